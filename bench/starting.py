"""Compare the time from the command to the first token: sample.py, and transformers' pipeline.

    python bench/starting.py
    python bench/starting.py --model=FOLDER     # a GPT-2 and its tokenizer in transformers' form
    python bench/starting.py --players=ours,other-ours --other=FOLDER

Timed is a process from its start until its answer's first line. Without --model, one with
random weights is exported.
"""
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Literal

import contest  # first: it puts the repository on the path

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
    """Export a model of random weights, with GPT-2's vocabulary and the tags; its folder."""
    import torch
    from core import checkpoint
    from model import GPT, GPTConfig
    n_layer, n_head, n_embd = SHAPES[shape]
    bpe = tokenizer.load('gpt2')
    torch.manual_seed(0)
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=bpe.vocab_size)
    saved = checkpoint.Checkpoint(
        model=GPT(config).state_dict(), model_args=asdict(config), template='xml',
        tokenizer=bpe.state(), config={}, step=0, val_loss=None)
    checkpoint.save(saved, os.path.join(folder, 'ckpt.pt'))
    command = [sys.executable, 'export.py', f'--init_from={folder}', f'--out={folder}/model']
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return f'{folder}/model'


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
        folder = config.model or make_folder(config.shape, made)

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
