"""A page about a prepared data set: what the model will learn, and what was left out.

    python data/oasst/prepare.py --report
    python data/report.py --folder=data/oasst       # for a folder that is prepared already

Its form is formats/dataset.html.
"""
import os
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import configurator
from configurator import Seed
from core import tokenfile
from core import tokenizer as tokenizers
from core.files import reading, write_whole
from formats.page import render

SHOWN = 20  # conversations
COLUMNS = 40  # in the histogram, at most
# 1, 2, 5, 10, 20, ...
NICE = [digit * 10 ** power for power in range(9) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Config:
    folder: str = 'data/oasst'  # prepared; report.html goes there
    seed: Seed = 1337  # which conversations are shown


def histogram(lengths, supervised):
    """The bars, dicts: a bar is for conversations of `first` to `last` tokens."""
    longest = int(lengths.max())
    width = next(width for width in NICE if longest // width < COLUMNS)
    index = lengths // width
    conversations = np.bincount(index).tolist()
    # An empty bar has no tokens.
    n_tokens = np.bincount(index, lengths).clip(1)
    shares = np.bincount(index, supervised) / n_tokens
    columns = []
    for i, share in enumerate(shares.tolist()):
        first = i * width
        columns.append({'index': i, 'first': first, 'last': first + width - 1,
                        'conversations': conversations[i], 'supervised': share})
    return columns


def ticks_of(columns):
    """The axis below the columns: [(per cent of the width, tokens)]."""
    end = columns[-1]['last'] + 1
    step = next(step for step in NICE if end / step < 6)
    return [(round(100 * at / end, 2), at) for at in range(0, end + 1, step)]


def tokens_of(ids, mask, tokenizer):
    """The conversation as dicts: of a token, or of some that share a character."""
    tags = set(tokenizer.special.values())
    found = []
    # Ids that do not make up whole characters yet.
    group = []
    for i in range(len(ids)):
        group.append(int(ids[i]))
        text = tokenizer.decode(group)
        is_last = i + 1 == len(ids) or mask[i + 1] != mask[i] or ids[i + 1] in tags
        # A character that is not whole ends in a replacement character.
        if is_last or not text.endswith('\ufffd'):
            is_tag = group[0] in tags
            found.append({'text': text, 'ids': group, 'supervised': bool(mask[i]),
                          'tag': is_tag})
            group = []
    return found


def examples(split, tokenizer, seed):
    """SHOWN conversations of the split, drawn by the seed."""
    rng = np.random.default_rng(seed)
    n = min(SHOWN, len(split))
    chosen = rng.choice(len(split), n, replace=False)
    found = []
    for i in sorted(chosen.tolist()):
        ids, mask = split[i]
        tokens = tokens_of(ids, mask, tokenizer)
        found.append({'split': split.name, 'index': i, 'n_tokens': len(ids),
                      'n_supervised': int(mask.sum()), 'tokens': tokens})
    return found


def page(folder, seed):
    """The page about a prepared folder."""
    meta = tokenfile.read_meta(folder)
    tokenizer = tokenizers.from_state({'tags': True, **meta['tokenizer']})
    splits = []
    for name in meta['splits']:
        split = tokenfile.Split([folder], name, vocab_size=tokenizer.vocab_size)
        if len(split):
            splits.append(split)
    lengths = np.concatenate([split.lengths for split in splits])
    supervised = np.concatenate([split.n_supervised for split in splits])
    columns = histogram(lengths, supervised)
    # How many conversations fit into a row
    fitting = []
    for size in (1024, 512, 256, 128):
        # The last token is only a target.
        n = int((lengths - 1 <= size).sum())
        fitting.append((f'{size:,}\u00a0positions', n))
    # What is missing in meta.json is left out of the page.
    source = meta.get('source', {})
    return render(
        'dataset.html', meta=meta, source=source, options=meta.get('options', {}),
        name=source.get('name') or os.path.basename(os.path.abspath(folder)),
        kept=len(lengths), seen=meta.get('seen', len(lengths)),
        n_tokens=int(lengths.sum()), n_supervised=int(supervised.sum()),
        median=int(np.median(lengths)), longest=int(lengths.max()),
        columns=columns, ticks=ticks_of(columns), fitting=fitting, splits=splits,
        dropped=Counter(meta.get('dropped')).most_common(),
        shown=examples(splits[0], tokenizer, seed), seed=seed)


def main(argv):
    config = configurator.load(Config, argv)
    with reading(os.path.join(config.folder, 'meta.json'), 'Prepare the folder again.'):
        text = page(config.folder, config.seed)
    path = os.path.join(config.folder, 'report.html')
    with write_whole(path) as file:
        file.write(text)
    print(f'what the model will learn, to look at: {path}')


if __name__ == '__main__':
    configurator.run(main)
