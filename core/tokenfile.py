"""The files of a prepared data set: written whole or not at all, read by memory map.

    python -c "from core import tokenfile as t; print(t.Split(['data/oasst'], 'train').lengths)"

For each split a folder holds SPLIT.bin (uint16 ids, one conversation after another, as nanoGPT
has it), SPLIT.mask.bin (uint8, 1 on supervised tokens) and SPLIT.idx.bin (int64, where each
conversation starts, and the end). meta.json is written last: a folder without it is not read.
"""
import contextlib
import hashlib
import json
import os

import numpy as np

from configurator import REPOSITORY, UserError
from core.conversation import TEMPLATES
from core.files import only_writer, reading, write_whole

FORMAT_VERSION = 1
DTYPES = {'.bin': np.uint16, '.mask.bin': np.uint8, '.idx.bin': np.int64}
# What meta.json counts in each split.
COUNTS = ('conversations', 'tokens', 'supervised_tokens')


def write(folder, splits, meta):
    """Write a prepared data set; returns meta with the counts added.

    splits: {name: [(ids, mask), …]}, two arrays (n,) for each conversation.
    """
    # The bytes of each file, and what meta.json says about them.
    files = {}
    counts = {}
    for split, conversations in splits.items():
        lengths = [len(ids) for ids, _ in conversations]
        arrays = {'.bin': [ids for ids, _ in conversations],
                  '.mask.bin': [mask for _, mask in conversations],
                  '.idx.bin': [np.cumsum([0, *lengths])]}
        digests = b''
        for ending, dtype in DTYPES.items():
            # [] is for a split without conversations. It is float64, hence "unsafe".
            parts = [[], *arrays[ending]]
            data = np.concatenate(parts, dtype=dtype, casting='unsafe').tobytes()
            digests += hashlib.sha256(data).digest()
            files[split + ending] = data
        n_supervised = files[split + '.mask.bin'].count(1)
        counts[split] = dict(zip(COUNTS, (len(lengths), sum(lengths), n_supervised)))
        counts[split]['sha256'] = hashlib.sha256(digests).hexdigest()
    meta = {'format_version': FORMAT_VERSION, **meta, 'splits': counts}
    # It is removed first and comes last: a folder without it is not read.
    files['meta.json'] = json.dumps(meta, indent=1).encode()
    with only_writer(folder):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, 'meta.json'))
        for name, data in files.items():
            with write_whole(os.path.join(folder, name), 'wb') as file:
                file.write(data)
    return meta


def find_folders(dataset, data_dir):
    """The folders of data sets, a text of names with commas between them.

    They are looked for in data_dir, here and then beside the scripts.
    """
    folders = []
    for name in dataset.split(','):
        folder = os.path.join(data_dir, name.strip())
        beside = os.path.join(REPOSITORY, folder)
        if not os.path.isdir(folder) and os.path.isdir(beside):
            folder = beside
        folders.append(folder)
    return folders


def read_meta(folder):
    """meta.json of a prepared folder, a dict."""
    path = os.path.join(folder, 'meta.json')
    with reading(path, 'Prepare the data first, for example: python data/oasst/prepare.py'):
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        version = meta['format_version']
        template = meta['template']
        if version != FORMAT_VERSION:
            raise ValueError(f'format {version!r}, this code reads {FORMAT_VERSION}')
        if template not in TEMPLATES:
            raise ValueError(f'template {template!r}, known are {", ".join(TEMPLATES)}')
        return meta


def fingerprint(meta):
    """Hash of what meta.json says of the token files, their hashes included."""
    splits = json.dumps(meta['splits'], sort_keys=True)
    return hashlib.sha256(splits.encode()).hexdigest()


class Split:
    """One split of one or more prepared folders: conversation i -> (ids, loss mask).

    lengths, n_supervised: (conversations,) int64. loss_on='all' supervises every token.
    UserError if files are missing or disagree, or if they hold ids beyond vocab_size.
    """

    def __init__(self, folders, split, loss_on='response', vocab_size=2 ** 16):
        self.name = split
        parts = [open_split(folder, split, vocab_size) for folder in folders]
        self.ids, self.mask, starts = parts[0]
        self.lengths = np.diff(starts)
        if len(parts) > 1:
            # Several data sets are mixed: one after another, in memory.
            self.ids = np.concatenate([ids for ids, _, _ in parts])
            self.mask = np.concatenate([mask for _, mask, _ in parts])
            self.lengths = np.concatenate([np.diff(starts) for _, _, starts in parts])
        if loss_on == 'all':
            self.mask = np.ones_like(self.mask)
        self.starts = np.cumsum([0, *self.lengths])
        # The first token of a conversation is never a target: nothing stands before it.
        self.n_supervised = np.zeros(0, np.int64)
        if len(self):
            firsts = self.starts[:-1]
            self.n_supervised = np.add.reduceat(self.mask, firsts, dtype=np.int64)
            self.n_supervised -= self.mask[firsts]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        span = slice(self.starts[i], self.starts[i + 1])
        return self.ids[span], self.mask[span]


def open_split(folder, split, vocab_size):
    """(ids, mask, starts): memory maps of one split, checked against meta.json."""
    counts = read_meta(folder)['splits'].get(split)
    if not counts:
        raise UserError(f'{folder} has no split {split!r}. Prepare it again with a part set '
                        'aside for it.')
    arrays = []
    for ending, dtype in DTYPES.items():
        path = os.path.join(folder, split + ending)
        with reading(path, 'Prepare the folder again.'):
            # An empty file cannot be mapped.
            size = os.path.getsize(path)
            arrays.append(np.memmap(path, dtype, mode='r') if size else np.zeros(0, dtype))
    ids, mask, starts = arrays
    expected = [counts[key] for key in COUNTS]
    found = [len(starts) - 1, len(ids), np.count_nonzero(mask)]
    whole = (found == expected and len(mask) == len(ids)
             and starts[0] == 0 and starts[-1] == len(ids))
    if not whole or (np.diff(starts) <= 0).any():
        raise UserError(f'the files of split {split!r} in {folder} disagree with meta.json. '
                        'Prepare the folder again.')
    if (ids >= vocab_size).any():
        raise UserError(f'{folder}/{split}.bin has the id {ids.max()}, the vocabulary only '
                        f'{vocab_size} tokens. Prepare the folder again.')
    return ids, mask, starts
