"""How the cost of packing grows with the size of the data.

    python bench/scaling.py

Synthetic conversations with lengths like OASST's: the time for the rows of one epoch, how full
they are, and the peak of the memory that packing allocates.
"""
import time
import tracemalloc
from dataclasses import dataclass

import contest  # first: it puts the repository on the path
import numpy as np

import configurator
from core.rows import pack

BLOCK_SIZE = 1024


@dataclass(frozen=True)
class Config:
    conversations: str = '1000,10000,100000,1000000'  # how many to pack


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


def main(argv):
    config = configurator.load(Config, argv)
    print(contest.versions('numpy'))
    print('| conversations | packed in | each | rows full | peak memory | each |')
    print('|---|---|---|---|---|---|')
    for n in config.conversations.split(','):
        print(measure_packing(int(n)), flush=True)


if __name__ == '__main__':
    configurator.run(main)
