"""data/common.py: downloads that break, sources in every form, workers, and a new data set."""
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from configurator import UserError
from conftest import ROOT
from core import conversation, files, readback, tokenfile
from data import common

DATA = bytes(range(256)) * 4000  # 1 MB
CUT = 4 << 16  # bytes after which a connection breaks: a whole number of blocks
PINS = {'it': {'url': None, 'sha256': hashlib.sha256(DATA).hexdigest(), 'licence': 'MIT'}}


# ---- downloads, from a server that misbehaves ----

def send(status, body=b'', **headers):
    """An answer of the server."""
    def answer(request):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace('_', '-'), value)
        request.end_headers()
        request.wfile.write(body)
    return answer


def send_part(n):
    """An answer that announces all that was asked for and breaks off after n bytes."""
    def answer(request):
        start = int(request.headers['Range'][6:-1])
        body = DATA[start:start + n]
        if start < len(DATA):
            send(206, body, Content_Length=len(DATA) - start)(request)
        else:
            send(416)(request)
    return answer


rest = send_part(len(DATA))
cut = send_part(CUT)
all_of_it = send(200, DATA, Content_Length=len(DATA))
busy = send(503, b'sorry', Content_Length=5)


def silent(request):
    time.sleep(0.5)


def redirect(where):
    return send(302, Location=where, Content_Length=0)


def garbage(data):
    return lambda request: request.wfile.write(data)


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get(*answers): the Source that is downloaded from a server with these answers.

    The last answer is for all further requests. get.ranges: where each request began.
    """
    ranges = []
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(int(self.headers['Range'][6:-1]))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(common, 'PAUSES_S', (0,) * 5)
    monkeypatch.setattr(common, 'SILENCE_S', 0.2)
    pin = PINS['it'] | {'url': f'http://127.0.0.1:{server.server_port}/file.gz'}

    def get(*new):
        answers[:] = new
        config = SimpleNamespace(input='', source='it')
        return common.Source(config, {'it': pin}, str(tmp_path))
    get.ranges = ranges
    yield get
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('answers, ranges', [
    ([rest], [0]), ([all_of_it], [0]), ([send(200, DATA)], [0]),
    ([cut, cut, rest], [0, CUT, 2 * CUT]), ([cut, all_of_it], [0, CUT]),
    ([cut, silent, rest], [0, CUT, CUT]), ([busy, send(500), send(429), rest], [0, 0, 0, 0]),
    ([redirect('/elsewhere'), rest], [0, 0]), ([garbage(b''), garbage(b'HTTP'), rest], [0, 0, 0]),
    ([garbage(b'HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n'), rest], [0, 0]),
    ([garbage(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n'), rest], [0, 0])])
def test_a_download_arrives_in_the_end(get, tmp_path, answers, ranges):
    source = get(*answers)
    assert (tmp_path / 'file.gz').read_bytes() == DATA and get.ranges == ranges
    assert source.about['name'] == 'it' and source.about['bytes'] == len(DATA)
    assert 'file.gz.part' not in os.listdir(tmp_path)
    assert get(rest).path == source.path and get.ranges == ranges  # it is not fetched again


@pytest.mark.parametrize('answer', [
    send(404), busy, garbage(b'\0' * 100), redirect('/file.gz'), redirect('http://['),
    redirect('file:///etc/hostname'), redirect('data:,x')])
def test_a_download_that_fails_is_one_line(get, tmp_path, answer):
    with pytest.raises(UserError) as error:
        get(answer)
    line = str(error.value)
    assert '\n' not in line and f'Put the file at {tmp_path / "file.gz"} yourself' in line
    assert not (tmp_path / 'file.gz').exists()


def test_what_an_earlier_run_left_is_continued(get, tmp_path):
    with pytest.raises(UserError, match='could not download'):
        get(cut, busy)
    get.ranges.clear()
    get(rest)
    assert get.ranges == [CUT]
    os.rename(tmp_path / 'file.gz', tmp_path / 'file.gz.part')  # it was killed before the renaming
    get(rest)
    assert (tmp_path / 'file.gz').read_bytes() == DATA


def test_pauses_grow(get, monkeypatch):
    pauses = []
    monkeypatch.undo()
    monkeypatch.setattr(time, 'sleep', pauses.append)
    with pytest.raises(UserError):
        get(busy)
    assert pauses == [0, 1, 2, 4, 8]


@pytest.mark.parametrize('wrong', [b'<html>log in first</html>', bytes(len(DATA)), b''])
def test_another_file_than_the_published_one_is_refused(get, tmp_path, wrong):
    for _ in range(2):
        with pytest.raises(UserError, match='file.gz is not the published file: .* Delete it'):
            get(send(200, wrong, Content_Length=len(wrong)))
    assert get.ranges == [0] and (tmp_path / 'file.gz').read_bytes() == wrong


def test_a_full_disk_is_one_line(get):
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match='File too large'):
            get(rest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- sources ----

def open_source(path, data=None):
    if data is not None:
        path.write_bytes(data)
    return common.Source(SimpleNamespace(input=str(path), source='it'), PINS, '')


def test_a_published_file_is_recognised_by_its_hash(tmp_path, capsys):
    about = open_source(tmp_path / 'renamed', DATA).about
    assert about == {'name': 'it', 'bytes': len(DATA), **PINS['it']}
    assert 'it: licence MIT' in capsys.readouterr().err
    about = open_source(tmp_path / 'own', b'x').about
    sha256 = hashlib.sha256(b'x').hexdigest()
    assert about == {'name': 'own', 'url': None, 'licence': None, 'bytes': 1, 'sha256': sha256}


ROWS = [{'n': i, 'text': 'é🙂\n"],['} for i in range(300)]
LINES = [json.dumps(row).encode() for row in ROWS]
ARRAY = json.dumps(ROWS).encode()
BOM = b'\xef\xbb\xbf'


@pytest.mark.parametrize('data', [
    b'\n'.join(LINES), b'\r\n'.join(LINES) + b'\r\n', BOM + b'\n \n\n'.join(LINES) + b'\n\n',
    ARRAY, BOM + b' \n' + ARRAY + b'\n', json.dumps(ROWS, indent=4, ensure_ascii=False).encode()])
@pytest.mark.parametrize('compress', [bytes, gzip.compress])
def test_lines_and_arrays_give_the_same_records(tmp_path, data, compress):
    source = open_source(tmp_path / 'rows', compress(data))
    assert list(source.records(dict)) == ROWS and not source.broken


@pytest.mark.parametrize('bad, why', [
    (b'{"n":', 'Expecting value'), (b'[1, 2]', r"found '\[1, 2\]', expected an object"),
    (b'{"n": "\xff"}', 'invalid start byte'), (b'{"n": ' + b'9' * 5000 + b'}', 'digits'),
    (b'{"n":' * 10_000, 'recursion'), (b'{"n": "refused"}', 'invalid literal for int')])
def test_a_broken_line_is_counted_and_named(tmp_path, capsys, bad, why):
    source = open_source(tmp_path / 'rows', b'\n'.join([*LINES[:150], bad, *LINES[150:]]))
    assert list(source.records(lambda record: int(record['n']))) == list(range(300))
    assert len(source.broken) == 1
    assert re.match(f'broken record 151: .*{why}', capsys.readouterr().err)


def test_a_broken_element_of_an_array_is_counted_too(tmp_path):
    source = open_source(tmp_path / 'rows', json.dumps([*ROWS, None, 'x']).encode())
    assert list(source.records(dict)) == ROWS
    assert source.broken == ["record 301: found 'None', expected an object",
                             "record 302: found 'x', expected an object"]


def test_more_than_one_broken_record_in_a_hundred_is_an_error(tmp_path, capsys):
    good = b'\n'.join(LINES[:198])
    assert len(list(open_source(tmp_path / 'few', good + b'\nx\n[]').records(dict))) == 198
    with pytest.raises(UserError, match='3 of 201 records of .*many are broken, more than 1 %'):
        list(open_source(tmp_path / 'many', good + b'\nx\n[]\n5').records(dict))
    assert 'broken record 199: Expecting value' in capsys.readouterr().err


def test_a_line_that_is_too_long_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'LONGEST_LINE', 100)
    long = b'{"n": 0, "text": "' + b'x' * 150 + b'"}'
    source = open_source(tmp_path / 'rows', b'\n'.join([*LINES, long, *LINES]))
    assert list(source.records(dict)) == ROWS * 2 and len(source.broken) == 2


ZIPPED = gzip.compress(b'\n'.join(LINES) + os.urandom(50_000))


@pytest.mark.parametrize('data, why', [
    (ARRAY[:-9], 'Unterminated string'), (ARRAY + b'[', 'Extra data'), (b'[' * 99_999, 'Recursion'),
    (b'[{"n": "\xe9"}]', 'UnicodeDecodeError'), (ZIPPED[:5000], 'EOFError'),
    (ZIPPED[:-4], 'EOFError'), (ZIPPED[:900] + bytes(100) + ZIPPED[1000:], 'BadGzip|error'),
    (ZIPPED + b'rubbish', 'BadGzip')])
def test_a_file_that_cannot_be_read_to_its_end_is_one_line(tmp_path, data, why):
    with pytest.raises(UserError, match=f'rows cannot be read: .*({why}).* Expected JSON') as error:
        list(open_source(tmp_path / 'rows', data).records(dict))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, said', [('none', 'none not found'), ('.', 'Is a directory')])
def test_a_source_that_is_no_file_is_one_line(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        open_source(tmp_path / name)


# ---- splitting, workers, progress ----

def test_the_split_is_a_hash_that_stays_what_it_is():
    """With another one, a run resumed on data prepared anew would learn what it was tested on."""
    def split_of(key):
        return common.split_by_hash(key, 1337, val=0.2, test=0.3)
    found = [split_of(f'tree {i}') for i in range(12)]
    assert ' '.join(found) == 'test train test train test train test train val test train test'
    splits = [split_of(i) for i in range(10_000)]
    assert abs(splits.count('val') - 2000) < 150 and abs(splits.count('test') - 3000) < 150
    assert split_of('\ud800')  # any text will do


SLOW = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from data import common

def slow(*_):
    os.write(1, b'at work\\n')
    time.sleep(float(sys.argv[2]))
    raise ValueError

common.conversation.encode = slow
common.tokenizer.load = lambda *_: SimpleNamespace(remember=lambda: None)
config = SimpleNamespace(tokenizer='', template='xml', max_tokens=9, too_long='cut')
examples = [common.Example(i, 'train', []) for i in range(99_000)]
try:
    list(common.encode_all(examples, config, n_bytes=1 << 30))
except KeyboardInterrupt:
    print('stopped', flush=True)
"""


@pytest.mark.parametrize('how, seconds', [(signal.SIGKILL, 600), (signal.SIGINT, 0.001)])
def test_workers_end_with_the_main_process(how, seconds):
    process = subprocess.Popen(
        [sys.executable, '-c', SLOW, ROOT, str(seconds)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == 'at work\n'
    if how == signal.SIGINT:
        time.sleep(0.5)
        os.killpg(process.pid, how)  # as Ctrl-C does, to all of them
    else:
        process.kill()
    # The workers hold the other ends of the pipes: these close when the last of them is gone.
    output, errors = process.communicate(timeout=60)
    assert errors == '' and ('stopped' in output) == (how == signal.SIGINT)


def test_encoding_is_shown_on_a_terminal(monkeypatch, vocabulary):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, 'stderr', Terminal())
    show = files.Bar.__init__
    monkeypatch.setattr(files.Bar, '__init__',
                        lambda *args, **more: show(*args, **more, delay=0, mininterval=0))
    config = SimpleNamespace(tokenizer=vocabulary, template='xml', max_tokens=99, too_long='cut')
    turns = [conversation.Turn('user', 'Hi'), conversation.Turn('assistant', 'Hello')]
    examples = [common.Example(i, 'train', turns) for i in range(3)]
    alone = list(common.encode_all(examples, config))
    assert sys.stderr.getvalue() == ''
    shared = list(common.encode_all(examples, config, n_bytes=1 << 30))
    assert 'encoding: 3 conversations' in sys.stderr.getvalue()
    assert [example.ids for example in alone] == [example.ids for example in shared]


# ---- the page about adding a data set ----

def test_the_script_in_the_readme_prepares_a_data_set(tmp_path, gpt2):
    """It is run as it stands, in a copy of what it imports."""
    text = pathlib.Path(ROOT, 'data', 'README.md').read_text(encoding='utf-8')
    code, = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(code.splitlines()) <= 32
    for name in ('core', 'data'):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name,
                        ignore=shutil.ignore_patterns('*.bin', '*.json*', '__pycache__'))
    shutil.copy(os.path.join(ROOT, 'configurator.py'), tmp_path)
    folder = tmp_path / 'data' / 'mine'
    folder.mkdir()
    (folder / 'prepare.py').write_text(code, encoding='utf-8')
    with open(folder / 'questions.csv', 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerow(['question', 'answer'])
        rows.writerows([f'What is {i}, "exactly"?', f'It is\n{i}.'] for i in range(100))
        rows.writerow(['A long one?', 'word ' * 2000])
    command = [sys.executable, 'data/mine/prepare.py']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == '100 conversations; 1 were too long\n', done.stderr
    found = {}
    for name in ('train', 'val'):
        split = tokenfile.Split([str(folder)], name)
        found[name] = [readback.decode(*split[i], gpt2) for i in range(len(split))]
    assert 1 <= len(found['val']) <= 12
    pairs = {(turns[0].text, turns[1].text) for turns in found['train'] + found['val']}
    assert pairs == {(f'What is {i}, "exactly"?', f'It is\n{i}.') for i in range(100)}
