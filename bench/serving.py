"""serve.py under load: several answers written together, beside one at a time and other servers.

    pip install -r requirements-serve.txt
    python bench/serving.py                      # 1, 4 and 16 clients
    python bench/serving.py --shape=gpt2-medium --dtype=bfloat16
    pip install -r requirements-bench.txt
    python bench/serving.py --players=together,transformers,transformers-batching

Each client asks one question after another over HTTP, streamed, and reads to the end. All servers
have the same random weights, exported by export.py. Compared are the tokens per second of all
clients together, and how long a client waits for its first word.
"""
import itertools
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
from typing import Literal

import contest  # also finds the repository's modules
import requests

import configurator
from configurator import REPOSITORY, Count
from contest import SHAPES
from starting import make_folder

SERVE = [sys.executable, os.path.join(REPOSITORY, 'serve.py'),
         '--init_from={model}', '--port={port}', '--dtype={dtype}']
TRANSFORMERS = [os.path.join(os.path.dirname(sys.executable), 'transformers'), 'serve', '{model}',
                '--port', '{port}', '--device', 'cpu', '--dtype', '{dtype}']
PLAYERS = {
    'together': [*SERVE, '--batch_size=16'],
    'one-at-a-time': [*SERVE, '--batch_size=1'],
    'transformers': TRANSFORMERS,
    'transformers-batching': [*TRANSFORMERS, '--continuous-batching'],
}


@dataclass(frozen=True)
class Config:
    shape: Literal[*SHAPES] = 'distilgpt2'  # of the model
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the weights
    clients: str = '1,4,16'   # how many ask at a time
    questions: Count = 2      # that each asks in a round, one after another
    new_tokens: Count = 64    # in each answer
    players: str = 'together,one-at-a-time'  # and transformers, transformers-batching
    rounds: Count = 5         # that each player plays
    model: str = ''           # set by the referee
    player: str = ''          # set by the referee

    def problems(self):
        return contest.problems(self.players, '', '|'.join(PLAYERS), ', '.join(PLAYERS))


def ask(config, url, client, number):
    """(tokens, seconds to the first word) of one streamed answer."""
    question = (f'Client {client} asks, as question {number} of many: '
                f'what is worth knowing about the {client + 7 * number}th country?')
    body = {
        'model': config.model,
        'messages': [{'role': 'user', 'content': question}],
        'max_tokens': config.new_tokens,
        'seed': client,
        'stream': True,
        'stream_options': {'include_usage': True},
    }
    started = time.perf_counter()
    first = usage = None
    url = f'{url}/v1/chat/completions'
    with requests.post(url, json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith(b'data: {'):
                continue
            event = json.loads(line.removeprefix(b'data: '))
            usage = event.get('usage') or usage
            if first is None and event['choices'] and event['choices'][0]['delta'].get('content'):
                first = time.perf_counter() - started
    return usage['completion_tokens'], first


def start(config):
    """Start the player's server; returns it and its address once it answers."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    command = []
    for part in PLAYERS[config.player]:
        command.append(part.format(model=config.model, port=port, dtype=config.dtype))
    server = subprocess.Popen(command, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    url = f'http://127.0.0.1:{port}'
    while True:
        try:
            requests.get(f'{url}/health', timeout=10).raise_for_status()
            return server, url
        except requests.RequestException:
            assert server.poll() is None, command
            time.sleep(0.2)


def play(config):
    """One player: a server, and rounds of clients."""
    stage = contest.Stage()
    server, url = start(config)
    n_clients = int(config.clients)
    numbers = itertools.count()

    def client(i):
        return [ask(config, url, i, next(numbers)) for _ in range(config.questions)]

    def a_round():
        with ThreadPoolExecutor(n_clients) as pool:
            answers = sum(pool.map(client, range(n_clients)), [])
        first = statistics.median(first for _, first in answers)
        return {'tokens': sum(tokens for tokens, _ in answers), 'first': first}

    try:
        a_round()
        stage.play(a_round)
    finally:
        server.kill()


def main(argv):
    """The referee, or one player."""
    config = configurator.load(Config, argv)
    if config.player:
        play(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_folder(config.shape, folder)
        print(contest.versions('torch', 'uvicorn', 'transformers'))
        for n_clients in config.clients.split(','):
            more = [f'--model={model}', f'--clients={n_clients}']
            players = contest.contest(config.players.split(','), [*argv, *more], config.rounds)
            print(f'\n{config.shape} in {config.dtype}, {n_clients} clients, '
                  f'{config.new_tokens} tokens an answer')
            print(contest.table(players, 'tokens', digits=1))
            for player in players:
                first = statistics.median(facts['first'] for facts in player.rounds)
                print(f'- {player.name}: the first word after {first:.2f} s')


if __name__ == '__main__':
    configurator.run(main)
