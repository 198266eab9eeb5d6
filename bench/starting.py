"""Compare the time from the command to the first token: sample.py, and transformers' pipeline.

    python bench/starting.py
    python bench/starting.py --model=FOLDER     # a GPT-2 and its tokenizer in transformers' form
    python bench/starting.py --players=ours,other-ours --other=FOLDER

Timed is a process from its start until its answer's first line. Without --model, a folder with
random weights and GPT-2's vocabulary is made.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import contest  # first: it puts the repository on the path
from tiktoken.load import read_file_cached

import configurator
from configurator import REPOSITORY, Count
from contest import SHAPES
from core import tokenizer

PROMPT = "What's the capital of France?"
THEIRS = """
import sys
from transformers import pipeline
pipe = pipeline('text-generation', model=sys.argv[1])
print(pipe(sys.argv[2], max_new_tokens=1, do_sample=False)[0]['generated_text'], flush=True)
"""


@dataclass(frozen=True)
class Config:
    model: str = ''          # a folder in transformers' form
    shape: Literal['distilgpt2', 'gpt2', 'gpt2-medium', 'tiny'] = 'distilgpt2'  # of the one made
    players: str = 'ours,pipeline'  # and other-ours
    other: str = ''          # a checkout of this repository, for other-ours
    rounds: Count = 7        # that each player plays, after one that is not counted

    def problems(self):
        """Players that do not exist."""
        return contest.problems(self.players, self.other, 'ours|pipeline', 'ours or pipeline')


def make_folder(shape, folder):
    """Save a model with random weights and GPT-2's tokenizer, as transformers does."""
    import torch
    import transformers
    n_layer, n_head, n_embd = SHAPES[shape]
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    merges = read_file_cached(tokenizer.GPT2_MERGES, tokenizer.GPT2_MERGES_SHA256)
    tokens = tokenizer.load('gpt2', tags=False).tokens
    vocabulary = {tokenizer.to_unicode(token): i for i, token in enumerate(tokens)}
    vocabulary[tokenizer.END_OF_TEXT] = 50256
    files = {'merges.txt': merges.decode(), 'vocab.json': json.dumps(vocabulary),
             'tokenizer_config.json': '{"tokenizer_class": "GPT2Tokenizer"}'}
    for name, text in files.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(text)
    # Again in the form that loads fastest, tokenizer.json.
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def first_line(command):
    """(seconds from starting the command to its first line, the line)."""
    environment = os.environ | {'HF_HUB_OFFLINE': '1'}
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=environment) as process:
        line = process.stdout.readline().strip()
        seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f'This failed: {" ".join(command)}')
    return seconds, line


def main(argv):
    config = configurator.load(Config, argv)
    names = config.players.split(',')
    with tempfile.TemporaryDirectory() as made:
        folder = config.model
        if not folder:
            folder = made
            make_folder(config.shape, folder)

        def command(name):
            if name == 'pipeline':
                return [sys.executable, '-c', THEIRS, folder, PROMPT]
            checkout = config.other if name.startswith(contest.OTHER) else REPOSITORY
            return [sys.executable, os.path.join(checkout, 'sample.py'), f'--init_from={folder}',
                    f'--start={PROMPT}', '--max_new_tokens=1', '--temperature=0']

        def measure(name, i):
            return first_line(command(name))[0]

        for name in names:  # reads the files from disk
            print(f'{name}: {first_line(command(name))[1]}')
        seconds = contest.take_times(names, config.rounds, measure)
    print(contest.versions('torch', 'transformers'))
    print(contest.compare(seconds, 'seconds', digits=2))


if __name__ == '__main__':
    configurator.run(main)
