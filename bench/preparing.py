"""Compare preparing data: data/oasst/prepare.py, and `datasets` with two processes.

    python bench/preparing.py --input=trees.jsonl --copies=143
    python bench/preparing.py --input=trees.jsonl --players=ours,other-ours --other=FOLDER

`datasets` works as nanoGPT prepares its data: map with num_proc, then a memory map written shard by
shard. It has less to do: it gets the conversations as text, one to a line. Ours reads the trees,
filters and splits them, and writes loss masks, too. Both end with files on disk.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import contest  # first: it puts the repository on the path

import configurator
from configurator import REPOSITORY, Count
from core.files import reading
from core.tokenizer import END_OF_TEXT, TAGS

THEIRS = """
import sys
import numpy as np
import tiktoken
from datasets import load_dataset

source, target, workers, *specials = sys.argv[1:]
gpt2 = tiktoken.get_encoding('gpt2')
encoding = tiktoken.Encoding(
    'gpt2-tags', pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
    special_tokens={piece: 50256 + i for i, piece in enumerate(specials)})

def process(example):
    ids = encoding.encode(example['text'], allowed_special='all')
    ids.append(50256)
    return {'ids': ids, 'len': len(ids)}

data = load_dataset('json', data_files=source, split='train', cache_dir=target + '/cache')
data = data.map(process, remove_columns=['text'], num_proc=int(workers))
out = np.memmap(target + '/train.bin', dtype=np.uint16, mode='w+', shape=(sum(data['len']),))
at = 0
shards = min(64, len(data))
for i in range(shards):
    batch = data.shard(num_shards=shards, index=i, contiguous=True).with_format('numpy')
    ids = np.concatenate(batch['ids'])
    out[at:at + len(ids)] = ids
    at += len(ids)
out.flush()
"""


@dataclass(frozen=True)
class Config:
    input: str = 'trees.jsonl'  # OpenAssistant's message trees, not compressed
    copies: Count = 1           # read them so many times, each time with new ids
    workers: Count = 2          # num_proc of datasets; ours takes one core
    players: str = 'ours,datasets'  # and other-ours
    other: str = ''             # a checkout of this repository, for other-ours
    rounds: Count = 5           # that each player plays

    def problems(self):
        """Players that do not exist."""
        return contest.problems(self.players, self.other, 'ours|datasets', 'ours or datasets')


def copy_trees(config, path):
    """Write the trees `copies` times to path."""
    expected = "Expected OpenAssistant's trees, one JSON object a line."
    with reading(config.input, expected), open(config.input, encoding='utf-8') as file:
        trees = [json.loads(line) for line in file]
    with open(path, 'w', encoding='utf-8') as file:
        for copy in range(config.copies):
            for tree in trees:
                new_id = f'{tree["message_tree_id"]}-{copy}'
                file.write(json.dumps(tree | {'message_tree_id': new_id}) + '\n')


def run(command):
    """What the command prints; the end of this script if it fails."""
    environment = os.environ | {'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(command, capture_output=True, encoding='utf-8', env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def write_texts(prepare, path):
    """Write the conversations to path as datasets gets them, and print how many there are."""
    texts = run([*prepare, '--stdout=True']).split(f'{END_OF_TEXT}\n')[:-1]
    with open(path, 'w', encoding='utf-8') as file:
        for text in texts:
            file.write(json.dumps({'text': text}) + '\n')
    messages = ''.join(texts)
    for tag in TAGS:
        messages = messages.replace(tag, '')
    n_mb = len(messages.encode()) / 1e6
    print(f'{len(texts):,} conversations, {n_mb:.1f} MB of text')


def main(argv):
    config = configurator.load(Config, argv)
    with tempfile.TemporaryDirectory() as folder:
        trees = os.path.join(folder, 'trees.jsonl')
        ready = os.path.join(folder, 'ready.jsonl')
        copy_trees(config, trees)
        options = [f'--input={trees}', '--max_tokens=100000', '--val_fraction=0']
        script = os.path.join('data', 'oasst', 'prepare.py')
        write_texts([sys.executable, os.path.join(REPOSITORY, script), *options], ready)

        def measure(name, i):
            # A new folder each time, or datasets would use its cache.
            target = os.path.join(folder, f'{name}-{i}')
            os.mkdir(target)
            command = [sys.executable, '-c', THEIRS, ready, target, str(config.workers),
                       END_OF_TEXT, *TAGS]
            if name != 'datasets':
                checkout = config.other if name.startswith(contest.OTHER) else REPOSITORY
                path = os.path.join(checkout, script)
                command = [sys.executable, path, *options, f'--out_dir={target}']
            started = time.perf_counter()
            run(command)
            return time.perf_counter() - started

        seconds = contest.take_times(config.players.split(','), config.rounds, measure)
    print(contest.versions('tiktoken', 'datasets', 'numpy', 'pyarrow'))
    print(contest.compare(seconds, 'seconds', digits=2))


if __name__ == '__main__':
    configurator.run(main)
