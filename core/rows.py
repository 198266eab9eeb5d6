"""Packing: conversations into rows, rows into batches.

    python -c "from core import rows; print(rows.pack([5, 4, 3, 2], 7, [0, 1, 2, 3]))"

Which rows make up a step follows from (seed, step) alone, so resuming needs no loader state.
"""
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from configurator import UserError
from core.files import Bar


def pack(lengths, capacity, order):
    """Best-fit packing: rows, lists of conversations whose lengths add up to <= capacity.

    The longest come first, each into the fullest row that has room for it; of equal ones,
    the first in `order`. Rows are kept in a stack for each amount of room left. The bits of
    one integer say which stacks are not empty, so that finding one takes no search.
    """
    lengths = np.asarray(lengths)
    order = np.asarray(order)
    # A stable sort keeps the order of equal ones, which the seed decides.
    longest_first = order[np.argsort(-lengths[order], kind='stable')]
    rows = []
    with_room = [[] for _ in range(capacity + 1)]
    occupied = 0
    for i, length in zip(longest_first.tolist(), lengths[longest_first].tolist()):
        fitting = occupied >> length
        if fitting:
            # The lowest set bit is the least room that is enough.
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
            rows[row].append(i)
        else:
            room = capacity
            row = len(rows)
            rows.append([i])
        if room > length:
            with_room[room - length].append(row)
            occupied |= 1 << (room - length)
    return rows


class Batch(NamedTuple):
    """Some rows as one stream of N tokens, conversations of equal length side by side."""
    idx: np.ndarray  # (N,) int64: each conversation without its last token
    positions: np.ndarray  # (N,) int64, restarting in each conversation
    runs: list  # [(how many, length), …] of the conversations, in order
    at: np.ndarray  # (S,) int64: where in the stream supervised tokens are predicted
    targets: np.ndarray  # (S,) int64: those tokens


def make_batch(split, conversations):
    """The Batch of these conversations of the split."""
    # Equal lengths side by side make one dense attention call each.
    conversations = sorted(conversations, key=lambda i: split.lengths[i])
    lengths = split.lengths[conversations] - 1
    pairs = [split[i] for i in conversations]
    idx = np.concatenate([ids[:-1] for ids, _ in pairs]).astype(np.int64)
    targets = np.concatenate([ids[1:] for ids, _ in pairs]).astype(np.int64)
    # A position predicts the token after it, so the mask moves by one.
    at = np.flatnonzero(np.concatenate([mask[1:] for _, mask in pairs]))
    positions = np.concatenate([np.arange(length) for length in lengths])
    # Both are in the order of the lengths.
    different, counts = np.unique(lengths, return_counts=True)
    runs = list(zip(counts.tolist(), different.tolist()))
    return Batch(idx, positions, runs, at, targets[at])


class Rows:
    """The rows of a split: whole conversations, together up to block_size positions.

    Longer ones are left out, and those with nothing supervised. Row number n_rows is the
    first of the second epoch, and so on. Without a seed, each epoch has the same order.
    """

    def __init__(self, split, block_size, seed=None):
        self.split = split
        self.block_size = block_size
        self.seed = seed
        # The last token of a conversation is only predicted, and takes no position.
        fits = split.lengths - 1 <= block_size
        self.n_too_long = int((~fits).sum())
        self.usable = np.flatnonzero(fits & (split.n_supervised > 0))
        if not len(self.usable):
            raise UserError(
                f'nothing to learn in {split.name}: of {len(split)} conversations, '
                f'{self.n_too_long} are longer than block_size={block_size}, and the '
                'others have no supervised token.')
        # A step may need the end of one epoch and the beginning of the next.
        self.epoch = lru_cache(maxsize=2)(self.make_epoch)
        # Packing depends on the lengths alone, so each epoch has as many rows.
        self.n_rows = len(self.epoch(0))

    def make_epoch(self, epoch):
        """The rows of one epoch, lists of conversations."""
        lengths = self.split.lengths - 1
        if self.seed is None:
            return pack(lengths, self.block_size, self.usable)
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        # Two shuffles: which conversations share a row, and the order of the rows.
        rows = pack(lengths, self.block_size, rng.permutation(self.usable))
        return [rows[i] for i in rng.permutation(len(rows))]

    def describe(self):
        """A line for a person."""
        lengths = self.split.lengths[self.usable]
        n_supervised = self.split.n_supervised[self.usable].sum()
        full = (lengths - 1).sum() / self.n_rows / self.block_size
        return (f'{self.split.name}: {len(lengths):,} conversations, {lengths.sum():,} '
                f'tokens, {n_supervised:,} supervised, in {self.n_rows:,} rows of '
                f'{self.block_size} ({full:.1%} full); {self.n_too_long:,} too long')

    def conversations(self, start, stop):
        """The conversations of rows start to stop."""
        found = []
        for i in range(start, stop):
            found += self.epoch(i // self.n_rows)[i % self.n_rows]
        return found

    def batch(self, start, stop):
        """The Batch of rows start to stop."""
        return make_batch(self.split, self.conversations(start, stop))

    def n_supervised(self, start, stop):
        """How many supervised tokens rows start to stop hold."""
        return int(self.split.n_supervised[self.conversations(start, stop)].sum())

    def batches(self, batch_size, first=0, every=1, limit=0, what=''):
        """Yield the Batches of one epoch: number `first`, then each `every`th after it.

        limit: leave out batches from this number on; 0 for none. what: names a progress bar.
        """
        n = -(-self.n_rows // batch_size)
        numbers = range(first, min(n, limit or n), every)
        for b in Bar(numbers, what, unit=' batches', disable=not what or None):
            yield self.batch(b * batch_size, min((b + 1) * batch_size, self.n_rows))
