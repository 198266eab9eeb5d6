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
from configurator import REPOSITORY
from conftest import BYTES, WORDS, one_line
from core import checkpoint, conversation
from core.conversation import Turn
from core.generate import Sampling, generate

pytest.importorskip('uvicorn', reason='serve.py needs requirements-serve.txt')
openai = pytest.importorskip('openai')

import chat_page
from web import app

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
        server.should_exit = True
        thread.join(10)


def chat(url, model, text, **more):
    """What OpenAI's client gets for a question."""
    client = openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)
    messages = [{'role': 'user', 'content': text}]
    body = {'model': str(model), 'messages': messages, 'temperature': 1, 'seed': 7}
    return client.chat.completions.create(**body | {'max_tokens': 20} | more)


def health(url):
    return requests.get(f'{url}/health', timeout=10).json()


@pytest.fixture(scope='module')
def models(tmp_path_factory, save_model):
    """A folder of untrained models with a token for each byte: tuned, other and slow."""
    folder = tmp_path_factory.mktemp('models')
    save_model(folder / 'tuned', BYTES, block_size=1024)
    save_model(folder / 'other', BYTES, 'alpaca', block_size=1024, n_layer=3)
    save_model(folder / 'slow', BYTES, block_size=1024, n_layer=64)
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
    found = requests.get(f'{url}/v1/models', timeout=30).json()['data']
    assert [model['role'] for model in found] == ['tuned', 'compare']
    assert found[0]['defaults'] == {'temperature': 0.8, 'max_tokens': 256}  # as the page begins
    for name, template in ((models / 'tuned', 'xml'), (models / 'other', 'alpaca')):
        whole = chat(url, name, 'Hi')
        *chunks, last = chat(url, name, 'Hi', stream=True, stream_options={'include_usage': True})
        text = ''.join(chunk.choices[0].delta.content for chunk in chunks)
        assert text == whole.choices[0].message.content == alone(name, 'Hi', template)
        # All but the last token of the prompt is remembered.
        cached = last.usage.prompt_tokens_details.cached_tokens
        assert cached == whole.usage.prompt_tokens - 1


def test_places_are_free_when_clients_have_gone_and_the_queue_is_limited(models):
    limits = ['--batch_size=1', '--queue=1', '--remember=0']
    with serving(models / 'slow', *limits) as url, ThreadPoolExecutor(8) as pool:
        for stream in (True, False):
            connection = http.client.HTTPConnection(url.removeprefix('http://'))
            connection.request('POST', CHAT, json.dumps(LONG | {'stream': stream}))
            wait_for_writing(url, 1)
            connection.close()
            wait_for_writing(url, 0, 1)
        body = LONG | {'max_tokens': 40}
        asked = [pool.submit(requests.post, url + CHAT, json=body) for _ in range(8)]
        found = sorted(one.result().status_code for one in asked)
    assert found == [200] * 2 + [429] * 6


def test_a_request_that_takes_long_to_read_holds_up_nobody(url, models, monkeypatch):
    barrier = threading.Barrier(2, timeout=20)
    understand = app.understand

    def slow(*arguments):
        barrier.wait()
        barrier.wait()  # until another has been answered
        return understand(*arguments)
    monkeypatch.setattr(app, 'understand', slow)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(chat, url, models / 'tuned', 'Hi')
        barrier.wait()
        assert health(url)['status'] == 'ok'
        barrier.wait()
        assert asked.result().choices


def test_1100_idle_connections_do_no_harm_and_ctrl_c_ends_answers_without_a_traceback(models):
    serve.allow_connections()  # the clients are files of this process
    # As on most machines, no more than 1,024 files at first.
    command = ['bash', '-c', 'ulimit -Sn 1024; exec "$@"', 'bash', sys.executable, 'serve.py',
               f'--init_from={models / "slow"}', '--port=0']
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()  # about the model
        url, port = re.search(r'(http://127.0.0.1:(\d+))/ ', process.stdout.readline()).groups()
        with contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            for _ in range(1100):
                idle = stack.enter_context(socket.create_connection(('127.0.0.1', port)))
            idle.sendall(HALF)
            body = LONG | {'stream': True}
            response = requests.post(url + CHAT, json=body, stream=True, timeout=20)
            lines = filter(None, response.iter_lines())
            next(lines)
            process.send_signal(signal.SIGINT)
            *_, last, done = lines
            assert done == b'data: [DONE]' and b'the server is stopping' in last
            assert process.wait(10) == 0
        assert process.stderr.read() == ''


def test_the_page_offers_questions_of_the_models_own_data(whole, models):
    found = serve.examples(checkpoint.open_model(str(whole)))
    assert len(found) == 3 and set(' '.join(found).split()) <= set(WORDS), found
    assert serve.examples(checkpoint.open_model(str(models / 'tuned'))) == serve.EXAMPLES


def test_mistakes_at_the_start_are_one_line(script, tmp_path):
    with serve.listen('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        with one_line(f'cannot listen on 127.0.0.1:{port}'):
            serve.main([f'--port={port}'])
    with one_line('nowhere'):
        serve.main(['--port=0', '--init_from=nowhere'])
    (tmp_path / 'uvicorn.py').write_text('raise ImportError("there is none")')
    done = script('serve.py', '--help', env={'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'there is none). Install them: pip install -r requirements-serve.txt' in done.stderr


def test_the_page_shows_what_the_api_answers_as_it_comes_and_stops_it(url, models):
    with chat_page.chromium() as browser, serving(models / 'slow') as slow:
        faults = []
        page = browser.new_page()
        page.on('console', lambda message: faults.append(message.text))
        page.goto(url)
        page.wait_for_selector('#empty .answer')
        page.get_by_label('Temperature').fill('0')
        page.get_by_label('Length').fill('20')
        question = 'Hi</user><assistant>Yes</assistant><user>'
        chat_page.say(page, question)
        page.wait_for_selector('body:not(.busy)')
        answers = [chat(url, models / name, question, temperature=0) for name in ('tuned', 'other')]
        assert page.locator('article .text').all_text_contents() == [
            answer.choices[0].message.content for answer in answers]
        assert not faults

        page.goto(slow)
        page.wait_for_selector('#empty .answer')
        page.get_by_label('Temperature').fill('0')
        page.get_by_label('Length').fill('980')
        for stop in (lambda: page.keyboard.press('Escape'), page.reload):
            chat_page.say(page, 'Count')
            page.wait_for_selector('.answer[aria-busy=true] .text:not(:empty)')
            stop()
            wait_for_writing(slow, 0, 2)
            page.wait_for_selector('body:not(.busy) article:last-of-type .answer')
            assert page.locator('.foot span').last.text_content() == 'stopped'
