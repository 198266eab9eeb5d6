"""Clients of serve.py that time out, go away and attack. After them, every place must be free.

    pip install -r requirements-serve.txt
    python tests/stress/clients.py --requests=600 --idle=1100

It prints how the requests ended, the slowest answer of /health meanwhile, and the lines of the log.
"""
import contextlib
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import requests
import torch

import configurator
from configurator import REPOSITORY, Count, Natural, Seed, UserError
from core import checkpoint
from core.tokenizer import Tokenizer
from model import GPT, GPTConfig

USER = {'role': 'user', 'content': 'x'}
TURNS = [USER, {'role': 'assistant', 'content': 'y'}] * 8_000
LARGE = [  # requests that take long to read, each close to a megabyte
    {'messages': [*TURNS, USER], 'truncation': 'auto', 'max_tokens': 50},
    {'messages': [{'role': 'user', 'content': 'word ' * 190_000}]},
    {'messages': [{'role': 'user', 'content': ('x' + ' ' * 2_000) * 450}]},
    {'messages': [0] * 300_000},
    {'messages': [USER], 'stop': ['y' * 100] * 4, 'max_tokens': 300},
]
BEGINNINGS = [  # of requests; the last one is many, by a client that reads nothing
    b'',
    b'GET / HT',
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{',
    b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n' * 999,
]


@dataclass(frozen=True)
class Config:
    requests: Count = 600  # of clients that read to the end or leave
    clients: Count = 24    # at a time
    large: Natural = 20    # requests that are as large as allowed
    idle: Natural = 1100   # connections that send nothing, or half a request
    files: Count = 1024    # open files that the server may have (ulimit -n)
    seed: Seed = 1337      # of what is asked, and when clients leave


def make_model(folder):
    """A checkpoint of an untrained model with a token for each byte."""
    tokenizer = Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
    shape = GPTConfig(n_layer=4, n_head=2, n_embd=64, vocab_size=tokenizer.vocab_size)
    weights = GPT(shape).state_dict()
    saved = checkpoint.Checkpoint(weights, asdict(shape), 'xml', tokenizer.state(), {}, 0, None)
    checkpoint.save(saved, os.path.join(folder, 'ckpt.pt'))


def ask(url, rng):
    """One request of a client who may go away; how it ended."""
    body = {
        'messages': [{'role': 'user', 'content': 'x' * rng.randrange(1, 700)}],
        'max_tokens': rng.randrange(1, 300),
        'stream': rng.random() < 0.7,
        'temperature': rng.choice([0, 1, 1e-40]),
    }
    if rng.random() < 0.2:
        body['stop'] = [rng.choice('abcdef')]
    n_lines = rng.randrange(1, 30) if rng.random() < 0.4 else None
    return post(url, body, rng.choice([0.05, 0.3, 60]), n_lines)


def post(url, body, timeout=60, n_lines=None):
    """How a request ended, of whose answer no more than n_lines are read."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    url = f'{url}/v1/chat/completions'
    try:
        with requests.post(url, body, stream=True, timeout=(5, timeout)) as response:
            if response.status_code != 200:
                time.sleep(0.5)  # as a polite client
                return f'status {response.status_code}'
            for i, _ in enumerate(response.iter_lines()):
                if i == n_lines:
                    return 'left while it was written'
    except (requests.Timeout, requests.ConnectionError):
        return 'timed out'
    return 'read to the end'


class Health(threading.Thread):
    """Asks for /health all the time, and keeps how long the slowest answer took."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url = url
        self.slowest = 0.0

    def run(self):
        while True:
            started = time.monotonic()
            try:
                requests.get(f'{self.url}/health', timeout=60).raise_for_status()
            except requests.ConnectionError:  # the server has ended
                return
            self.slowest = max(self.slowest, time.monotonic() - started)
            time.sleep(0.01)

    def so_far(self):
        slowest = self.slowest
        self.slowest = 0.0
        return f'/health took at most {slowest:.2f} s'


def attack(config, url):
    """Ask, disturb, and print what came of it."""
    health = Health(url)
    health.start()
    with ThreadPoolExecutor(config.clients) as pool:
        rngs = [random.Random(f'{config.seed} {i}') for i in range(config.requests)]
        ends = Counter(pool.map(lambda rng: ask(url, rng), rngs))
        print(f'{config.requests} clients: {dict(ends.most_common())}; {health.so_far()}')
        bodies = [json.dumps(LARGE[i % len(LARGE)]).encode() for i in range(config.large)]
        health.so_far()
        ends += Counter(pool.map(lambda body: post(url, body), bodies))
        print(f'{config.large} large requests; {health.so_far()}')
    address = tuple(url.split('//')[1].split(':'))
    idle = []
    for i in range(config.idle):
        idle.append(socket.create_connection(address))
        idle[-1].setblocking(False)
        with contextlib.suppress(OSError):  # the server may have closed it, or read no more
            idle[-1].send(BEGINNINGS[i % len(BEGINNINGS)])
    time.sleep(1)
    print(f'{config.idle} idle connections; {health.so_far()}')
    left = requests.get(f'{url}/health', timeout=10).json()
    for one in idle:
        one.close()
    print(f'then {left}')
    if left['writing'] or left['waiting'] or any(how.startswith('status 5') for how in ends):
        raise UserError('places are lost, or the server failed.')


def limit_files(n):
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))


def main(argv):
    config = configurator.load(Config, argv)
    limit_files(max(4096, 2 * config.idle))
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        command = [sys.executable, os.path.join(REPOSITORY, 'serve.py'), f'--init_from={folder}',
                   '--port=0', '--queue=16', '--device=cpu']
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              preexec_fn=lambda: limit_files(config.files)) as server:
            log = []
            try:
                url = None
                while not url:
                    url = re.search(r'chat: (http\S+)/ ', server.stdout.readline())
                threading.Thread(target=lambda: log.extend(server.stdout), daemon=True).start()
                attack(config, url[1])
            finally:
                server.terminate()
                print(f'the server ended with {server.wait(20)}; its log has {len(log)} lines')


if __name__ == '__main__':
    configurator.run(main)
