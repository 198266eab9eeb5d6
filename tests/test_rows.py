"""rows.py: every conversation in one row, rows nearly full, an order that follows from the seed."""
from itertools import chain

import numpy as np
import pytest

from conftest import one_line
from core import tokenfile
from core.rows import Rows, make_batch, pack
from core.tokenfile import Split

META = {'template': 'xml', 'tokenizer': {'name': 'x', 'sha256': 'y'}}


def of_lengths(folder, lengths, n_supervised=1):
    """A split of conversations of these lengths, supervised on their last tokens."""
    rng = np.random.default_rng(0)
    found = []
    for length in lengths:
        mask = np.arange(length) >= length - n_supervised
        found.append((rng.integers(0, 65536, length), mask))
    tokenfile.write(str(folder), {'train': found}, META)
    return Split([str(folder)], 'train')


def lengths_like_oassts(n, longest):
    """(n,) lengths: the logarithm near normal, the median 164."""
    return np.random.default_rng(0).lognormal(5.1, 0.9, n).astype(np.int64).clip(2, longest)


@pytest.mark.parametrize('n', [*range(15), 50_000])
def test_every_conversation_is_in_one_row_and_rows_are_nearly_full(n):
    """The largest is quick enough to test."""
    lengths = lengths_like_oassts(n, 1024)
    rows = pack(lengths, 1024, np.arange(n))
    assert sorted(chain(*rows)) == list(range(n))
    fill = sorted(lengths[row].sum() for row in rows)
    assert not fill or fill[-1] <= 1024
    assert len(fill) < 2 or fill[0] + fill[1] > 1024  # two that fit together would be one
    assert n < 15 or np.mean(fill) > 0.995 * 1024


def test_the_longest_goes_first_into_the_fullest_row_that_has_room():
    assert pack([5, 2, 8, 1], 10, [0, 1, 2, 3]) == [[2, 1], [0, 3]]
    # Of equal ones, the first in order goes first; what is not in it stays out.
    assert pack([4, 4, 4, 4, 2], 8, [3, 1, 4, 0, 2]) == [[3, 1], [0, 2], [4]]


def test_every_epoch_has_every_conversation_once_in_another_order(tmp_path):
    split = of_lengths(tmp_path, lengths_like_oassts(200, 200))
    rows = Rows(split, 256, seed=1)
    a = rows.epoch(0)
    b = rows.epoch(1)
    for epoch in (a, b):
        assert sorted(sum(epoch, [])) == list(range(200)) and len(epoch) == rows.n_rows
    assert sorted(map(sorted, a)) != sorted(map(sorted, b))
    n = rows.n_rows
    assert rows.conversations(n - 1, n + 2) == a[-1] + b[0] + b[1]
    assert Rows(split, 256, seed=2).epoch(1) != b
    assert Rows(split, 256).epoch(0) == Rows(split, 256).epoch(5)  # no seed: not shuffled


def test_the_order_stays_what_it_was(tmp_path):
    """A run that is resumed with a later version must see the rows it would have seen."""
    rows = Rows(of_lengths(tmp_path, [3, 9, 4, 4, 7, 2, 5, 5]), 10, seed=1337)
    # The seed alone decides, not which epoch was asked for before.
    assert rows.epoch(1) == [[4, 7], [6, 2, 3], [1, 0], [5]]
    assert rows.epoch(0) == [[7, 3, 2], [4, 6], [5], [1, 0]]


def test_what_is_too_long_or_has_nothing_supervised_is_left_out(tmp_path):
    """A conversation that no row can hold must not stop those behind it."""
    of_lengths(tmp_path / 'a', [5, 12, 11, 500, 3, 11])  # 11 tokens are 10 positions
    of_lengths(tmp_path / 'b', [5, 6], n_supervised=0)
    rows = Rows(Split([str(tmp_path / 'a'), str(tmp_path / 'b')], 'train'), 10, seed=0)
    for epoch in range(5):
        assert sorted(sum(rows.epoch(epoch), [])) == [0, 2, 4, 5]
    assert rows.describe() == (
        'train: 4 conversations, 30 tokens, 4 supervised, in 3 rows of 10 (86.7% full); 2 too long')


@pytest.mark.parametrize('lengths, n_supervised, said', [
    ([50, 60], 1, 'of 2 conversations, 2 are longer than block_size=16'),
    ([5, 6], 0, 'no supervised token'), ([], 1, 'nothing to learn in train: of 0 conversations')])
def test_nothing_to_learn_is_a_line(tmp_path, lengths, n_supervised, said):
    with one_line(said):
        Rows(of_lengths(tmp_path, lengths, n_supervised), 16)


def test_a_batch_is_the_conversations_side_by_side(tmp_path):
    train = [([10, 11, 12], [0, 0, 1]), ([20, 21, 22, 23], [0, 1, 0, 1]), ([30, 31, 32], [0, 1, 1])]
    tokenfile.write(str(tmp_path), {'train': train}, META)
    batch = make_batch(Split([str(tmp_path)], 'train'), [1, 0, 2])
    assert batch.idx.tolist() == [10, 11, 30, 31, 20, 21, 22]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert batch.runs == [(2, 2), (1, 3)]
    assert batch.at.tolist() == [1, 2, 3, 4, 6]
    assert batch.targets.tolist() == [12, 31, 32, 21, 23]
    arrays = (batch.idx, batch.positions, batch.at, batch.targets)
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}


def test_batches_are_the_rows_of_the_first_epoch_shared_out(tmp_path):
    rows = Rows(of_lengths(tmp_path, lengths_like_oassts(100, 100), n_supervised=2), 128, seed=3)
    batches = list(rows.batches(3))
    assert sum(len(batch.idx) for batch in batches) == int((rows.split.lengths - 1).sum())
    for number, batch in enumerate(batches):
        stop = min(3 * number + 3, rows.n_rows)
        assert rows.n_supervised(3 * number, stop) == len(batch.targets) == len(batch.at)
    shared = [batch.runs for first in range(3) for batch in rows.batches(3, first, 3)]
    assert sorted(shared) == sorted(batch.runs for batch in batches)
    assert len(list(rows.batches(3, limit=2))) == 2
