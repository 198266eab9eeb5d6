"""Models by their hub names, from a small server on 127.0.0.1 that speaks the hub's protocol."""
import hashlib
import http.server
import json
import os
import threading
import time

import pytest
import torch

from conftest import one_line
from core import checkpoint

hub = pytest.importorskip('huggingface_hub')
transformers = pytest.importorskip('transformers')

SHA = 'c' * 40  # of the commit that the server has


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.folder/NAME/FILE as the hub does, and notes what was asked for."""

    def do_GET(self):
        path = self.path.split('?')[0].strip('/').removeprefix('api/models/')
        self.server.asked.append(path)
        at = self.server.folder / path.replace(f'/resolve/{SHA}', '').replace(f'/tree/{SHA}', '')
        self.send_response(200)
        if path.endswith('/revision/main'):
            data = json.dumps({'id': 'x', 'sha': SHA}).encode()
        elif at.is_dir():
            data = json.dumps([
                {'type': 'file', 'path': file.name, 'size': file.stat().st_size, 'oid': 'f' * 40}
                for file in at.iterdir()]).encode()
        else:
            data = at.read_bytes()
            announced = b'something else' if at.name == self.server.damaged else data
            self.send_header('ETag', hashlib.sha256(announced).hexdigest())
        self.send_header('X-Repo-Commit', SHA)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(data)

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server: .folder to put models in, .asked paths, .damaged: the name of a file."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.folder = tmp_path / 'hub'
    server.asked = []
    server.damaged = None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.address = address = f'http://127.0.0.1:{server.server_port}'
    for name, value in {
            'ENDPOINT': address,
            'HUGGINGFACE_CO_URL_TEMPLATE': address + '/{repo_id}/resolve/{revision}/{filename}',
            'HF_HUB_CACHE': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': False,
            'HF_HUB_DISABLE_TELEMETRY': True}.items():
        monkeypatch.setattr(hub.constants, name, value)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    yield server
    close(server)


def close(server):
    server.shutdown()
    server.server_close()


def save_model(folder):
    """A tiny random GPT-2."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize('name', ['distilgpt2', 'microsoft/DialoGPT-small'])
def test_a_model_is_downloaded_once_and_then_opened_without_network(server, gpt2, name):
    """Of safetensors and pickled weights only the former are fetched, if there are both."""
    folder = server.folder / name
    model = save_model(folder)
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    if '/' in name:
        (folder / 'model.safetensors').unlink()
    checkpoint.open_model(name)
    assert ('/pytorch_model.bin' in str(server.asked)) == ('/' in name)
    close(server)
    opened = checkpoint.open_model(name)
    wte = opened.model.transformer.wte.weight[:50257]
    assert torch.equal(wte, model.transformer.wte.weight)
    assert opened.tokenizer.sha256 == gpt2.sha256 and opened.description == name


def test_sample_asks_for_files_of_the_model_and_nothing_else(server, tmp_path, gpt2, script):
    save_model(server.folder / 'distilgpt2')
    env = os.environ | {'HF_ENDPOINT': server.address, 'HF_HOME': str(tmp_path / 'home')}
    done = script('sample.py', '--init_from=distilgpt2', '--start=Hi', '--device=cpu',
                  '--max_new_tokens=2', env=env)
    assert done.returncode == 0 and done.stdout.startswith('Hi'), done.stderr
    assert all('distilgpt2' in path for path in server.asked), server.asked


def test_another_architecture_is_refused_before_its_weights_are_asked_for(server):
    folder = server.folder / 'meta' / 'llama'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    (folder / 'model.safetensors').write_bytes(b'weights')
    with one_line("model_type='llama'; this code computes GPT-2s"):
        checkpoint.open_model('meta/llama')
    assert 'config.json' in str(server.asked) and 'model.safetensors' not in str(server.asked)


def test_a_file_that_is_not_what_the_hub_announced_is_deleted(server, gpt2):
    save_model(server.folder / 'gpt2')
    server.damaged = 'model.safetensors'
    for _ in range(2):  # it is not left in the cache
        with one_line('model.safetensors has sha256 .* It was deleted'):
            checkpoint.open_model('gpt2')
    server.damaged = None
    checkpoint.open_model('gpt2')


def test_without_network_it_ends_in_a_line_within_seconds(server):
    close(server)
    started = time.monotonic()
    with one_line('gpt2 is not a folder here.*the network'):
        checkpoint.open_model('gpt2')
    assert time.monotonic() - started < 8
