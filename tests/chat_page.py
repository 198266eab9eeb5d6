"""For the tests of the page: a server that answers by script, and headless Chromium."""
import contextlib
import http.server
import json
import pathlib
import select
import shutil
import threading

PAGE = pathlib.Path(__file__).parent.parent / 'web' / 'chat.html'
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chrome')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking',
         '--disable-component-update']
TUNED = {'id': 'out/oasst', 'role': 'tuned', 'window': 1024, 'template': 'xml',
         'description': 'gpt2-medium tuned on OpenAssistant',
         'defaults': {'temperature': 0.7, 'max_tokens': 256}}
UNTUNED = {**TUNED, 'id': 'gpt2-medium', 'role': 'compare', 'description': 'as published'}
PARIS = ['The capital', ' of France', ' is Paris.']


class Stub(http.server.ThreadingHTTPServer):
    """Speaks as much of the API as the page uses.

    replies: {model id: pieces of text}. Among the pieces, None waits until `go` is set, a dict is
    sent as it is, and an exception breaks the connection. (status, message) is an error.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.models = [TUNED]
        self.replies = {'out/oasst': PARIS, 'gpt2-medium': [' France', '?']}
        self.finish = 'stop'
        self.key = None  # the API key that is expected
        self.keys = []   # what has been sent for it
        self.requests = []
        self.go = threading.Event()
        self.left = threading.Event()  # a client went away in the middle
        self.url = f'http://127.0.0.1:{self.server_port}/'
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self):
        self.go.set()
        self.shutdown()
        super().server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def do_GET(self):
        if self.path == '/':
            self.send(200, PAGE.read_bytes())
            return
        self.server.keys.append(self.headers['Authorization'])
        if self.server.key and self.server.keys[-1] != f'Bearer {self.server.key}':
            self.send(401, {'error': {'message': 'wrong key'}})
        else:
            self.send(200, {'data': self.server.models})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.requests.append(request)
        reply = self.server.replies[request['model']]
        if isinstance(reply, tuple):
            self.send(reply[0], {'error': {'message': reply[1]}})
            return
        self.send(200, b'')
        for piece in reply:
            if isinstance(piece, Exception):
                return
            if piece is None:
                while not self.server.go.wait(0.01):
                    if select.select([self.connection], [], [], 0)[0]:  # it has been closed
                        self.server.left.set()
                        return
            elif isinstance(piece, dict):
                self.event(**piece)
            else:
                self.event(choices=[{'delta': {'content': piece}, 'finish_reason': None}])
        self.event(choices=[{'delta': {}, 'finish_reason': self.server.finish}])
        self.event(choices=[], usage={'prompt_tokens': 9, 'completion_tokens': 7})
        self.wfile.write(b'data: [DONE]\n\n')

    def event(self, **data):
        self.wfile.write(f'data: {json.dumps(data)}\n\n'.encode())


@contextlib.contextmanager
def chromium():
    """A headless browser."""
    from playwright.sync_api import sync_playwright  # test_chat.py skips without it
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def say(page, text):
    """Type it and press Enter."""
    page.get_by_label('Message').fill(text)
    page.get_by_label('Message').press('Enter')
