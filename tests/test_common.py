"""data/common.py: downloads that break, sources in every form, workers, and a new data set."""
import csv
import gzip
import hashlib
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from configurator import UserError
from conftest import ROOT, read_back
from core import tokenfile
from data import common

DATA = bytes(range(256)) * 16_384  # 4 MB
PINS = {'it': {'url': None, 'sha256': hashlib.sha256(DATA).hexdigest(), 'licence': 'MIT'}}


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get(status, body): the Source that is downloaded from a server that answers with these.

    get.ranges: where each request began.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers['Range'][6:-1])
            get.ranges.append(start)
            status, body = get.answer
            length = len(body)
            if status == 206:
                body = body[start:]
                length = len(DATA) - start  # if the body is shorter, the connection breaks
            self.send_response(status)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv('no_proxy', '*')
    pin = PINS['it'] | {'url': f'http://127.0.0.1:{server.server_port}/file.gz'}

    def get(*answer):
        get.answer = answer
        config = SimpleNamespace(input='', source='it')
        return common.Source(config, {'it': pin}, str(tmp_path))
    get.ranges = []
    yield get
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('status', [206, 200])
def test_a_download_is_continued_by_the_next_run(get, tmp_path, status):
    with pytest.raises(UserError, match='could not download .* Run this again to go on'):
        get(206, DATA[:3 << 20])
    assert not (tmp_path / 'file.gz').exists()
    source = get(status, DATA)
    assert get.ranges[0] == 0 < get.ranges[1]
    assert source.about['name'] == 'it' and (tmp_path / 'file.gz').read_bytes() == DATA
    get(status, DATA)  # it is not fetched again
    assert len(get.ranges) == 2 and os.listdir(tmp_path) == ['file.gz']


@pytest.mark.parametrize('status, body, said', [
    (404, b'', '404.* put the file at .*/file.gz yourself'),
    (200, b'<html>log in first</html>', 'file.gz is not the published file: .* Delete it')])
def test_a_download_that_fails_is_one_line(get, status, body, said):
    with pytest.raises(UserError, match=said) as error:
        get(status, body)
    assert '\n' not in str(error.value)


def open_source(path, data):
    path.write_bytes(data)
    return common.Source(SimpleNamespace(input=str(path), source='it'), PINS, '')


def test_a_published_file_is_recognised_by_its_hash(tmp_path, capsys):
    about = open_source(tmp_path / 'renamed', DATA).about
    assert about == {'name': 'it', 'bytes': len(DATA), **PINS['it']}
    assert 'it: licence MIT' in capsys.readouterr().err
    about = open_source(tmp_path / 'own', b'x').about
    assert about['name'] == 'own' and about['bytes'] == 1 and about['licence'] is None


ROWS = [{'n': i, 'text': 'é🙂\n"],['} for i in range(300)]
LINES = [json.dumps(row).encode() for row in ROWS]
ARRAY = json.dumps(ROWS).encode()
BOM = b'\xef\xbb\xbf'


@pytest.mark.parametrize('data', [
    b'\r\n'.join(LINES) + b'\r\n', BOM + b'\n \n\n'.join(LINES), ARRAY, BOM + b' \n' + ARRAY,
    json.dumps(ROWS, indent=4, ensure_ascii=False).encode()])
@pytest.mark.parametrize('compress', [bytes, gzip.compress])
def test_lines_and_arrays_give_the_same_records(tmp_path, data, compress):
    source = open_source(tmp_path / 'rows', compress(data))
    assert list(source.records(dict)) == ROWS and not source.broken


@pytest.mark.parametrize('bad, why', [
    (b'{"n":', 'Expecting value'), (b'[1, 2]', 'TypeError'), (b'{"n": "\xff"}', 'invalid start'),
    (b'{"n":' * 10_000, 'RecursionError'), (b'{"n": "refused"}', 'invalid literal for int')])
def test_up_to_one_broken_line_in_a_hundred_is_counted_and_named(tmp_path, capsys, bad, why):
    source = open_source(tmp_path / 'rows', b'\n'.join([*LINES[:150], bad, *LINES[150:]]))
    assert list(source.records(lambda record: int(record['n']))) == list(range(300))
    assert len(source.broken) == 1
    assert re.match(f'broken record 151: .*{why}', capsys.readouterr().err)
    source = open_source(tmp_path / 'rows', b'\n'.join([*LINES[:99], bad, bad]))
    with pytest.raises(UserError, match=f'2 of 101 records .* broken, .* record 100: .*{why}'):
        list(source.records(lambda record: int(record['n'])))


@pytest.mark.parametrize('data, why', [
    (ARRAY[:-9], 'Unterminated string'), (gzip.compress(ARRAY)[:-9], 'EOFError'),
    (gzip.compress(ARRAY) + b'rubbish', 'BadGzip')])
def test_a_file_that_cannot_be_read_to_its_end_is_one_line(tmp_path, data, why):
    with pytest.raises(UserError, match=f'rows cannot be read: .*{why}.* Expected JSON'):
        list(open_source(tmp_path / 'rows', data).records(dict))


def test_the_split_is_a_hash_that_stays_what_it_is():
    """With another one, a run resumed on data prepared anew would learn what it was tested on."""
    found = [common.split_by_hash(f'tree {i}', 1337, val=0.2, test=0.3) for i in range(12)]
    assert ' '.join(found) == 'test train test train test train test train val test train test'


SLOW = """
import os, time
from types import SimpleNamespace
from data import common

def encode(*_):
    os.write(1, b'at work\\n')
    time.sleep(0.001)
    raise ValueError

common.conversation.encode = encode
common.tokenizer.load = lambda *_: SimpleNamespace(encode=print)
config = SimpleNamespace(tokenizer='', template='xml', max_tokens=9, too_long='cut')
examples = [common.Example(i, 'train', []) for i in range(99_000)]
try:
    list(common.encode_all(examples, config, n_bytes=1 << 30))
except KeyboardInterrupt:
    print('stopped', flush=True)
"""


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_main_process(how):
    process = subprocess.Popen([sys.executable, '-c', SLOW], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    assert process.stdout.readline() == 'at work\n'
    if how == signal.SIGINT:
        time.sleep(0.5)
        os.killpg(process.pid, how)  # as Ctrl-C does, to all of them
    else:
        process.send_signal(how)
    # The workers hold the other ends of the pipes: these close when the last of them is gone.
    output, errors = process.communicate(timeout=60)
    assert errors == '' and ('stopped' in output) == (how == signal.SIGINT)


ELSEWHERE = """
import json, multiprocessing, sys
from data.alpaca import prepare

if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    with open('rows.json', 'w') as file:
        json.dump([{'instruction': f'{i}?', 'output': 'word ' * 50} for i in range(5000)], file)
    prepare.main(['--input=rows.json', '--out_dir=out', f'--tokenizer={sys.argv[1]}'])
"""


def test_workers_start_as_on_a_mac_too(tmp_path, vocabulary):
    """There, and with Python 3.14 on Linux, they are no forks: all that they need is pickled."""
    (tmp_path / 'script.py').write_text(ELSEWHERE)
    done = subprocess.run([sys.executable, 'script.py', vocabulary], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': ROOT})
    assert done.returncode == 0, done.stderr
    assert tokenfile.read_meta(str(tmp_path / 'out'))['kept'] == 5000


def test_the_script_in_the_readme_prepares_a_data_set(tmp_path, gpt2, capsys, monkeypatch):
    text = pathlib.Path(ROOT, 'data', 'README.md').read_text(encoding='utf-8')
    code, = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    pairs = [[f'What is {i}, "exactly"?', f'It is\n{i}.'] for i in range(100)]
    with open(tmp_path / 'questions.csv', 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerows([['question', 'answer'], *pairs, ['A long one?', 'word ' * 2000]])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    exec(code, {'__file__': str(tmp_path / 'prepare.py')})
    assert capsys.readouterr().out == '100 conversations; 1 were too long\n'
    train = read_back(tmp_path)
    val = read_back(tmp_path, 'val')
    assert 1 <= len(val) <= 12
    assert sorted([turn.text for turn in turns] for turns in train + val) == sorted(pairs)
