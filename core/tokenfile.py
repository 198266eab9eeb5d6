"""Conversations on disk as tokens: written whole or not at all, read by memory map, packed in rows.

    python -c "import tokenfile; print(tokenfile.Split(['data/oasst'], 'train').lengths.mean())"

A folder holds, for each split, SPLIT.bin (uint16 ids, one conversation after another, as nanoGPT has
it), SPLIT.mask.bin (uint8, 1 on what is to be learned) and SPLIT.idx.bin (int64, where each
conversation starts, and the end); and meta.json, written last, so that its presence says the rest
is whole.
"""
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from core.claim import claimed
from configurator import REPOSITORY, UserError
from core.progress import Bar

FORMAT_VERSION = 1
DTYPES = {'.bin': np.uint16, '.mask.bin': np.uint8, '.idx.bin': np.int64}


class Writer:
    """Collects the splits in a temporary folder inside `folder`; `finish` moves them into place.

        with Writer('data/oasst', ('train', 'val')) as writer:
            writer.add('train', ids, mask, lengths)
            writer.finish(meta)

    Left before finish, by an exception or a kill, it has changed nothing that a reader sees. UserError
    where another process is writing to the folder.
    """

    def __init__(self, folder, splits):
        self.folder, self.splits = folder, splits

    def __enter__(self):
        with ExitStack() as stack:
            stack.enter_context(claimed(self.folder, '.partial-*'))
            self.partial = tempfile.mkdtemp(prefix='.partial-', dir=self.folder)
            stack.callback(shutil.rmtree, self.partial, ignore_errors=True)
            self.files = {split: {ending: stack.enter_context(open(os.path.join(self.partial, split + ending), 'wb'))
                                  for ending in DTYPES} for split in self.splits}
            self.stack = stack.pop_all()
        self.hashes = {split: {ending: hashlib.sha256() for ending in DTYPES} for split in self.splits}
        self.counts = {split: {'conversations': 0, 'tokens': 0, 'supervised_tokens': 0} for split in self.splits}
        for split in self.splits:
            self._write(split, '.idx.bin', 0)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.stack.close()  # all of it, even where closing a file fails on a full disk
        except OSError as failed:
            error = error or failed
        if isinstance(error, OSError):
            raise UserError(f'could not write to {self.folder}: {error.strerror}. Make room, or use --out_dir=FOLDER.') from None

    def add(self, split, ids, mask, lengths):
        """Append conversations: ids and mask (n,) of all of them, lengths (conversations,)."""
        counts = self.counts[split]
        assert np.sum(lengths) == len(ids) == len(mask), (np.sum(lengths), len(ids), len(mask))
        self._write(split, '.bin', ids)
        self._write(split, '.mask.bin', mask)
        self._write(split, '.idx.bin', counts['tokens'] + np.cumsum(lengths, dtype=np.int64))
        counts['conversations'] += len(lengths)
        counts['tokens'] += len(ids)
        counts['supervised_tokens'] += int(np.sum(mask, dtype=np.int64))

    def _write(self, split, ending, values):
        data = np.asarray(values, DTYPES[ending]).tobytes()
        self.files[split][ending].write(data)
        self.hashes[split][ending].update(data)

    def finish(self, meta):
        """Move the files into place; meta.json, with the counts added, is the last."""
        for files in self.files.values():
            for file in files.values():
                _flush(file)
                file.close()
        # The hash is of the three files' hashes: however the conversations came, in one piece or many.
        splits = {split: {**counts, 'sha256': hashlib.sha256(b''.join(
            digest.digest() for digest in self.hashes[split].values())).hexdigest()}
            for split, counts in self.counts.items()}
        # backslashreplace: a file's name, which stands in there, need not be Unicode
        with open(os.path.join(self.partial, 'meta.json'), 'w', encoding='utf-8', errors='backslashreplace') as file:
            json.dump({'format_version': FORMAT_VERSION, **meta, 'splits': splits}, file,
                      indent=1, ensure_ascii=False)
            _flush(file)
        if os.path.exists(os.path.join(self.folder, 'meta.json')):
            os.remove(os.path.join(self.folder, 'meta.json'))
        names = sorted(os.listdir(self.partial), key=lambda name: name == 'meta.json')
        for name in names:
            os.replace(os.path.join(self.partial, name), os.path.join(self.folder, name))


def _flush(file):
    file.flush()
    os.fsync(file.fileno())


def find_folders(dataset, data_dir):
    """The folders of data sets, names with commas between: in data_dir, seen from here or else from this file."""
    bases = (data_dir, os.path.join(REPOSITORY, data_dir))
    return [next((path for path in (os.path.join(base, name.strip()) for base in bases) if os.path.isdir(path)),
                 os.path.join(data_dir, name.strip())) for name in dataset.split(',')]


def read_meta(folder):
    """meta.json of a prepared folder, checked; UserError that says how to make it where it is not."""
    path = os.path.join(folder, 'meta.json')
    script = os.path.join(folder, 'prepare.py')
    how = f'Run: python {os.path.relpath(script)}' if os.path.exists(script) else \
        'Expected a folder that a data/*/prepare.py has written.'
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        if (version := meta['format_version']) == FORMAT_VERSION:
            splits, template, tokenizer = meta['splits'], meta['template'], meta['tokenizer']
            well_formed = (type(splits) is dict and type(template) is str
                           and type(tokenizer['name']) is type(tokenizer['sha256']) is str
                           and all(type(counts[key]) is int for counts in splits.values()
                                   for key in ('conversations', 'tokens', 'supervised_tokens')))
    except FileNotFoundError:
        raise UserError(f'{path} not found. {how}') from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error}). {how}') from None
    if version != FORMAT_VERSION:
        raise UserError(f'{path} is of format {version!r}; this code reads {FORMAT_VERSION}. {how}')
    if not well_formed:
        raise UserError(f'{path} holds values of wrong types. {how}')
    return meta


class Split:
    """One split of one or more prepared folders: conversation i -> its ids and its loss mask.

    loss_on='all' supervises every token but the first of each conversation, 'response' the mask.
    lengths, n_supervised: (conversations,) int64. UserError for files that are missing or disagree,
    and for ids that a vocabulary of vocab_size tokens does not have.
    """

    def __init__(self, folders, split, loss_on='response', vocab_size=2 ** 16):
        self.name, self.loss_on = split, loss_on
        self.files = [_open_split(folder, split) for folder in folders]
        for folder, (ids, _, _) in zip(folders, self.files):
            if len(ids) and ids.max() >= vocab_size:
                raise UserError(f'{os.path.join(folder, split)}.bin has the id {ids.max()}, the vocabulary only '
                                f'{vocab_size} tokens. Prepare the folder again.')
        self.first = np.cumsum([0] + [len(starts) - 1 for _, _, starts in self.files])
        self.lengths = np.concatenate([np.diff(starts) for _, _, starts in self.files])
        # A conversation's first token is in its context alone: nothing stands before it to predict it.
        self.n_supervised = self.lengths - 1 if loss_on == 'all' else np.concatenate(
            [np.add.reduceat(mask, starts[:-1], dtype=np.int64) - mask[starts[:-1]] if len(mask) else
             np.zeros(0, np.int64) for _, mask, starts in self.files])

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        f = int(np.searchsorted(self.first, i, side='right')) - 1
        ids, mask, starts = self.files[f]
        span = slice(starts[i - self.first[f]], starts[i - self.first[f] + 1])
        return ids[span], np.ones_like(mask[span]) if self.loss_on == 'all' else mask[span]


def _open_split(folder, split):
    """(ids, mask, starts) of one split as arrays on the files, checked against meta.json and each other."""
    meta = read_meta(folder)
    if split not in meta['splits']:
        raise UserError(f'{folder} has no split {split!r}, only {", ".join(meta["splits"])}. '
                        'Prepare it again with a part set aside for it.')
    arrays = []
    for ending, dtype in DTYPES.items():
        path = os.path.join(folder, split + ending)
        try:
            arrays.append(np.memmap(path, dtype, mode='r') if os.path.getsize(path) else np.zeros(0, dtype))
        except (OSError, ValueError) as error:  # ValueError: a part of a number at the end
            why = getattr(error, 'strerror', None) or 'cut short'
            raise UserError(f'{path}: {why}, although meta.json names it. Prepare the folder again.') from None
    ids, mask, starts = arrays
    counts = meta['splits'][split]
    found = {'conversations': len(starts) - 1, 'tokens': len(ids),
             'supervised_tokens': int(np.count_nonzero(mask))}
    agree = (all(counts[key] == n for key, n in found.items()) and len(mask) == len(ids)
             and len(starts) and starts[0] == 0 and starts[-1] == len(ids) and (np.diff(starts) > 0).all()
             and (not len(mask) or mask.max() <= 1))
    if not agree:
        raise UserError(f'the files of split {split!r} in {folder} disagree: {found} found, meta.json has '
                        f'{ {key: counts[key] for key in found} }. Prepare the folder again.')
    return ids, mask, starts


def pack(lengths, capacity, order):
    """Best-fit rows: lists of the conversations, in all of `order`, whose lengths add up to <= capacity.

    Longest first, each into the fullest row that still has room for it; of equal ones, the first in
    `order` goes first. Every conversation stands in exactly one row. Near-linear: the rows are kept
    in one stack for each amount of room left, and one integer's bits say which stacks are not empty.
    """
    order = order[np.argsort(-lengths[order], kind='stable')]
    rows, with_room, occupied = [], [[] for _ in range(capacity + 1)], 0
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
            rows[row].append(i)
        else:
            room, row = capacity, len(rows)
            rows.append([i])
        if room > length:
            with_room[room - length].append(row)
            occupied |= 1 << (room - length)
    return rows


class Batch(NamedTuple):
    """Some rows as one stream of N tokens, conversations of equal length side by side, no padding.

    idx, positions (N,) int64: a conversation's tokens but its last; positions restart in each.
    runs: [(how many, length), …] of the conversations in order, whose sum of products is N.
    at (S,) int64: where in the stream a supervised token is predicted; targets (S,) int64: that token.
    """
    idx: np.ndarray
    positions: np.ndarray
    runs: list
    at: np.ndarray
    targets: np.ndarray


def make_batch(split, conversations):
    """The Batch of these conversations of the split."""
    conversations = sorted(conversations, key=lambda i: split.lengths[i])
    lengths = split.lengths[conversations] - 1  # the last token is predicted, and predicts nothing
    found = [split[i] for i in conversations]
    at = np.flatnonzero(np.concatenate([mask[1:] for _, mask in found]))
    return Batch(
        idx=np.concatenate([ids[:-1] for ids, _ in found]).astype(np.int64),
        positions=np.concatenate([np.arange(n) for n in lengths]),
        runs=[(int(n), int(length)) for length, n in zip(*np.unique(lengths, return_counts=True))],
        at=at, targets=np.concatenate([ids[1:] for ids, _ in found]).astype(np.int64)[at])


class Rows:
    """The rows of a split, in an order that is a function of (seed, epoch) alone.

    A row holds whole conversations, of up to block_size positions in all. Left out, and counted in
    n_too_long: conversations that no row can hold. Left out as well: those with nothing supervised.
    """

    def __init__(self, split, block_size, seed=None):
        self.split, self.block_size, self.seed = split, block_size, seed
        positions = split.lengths - 1
        self.n_too_long = int((positions > block_size).sum())
        self.usable = np.flatnonzero((positions <= block_size) & (split.n_supervised > 0))
        if not len(self.usable):
            raise UserError(f'nothing to learn from in {split.name}: of {len(split)} conversations, {self.n_too_long} '
                            f'are longer than block_size={block_size}, and the others have no supervised token.')
        self.n_rows = len(self.epoch(0))  # the same in each: it follows from the lengths alone

    @lru_cache(maxsize=2)
    def epoch(self, epoch):
        """The rows of one epoch, each a list of conversations; seed None: not shuffled."""
        order = self.usable
        if self.seed is not None:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            order = rng.permutation(order)
        rows = pack(self.split.lengths - 1, self.block_size, order)
        if self.seed is not None:
            rows = [rows[i] for i in rng.permutation(len(rows))]
        return rows

    def slice(self, start, stop):
        """The conversations of rows start to stop, counted through all epochs: one list a row."""
        return [self.epoch(i // self.n_rows)[i % self.n_rows] for i in range(start, stop)]

    def batches(self, batch_size, first=0, every=1, limit=0, what=''):
        """The Batches of the first epoch, batch_size rows each: number `first`, then each `every`th.

        limit: of all that there are, only so many come; 0 all. what: the work to show as a progress bar, by the
        one that has number 0.
        """
        n = -(-self.n_rows // batch_size)
        for b in Bar(range(first, min(n, limit or n), every), what, unit=' batches', disable=not what or first > 0 or None):
            rows = self.slice(b * batch_size, min((b + 1) * batch_size, self.n_rows))
            yield make_batch(self.split, [i for row in rows for i in row])

    def n_supervised(self, rows):
        """How many supervised tokens are in these rows."""
        return int(self.split.n_supervised[[i for row in rows for i in row]].sum())


def fingerprint(folder):
    """sha256 over the splits' hashes: a run can be resumed, bit for bit, on equal ones alone."""
    return hashlib.sha256(json.dumps(read_meta(folder)['splits'], sort_keys=True).encode()).hexdigest()


def sources(folders):
    """[{'dataset', 'tokens', 'source'}] of prepared folders: what a checkpoint keeps of where its data is from."""
    metas = [read_meta(folder) for folder in folders]
    return [{'dataset': os.path.basename(os.path.normpath(folder)), 'source': meta.get('source'),
             'tokens': sum(counts['tokens'] for counts in meta['splits'].values())} for folder, meta in zip(folders, metas)]
