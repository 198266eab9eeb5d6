"""What test_chat.py drives: a server that answers by script, and headless Chromium. As a command, a picture of the page:

    python tests/chat_page.py http://127.0.0.1:8000 docs/chat.png "What's the capital of France?"
"""
import contextlib
import http.server
import json
import os
import select
import shutil
import socket
import sys
import threading

PAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'web', 'chat.html')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # as serve.py sends it
TUNED = {'id': 'out/oasst', 'object': 'model', 'created': 0, 'owned_by': 'local', 'role': 'tuned', 'window': 1024,
         'description': 'gpt2-medium tuned on OpenAssistant', 'template': 'xml'}
UNTUNED = {**TUNED, 'id': 'gpt2-medium', 'role': 'compare', 'description': 'as published, not tuned', 'template': 'plain'}
PARIS = ['The capital', ' of France', ' is Paris.']


class Stub(http.server.ThreadingHTTPServer):
    """Speaks what the page uses of serve.py, by script; port 0 is any free one.

    replies: model id → pieces of text (None waits until go is set), or (status, headers, error) in place of an answer,
    or a dict among the pieces, sent as an event, or an exception, which ends the connection there.
    """
    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(('127.0.0.1', port), Handler)
        self.models, self.requests = [TUNED], []
        self.replies, self.finish = {'out/oasst': PARIS, 'gpt2-medium': [' France', '?']}, 'stop'
        self.go, self.left = threading.Event(), threading.Event()  # the rest may come; a client went away in the middle
        self.url = f'http://127.0.0.1:{self.server_port}/'
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self):
        self.go.set()
        self.shutdown()
        super().server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, kind, body, headers=()):
        self.send_response(status)
        for name, value in (('Content-Type', kind), ('Content-Length', len(body)), ('Content-Security-Policy', POLICY), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == '/v1/models':
            return self.send(200, 'application/json', json.dumps({'object': 'list', 'data': self.server.models}).encode())
        assert self.path == '/', self.path
        with open(PAGE, 'rb') as file:
            self.send(200, 'text/html; charset=utf-8', file.read())

    def do_POST(self):
        assert self.path == '/v1/chat/completions', self.path
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.requests.append(request)
        reply = self.server.replies[request['model']]
        if isinstance(reply, tuple):
            status, headers, error = reply
            return self.send(status, 'application/json', json.dumps({'error': error}).encode(), headers)
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.end_headers()
        for piece in reply:
            if isinstance(piece, Exception):
                return
            if piece is None:
                while not self.server.go.wait(0.01):
                    if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                        return self.server.left.set()
                continue
            self.event(piece if isinstance(piece, dict) else {'choices': [{'delta': {'content': piece}, 'finish_reason': None}]})
        self.event({'choices': [{'delta': {}, 'finish_reason': self.server.finish}]})
        self.event({'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': 7, 'total_tokens': 16},
                    'timings': {'first_token_s': 0.1, 'tokens_per_s': 41.27}})
        self.wfile.write(b'data: [DONE]\n\n')

    def event(self, data):
        self.wfile.write(f'data: {json.dumps({"object": "chat.completion.chunk", **data})}\n\n'.encode())


@contextlib.contextmanager
def chromium():
    """A headless browser."""
    from playwright.sync_api import sync_playwright  # not at the top: test_chat.py skips without it
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def say(page, text):
    """Type it and press Enter."""
    page.get_by_label('Message').fill(text)
    page.get_by_label('Message').press('Enter')


def contrasts(page):
    """[(ratio, element), …] of the text that stands on the page, as WCAG counts."""
    return page.evaluate("""() => {
      const parts = color => color.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const behind = node => { const color = parts(getComputedStyle(node).backgroundColor);
        return color[3] === 0 ? behind(node.parentElement) : color; };
      return [...document.querySelectorAll('body *')].filter(node => node.checkVisibility() && !node.closest('.hidden') &&
          (node.matches('input, textarea') || [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())))
        .map(node => { const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
          return [(a + .05) / (b + .05), node.tagName + '.' + node.className + '#' + node.id]; });
    }""")


def picture(url, path, *questions):
    """Ask the server at url the questions, one after the other, greedily, and save what the page then shows."""
    with chromium() as browser:
        page = browser.new_page(viewport={'width': 1080, 'height': 740})
        page.goto(url)
        page.wait_for_selector('#empty .answer')
        page.get_by_label('Temperature').fill('0')
        page.get_by_label('Length').fill('24')
        for question in questions:
            say(page, question)
            page.wait_for_selector('body:not(.busy)', timeout=600_000)
        page.screenshot(path=path)


if __name__ == '__main__':
    picture(*sys.argv[1:])
