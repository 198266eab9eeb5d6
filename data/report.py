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
from configurator import Seed, UserError
from core import tokenfile
from core import tokenizer as tokenizers
from core.files import reading, write_whole
from formats.page import render

SHOWN = 20  # conversations
# The most frequent ones; the others are added up.
LANGUAGES = 12
COLUMNS = 40  # in the histogram, at most

# Why a conversation was left out, by the names that prepare.py gives the reasons.
REASONS = {
    'language': 'a message is in a language that --lang leaves out',
    'deleted': 'a message was deleted by its author or a moderator',
    'review_result': 'a message did not pass review',
    'empty text': 'a message has no text',
    'synthetic': 'a model wrote a message, and --synthetic=False leaves such out',
    'roles': 'user and assistant do not take turns',
    'top_k': 'the reply is not among the best --top_k',
    'repeated': 'the same conversation came before',
    'too long': 'no answer fits into max_tokens, or not even its beginning',
    'template heading': 'a message contains a heading of the template',
    'cannot be encoded': 'it has over 100,000 characters of white space in a row',
    'half a surrogate pair': 'a message is not valid Unicode',
    'empty output': 'there is nothing to learn',
    'empty instruction': 'there is no question',
    'empty message': 'a message has no text',
    'no question': 'there is no message of a user',
    'no answer': 'there is nothing to learn',
    'tool calls': 'it calls tools, for which no template has a place',
    'parts not text': 'a message has parts that are not text, such as images',
    'weight 0': 'a message is marked as one not to learn',
}


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


def nice_numbers():
    """Yield 1, 2, 5, 10, 20, 50, ..."""
    for power in range(18):
        for digit in (1, 2, 5):
            yield digit * 10 ** power


def histogram(lengths, supervised):
    """The Columns for conversations with these lengths and numbers of supervised tokens."""
    longest = int(lengths.max())
    # A few conversations that are far longer than the others share the last column.
    end = min(longest, max(1, int(np.quantile(lengths, 0.995) * 1.5)))
    # Columns start at multiples of a nice number.
    width = next(width for width in nice_numbers() if end // width < COLUMNS)
    n = end // width + 1
    index = np.minimum(lengths // width, n - 1)
    conversations = np.bincount(index, minlength=n)
    n_tokens = np.bincount(index, lengths, n)
    n_supervised = np.bincount(index, supervised, n)
    columns = []
    for i in range(n):
        first = i * width
        last = first + width - 1
        if i == n - 1:
            last = max(last, longest)
        share = n_supervised[i] / max(1, n_tokens[i])
        columns.append(Column(i, first, last, int(conversations[i]), float(share)))
    return columns


def ticks_of(columns):
    """The axis below the Columns: [(per cent of the width, tokens)]."""
    end = len(columns) * columns[1].first
    step = next(step for step in nice_numbers() if end / step < 6)
    return [(round(100 * tokens / end, 2), tokens) for tokens in range(0, end + 1, step)]


def remark_on(columns):
    """A sentence about the highest of the Columns, and one about the last if it holds outliers."""
    top = max(columns, key=lambda column: column.conversations)
    remark = (f'The highest bar: {top.conversations:,} conversations '
              f'of {top.first:,} to {top.last:,} tokens.')
    last = columns[-1]
    if last.last - last.first > columns[0].last:
        remark += f' The last bar holds all longer ones, up to {last.last:,} tokens.'
    return remark


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


def is_text(data):
    """Whether the bytes are whole characters."""
    try:
        data.decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True


def tokens_of(ids, mask, tokenizer):
    """The conversation as a list of Tokens."""
    tags = set(tokenizer.special.values())
    found = []
    # Ids that do not make up whole characters yet.
    group = []

    def finish(supervised, tag=False):
        if group:
            found.append(Token(tokenizer.decode(group), list(group), supervised, tag))
            group.clear()

    before = False
    # A token may hold a part of a character: tokens are collected until their bytes are whole.
    for i, supervised in zip(ids.tolist(), mask.astype(bool).tolist()):
        if i in tags or supervised != before:
            # What is left is half a character.
            finish(before)
        group.append(i)
        if i in tags or is_text(tokenizer.decode_bytes(group)):
            finish(supervised, i in tags)
        before = supervised
    finish(before)
    return found


# Characters that a browser does not show, or that change the direction of what follows.
# The pictures that Unicode has for them.
MARKS = {code: chr(0x2400 + code) for code in range(32)}
MARKS |= {ord('\n'): '<s>↵</s>\n', ord('\t'): '<s>→</s>\t', 0x7f: '␡'}
for code in (0x200e, 0x200f, *range(0x202a, 0x202f), *range(0x2066, 0x206a)):
    MARKS[code] = f'<s>U+{code:04X}</s>'


def visible(text):
    """The text as HTML, with marks in the place of characters that cannot be seen."""
    return markupsafe.Markup(html.escape(text).translate(MARKS))


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


def languages_of(meta):
    """[(language, how many conversations)], the rare ones added up."""
    found = largest_first(meta.get('languages', {}))
    others = sum(n for _, n in found[LANGUAGES:])
    found = found[:LANGUAGES]
    if others:
        found.append(('others', others))
    return found


def page(folder, seed):
    """The page about a prepared folder, as bytes."""
    meta = tokenfile.read_meta(folder)
    tokenizer = tokenizers.from_state({'tags': True, **meta['tokenizer']})
    splits = [tokenfile.Split([folder], name, vocab_size=tokenizer.vocab_size)
              for name in meta['splits']]
    splits = [split for split in splits if len(split)]
    if not splits:
        raise UserError(f'{folder} holds no conversations. Prepare it again.')
    lengths = np.concatenate([split.lengths for split in splits])
    supervised = np.concatenate([split.n_supervised for split in splits])
    columns = histogram(lengths, supervised)
    # What is missing in meta.json is left out of the page; a wrong type is an error, see write.
    source = meta.get('source', {})
    return render(
        'dataset.html', meta=meta, source=source, options=meta.get('options', {}),
        name=source.get('name') or os.path.basename(os.path.abspath(folder)),
        kept=len(lengths), seen=meta.get('seen', len(lengths)),
        n_tokens=int(lengths.sum()), n_supervised=int(supervised.sum()),
        median=int(np.median(lengths)), longest=int(lengths.max()),
        columns=columns, ticks=ticks_of(columns), remark=remark_on(columns),
        fitting=fitting(lengths), splits=splits, languages=languages_of(meta),
        dropped=[pair for pair in largest_first(meta.get('dropped', {})) if pair[1]],
        reasons=REASONS, shown=examples(splits[0], tokenizer, seed), seed=seed, visible=visible)


def write(folder, seed):
    """Write FOLDER/report.html; returns its path."""
    # meta.json may hold anything: whatever that leads to becomes one line.
    with reading(os.path.join(folder, 'meta.json'), 'Prepare the folder again.'):
        text = page(folder, seed)
    path = os.path.join(folder, 'report.html')
    with write_whole(path, 'wb') as file:
        file.write(text)
    return path


def main(argv):
    config = configurator.load(Config, argv)
    print(f'what the model will learn, to look at: {write(config.folder, config.seed)}')


if __name__ == '__main__':
    configurator.run(main)
