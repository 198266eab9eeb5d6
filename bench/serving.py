"""serve.py under load: several people's answers written together, beside one at a time and other servers.

    pip install -r requirements-serve.txt
    python bench/serving.py                      # 1, 4 and 16 clients
    python bench/serving.py --shape=gpt2-medium --dtype=bfloat16
    python bench/serving.py --players=together,transformers,transformers-batching   # needs requirements-bench.txt

Each client asks one question after another over HTTP, streamed, and reads to the end. All servers have
the same random weights, exported by export.py; what is compared are tokens per second of all clients
together, and how long a client waits for its first word.
"""
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import contest  # also finds the repository's modules
import requests
import torch

from core import checkpoint
import configurator
import export
from core import tokenizer
from configurator import REPOSITORY
from model import GPT, GPTConfig
from training import SHAPES

OURS = [sys.executable, os.path.join(REPOSITORY, 'serve.py'), '--init_from={model}', '--port={port}', '--dtype={dtype}']
THEIRS = [os.path.join(os.path.dirname(sys.executable), 'transformers'), 'serve', '{model}', '--port', '{port}', '--device', 'cpu',
          '--dtype', '{dtype}']
PLAYERS = {'together': [*OURS, '--batch_size=16'], 'one-at-a-time': [*OURS, '--batch_size=1'],
           'transformers': THEIRS, 'transformers-batching': [*THEIRS, '--continuous-batching']}


@dataclass(frozen=True)
class Config:
    shape: str = 'distilgpt2'  # distilgpt2, gpt2 or gpt2-medium
    dtype: str = 'float32'     # of the weights: float32 or bfloat16
    clients: str = '1,4,16'    # how many ask at a time
    questions: int = 2         # that each asks in a round, one after another
    new_tokens: int = 64       # of each answer
    players: str = 'together,one-at-a-time'  # and transformers, transformers-batching
    rounds: int = 5            # each player plays so many
    model: str = ''            # set by the referee
    player: str = ''           # set by the referee

    def problems(self):
        """What cannot work, a sentence each."""
        for name in self.players.split(','):
            if name not in PLAYERS:
                yield f'players={name!r}: expected {", ".join(PLAYERS)}.'


def make_model(shape, folder):
    """A model of random weights with the template xml, exported into folder/model."""
    n_layer, n_head, n_embd = SHAPES[shape]
    bpe = tokenizer.load('gpt2')
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=bpe.vocab_size))
    checkpoint.save(checkpoint.pack(model, bpe, 'xml', {}, 0, None), os.path.join(folder, 'ckpt.pt'))
    export.main([f'--init_from={folder}', f'--out={folder}/model'])
    return f'{folder}/model'


def ask(config, url, client, number):
    """(tokens, seconds to the first word) of one streamed answer."""
    question = f'Client {client} asks, as question {number} of many: what is worth knowing about the {client + 7 * number}th country?'
    started, first, usage = time.perf_counter(), None, None
    body = {'model': config.model, 'messages': [{'role': 'user', 'content': question}], 'max_tokens': config.new_tokens,
            'stream': True, 'stream_options': {'include_usage': True}, 'seed': client}
    with requests.post(f'{url}/v1/chat/completions', json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b'data: {'):
                event = json.loads(line[6:])
                if first is None and event['choices'] and event['choices'][0]['delta'].get('content'):
                    first = time.perf_counter() - started
                usage = event.get('usage') or usage
    return usage['completion_tokens'], first


def play(config):
    """One player: a server, and rounds of clients."""
    stage = contest.Stage()
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    command = [part.format(model=config.model, port=port, dtype=config.dtype) for part in PLAYERS[config.player]]
    server, url = subprocess.Popen(command, env={**os.environ, 'HF_HUB_OFFLINE': '1'}), f'http://127.0.0.1:{port}'
    while True:
        try:
            requests.get(f'{url}/health', timeout=10).raise_for_status()
            break
        except requests.RequestException:
            assert server.poll() is None, command
            time.sleep(0.2)
    n_clients, numbers = int(config.clients), iter(range(10 ** 9))

    def a_round():
        def client(i):
            return [ask(config, url, i, next(numbers)) for _ in range(config.questions)]
        with ThreadPoolExecutor(n_clients) as pool:
            found = [one for answers in pool.map(client, range(n_clients)) for one in answers]
        return {'tokens': sum(tokens for tokens, _ in found), 'first': statistics.median(first for _, first in found)}
    try:
        a_round()
        stage.say(ready=True)
        while sys.stdin.readline().strip() == 'go':
            started = time.perf_counter()
            facts = a_round()
            stage.say(seconds=time.perf_counter() - started, **facts)
    finally:
        server.kill()


def main(argv):
    """The referee, or one player."""
    config = configurator.load(Config, argv)
    if config.player:
        return play(config)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(config.shape, folder)
        print(contest.versions('torch', 'fastapi', 'uvicorn', 'transformers'))
        for n_clients in config.clients.split(','):
            players = contest.contest(config.players.split(','), [*argv, f'--model={model}', f'--clients={n_clients}'], config.rounds)
            print(f'\n{config.shape} in {config.dtype}, {n_clients} clients, {config.new_tokens} tokens an answer')
            print(contest.table(players, 'tokens', digits=1))
            for player in players:
                first = statistics.median(facts['first'] for facts in player.rounds)
                print(f'- {player.name}: the first word after {first:.2f} s')


if __name__ == '__main__':
    configurator.run(main)
