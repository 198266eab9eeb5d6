"""Rows of instruction, input and output -> token files: four published sets, or your own.

    python data/alpaca/prepare.py                                              # Stanford's 52,002
    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5    # the book's 1,100
    python data/alpaca/prepare.py --input=rows.jsonl --out_dir=data/mine --template=xml

A `history` of [question, answer] pairs becomes earlier turns; a `system` text is put before the
first question. A hash of its first question decides the split of a row, so that none is in two
splits. --split and --train_rows decide by position instead, as published runs do.
Sources: Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, and those in SOURCES.
"""
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import configurator
from configurator import Count, Fraction, Natural, Range, Seed, UserError
from core.conversation import TEMPLATES, Turn
from data import common

GITHUB = 'https://raw.githubusercontent.com'
DATASETS = f'{common.HUB}/datasets'
SOURCES = {
    'alpaca': {
        'url': f'{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/'
               'alpaca_data.json',
        'sha256': '2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419',
        'licence': 'CC-BY-NC-4.0'},
    # Its page says CC-BY-4.0, but these are Stanford's rows, corrected.
    'alpaca-cleaned': {
        'url': f'{DATASETS}/yahma/alpaca-cleaned/resolve/12567cabf869d7c92e573c7c783905fc160e9639/'
               'alpaca_data_cleaned.json',
        'sha256': 'bd844b8247a0f543804b6ce0882b0aaec4bbf5e8d66167df6213a0f1e4fe878b',
        'licence': 'CC-BY-NC-4.0'},
    'instruction-data': {
        'url': f'{GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/'
               'ch07/01_main-chapter-code/instruction-data.json',
        'sha256': '7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944',
        'licence': 'Apache-2.0'},
    # Its page says Apache-2.0, but 51,759 of its 222,650 rows are Stanford's.
    'open-instruct': {
        'url': f'{DATASETS}/hakurei/open-instruct-v1/resolve/'
               '403db13fd46bfc7c3333052f96cb621c8a79de7c/instruct_data.json',
        'sha256': '63779ed0fb8c037355dd8079eb70cef4b92086b5340a458e1b21e0b3d7964876',
        'licence': 'CC-BY-NC-4.0'},
}
RECIPES = {'alpaca': 'config/finetune_alpaca.py', 'alpaca-cleaned': 'config/finetune_alpaca.py',
           'instruction-data': 'config/finetune_instruction_data.py',
           'open-instruct': 'config/finetune_open_instruct.py'}

# Inputs that say there is none, such as "No input", "<noinput>." and "N/A": 676 of Stanford's.
MEANS_NONE = re.compile(
    r'[\W_]*(no[\s_-]*inputs?( (is )?(required|needed|necessary|provided|given|available))?'
    r'|none|n/?a|not applicable|null)[\W\d_]*', re.IGNORECASE)


@dataclass(frozen=True)
class Config:
    source: Literal[tuple(SOURCES)] = 'alpaca'  # which of them to download, once
    input: str = ''             # a local file to read instead: an array or lines, may be gzipped
    out_dir: str = ''           # where the token files go; '' is data/SOURCE
    report: bool = False        # also write report.html there, a page about the data
    template: Literal[tuple(TEMPLATES)] = 'alpaca'  # how rows are written
    tokenizer: str = 'gpt2'     # gpt2, or a folder or tokenizer.json in transformers' format
    max_tokens: Count = 1024    # of a row
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of an answer that is, or nothing
    dedup: bool = False         # drop a row if its prompt and output were seen before
    # the split by a hash of the prompt
    val_fraction: Fraction = 0.05  # share of the prompts for validation
    test_fraction: Fraction = 0.0  # share of the prompts for a test split
    seed: Seed = 1337           # decides which prompts those are
    # the split by position, as published runs have it: a prompt may be in several splits
    split: str = ''             # percentages for train/test/val, such as 85/10/5
    train_rows: Natural = 0     # rows to train on; then come val_rows, and the rest is test
    val_rows: Natural = 1000    # only with train_rows
    shuffle_seed: Annotated[int, Range(-1)] = -1  # first shuffle as datasets does; -1 does not

    @property
    def percentages(self):
        return [int(part) for part in re.findall(r'\d+', self.split)]

    @property
    def by_position(self):
        return bool(self.split or self.train_rows)

    def problems(self):
        if self.split and (len(self.percentages) != 3 or sum(self.percentages) != 100):
            yield f'split={self.split!r}: expected percentages for train/test/val, as in 85/10/5.'
        if bool(self.split) + bool(self.train_rows) + bool(self.test_fraction) > 1:
            yield 'split, train_rows and test_fraction are three ways to split. Use one of them.'
        if self.shuffle_seed >= 0 and not self.by_position:
            yield 'shuffle_seed needs a split by position: --split=85/10/5 or --train_rows=N.'


class Row(NamedTuple):
    prompt: str  # the first message, without case and without differences in white space
    turns: list
    drop: str  # why it is left out, or ''


def read_row(record, counts):
    """Return the Row of an object, and count what is odd about it."""
    counts['rows'] += 1
    drop = ''
    used = ['history', 'system']
    texts = []
    for field, other in (('instruction', ''), ('input', 'context'), ('output', 'response')):
        name = field
        if field not in record and other in record:
            name = other
            counts[f'  {field} under {other!r}'] += 1
        used.append(name)
        text = record.get(name, '')
        if name not in record:
            counts[f'  no field {field}'] += 1
        elif text is None or text != text:  # pandas writes NaN
            counts[f'  {field} is null'] += 1
            text = ''
        elif not isinstance(text, str):
            drop = drop or f'{field} not text'
            text = ''
        texts.append(text)
    instruction, context, output = texts
    if not output.strip():
        drop = drop or 'empty output'
    if not instruction.strip():
        drop = drop or 'empty instruction'
    if MEANS_NONE.fullmatch(context):
        counts['  input that means none'] += 1
        context = ''
    if not context.strip():
        context = ''
    turns = [Turn('user', instruction, context), Turn('assistant', output)]
    try:
        turns = read_history(record.get('history')) + turns
    except (AttributeError, TypeError, ValueError):
        drop = drop or 'history not pairs of text'
    if len(turns) > 2:
        counts['  with a history'] += 1
    # The rows of one conversation, which grows, are in the same split.
    first = turns[0]
    prompt = ' '.join(first.text.split()) + '\n' + ' '.join(first.context.split())
    system = record.get('system')
    if not isinstance(system, str):
        # Neither null nor NaN.
        if system and system == system:
            drop = drop or 'system not text'
    elif system.strip():
        counts['  with a system message'] += 1
        turns[0] = first._replace(text=f'{system}\n\n{first.text}')
    common.count_unused(record, used, counts)
    return Row(prompt.casefold(), turns, drop)


def read_history(history):
    """The turns of [[question, answer], ...], which may be null or NaN."""
    if not history or history != history:
        return []
    turns = []
    for question, answer in history:
        if not question.strip() or not answer.strip():
            raise ValueError
        turns += [Turn('user', question), Turn('assistant', answer)]
    return turns


def split_by_position(n, config):
    """Return the splits of n rows."""
    if config.split:
        train, test, _ = config.percentages
        n_train = int(n * (train / 100))
        n_test = int(n * (test / 100))
        sizes = {'train': n_train, 'test': n_test, 'val': n - n_train - n_test}
    else:
        n_test = n - config.train_rows - config.val_rows
        sizes = {'train': config.train_rows, 'val': config.val_rows, 'test': n_test}
        if n_test < 0:
            raise UserError(f'train_rows={config.train_rows} and val_rows={config.val_rows} are '
                            f'more than the {n:,} rows. Use fewer.')
    splits = np.repeat(list(sizes), list(sizes.values()))
    if config.shuffle_seed >= 0:
        order = np.random.default_rng(config.shuffle_seed).permutation(n)
        # Place i is taken by row order[i].
        splits[order] = splits.copy()
    return splits.tolist()


def count_prompts(rows, splits, names):
    """Return how many rows repeat a prompt, and how many of each split one of train."""
    used = [(row.prompt, split) for row, split in zip(rows, splits) if not row.drop]
    in_train = {prompt for prompt, split in used if split == 'train'}
    leaked = Counter(split for prompt, split in used if prompt in in_train)
    return {'rows_repeating_a_prompt': len(used) - len({prompt for prompt, _ in used}),
            'also_in_train': {name: leaked[name] for name in names if name != 'train'}}


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, SOURCES, HERE)
    name = source.about['name']
    folder = config.out_dir or os.path.join(os.path.dirname(HERE), name)
    if name not in SOURCES and not config.out_dir:
        raise UserError(f'{source.path} is none of the published files. Say where its token files '
                        'are to go, such as --out_dir=data/mine')
    rows = []
    seen = set()
    for row in source.records(lambda record: read_row(record, source.counts)):
        if config.dedup and not row.drop:
            texts = [' '.join(f'{turn.text}\n{turn.context}'.split()) for turn in row.turns[1:]]
            if (row.prompt, *texts) in seen:
                row = row._replace(drop='repeated')
            seen.add((row.prompt, *texts))
        rows.append(row)
    if config.by_position:
        rule = 'by position'
        splits = split_by_position(len(rows), config)
    else:
        rule = 'hash of the normalised prompt'
        shares = {'val': config.val_fraction, 'test': config.test_fraction}
        splits = [common.split_by_hash(row.prompt, config.seed, **shares) for row in rows]
    names = ['train', 'val']
    if config.by_position or config.test_fraction:
        names.append('test')
    prompts = count_prompts(rows, splits, names)
    print(f"{'rows that repeat a prompt':<28}{prompts['rows_repeating_a_prompt']:>12,}")
    for split, n in prompts['also_in_train'].items():
        print(f"{f'  in {split} and in train':<28}{n:>12,}")

    examples = []
    for number, (row, split) in enumerate(zip(rows, splits)):
        examples.append(common.Example(number, split, row.turns, drop=row.drop))
    recipe = RECIPES.get(name, common.OWN_DATA)
    common.export(examples, source, config, folder, names, recipe, split_rule=rule, prompts=prompts)


if __name__ == '__main__':
    configurator.run(main)
