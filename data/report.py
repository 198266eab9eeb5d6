"""A page about a prepared data set: what the model will learn, and what was left out.

    python data/oasst/prepare.py --report
    python data/report.py --folder=data/oasst       # for a folder that is prepared already

Everything comes from the token files and meta.json. formats/dataset.html is the page's form.
"""
import html
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import markupsafe  # comes with jinja2
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
NICE = [digit * 10 ** power for power in range(9) for digit in (1, 2, 5)]  # 1, 2, 5, 10, 20, ...


@dataclass(frozen=True)
class Config:
    folder: str = 'data/oasst'  # with the token files; report.html goes there
    seed: Seed = 1337           # which conversations are shown


# ---- how long the conversations are ----

class Column(NamedTuple):
    """A bar of the histogram: conversations that have from `first` to `last` tokens."""
    index: int
    first: int
    last: int
    conversations: int
    supervised: float  # share of their tokens


def histogram(lengths, supervised):
    """The Columns for conversations with these lengths and numbers of supervised tokens."""
    longest = int(lengths.max())
    width = next(width for width in NICE if longest // width < COLUMNS)
    index = lengths // width
    conversations = np.bincount(index)
    n_tokens = np.bincount(index, lengths)
    n_supervised = np.bincount(index, supervised)
    columns = []
    for i in range(len(conversations)):
        first = i * width
        share = n_supervised[i] / max(1, n_tokens[i])
        columns.append(Column(i, first, first + width - 1, int(conversations[i]), float(share)))
    return columns


def ticks_of(columns):
    """The axis below the Columns: [(per cent of the width, tokens)]."""
    end = columns[-1].last + 1
    step = next(step for step in NICE if end / step < 6)
    return [(round(100 * tokens / end, 2), tokens) for tokens in range(0, end + 1, step)]


def fitting(lengths):
    """[(row size, how many conversations fit)], down from the size that holds them all."""
    found = []
    for size in (128, 256, 512, 1024):
        # The last token is only a target.
        n = int((lengths - 1 <= size).sum())
        found.append((f'{size:,}\u00a0positions', n))
        if n == len(lengths):
            break
    return found[::-1]


# ---- conversations, token by token ----

class Token(NamedTuple):
    """A token, or several that only together make up whole characters."""
    text: str
    ids: list
    supervised: bool
    tag: bool


def tokens_of(ids, mask, tokenizer):
    """The conversation as a list of Tokens."""
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
            found.append(Token(text, group, bool(mask[i]), group[0] in tags))
            group = []
    return found


def visible(text):
    """The text as HTML, with marks for line breaks and tabs."""
    text = html.escape(text).replace('\n', '<s>↵</s>\n').replace('\t', '<s>→</s>\t')
    return markupsafe.Markup(text)


def examples(split, tokenizer, seed):
    """SHOWN conversations of the split, drawn by the seed."""
    n = min(SHOWN, len(split))
    chosen = np.random.default_rng(seed).choice(len(split), n, replace=False)
    found = []
    for i in sorted(chosen.tolist()):
        ids, mask = split[i]
        found.append({'split': split.name, 'index': i, 'n_tokens': len(ids),
                      'n_supervised': int(mask.sum()), 'tokens': tokens_of(ids, mask, tokenizer)})
    return found


# ---- the page ----

def largest_first(counts):
    """[(name, number)] of a dict of numbers."""
    return sorted(counts.items(), key=lambda pair: -pair[1])


def page(folder, seed):
    """The page about a prepared folder, as bytes."""
    meta = tokenfile.read_meta(folder)
    tokenizer = tokenizers.from_state({'tags': True, **meta['tokenizer']})
    splits = [tokenfile.Split([folder], name, vocab_size=tokenizer.vocab_size)
              for name in meta['splits']]
    splits = [split for split in splits if len(split)]
    lengths = np.concatenate([split.lengths for split in splits])
    supervised = np.concatenate([split.n_supervised for split in splits])
    columns = histogram(lengths, supervised)
    # What is missing in meta.json is left out of the page.
    source = meta.get('source', {})
    return render(
        'dataset.html', meta=meta, source=source, options=meta.get('options', {}),
        name=source.get('name') or os.path.basename(os.path.abspath(folder)),
        kept=len(lengths), seen=meta.get('seen', len(lengths)),
        n_tokens=int(lengths.sum()), n_supervised=int(supervised.sum()),
        median=int(np.median(lengths)), longest=int(lengths.max()),
        columns=columns, ticks=ticks_of(columns), fitting=fitting(lengths), splits=splits,
        languages=largest_first(meta.get('languages', {})),
        dropped=largest_first(meta.get('dropped', {})),
        shown=examples(splits[0], tokenizer, seed), seed=seed, visible=visible)


def main(argv):
    config = configurator.load(Config, argv)
    with reading(os.path.join(config.folder, 'meta.json'), 'Prepare the folder again.'):
        text = page(config.folder, config.seed)
    path = os.path.join(config.folder, 'report.html')
    with write_whole(path, 'wb') as file:
        file.write(text)
    print(f'what the model will learn, to look at: {path}')


if __name__ == '__main__':
    configurator.run(main)
