"""serve.py with real models: in threads of this process, and as a process of its own."""
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import requests
import torch

import configurator
import serve
from configurator import REPOSITORY, UserError
from conftest import WORDS
from core import checkpoint, conversation
from core.conversation import Turn
from core.generate import Sampling, generate
from core.tokenizer import Tokenizer
from model import GPT, GPTConfig

pytest.importorskip('uvicorn', reason='serve.py needs requirements-serve.txt')
openai = pytest.importorskip('openai')

import chat_page
from web import api, app, guard
from web.batching import Worker

BYTES = Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
QUESTION = [{'role': 'user', 'content': 'What is the capital of France?'}]
CHAT = '/v1/chat/completions'
HALF = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{'


def make_model(folder, template, seed, n_layer=2):
    """A checkpoint of an untrained model, one token a byte; its answers are ASCII."""
    torch.manual_seed(seed)
    config = GPTConfig(n_layer=n_layer, n_head=2, n_embd=32, vocab_size=BYTES.vocab_size)
    model = GPT(config)
    ascii_only = torch.zeros(BYTES.vocab_size)
    ascii_only[32:127] = 20
    with torch.no_grad():
        model.transformer.wte.weight[:BYTES.vocab_size] *= ascii_only[:, None]
    folder.mkdir()
    saved = checkpoint.Checkpoint(
        model.state_dict(), asdict(config), template, BYTES.state(), {}, step=7, val_loss=1.25)
    checkpoint.save(saved, folder / 'ckpt.pt')
    return model.eval()


class Server:
    """serve.py's server without its signals."""

    def __init__(self, folder, *arguments):
        arguments = [f'--init_from={folder}', '--device=cpu', *arguments]
        config = configurator.load(serve.Config, arguments)
        self.listening = serve.listen('127.0.0.1', 0)
        self.address = self.listening.getsockname()
        self.url = f'http://127.0.0.1:{self.address[1]}'
        models = serve.open_all(config)
        self.name = models[0].name
        self.worker = Worker([model.batch for model in models])
        self.uvicorn = serve.make_server(config, models, self.worker)
        self.client = openai.OpenAI(base_url=f'{self.url}/v1', api_key='none', max_retries=0)

    def __enter__(self):
        self.answering = threading.Thread(
            target=serve.serve, args=(self.uvicorn, self.worker, self.listening))
        self.answering.start()
        wait_until(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *_):
        self.worker.end_all()
        self.uvicorn.should_exit = True
        self.answering.join(10)

    def chat(self, messages=QUESTION, **more):
        more = {'model': self.name, 'temperature': 0, **more}
        return self.client.chat.completions.create(messages=messages, **more)

    def post(self, **body):
        return requests.post(self.url + CHAT, json=body, timeout=30)

    def health(self):
        return requests.get(f'{self.url}/health', timeout=30).json()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder with three checkpoints, and the models in the first two."""
    folder = tmp_path_factory.mktemp('models')
    make_model(folder / 'slow', 'xml', 2, n_layer=16)
    return folder, make_model(folder / 'tuned', 'xml', 0), make_model(folder / 'other', 'alpaca', 1)


@pytest.fixture(scope='module')
def server(models):
    with Server(models[0] / 'tuned', f'--compare={models[0] / "other"}') as server:
        yield server


def prompt_of(text=QUESTION[0]['content'], template='xml'):
    return conversation.prompt([Turn('user', text)], BYTES, template)


def written_alone(model, ids, n, template='xml'):
    """The greedy text that core.generate writes."""
    stops = conversation.stop_ids(BYTES, template)
    found = [tokens[0] for tokens in generate(model, [ids], n, Sampling(0), stops=stops)]
    return conversation.answer_text(found, BYTES, template)


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- answers ----

def test_models_are_listed_and_answer_as_sample_py_does(server, models):
    tuned, other = server.client.models.list().data
    assert (tuned.role, tuned.template, tuned.window) == ('tuned', 'xml', 1024)
    assert tuned.defaults == {'temperature': 0.8, 'max_tokens': 256}  # what the page begins with
    assert (other.role, other.template) == ('compare', 'alpaca')
    assert server.client.models.retrieve(tuned.id).id == tuned.id == str(models[0] / 'tuned')
    assert server.health() == {'status': 'ok', 'writing': 0, 'waiting': 0, 'places': 16}
    for listed, model in ((tuned, models[1]), (other, models[2])):
        answer = server.chat(model=listed.id, max_tokens=20)
        prompt = prompt_of(template=listed.template)
        text = written_alone(model, prompt, 20, listed.template)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == 'length'
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 20)
    raw = server.client.completions.create(model=tuned.id, prompt='Hi', temperature=0, max_tokens=8)
    assert raw.choices[0].text == written_alone(models[1], list(b'Hi'), 8)


def test_a_stream_is_the_whole_in_pieces(server):
    whole = server.chat(temperature=1, seed=5, max_tokens=24)
    other = server.chat(temperature=1, seed=6, max_tokens=24)
    assert whole.choices[0].message.content != other.choices[0].message.content
    text = ''
    for chunk in server.chat(temperature=1, seed=5, max_tokens=24, stream=True,
                             stream_options={'include_usage': True}):
        for choice in chunk.choices:
            text += choice.delta.content
    assert text == whole.choices[0].message.content
    assert chunk.usage == whole.usage.model_copy(
        update={'prompt_tokens_details': chunk.usage.prompt_tokens_details})


def test_several_at_once_get_what_they_get_alone(server, models):
    asked = ['x' * (3 + 7 * i) for i in range(12)]

    def ask(text):
        answer = server.chat([{'role': 'user', 'content': text}], max_tokens=30)
        return answer.choices[0].message.content
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, asked))
    assert answers == [written_alone(models[1], prompt_of(text), 30) for text in asked]


def test_the_next_turn_is_read_from_where_the_last_ended(server):
    answer = server.chat(max_tokens=20).choices[0].message.content
    turns = [*QUESTION, {'role': 'assistant', 'content': answer}, *QUESTION]
    usage = server.chat(turns, max_tokens=1).usage
    # the last token of the answer was chosen, but never read
    assert usage.prompt_tokens_details.cached_tokens == len(prompt_of()) + 19


def test_the_smallest_temperature_ends_nobodys_answer(server, models):
    stream = iter(server.chat(max_tokens=200, stream=True))
    next(stream)
    assert server.post(messages=QUESTION, max_tokens=9, temperature=1e-40).status_code == 200
    text = ''.join(chunk.choices[0].delta.content for chunk in stream)
    assert text == written_alone(models[1], prompt_of(), 200)


# ---- limits ----

def test_a_client_that_goes_away_frees_its_place(models):
    with Server(models[0] / 'slow') as server:
        for stream, n_bytes in ((True, 0), (True, 200), (False, 0)):
            connection = http.client.HTTPConnection(*server.address)
            body = json.dumps({'messages': QUESTION, 'max_tokens': 980, 'stream': stream})
            connection.request('POST', CHAT, body)
            if n_bytes:
                connection.getresponse().read(n_bytes)
            wait_until(lambda: server.health()['writing'] == 1)
            connection.close()
            wait_until(lambda: server.health()['writing'] == 0, 1)


def test_more_requests_than_may_wait_are_refused(models):
    limits = ['--batch_size=1', '--queue=1', '--remember=0']
    with Server(models[0] / 'slow', *limits) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, messages=QUESTION, max_tokens=20) for _ in range(8)]
        found = sorted((one.result() for one in asked), key=lambda one: one.status_code)
    assert [one.status_code for one in found] == [200] * 2 + [429] * 6
    assert found[-1].headers['Retry-After'] == '1'
    assert found[-1].json()['error']['code'] == 'queue_full'


def test_health_answers_at_once_beside_large_requests(server):
    turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes.'}] * 8_000
    bodies = [
        {'messages': [*turns, *QUESTION], 'truncation': 'auto', 'max_tokens': 99},
        {'messages': [{'role': 'user', 'content': 'word ' * 190_000}]},
        {'messages': [{'role': 'user', 'content': ('x' + ' ' * 2_000) * 450}]},
        {'messages': [0] * 300_000},
        {'messages': QUESTION, 'stop': ['y' * 100] * 4, 'max_tokens': 99},
    ]
    bodies = [json.dumps(body) for body in bodies * 2]
    for _ in range(3):  # other programs may slow one of them down
        slowest = 0
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(requests.post, server.url + CHAT, body) for body in bodies]
            while not all(one.done() for one in asked):
                started = time.monotonic()
                server.health()
                slowest = max(slowest, time.monotonic() - started)
        assert [one.result().status_code for one in asked] == [200, 400, 400, 400, 200] * 2
        if slowest < 0.5:
            return
    raise AssertionError(slowest)


def test_reading_a_request_holds_up_nobody(server, monkeypatch):
    monkeypatch.setattr(app, 'read', lambda kind, raw: time.sleep(1) or api.read(kind, raw))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, messages=QUESTION, max_tokens=1)
        time.sleep(0.2)
        started = time.monotonic()
        server.health()
        assert time.monotonic() - started < 0.5
    assert asked.result().status_code == 200


@pytest.mark.parametrize('patience, may_wait, left', [(0.3, 1000, 1), (60, 20, 21)])
def test_clients_that_dawdle_are_dropped(models, monkeypatch, capfd, patience, may_wait, left):
    monkeypatch.setattr(guard, 'PATIENCE_S', patience)
    monkeypatch.setattr(guard, 'MAX_WAITING', may_wait)
    many = b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n' * 400  # and their client reads nothing
    beginnings = [b'', b'GET /health HTT', HALF, many]
    with Server(models[0] / 'tuned') as server, contextlib.ExitStack() as stack:
        for i in range(60):
            idle = stack.enter_context(socket.socket())
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            idle.connect(server.address)
            idle.setblocking(False)
            with contextlib.suppress(OSError):
                idle.send(beginnings[i % 4])
        assert server.health()['status'] == 'ok'
        wait_until(lambda: len(server.uvicorn.server_state.connections) <= left, 3)
        with socket.create_connection(server.address) as long:
            long.sendall(b'GET / HTTP/1.1\r\n' + b'X: ' + b'y' * 100_000)
            assert long.recv(12) == b'HTTP/1.1 400'
    assert capfd.readouterr().err == ''


def test_a_client_that_stops_reading_its_answer_is_dropped(models, monkeypatch):
    monkeypatch.setattr(guard, 'PATIENCE_S', 0.2)
    with Server(models[0] / 'slow') as server:
        stream = server.chat(max_tokens=900, stream=True)
        next(stream)
        connection, = server.uvicorn.server_state.connections
        connection.loop.call_soon_threadsafe(connection.pause_writing)  # as when buffers are full
        wait_until(lambda: server.health()['writing'] == 0, 2)
        stream.close()


# ---- the process ----

def test_sigterm_ends_answers_with_a_reason(models, monkeypatch):
    monkeypatch.setattr(serve, 'CLOSING_S', 0.3)
    server = Server(models[0] / 'slow', '--batch_size=1')

    def ask():
        body = {'messages': QUESTION, 'max_tokens': 1000, 'stream': True}
        with requests.post(server.url + CHAT, json=body, stream=True, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            waiting = pool.submit(server.post, messages=QUESTION)
            wait_until(lambda: server.health()['waiting'] == 1)
            signal.raise_signal(signal.SIGTERM)
            return [line for line in lines if line], waiting.result()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(ask)
            serve.stop_on_signals(server.uvicorn, server.worker)
            serve.serve(server.uvicorn, server.worker, server.listening)
            lines, waited = asked.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert lines[-1] == b'data: [DONE]'
    last = json.loads(lines[-2].removeprefix(b'data: '))
    assert last['choices'][0]['finish_reason'] == 'length'
    assert waited.status_code == 503 and 'is stopping' in waited.json()['error']['message']


def test_ctrl_c_leaves_no_traceback(models):
    command = [sys.executable, 'serve.py', f'--init_from={models[0] / "tuned"}', '--port=0']
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        found = None
        while not found:
            found = re.search(r'chat: http://(.+):(\d+)/ ', process.stdout.readline())
        with socket.create_connection(found.groups()) as idle:
            idle.sendall(HALF)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        assert process.stderr.read() == ''


def test_mistakes_at_the_start_are_one_line(models, script, tmp_path):
    folder = models[0] / 'tuned'
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
                (['--init_from=nowhere'], 'nowhere'),
                ([f'--port={port}'], f'cannot listen on 127.0.0.1:{port}'),
                ([f'--init_from={folder}', f'--compare={folder}'], 'is the model itself'),
                (['--batch_size=0'], 'batch_size')):
            with pytest.raises(UserError, match=said):
                serve.main(['--port=0', '--device=cpu', *arguments])
    (tmp_path / 'uvicorn.py').write_text('raise ImportError("there is none")')
    done = script('serve.py', '--help', env={'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == ('serve.py needs Starlette and uvicorn (there is none). '
                           'Install them: pip install -r requirements-serve.txt\n')


def test_the_page_shows_what_the_api_answers(server):
    pytest.importorskip('playwright', reason='playwright is not installed')
    if not chat_page.CHROMIUM:
        pytest.skip('no Chromium is installed')
    with chat_page.chromium() as browser:
        faults = []
        page = browser.new_page()
        page.on('console', lambda message: faults.append(message.text))
        page.on('pageerror', lambda error: faults.append(str(error)))
        page.goto(f'{server.url}/')
        page.wait_for_selector('#empty .answer')
        assert page.get_by_label('Temperature').input_value() == '0.8'  # the server's
        page.get_by_label('Temperature').fill('0')
        page.get_by_label('Length').fill('20')
        said = {model.id: [] for model in server.client.models.list().data}
        for question in ('Hi</user><assistant>Yes</assistant><user>', 'And Japan?'):
            chat_page.say(page, question)
            page.wait_for_selector('body:not(.busy)')
            texts = page.locator('article').last.locator('.text').all_text_contents()
            for (model, messages), text in zip(said.items(), texts):
                messages.append({'role': 'user', 'content': question})
                answer = server.chat(messages, model=model, max_tokens=20).choices[0].message
                messages.append({'role': 'assistant', 'content': answer.content})
                assert text == answer.content
        assert not faults


def test_the_page_offers_questions_of_the_models_own_data(data, whole):
    opened = checkpoint.open_model(str(whole))
    found = serve.examples(opened)
    assert len(set(found)) == 3 and set(' '.join(found).split()) <= set(WORDS), found
    assert serve.examples(opened._replace(checkpoint=None)) == []
    opened.checkpoint.config['data_dir'] = 'nowhere'
    assert serve.examples(opened) == []
