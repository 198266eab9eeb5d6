"""data/common.py: downloads that break, sources in every form, and a new data set."""
import csv
import gzip
import hashlib
import http.server
import json
import os
import pathlib
import re
import sys
import threading
from types import SimpleNamespace

import pytest

from conftest import ROOT, one_line, read_back
from data import common

DATA = bytes(range(256)) * 16_384  # 4 MB
PINS = {'it': {'url': None, 'sha256': hashlib.sha256(DATA).hexdigest(), 'licence': 'MIT'}}


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get(status, length, body): the Source that a server gives, which answers one request so."""
    monkeypatch.setenv('no_proxy', '*')

    def get(status, length, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                get.range = self.headers['Range']
                self.send_response(status)
                self.send_header('Content-Length', str(length))
                self.end_headers()
                self.wfile.write(body)

        with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            pin = PINS['it'] | {'url': f'http://127.0.0.1:{server.server_port}/file.gz'}
            config = SimpleNamespace(input='', source='it')
            return common.Source(config, {'it': pin}, str(tmp_path))
    return get


@pytest.mark.parametrize('status, length, body, said', [
    (404, 0, b'', '404.* put the file at .*/file.gz yourself'),
    (200, len(DATA), DATA[:99], 'could not download .* Run this again'),
    (200, 6, b'<html>', 'file.gz is not the published file: .* Delete it')])
def test_a_download_that_fails_is_one_line(get, tmp_path, status, length, body, said):
    with one_line(said):
        get(status, length, body)
    assert (tmp_path / 'file.gz').exists() == ('Delete' in said)


def test_a_download_that_broke_off_is_continued(get, tmp_path):
    with one_line('Run this again to go on'):
        get(200, len(DATA), DATA[:3 << 20])
    n = (tmp_path / 'file.gz.part').stat().st_size
    assert get(206, len(DATA) - n, DATA[n:]).about['name'] == 'it'
    assert get.range == f'bytes={n}-' and n > 0 and os.listdir(tmp_path) == ['file.gz']


def test_a_file_is_downloaded_once_and_recognised_by_its_hash(get, tmp_path, capsys):
    for status in (200, 404):  # the second time, nobody asks
        assert get(status, len(DATA), DATA).about['name'] == 'it'
    assert os.listdir(tmp_path) == ['file.gz']
    about = open_source(tmp_path / 'renamed', DATA).about
    assert about == {'name': 'it', 'bytes': len(DATA), **PINS['it']}
    assert capsys.readouterr().err.count('it: licence MIT') == 3
    about = open_source(tmp_path / 'own', b'x').about
    assert (about['name'], about['bytes'], about['licence']) == ('own', 1, None)


def open_source(path, data):
    path.write_bytes(data)
    return common.Source(SimpleNamespace(input=str(path), source='it'), PINS, '')


ROWS = [{'n': i, 'text': 'é🙂\n"],['} for i in range(300)]
LINES = [json.dumps(row).encode() for row in ROWS]
ARRAY = json.dumps(ROWS).encode()
BOM = b'\xef\xbb\xbf'


@pytest.mark.parametrize('data', [
    b'\r\n'.join(LINES) + b'\r\n', BOM + b'\n \n\n'.join(LINES), ARRAY, BOM + b' \n' + ARRAY])
@pytest.mark.parametrize('compress', [bytes, gzip.compress])
def test_lines_and_arrays_give_the_same_records(tmp_path, data, compress):
    source = open_source(tmp_path / 'rows', compress(data))
    assert list(source.records(dict, '')) == ROWS


@pytest.mark.parametrize('data, said', [
    (b'{"n":', 'record 3 of .*rows cannot be read: JSONDecodeError Expecting value'),
    (b'[1, 2]', 'record 3 .*TypeError'), (b'{"n": "\xff"}', 'record 3 .*invalid start'),
    (b'{"n":' * 10_000, 'record 3 .*RecursionError'),
    (ARRAY[:-9], 'Unterminated string'), (gzip.compress(ARRAY)[:-9], 'rows cannot .*EOFError'),
    (gzip.compress(ARRAY) + b'rubbish', 'rows cannot be read: BadGzip')])
def test_what_cannot_be_read_is_one_line(tmp_path, data, said):
    if data[:1] == b'{' or len(data) < 9:
        data = b'\n'.join([*LINES[:2], data, *LINES])
    with one_line(f'{said}.* Expected rows'):
        list(open_source(tmp_path / 'rows', data).records(lambda row: row['n'], 'Expected rows.'))


def test_the_split_is_a_hash_that_stays_what_it_is():
    """With another one, a run resumed on data prepared anew would learn what it was tested on."""
    found = [common.split_by_hash(f'tree {i}', 1337, val=0.2, test=0.3) for i in range(12)]
    assert ' '.join(found) == 'test train test train test train test train val test train test'


def test_the_script_in_the_readme_prepares_a_data_set(tmp_path, gpt2, capsys, monkeypatch):
    text = pathlib.Path(ROOT, 'data', 'README.md').read_text(encoding='utf-8')
    code, = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    pairs = [[f'What is {i}, "exactly"?', f'It is\n{i}.'] for i in range(100)]
    with open(tmp_path / 'questions.csv', 'w', newline='') as file:
        long = ['A long one?', 'word ' * 2000]
        csv.writer(file).writerows([['question', 'answer'], *pairs, long])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    exec(code, {'__file__': str(tmp_path / 'prepare.py')})
    assert capsys.readouterr().out == '100 conversations; 1 were too long\n'
    train = read_back(tmp_path)
    val = read_back(tmp_path, 'val')
    assert 1 <= len(val) <= 12
    assert sorted([turn.text for turn in turns] for turns in train + val) == sorted(pairs)
