"""data/download.py against a small server on 127.0.0.1 that misbehaves on purpose."""
import gzip
import hashlib
import http.server
import os
import threading
import time

import pytest

from configurator import UserError
from data import download
from data.download import BLOCK

DATA = bytes(range(256)) * 4000  # 1 MB, more than one block
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server:
    """answers: functions of the request, one for each, the last for all that follow. ranges: what was asked for."""

    def __init__(self):
        self.answers, self.ranges = [whole], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.ranges.append(self.headers.get('Range'))
                (outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0])(self)

            def log_message(self, *_):
                pass
        self.httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.httpd.handle_error = lambda *_: None  # that we hang up is meant
        self.url = f'http://127.0.0.1:{self.httpd.server_port}/file.gz'
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()


def reply(request, status, body, **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace('_', '-'), value)
    request.end_headers()
    request.wfile.write(body)


def whole(request, data=DATA):
    """A server as it should be."""
    start = int((request.headers.get('Range') or 'bytes=0-')[6:-1])
    if start:
        reply(request, 206, data[start:], Content_Length=len(data) - start, Content_Range=f'bytes {start}-{len(data) - 1}/{len(data)}')
    else:
        reply(request, 200, data, Content_Length=len(data))


def cut_after(n):
    """It announces the rest, and breaks off after n bytes of it."""
    def answer(request):
        start = int((request.headers.get('Range') or 'bytes=0-')[6:-1])
        headers = {'Content_Range': f'bytes {start}-{len(DATA) - 1}/{len(DATA)}'} if start else {}
        reply(request, 206 if start else 200, DATA[start:start + n], Content_Length=len(DATA) - start, **headers)
    return answer


def without_ranges(request):
    reply(request, 200, DATA, Content_Length=len(DATA))


def without_length(request):
    reply(request, 200, DATA)  # HTTP/1.0: the end of the connection is the end of the file


def status(code):
    return lambda request: reply(request, code, b'sorry', Content_Length=5)


def page(request):
    reply(request, 200, b'<html>log in first</html>', Content_Length=25, Content_Type='text/html')


def wrong_bytes(request):
    whole(request, bytes(len(DATA)))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(download, 'PAUSE_S', 0)
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Download the file from the server, which gives these answers; the folder holds it, whole, or nothing under its name."""
    def get(*answers, n_bytes=len(DATA)):
        server.answers[:] = answers or (whole,)
        path = tmp_path / 'file.gz'
        try:
            assert download.download(server.url, str(path), n_bytes, SHA256) == str(path)
        except UserError as error:
            assert not path.exists() and '\n' not in str(error)
            raise
        assert path.read_bytes() == DATA and os.listdir(tmp_path) == ['file.gz']
    return get


def test_a_whole_file(get, server):
    get()
    assert server.ranges == [None]


def test_what_broke_off_is_resumed(get, server, capsys):
    get(cut_after(6 * BLOCK + 5), cut_after(20 * BLOCK), cut_after(0), whole)
    assert server.ranges == [None, f'bytes={6 * BLOCK}-', f'bytes={26 * BLOCK}-', f'bytes={26 * BLOCK}-']
    assert 'trying again (2 of 5)' in capsys.readouterr().err


def test_what_an_earlier_run_left_is_resumed(get, server, tmp_path):
    with pytest.raises(UserError, match='the connection failed'):
        get(cut_after(BLOCK))
    assert os.listdir(tmp_path) == ['file.gz.part'] and len(server.ranges) == download.ATTEMPTS
    server.ranges.clear()
    get()
    assert server.ranges == [f'bytes={5 * BLOCK}-']


def test_a_part_that_is_whole_is_not_fetched_again(get, server, tmp_path):
    (tmp_path / 'file.gz.part').write_bytes(DATA)
    get()
    assert server.ranges == []


def test_a_part_that_is_too_long_is_begun_again(get, server, tmp_path):
    (tmp_path / 'file.gz.part').write_bytes(DATA + b'x')
    get()
    assert server.ranges == [None]


def test_a_server_without_ranges_begins_again(get, server):
    get(cut_after(BLOCK), without_ranges)
    assert server.ranges == [None, f'bytes={BLOCK}-']


def test_a_server_that_ends_before_our_part_begins_again(get, server, tmp_path):
    (tmp_path / 'file.gz.part').write_bytes(b'x' * 1000)
    get(status(416), whole)
    assert server.ranges == ['bytes=1000-', None]


def test_no_content_length(get, server):
    get(without_length)


def test_404_is_not_tried_again(get, server, tmp_path):
    with pytest.raises(UserError) as caught:
        get(status(404))
    assert '404' in str(caught.value) and f'Put the file at {tmp_path / "file.gz"} yourself' in str(caught.value)
    assert len(server.ranges) == 1 and os.listdir(tmp_path) == []


@pytest.mark.parametrize('code', [500, 503, 429])
def test_a_busy_server_is_tried_again(get, server, code):
    get(status(code), status(code), whole)
    assert len(server.ranges) == 3


def test_a_server_that_stays_broken_is_a_line(get, server):
    with pytest.raises(UserError, match='500 Internal Server Error, 5 times. Put the file at'):
        get(status(500))
    assert len(server.ranges) == download.ATTEMPTS


def test_pauses_grow(get, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, 'PAUSE_S', 1.0)
    monkeypatch.setattr(download.time, 'sleep', pauses.append)
    get(*[status(500)] * 4, whole)
    assert pauses == [1, 2, 4, 8]


def test_a_redirect_is_followed_and_keeps_the_range(get, server):
    def elsewhere(request):
        reply(request, 302, b'', Location='/elsewhere', Content_Length=0)
    get(elsewhere, cut_after(BLOCK), elsewhere, whole)
    assert server.ranges == [None, None, f'bytes={BLOCK}-', f'bytes={BLOCK}-']


@pytest.mark.parametrize('where', ['file:///etc/hostname', 'ftp://127.0.0.1/x', 'http://[', 'http://', 'http://:x/', '/file.gz', 'data:,x'])
def test_a_redirect_to_what_is_no_file_is_refused_at_once(get, server, tmp_path, where):
    with pytest.raises(UserError, match='it leads to no file .*Put the file at'):
        get(lambda request: reply(request, 302, b'', Location=where, Content_Length=0))
    # /file.gz, and what requests takes for it, are the file itself: 30 times round
    assert len(server.ranges) == (31 if where in ('/file.gz', 'http://') else 1) and os.listdir(tmp_path) == []


def test_a_server_that_falls_silent_is_tried_again(get, server, monkeypatch):
    def stalls(request):
        cut_after(BLOCK)(request)
        request.wfile.flush()
        time.sleep(0.6)
    monkeypatch.setattr(download, 'SILENCE_S', 0.2)
    get(stalls, lambda request: time.sleep(0.6), whole)
    assert server.ranges == [None, f'bytes={BLOCK}-', f'bytes={BLOCK}-']


def test_a_slow_server_is_waited_for(get, server, monkeypatch):
    def slow(request):
        request.send_response(200)
        request.send_header('Content-Length', len(DATA))
        request.end_headers()
        for start in range(0, len(DATA), BLOCK * 8):
            request.wfile.write(DATA[start:start + BLOCK * 8])
            time.sleep(0.05)
    monkeypatch.setattr(download, 'SILENCE_S', 5)
    get(slow)
    assert server.ranges == [None]


def test_more_bytes_than_announced_are_not_taken(get, server):
    get(lambda request: reply(request, 200, DATA + b'more', Content_Length=len(DATA)))


def test_a_small_answer_that_unpacks_to_a_large_one_is_stopped(get, server, tmp_path):
    bomb = gzip.compress(bytes(50 << 20))
    with pytest.raises(UserError, match='gave a wrong file'):
        get(lambda request: reply(request, 200, bomb, Content_Encoding='gzip'))
    assert os.listdir(tmp_path) == [] and len(server.ranges) == 1


@pytest.mark.parametrize('answer', [b'', b'HTTP', b'\0' * 100, b'HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n\0',
                                    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n', b'HTTP/1.1 999\r\n' + b'a: b\r\n' * 200])
def test_what_is_no_answer_is_tried_again(get, server, answer):
    get(lambda request: request.wfile.write(answer), whole)


def test_a_page_in_place_of_the_file_is_refused(get, server, tmp_path):
    with pytest.raises(UserError, match='is 25 bytes there, expected 1,024,000: not the pinned file'):
        get(page)
    assert os.listdir(tmp_path) == [] and len(server.ranges) == 1


def test_wrong_bytes_of_the_right_size_are_deleted(get, tmp_path):
    with pytest.raises(UserError, match='gave a wrong file .sha256 .* it was deleted'):
        get(wrong_bytes)
    assert os.listdir(tmp_path) == []
    get()


def test_a_wrong_beginning_is_found_out(get, server, tmp_path):
    (tmp_path / 'file.gz.part').write_bytes(b'x' * 1000)
    with pytest.raises(UserError, match='gave a wrong file'):
        get()
    get()
    assert server.ranges == ['bytes=1000-', None]


def test_a_stream_that_does_not_end_is_stopped(get, tmp_path):
    def endless(request):
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(DATA)
        except OSError:  # we hung up
            pass
    with pytest.raises(UserError, match='gave a wrong file'):
        get(endless)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_there_is_not_fetched_again(get, server, tmp_path):
    (tmp_path / 'file.gz').write_bytes(DATA)
    get()
    assert server.ranges == []


@pytest.mark.parametrize('data, said', [(b'x', '1 bytes, expected 1,024,000'), (bytes(len(DATA)), 'expected ' + SHA256), (b'', '0 bytes')])
def test_a_wrong_file_that_is_there_is_refused_and_left(server, tmp_path, data, said):
    path = tmp_path / 'file.gz'
    path.write_bytes(data)
    with pytest.raises(UserError, match=f'file.gz is not the pinned file: .*{said}.* Delete it and run this again'):
        download.download(server.url, str(path), len(DATA), SHA256)
    assert server.ranges == [] and path.read_bytes() == data


def test_a_size_that_is_not_known_leaves_it_to_the_hash(get, server, tmp_path):
    get(cut_after(BLOCK), whole, n_bytes=None)
    assert server.ranges == [None, f'bytes={BLOCK}-']
    os.remove(tmp_path / 'file.gz')
    with pytest.raises(UserError, match='gave a wrong file'):
        get(page, n_bytes=None)
    with pytest.raises(UserError, match='does not say how long it is'):
        get(without_length, n_bytes=None)


def test_no_server_is_one_line_that_names_the_file_to_put(server, tmp_path):
    server.httpd.shutdown()
    server.httpd.server_close()
    with pytest.raises(UserError) as caught:
        download.download(server.url, str(tmp_path / 'file.gz'), len(DATA), SHA256)
    line = str(caught.value)
    assert line.count('\n') == 0 and server.url in line and f'Put the file at {tmp_path / "file.gz"} yourself' in line
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_is_a_line(server, tmp_path):
    (tmp_path / 'none').touch()
    with pytest.raises(UserError, match='cannot write to .*none: '):
        download.download(server.url, str(tmp_path / 'none' / 'file.gz'), len(DATA), SHA256)
    assert server.ranges == []


def test_a_full_disk_is_a_line_and_not_tried_again(get, server):
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match='cannot write'):
            get()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(server.ranges) == 1
