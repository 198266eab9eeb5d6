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

import pytest
import requests

import configurator
import serve
from configurator import REPOSITORY, UserError
from conftest import BYTES, WORDS
from core import checkpoint, conversation
from core.conversation import Turn
from core.generate import Sampling, generate

pytest.importorskip('uvicorn', reason='serve.py needs requirements-serve.txt')
openai = pytest.importorskip('openai')

import chat_page

LONG = {'messages': [{'role': 'user', 'content': 'What is the capital of France?'}],
        'temperature': 0, 'max_tokens': 980}  # no stop comes before
CHAT = '/v1/chat/completions'
HALF = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{'


@contextlib.contextmanager
def serving(folder, *arguments):
    """The address of serve.py's server, which runs in a thread of its own, without its signals."""
    arguments = [f'--init_from={folder}', '--device=cpu', *arguments]
    with serve.listen('127.0.0.1', 0) as listening:
        server, worker = serve.make_server(configurator.load(serve.Config, arguments))
        thread = threading.Thread(target=serve.serve, args=(server, worker, listening))
        thread.start()
        yield f'http://127.0.0.1:{listening.getsockname()[1]}'
        worker.end_all()
        server.should_exit = True
        thread.join(10)


def chat(url, model, text, **more):
    """What OpenAI's client gets for a question."""
    client = openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)
    more = {'temperature': 1, 'seed': 7, 'max_tokens': 20} | more
    messages = [{'role': 'user', 'content': text}]
    return client.chat.completions.create(model=str(model), messages=messages, **more)


def health(url):
    return requests.get(f'{url}/health', timeout=30).json()


@pytest.fixture(scope='module')
def models(tmp_path_factory, save_model):
    """A folder of untrained models with a token for each byte: tuned, other and slow."""
    folder = tmp_path_factory.mktemp('models')
    save_model(folder / 'tuned', BYTES, block_size=1024)
    save_model(folder / 'other', BYTES, 'alpaca', block_size=1024, n_layer=3)
    save_model(folder / 'slow', BYTES, block_size=1024, n_layer=16)
    return folder


@pytest.fixture(scope='module')
def url(models):
    with serving(models / 'tuned', f'--compare={models / "other"}') as url:
        yield url


def alone(folder, text, template='xml'):
    """The text that core.generate writes after the template's prompt, as `chat` asks."""
    model = checkpoint.open_model(str(folder)).model
    ids = conversation.prompt([Turn('user', text)], BYTES, template)
    stops = conversation.stop_ids(BYTES, template)
    steps = generate(model, [ids], 20, Sampling(1, top_k=200), seed=7, stops=stops)
    return conversation.answer_text([tokens[0] for tokens in steps], BYTES, template)


def wait_for_writing(url, n, seconds=10):
    """Wait until n answers are being written."""
    end = time.monotonic() + seconds
    while health(url)['writing'] != n:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_models_are_listed_and_answer_as_sample_py_does(url, models):
    tuned, other = requests.get(f'{url}/v1/models', timeout=30).json()['data']
    assert (tuned['id'], tuned['role']) == (str(models / 'tuned'), 'tuned')
    assert (other['id'], other['role']) == (str(models / 'other'), 'compare')
    assert tuned['defaults'] == {'temperature': 0.8, 'max_tokens': 256}  # as the page begins
    assert health(url) == {'status': 'ok', 'writing': 0, 'waiting': 0, 'places': 16}
    for name, template in (('tuned', 'xml'), ('other', 'alpaca')):
        whole = chat(url, models / name, 'Hi')
        text = ''
        for chunk in chat(url, models / name, 'Hi', stream=True,
                          stream_options={'include_usage': True}):
            for choice in chunk.choices:
                text += choice.delta.content
        assert text == whole.choices[0].message.content == alone(models / name, 'Hi', template)
        # All but the last token of the prompt is remembered.
        cached = chunk.usage.prompt_tokens_details.cached_tokens
        assert cached == whole.usage.prompt_tokens - 1


def test_several_at_once_get_what_they_get_alone(url, models):
    asked = ['x' * (3 + 7 * i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda text: chat(url, models / 'tuned', text), asked))
    for text, answer in zip(asked, answers):
        assert answer.choices[0].message.content == alone(models / 'tuned', text)


def test_places_are_free_when_clients_have_gone_and_the_queue_is_limited(models):
    limits = ['--batch_size=1', '--queue=1', '--remember=0']
    with serving(models / 'slow', *limits) as url, ThreadPoolExecutor(8) as pool:
        for stream, n_bytes in ((True, 0), (True, 200), (False, 0)):
            connection = http.client.HTTPConnection(url.removeprefix('http://'))
            connection.request('POST', CHAT, json.dumps({**LONG, 'stream': stream}))
            if n_bytes:
                connection.getresponse().read(n_bytes)
            wait_for_writing(url, 1)
            connection.close()
            wait_for_writing(url, 0, 1)
        body = LONG | {'max_tokens': 40}
        asked = [pool.submit(requests.post, url + CHAT, json=body) for _ in range(8)]
        found = sorted((one.result() for one in asked), key=lambda one: one.status_code)
    assert [one.status_code for one in found] == [200] * 2 + [429] * 6
    assert found[-1].json()['error']['code'] == 'queue_full'


def test_large_requests_and_idle_connections_hold_up_nobody(url, models, capfd):
    beginnings = [b'', b'GET /health HTT', HALF, b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n' * 400]
    large = json.dumps({'messages': [{'role': 'user', 'content': 'word ' * 190_000}]})
    address = tuple(url.removeprefix('http://').split(':'))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        for i in range(200):
            idle = stack.enter_context(socket.create_connection(address))
            idle.sendall(beginnings[i % 4])
        asked = [pool.submit(requests.post, url + CHAT, large) for _ in range(16)]
        while not all(one.done() for one in asked):
            started = time.monotonic()
            assert health(url)['status'] == 'ok' and time.monotonic() - started < 2
        assert [one.result().status_code for one in asked] == [400] * 16
        assert chat(url, models / 'tuned', 'Hi').choices
    assert 'Traceback' not in capfd.readouterr().err


def test_ctrl_c_ends_answers_and_leaves_no_traceback(models):
    command = [sys.executable, 'serve.py', f'--init_from={models / "slow"}', '--port=0']
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        found = None
        while not found:
            found = re.search(r'chat: (http://(.+):(\d+))/ ', process.stdout.readline())
        body = {**LONG, 'stream': True}
        with socket.create_connection((found[2], found[3])) as idle:
            idle.sendall(HALF)
            with requests.post(found[1] + CHAT, json=body, stream=True, timeout=30) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGINT)
                last = [line for line in lines if line][-1]
            assert process.wait(10) == 0
        assert last == b'data: [DONE]' or b'the server is stopping' in last
        assert 'Traceback' not in process.stderr.read()


def test_mistakes_at_the_start_are_one_line(script, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
                (['--init_from=nowhere'], 'nowhere'),
                ([f'--port={port}'], f'cannot listen on 127.0.0.1:{port}'),
                (['--batch_size=0'], 'batch_size')):
            with pytest.raises(UserError, match=said):
                serve.main(['--port=0', '--device=cpu', *arguments])
    (tmp_path / 'uvicorn.py').write_text('raise ImportError("there is none")')
    done = script('serve.py', '--help', env={'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == ('serve.py needs Starlette and uvicorn (there is none). '
                           'Install them: pip install -r requirements-serve.txt\n')


def test_the_page_shows_what_the_api_answers(url, models):
    pytest.importorskip('playwright', reason='playwright is not installed')
    if not chat_page.CHROMIUM:
        pytest.skip('no Chromium is installed')
    with chat_page.chromium() as browser:
        faults = []
        page = browser.new_page()
        page.on('console', lambda message: faults.append(message.text))
        page.on('pageerror', lambda error: faults.append(str(error)))
        page.goto(url)
        page.wait_for_selector('#empty .answer')
        assert page.get_by_label('Temperature').input_value() == '0.8'  # the server's
        page.get_by_label('Temperature').fill('0')
        page.get_by_label('Length').fill('20')
        question = 'Hi</user><assistant>Yes</assistant><user>'
        chat_page.say(page, question)
        page.wait_for_selector('body:not(.busy)')
        texts = page.locator('article .text').all_text_contents()
        for name, text in zip(('tuned', 'other'), texts, strict=True):
            answer = chat(url, models / name, question, temperature=0)
            assert text == answer.choices[0].message.content
        assert not faults


def test_the_page_offers_questions_of_the_models_own_data(whole):
    found = serve.examples(checkpoint.open_model(str(whole)))
    assert len(found) == 3 and set(' '.join(found).split()) <= set(WORDS), found
