"""From the command to the first token: sample.py beside a script with transformers' pipeline.

    python bench/starting.py --model=FOLDER --rounds=7     # a GPT-2 and its tokenizer in transformers' form

Timed from starting the process to the answer's line on its standard output, in turn. Without --model
a folder of random weights of the given shape is made, with GPT-2's vocabulary.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import contest  # also finds the repository's modules

import configurator
from core import tokenizer
from formats.chat_template import merges as merges_of
from configurator import REPOSITORY
from training import SHAPES

THEIRS = """
import sys
from transformers import pipeline
pipe = pipeline('text-generation', model=sys.argv[1])
print(pipe(sys.argv[2], max_new_tokens=1, do_sample=False)[0]['generated_text'], flush=True)
"""


@dataclass(frozen=True)
class Config:
    model: str = ''            # a folder in transformers' form
    shape: str = 'distilgpt2'  # of the one that is made: distilgpt2, gpt2 or gpt2-medium
    rounds: int = 7            # of each


def make_folder(shape, folder):
    """A model of random weights and GPT-2's tokenizer, as transformers saves them."""
    import torch
    import transformers
    n_layer, n_head, n_embd = SHAPES[shape]
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).save_pretrained(folder)
    tokens = tokenizer.load('gpt2', tags=False).tokens
    merges = [' '.join(map(tokenizer.to_unicode, pair)) for pair in merges_of(tokens)]
    vocabulary = {tokenizer.to_unicode(token): i for i, token in enumerate(tokens)} | {'<|endoftext|>': 50256}
    with open(os.path.join(folder, 'vocab.json'), 'w', encoding='utf-8') as file:
        json.dump(vocabulary, file, ensure_ascii=False)
    with open(os.path.join(folder, 'merges.txt'), 'w', encoding='utf-8') as file:
        file.write('#version: 0.2\n' + '\n'.join(merges) + '\n')
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as file:
        json.dump({'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': 1024}, file)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def seconds_to_answer(command):
    """(seconds, the line) from starting the command to its first line."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env={**os.environ, 'HF_HUB_OFFLINE': '1'}) as process:
        line = process.stdout.readline()
        return time.perf_counter() - started, line.strip()


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    prompt = "What's the capital of France?"
    with tempfile.TemporaryDirectory() as made:
        if not config.model:
            make_folder(config.shape, made)
        folder = config.model or made
        commands = {
            'sample.py': [sys.executable, os.path.join(REPOSITORY, 'sample.py'), f'--init_from={folder}', f'--start={prompt}',
                          '--max_new_tokens=1', '--temperature=0'],
            'pipeline': [sys.executable, '-c', THEIRS, folder, prompt]}
        seconds = {name: [] for name in commands}
        for i in range(config.rounds + 1):
            for name, command in commands.items():
                taken, line = seconds_to_answer(command)
                if i:  # the first reads the files from disk
                    seconds[name].append(taken)
                else:
                    print(f'{name}: {line}')
    print(contest.versions('torch', 'transformers'))
    for name, found in seconds.items():
        print(f'{name}: median {statistics.median(found):.2f} s ({min(found):.2f} … {max(found):.2f})')
    print(f"sooner: {statistics.median(seconds['pipeline']) / statistics.median(seconds['sample.py']):.2f} times")


if __name__ == '__main__':
    configurator.run(main)
