"""Clients of serve.py that time out, go away and say half. After them, every place must be free.

    pip install -r requirements-serve.txt
    python tests/stress/clients.py

It prints how the requests ended, and the slowest answer of /health meanwhile.
"""
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import requests

from configurator import REPOSITORY
from core import checkpoint
from core.tokenizer import Tokenizer
from model import GPT, GPTConfig

N_REQUESTS = 600
N_CLIENTS = 24  # at a time
N_IDLE = 1100
LARGE = {'messages': [{'role': 'user', 'content': 'word ' * 190_000}]}
BEGINNINGS = [  # of requests; the last one is many, by a client that reads nothing
    b'',
    b'GET / HT',
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{',
    b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n' * 999,
]


def make_model(folder):
    """A checkpoint of an untrained model with a token for each byte."""
    tokenizer = Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
    shape = GPTConfig(n_layer=4, n_head=2, n_embd=64, vocab_size=tokenizer.vocab_size)
    weights = GPT(shape).state_dict()
    saved = checkpoint.Checkpoint(weights, asdict(shape), 'xml', tokenizer.state(), {}, 0, None)
    checkpoint.save(saved, os.path.join(folder, 'ckpt.pt'))


def ask(url, seed):
    """One request of a client who may go away; how it ended."""
    rng = random.Random(seed)
    body = {'messages': [{'role': 'user', 'content': 'x' * rng.randrange(1, 700)}],
            'max_tokens': rng.randrange(1, 300), 'stream': rng.random() < 0.7}
    if rng.random() < 0.05:
        body = LARGE
    n_lines = rng.choice([0, 9, 10_000])
    timeout = rng.choice([0.05, 0.3, 60])
    try:
        with requests.post(f'{url}/v1/chat/completions', json.dumps(body), stream=True,
                           timeout=(5, timeout)) as response:
            for i, _ in enumerate(response.iter_lines()):
                if i == n_lines:
                    return 'left while it was written'
            return f'status {response.status_code}'
    except (requests.Timeout, requests.ConnectionError):
        return 'timed out'


def attack(url):
    """Ask and disturb; how the requests ended, and what /health says afterwards."""
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        ends = Counter(pool.map(lambda seed: ask(url, seed), range(N_REQUESTS)))
    address = tuple(url.removeprefix('http://').split(':'))
    with contextlib.ExitStack() as stack:
        for i in range(N_IDLE):
            idle = stack.enter_context(socket.create_connection(address))
            idle.setblocking(False)
            with contextlib.suppress(OSError):  # the server reads no more
                idle.send(BEGINNINGS[i % len(BEGINNINGS)])
        time.sleep(1)
        return ends, requests.get(f'{url}/health', timeout=10).json()


def watch(url, times):
    """Ask for /health all the time, until the server has ended."""
    with contextlib.suppress(requests.ConnectionError):
        while True:
            started = time.monotonic()
            requests.get(f'{url}/health', timeout=60).raise_for_status()
            times.append(time.monotonic() - started)


def main():
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        command = [sys.executable, 'serve.py', f'--init_from={folder}', '--port=0', '--device=cpu']
        # As on most machines, no more than 1,024 files at first.
        command = ['bash', '-c', 'ulimit -Sn 1024 && exec "$@"', 'bash', *command]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
            url = None
            while not url:
                url = re.search(r'chat: (http\S+)/ ', server.stdout.readline())
            times = []
            threading.Thread(target=server.stdout.read, daemon=True).start()
            threading.Thread(target=watch, args=(url[1], times), daemon=True).start()
            try:
                ends, left = attack(url[1])
            finally:
                server.terminate()
    print(f'{dict(ends)}; {N_IDLE} idle; then {left}; /health took at most {max(times):.2f} s')
    if left['writing'] or left['waiting'] or 'status 500' in ends:
        sys.exit('places are lost, or the server failed.')


if __name__ == '__main__':
    main()
