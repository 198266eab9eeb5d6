"""Models by their hub names, from a small server on 127.0.0.1 that speaks the hub's protocol."""
import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def hub(tmp_path):
    """Serves tmp_path/hub/NAME/FILE as the hub does; returns (its address, the folder, the paths asked for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append((self.command, self.path))
            path = tmp_path / 'hub' / self.path.lstrip('/').replace('resolve/main/', '').replace(f'resolve/{"c" * 40}/', '')
            if not path.is_file():
                self.send_response(404)
                self.send_header('X-Error-Code', 'EntryNotFound')
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            data = path.read_bytes()
            digest = hashlib.sha256(data if not (path.parent / 'lie').exists() or path.suffix == '.json' else b'lie').hexdigest()
            self.send_response(200)
            self.send_header('ETag', f'"{digest}"')
            self.send_header('X-Repo-Commit', 'c' * 40)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', tmp_path / 'hub', asked
    server.shutdown()


def sample(address, tmp_path, name):
    env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '127.0.0.1'}
    env.pop('HF_HUB_OFFLINE', None)
    return subprocess.run([sys.executable, os.path.join(ROOT, 'sample.py'), f'--init_from={name}', '--start=Hi', '--device=cpu',
                           '--max_new_tokens=2'], capture_output=True, text=True, env=env, timeout=120)


def model_folder(folder, pickled=False):
    import torch
    import transformers
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16))
    model.save_pretrained(folder)
    if pickled:
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
        (folder / 'model.safetensors').unlink()


@pytest.mark.parametrize('name, pickled', [('distilgpt2', False), ('microsoft/DialoGPT-small', True)])
def test_a_model_is_downloaded_once_and_then_opened_from_the_cache(hub, tmp_path, gpt2, name, pickled):
    address, folder, asked = hub
    model_folder(folder / name, pickled)
    done = sample(address, tmp_path, name)
    assert done.returncode == 0 and done.stdout.startswith('Hi'), done.stderr
    n_asked = len(asked)
    assert n_asked and all('/resolve/' in path for _, path in asked), asked  # and nothing else
    assert sample(address, tmp_path, name).stdout == done.stdout
    assert asked[n_asked:] == []


def test_a_file_that_is_not_what_the_hub_announced_is_deleted(hub, tmp_path, gpt2):
    address, folder, _ = hub
    model_folder(folder / 'gpt2')
    (folder / 'gpt2' / 'lie').touch()
    done = sample(address, tmp_path, 'gpt2')
    assert done.returncode == 2 and 'arrived with sha256' in done.stderr.strip().split('\n')[-1], done.stderr
    assert 'Traceback' not in done.stderr
