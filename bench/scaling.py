"""How our own cost grows: training with the size of a batch, packing with the size of the data.

    python bench/scaling.py --data=data/oasst

Training: supervised tokens a second for each setting, rounds in turn. Packing: synthetic
conversations with lengths like OASST's; the time for the rows of one epoch, how full they are, and
the peak of the memory that packing allocates.
"""
import os
import sys
import time
import tracemalloc
from dataclasses import dataclass

import contest  # first: it puts the repository on the path
import numpy as np

import configurator
from configurator import Count
from core.rows import pack

TRAINING = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'training.py')
BLOCK_SIZE = 1024


@dataclass(frozen=True)
class Config:
    data: str = 'data/oasst'   # a prepared folder
    shape: str = 'distilgpt2'  # see bench/training.py
    rounds: Count = 3          # of each setting
    sizes: str = '1x512,4x512,8x512,4x128,4x1024'  # rows x positions; '' skips training
    conversations: str = '1000,10000,100000,1000000'  # to pack; '' skips packing


def measure_packing(n):
    """A row of the table about packing."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.1, 0.8, n).astype(np.int64)  # median 164, as in OASST
    lengths = lengths.clip(4, BLOCK_SIZE)
    order = rng.permutation(n)
    started = time.perf_counter()
    rows = pack(lengths, BLOCK_SIZE, order)
    seconds = time.perf_counter() - started
    full = lengths.sum() / (BLOCK_SIZE * len(rows))
    del rows
    # Once more, because counting memory takes time.
    tracemalloc.start()
    pack(lengths, BLOCK_SIZE, order)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (f'| {n:,} | {seconds:.3f} s | {seconds / n * 1e6:.2f} µs | {full:.2%} '
            f'| {peak / 2 ** 20:.1f} MiB | {peak / n:.0f} B |')


def training_command(config, size):
    """What starts a player with batches of this size."""
    n_rows, n_positions = map(int, size.split('x'))
    steps = max(1, 4096 // (n_rows * n_positions))  # about as many tokens in each round
    return [sys.executable, TRAINING, '--player=ours', f'--data={config.data}',
            f'--shape={config.shape}', f'--batch_size={n_rows}', f'--block_size={n_positions}',
            f'--steps={steps}']


def main(argv):
    config = configurator.load(Config, argv)
    print(contest.versions('torch', 'numpy'))
    if config.conversations:
        print('| conversations | packed in | each | rows full | peak memory | each |')
        print('|---|---|---|---|---|---|')
        for n in config.conversations.split(','):
            print(measure_packing(int(n)), flush=True)
    if config.sizes:
        commands = {size: training_command(config, size) for size in config.sizes.split(',')}
        players = contest.play(commands, config.rounds)
        print(contest.table(players, 'supervised tokens'))


if __name__ == '__main__':
    configurator.run(main)
