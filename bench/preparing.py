"""Conversations to token files: data/oasst/prepare.py beside `datasets` with two processes.

    python bench/preparing.py --input=trees.jsonl

Theirs is nanoGPT's way of preparing data (datasets.map with num_proc, then a memory map written in
shards), and has the easier work: the conversations are ready as text, one to a line, where ours
reads the trees, filters them, splits them, and writes loss masks too. Both end on disk.
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
from core import conversation
from core import tokenizer
from configurator import REPOSITORY

THEIRS = """
import sys
import numpy as np
import tiktoken
from datasets import load_dataset

source, target, workers, repository = sys.argv[1:]
sys.path.insert(0, repository)
from core.tokenizer import END_OF_TEXT, TAGS
gpt2 = tiktoken.get_encoding('gpt2')
encoding = tiktoken.Encoding('gpt2-tags', pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                             special_tokens={piece: 50256 + i for i, piece in enumerate((END_OF_TEXT, *TAGS))})

def process(example):
    ids = encoding.encode(example['text'], allowed_special='all')
    ids.append(50256)
    return {'ids': ids, 'len': len(ids)}

data = load_dataset('json', data_files=source, split='train', cache_dir=target + '/cache')
data = data.map(process, remove_columns=['text'], num_proc=int(workers))
out = np.memmap(target + '/train.bin', dtype=np.uint16, mode='w+', shape=(sum(data['len']),))
at, shards = 0, min(64, len(data))
for i in range(shards):
    batch = data.shard(num_shards=shards, index=i, contiguous=True).with_format('numpy')
    ids = np.concatenate(batch['ids'])
    out[at:at + len(ids)] = ids
    at += len(ids)
out.flush()
print(at)
"""


@dataclass(frozen=True)
class Config:
    input: str = 'trees.jsonl'  # OpenAssistant's trees
    turns: str = 'first'        # as data/oasst/prepare.py has it
    workers: int = 2            # num_proc of theirs; ours takes all cores
    rounds: int = 5             # of each


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    with tempfile.TemporaryDirectory() as folder:
        prepare = [sys.executable, os.path.join(REPOSITORY, 'data', 'oasst', 'prepare.py'), f'--input={config.input}',
                   f'--turns={config.turns}', f'--out_dir={folder}/ours', '--max_tokens=100000', '--val_fraction=0']
        text = subprocess.run([*prepare, '--stdout=True'], capture_output=True, text=True, check=True).stdout
        found = conversation.from_text(text)
        ready = os.path.join(folder, 'ready.jsonl')
        with open(ready, 'w', encoding='utf-8') as file:
            for turns in found:
                pieces = ''.join(f'<{turn.role}>{turn.text}</{turn.role}>' for turn in turns)
                file.write(json.dumps({'text': f'<conversation>{pieces}</conversation>'}) + '\n')
        size = sum(len(turn.text.encode()) for turns in found for turn in turns) / 1e6
        print(f'{len(found):,} conversations, {size:.1f} MB of text', file=sys.stderr)
        seconds = {'prepare.py': [], 'datasets.map': []}
        for i in range(config.rounds):
            theirs = os.path.join(folder, f'theirs-{i}')
            os.mkdir(theirs)  # a new one each time, or `datasets` takes what it has cached
            for name, command in (('prepare.py', prepare),
                                  ('datasets.map', [sys.executable, '-c', THEIRS, ready, theirs, str(config.workers), REPOSITORY])):
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
                seconds[name].append(time.perf_counter() - started)
                print(f'{name}: {seconds[name][-1]:.1f} s', file=sys.stderr)
    print(contest.versions('tiktoken', 'datasets', 'numpy', 'pyarrow'))
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f'{name}: median {median:.2f} s ({min(taken):.2f} … {max(taken):.2f}), {size / median:.1f} MB of text a second')
    print(f"ratio: {statistics.median(seconds['datasets.map']) / statistics.median(seconds['prepare.py']):.1f}")


if __name__ == '__main__':
    configurator.run(main)
