"""The files of a prepared data set: written whole or not at all, read by memory map.

    python -c "from core import tokenfile as t; print(t.Split(['data/oasst'], 'train').lengths)"

For each split a folder holds SPLIT.bin (uint16 ids, one conversation after another, as nanoGPT has
it), SPLIT.mask.bin (uint8, 1 on supervised tokens) and SPLIT.idx.bin (int64, where each
conversation starts, and the end). meta.json is written last: where it is, the rest is whole.
"""
import contextlib
import hashlib
import json
import os
import shutil

import numpy as np

from configurator import REPOSITORY, Natural, UserError, accept
from core.conversation import TEMPLATES
from core.files import flush, flush_folder, only_writer, reading
from core.tokenizer import GPT2_SHA256

FORMAT_VERSION = 1
DTYPES = {'.bin': np.uint16, '.mask.bin': np.uint8, '.idx.bin': np.int64}
# What meta.json counts in each split.
COUNTS = ('conversations', 'tokens', 'supervised_tokens')


class Writer:
    """Collects the splits in a temporary folder; `finish` moves them into place.

        with Writer('data/mine', ('train', 'val')) as writer:
            writer.add('train', ids, mask, lengths)
            writer.finish(meta)

    Until finish, a reader sees what was there before.
    """

    def __init__(self, folder, splits):
        self.folder = folder
        self.partial = os.path.join(folder, '.partial')
        self.counts = {}
        for split in splits:
            self.counts[split] = dict.fromkeys(COUNTS, 0)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_writer(self.folder))
            # A killed process may have left one.
            shutil.rmtree(self.partial, ignore_errors=True)
            os.mkdir(self.partial)
            stack.callback(shutil.rmtree, self.partial, ignore_errors=True)
            self.files = {}
            self.hashes = {}
            for split in self.counts:
                for ending in DTYPES:
                    path = os.path.join(self.partial, split + ending)
                    self.files[split, ending] = stack.enter_context(open(path, 'wb'))
                    self.hashes[split, ending] = hashlib.sha256()
                self.write(split, '.idx.bin', 0)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback):
        with contextlib.suppress(OSError):  # closing a file fails on a full disk, too
            self.stack.close()
        if isinstance(error, OSError):
            raise UserError(f'cannot write to {self.folder}: {error.strerror}. Make room, or use '
                            '--out_dir=FOLDER.') from None

    def add(self, split, ids, mask, lengths):
        """Append conversations: ids and mask (n,) of all of them, lengths (conversations,)."""
        assert sum(lengths) == len(ids) == len(mask), (sum(lengths), len(ids), len(mask))
        counts = self.counts[split]
        ends = counts['tokens'] + np.cumsum(lengths, dtype=np.int64)
        self.write(split, '.bin', ids)
        self.write(split, '.mask.bin', mask)
        self.write(split, '.idx.bin', ends)
        counts['conversations'] += len(lengths)
        counts['tokens'] += len(ids)
        counts['supervised_tokens'] += int(np.count_nonzero(mask))

    def write(self, split, ending, values):
        """Append values to one file."""
        data = np.asarray(values, DTYPES[ending]).tobytes()
        self.files[split, ending].write(data)
        self.hashes[split, ending].update(data)

    def finish(self, meta):
        """Move the files into place. meta.json, with the counts added, comes last."""
        splits = {}
        for split, counts in self.counts.items():
            digests = b''.join(self.hashes[split, ending].digest() for ending in DTYPES)
            splits[split] = counts | {'sha256': hashlib.sha256(digests).hexdigest()}
        meta_path = os.path.join(self.partial, 'meta.json')
        # A file's name, which stands in meta, need not be valid Unicode.
        with open(meta_path, 'w', encoding='utf-8', errors='backslashreplace') as file:
            whole = {'format_version': FORMAT_VERSION, **meta, 'splits': splits}
            json.dump(whole, file, indent=1, ensure_ascii=False)
            flush(file)
        for file in self.files.values():
            flush(file)
            file.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.folder, 'meta.json'))
        # A .bin comes after its .idx.bin: alone, it would be taken for nanoGPT's.
        names = [split + ending for split in self.counts for ending in reversed(DTYPES)]
        for name in [*names, 'meta.json']:
            os.replace(os.path.join(self.partial, name), os.path.join(self.folder, name))
        flush_folder(self.folder)


def find_folders(dataset, data_dir):
    """The folders of data sets, a comma list of names, in data_dir here or beside the scripts."""
    folders = []
    for name in dataset.split(','):
        folder = os.path.join(data_dir, name.strip())
        beside = os.path.join(REPOSITORY, folder)
        if not os.path.isdir(folder) and os.path.isdir(beside):
            folder = beside
        folders.append(folder)
    return folders


def read_meta(folder):
    """meta.json of a prepared folder, checked; or the like for a folder of nanoGPT's."""
    path = os.path.join(folder, 'meta.json')
    names = ('train.bin', 'train.idx.bin', 'meta.json')
    if [os.path.exists(os.path.join(folder, name)) for name in names] == [True, False, False]:
        return nanogpt_meta(folder)
    with reading(path, 'Prepare the data first: python data/oasst/prepare.py, or another one.'):
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        if meta['format_version'] != FORMAT_VERSION:
            raise ValueError(f"format {meta['format_version']!r}, this code reads {FORMAT_VERSION}")
        if meta['template'] not in TEMPLATES:
            raise ValueError(f"template {meta['template']!r}, known are {', '.join(TEMPLATES)}")
        accept(meta['tokenizer']['sha256'], str)
        for split in meta['splits'].values():
            for key in COUNTS:
                accept(split[key], Natural)
    return meta


def nanogpt_meta(folder):
    """What meta.json would say of a folder that nanoGPT prepared: GPT-2's ids, all supervised."""
    if os.path.exists(os.path.join(folder, 'meta.pkl')):
        raise UserError(f"{folder} has a vocabulary of its own (meta.pkl). Expected GPT-2's ids.")
    splits = {}
    for split in ('train', 'val'):
        path = os.path.join(folder, f'{split}.bin')
        n = 0
        if os.path.exists(path):
            n = os.path.getsize(path) // 2
        splits[split] = dict.fromkeys(COUNTS, n)
    tokenizer = {'name': 'gpt2', 'sha256': GPT2_SHA256, 'tags': False, 'tokens': None}
    return {'template': 'plain', 'tokenizer': tokenizer, 'splits': splits, 'nanogpt': True}


def fingerprint(folder):
    """Hash of the token files. A run can be resumed only on equal ones."""
    splits = json.dumps(read_meta(folder)['splits'], sort_keys=True)
    return hashlib.sha256(splits.encode()).hexdigest()


def sources(folders):
    """What a checkpoint keeps of where its data came from: one dict for each folder."""
    found = []
    for folder in folders:
        meta = read_meta(folder)
        n_tokens = sum(counts['tokens'] for counts in meta['splits'].values())
        name = os.path.basename(os.path.normpath(folder))
        found.append({'dataset': name, 'source': meta.get('source'), 'tokens': n_tokens})
    return found


class Split:
    """One split of one or more prepared folders: conversation i -> (ids, loss mask).

    lengths, n_supervised: (conversations,) int64. loss_on='all' supervises every token but the
    first of each conversation. UserError if files are missing or disagree, or if they hold ids
    beyond vocab_size. nanoGPT's files, which are one long text, are torn into windows.
    """

    def __init__(self, folders, split, loss_on='response', vocab_size=2 ** 16, window=1025):
        self.name = split
        self.loss_on = loss_on
        self.files = [open_split(folder, split, vocab_size, window) for folder in folders]
        self.lengths = np.concatenate([np.diff(starts) for _, _, starts in self.files])
        counts = [len(starts) - 1 for _, _, starts in self.files]
        # The number of each folder's first conversation.
        self.first = np.cumsum([0, *counts])
        # The first token of a conversation is never a target: nothing stands before it.
        self.n_supervised = self.lengths - 1
        if loss_on == 'response':
            sums = [count_supervised(mask, starts) for _, mask, starts in self.files]
            self.n_supervised = np.concatenate(sums)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        # The folder that conversation i is in, and its number there.
        f = int(np.searchsorted(self.first, i, side='right')) - 1
        ids, mask, starts = self.files[f]
        i -= self.first[f]
        span = slice(starts[i], starts[i + 1])
        if self.loss_on == 'all':
            return ids[span], np.ones_like(mask[span])
        return ids[span], mask[span]


def count_supervised(mask, starts):
    """Supervised tokens of each conversation, without its first token. (conversations,) int64"""
    firsts = starts[:-1]
    if not len(firsts):
        return np.zeros(0, np.int64)
    return np.add.reduceat(mask, firsts, dtype=np.int64) - mask[firsts]


def open_split(folder, split, vocab_size, window):
    """(ids, mask, starts): memory maps of one split, checked against meta.json and each other."""
    meta = read_meta(folder)
    if split not in meta['splits']:
        raise UserError(f'{folder} has no split {split!r}, only {", ".join(meta["splits"])}. '
                        'Prepare it again with a part set aside for it.')
    if 'nanogpt' in meta:
        n = meta['splits'][split]['tokens']
        ids = np.zeros(0, np.uint16)
        path = os.path.join(folder, f'{split}.bin')
        if n:
            with reading(path, 'Expected two bytes for each token.'):
                ids = np.memmap(path, np.uint16, mode='r')
        check_ids(ids, vocab_size, folder, split)
        return ids, np.ones(n, np.uint8), np.array([*range(0, n, window), n])
    arrays = []
    for ending, dtype in DTYPES.items():
        path = os.path.join(folder, split + ending)
        with reading(path, 'Prepare the folder again.'):
            if os.path.getsize(path):
                arrays.append(np.memmap(path, dtype, mode='r'))
            else:
                arrays.append(np.zeros(0, dtype))
    ids, mask, starts = arrays
    counts = meta['splits'][split]
    found = dict(zip(COUNTS, (len(starts) - 1, len(ids), int(np.count_nonzero(mask)))))
    expected = {key: counts[key] for key in COUNTS}
    whole = (found == expected and len(mask) == len(ids) and starts[0] == 0
             and starts[-1] == len(ids) and (np.diff(starts) > 0).all() and not (mask > 1).any())
    if not whole:
        raise UserError(f'the files of split {split!r} in {folder} disagree: found {found}, '
                        f'meta.json has {expected}. Prepare the folder again.')
    check_ids(ids, vocab_size, folder, split)
    return ids, mask, starts


def check_ids(ids, vocab_size, folder, split):
    """UserError for ids that the vocabulary does not have."""
    if (ids >= vocab_size).any():
        raise UserError(f'{folder}/{split}.bin has the id {ids.max()}, the vocabulary only '
                        f'{vocab_size} tokens. Prepare the folder again.')
