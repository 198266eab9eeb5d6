"""serve.py under load: several people's answers written together, beside one at a time.

    python bench/serving.py                      # 1, 4 and 16 clients
    python bench/serving.py --shape=gpt2-medium --dtype=bfloat16

Each client asks one question after another over HTTP, streamed, and reads to the end. Both servers
have the same random weights; what is compared are tokens per second of all clients together, and how
long a client waits for its first word.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import contest  # also finds the repository's modules
import requests

import configurator
from configurator import REPOSITORY
from starting import make_folder

PLAYERS = {'together': '--batch_size=16', 'one-at-a-time': '--batch_size=1'}


@dataclass(frozen=True)
class Config:
    shape: str = 'distilgpt2'  # distilgpt2, gpt2 or gpt2-medium
    dtype: str = 'float32'     # of serve.py
    clients: str = '1,4,16'    # how many ask at a time
    questions: int = 2         # that each asks in a round, one after another
    new_tokens: int = 64       # of each answer
    rounds: int = 5            # each player plays so many
    model: str = ''            # set by the referee
    player: str = ''           # set by the referee


def ask(url, new_tokens, client, number):
    """(tokens, seconds to the first word) of one streamed answer."""
    question = f'Client {client} asks, as question {number} of many: what is worth knowing about the {client + 7 * number}th country?'
    started, first = time.perf_counter(), None
    body = {'messages': [{'role': 'user', 'content': question}], 'max_tokens': new_tokens, 'stream': True,
            'stream_options': {'include_usage': True}, 'seed': client}
    with requests.post(f'{url}/v1/chat/completions', json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b'data: {'):
                event = json.loads(line[6:])
                if first is None and event['choices'] and event['choices'][0]['delta'].get('content'):
                    first = time.perf_counter() - started
                usage = event.get('usage')
    return usage['completion_tokens'], first


def play(config):
    """One player: a server, and rounds of clients."""
    stage = contest.Stage()
    server = subprocess.Popen([sys.executable, os.path.join(REPOSITORY, 'serve.py'), f'--init_from={config.model}', '--port=0',
                               f'--dtype={config.dtype}', PLAYERS[config.player]], stdout=subprocess.PIPE, text=True)
    url = next(found[1] for line in server.stdout if (found := re.search(r'chat: (http\S+)/ ', line)))
    n_clients, numbers = int(config.clients), iter(range(10 ** 9))

    def a_round():
        def client(i):
            return [ask(url, config.new_tokens, i, next(numbers)) for _ in range(config.questions)]
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
    print(contest.versions('torch', 'fastapi', 'uvicorn'))
    with tempfile.TemporaryDirectory() as folder:
        make_folder(config.shape, folder)
        for n_clients in config.clients.split(','):
            players = contest.contest(PLAYERS, [*argv, f'--model={folder}', f'--clients={n_clients}'], config.rounds)
            print(f'\n{config.shape} in {config.dtype}, {n_clients} clients, {config.new_tokens} tokens an answer')
            print(contest.table(players, 'tokens', digits=1))
            for player in players:
                first = statistics.median(facts['first'] for facts in player.rounds)
                print(f'- {player.name}: the first word after {first:.2f} s')


if __name__ == '__main__':
    configurator.run(main)
