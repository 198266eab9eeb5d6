"""Clients of serve.py that come together, stop reading, time out and go away; after them every place is free.

    pip install -r requirements-serve.txt
    python tests/stress/clients.py --requests=600
"""
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import requests
import torch

from core import checkpoint
import configurator
from configurator import REPOSITORY, UserError
from model import GPT, GPTConfig
from core.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    requests: int = 600  # of all clients together
    clients: int = 24    # at a time
    seed: int = 1337     # of what they ask and when they leave


def make_model(folder):
    """A checkpoint of an untrained model with a token for each byte."""
    bpe = Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
    model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=64, block_size=1024, vocab_size=bpe.vocab_size))
    checkpoint.save(checkpoint.pack(model, bpe, 'xml', {}, 0, None), os.path.join(folder, 'ckpt.pt'))


def ask(url, rng):
    """One request of a client who may go away; how it ended."""
    body = {'messages': [{'role': 'user', 'content': 'x' * rng.randrange(1, 700)}], 'max_tokens': rng.randrange(1, 300),
            'stream': rng.random() < 0.7, 'temperature': rng.choice([0, 1]), 'n': rng.choice([1, 1, 2])}
    if rng.random() < 0.2:
        body['stop'] = [rng.choice('abcdef')]
    lines = rng.randrange(1, 30) if rng.random() < 0.4 else None
    try:
        with requests.post(f'{url}/v1/chat/completions', json=body, stream=True, timeout=(5, rng.choice([0.05, 0.3, 60]))) as response:
            if response.status_code != 200:
                time.sleep(0.5)  # refused: as a polite client
                return f'status {response.status_code}'
            for i, _ in enumerate(response.iter_lines()):
                if i == lines:
                    return 'left while it was written'
    except (requests.Timeout, requests.ConnectionError):
        return 'timed out'
    return 'read to the end'


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        with subprocess.Popen([sys.executable, os.path.join(REPOSITORY, 'serve.py'), f'--init_from={folder}', '--port=0', '--queue=16',
                               '--device=cpu'], stdout=subprocess.PIPE, text=True) as server:
            try:
                url = next(found[1] for line in server.stdout if (found := re.search(r'chat: (http\S+)/ ', line)))
                with ThreadPoolExecutor(config.clients) as pool:
                    pool.submit(lambda: [None for _ in server.stdout])  # or its pipe fills up
                    ends = Counter(pool.map(lambda i: ask(url, random.Random(f'{config.seed} {i}')), range(config.requests)))
                    time.sleep(1)
                    health = requests.get(f'{url}/health', timeout=10).json()
                    server.kill()
            finally:
                server.kill()
    print(', '.join(f'{n} {how}' for how, n in ends.most_common()) + f'; then {health}')
    if health['writing'] or health['waiting'] or any(how.startswith('status 5') for how in ends):
        raise UserError('places are lost, or the server failed.')


if __name__ == '__main__':
    configurator.run(main)
