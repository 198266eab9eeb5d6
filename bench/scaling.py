"""How our own cost grows: training with the length of a row and the rows in a batch, packing with the data.

    python bench/scaling.py --data=data/oasst

Training: supervised tokens a second of each setting, rounds in turn. Packing: 1,000 to 1,000,000
synthetic conversations with lengths like OASST's, the time for one epoch's rows, how full they are,
and the memory that the packing needed at its peak, as Python and numpy count it.
"""
import time
import tracemalloc
from dataclasses import dataclass

import contest  # also finds the repository's modules
import numpy as np

import configurator
from core import tokenfile
import training


@dataclass(frozen=True)
class Config:
    data: str = 'data/oasst'   # a prepared folder
    shape: str = 'distilgpt2'  # distilgpt2, gpt2 or gpt2-medium
    rounds: int = 3            # of each setting
    sizes: str = '1x512,4x512,8x512,4x128,4x1024'  # rows x positions; '' leaves training out
    conversations: str = '1000,10000,100000,1000000'  # to pack; '' leaves packing out
    player: str = ''           # set by the referee


def packing(n):
    """A line of the table of packing."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.1, 0.8, n).astype(np.int64), 4, 1024)  # median 164, as in OASST
    order = rng.permutation(n)
    started = time.perf_counter()
    rows = tokenfile.pack(lengths, 1024, order)
    seconds = time.perf_counter() - started
    del rows
    tracemalloc.start()
    rows = tokenfile.pack(lengths, 1024, order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    full = lengths.sum() / (1024 * len(rows))
    return f'| {n:,} | {seconds:.3f} s | {seconds / n * 1e6:.2f} µs | {full:.2%} | {peak / 2**20:.1f} MiB | {peak / n:.0f} B |'


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    if config.player:
        rows, positions = config.player.removeprefix('ours-').split('x')
        steps = max(1, 4096 // (int(rows) * int(positions)))
        training.play_ours(contest.Stage(), training.Config(data=config.data, shape=config.shape, block_size=int(positions),
                                                           batch_size=int(rows), steps=steps, player=config.player))
    print(contest.versions('torch', 'numpy'))
    if config.conversations:
        print('| conversations | packed in | each | rows full | peak memory | each |\n|---|---|---|---|---|---|')
        for n in config.conversations.split(','):
            print(packing(int(n)), flush=True)
    if config.sizes:
        players = contest.contest(['ours-' + size for size in config.sizes.split(',')], argv, config.rounds)
        print('| rows x positions | supervised tokens/s | least … most |\n|---|---|---|')
        for player in players:
            rates = sorted(player.rates('supervised tokens'))
            print(f'| {player.name.removeprefix("ours-")} | {rates[len(rates) // 2]:,.0f} | {rates[0]:,.0f} … {rates[-1]:,.0f} |')


if __name__ == '__main__':
    configurator.run(main)
