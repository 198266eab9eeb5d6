"""Rows of instruction, input and output -> token files: published ones, or your own.

    python data/alpaca/prepare.py                   # Stanford's 52,002
    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5
    python data/alpaca/prepare.py --input=rows.jsonl --template=xml

A `history` of [question, answer] pairs becomes earlier turns; a `system` text goes before
the first question. A hash of the first question decides the split: none is in two. With
--split and --train_rows the position decides, as published.
Source: Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca
"""
import os
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

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
        'url': f'{GITHUB}/tatsu-lab/stanford_alpaca/'
               '761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json',
        'sha256': '2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419',
        'licence': 'CC-BY-NC-4.0'},
    # Its page says CC-BY-4.0, but these are Stanford's rows, corrected.
    'alpaca-cleaned': {
        'url': f'{DATASETS}/yahma/alpaca-cleaned/resolve/'
               '12567cabf869d7c92e573c7c783905fc160e9639/alpaca_data_cleaned.json',
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
RECIPES = {'alpaca': 'alpaca', 'alpaca-cleaned': 'alpaca',
           'instruction-data': 'instruction_data', 'open-instruct': 'open_instruct'}
EXPECTED = 'Expected JSON lines or an array of rows with instruction and output.'
# Such as "No input", "<noinput>." and "N/A": 676 of Stanford's.
NO_INPUT = r'no[\s_-]*inputs?( (is )?(required|needed|necessary|provided|given|available))?'
MEANS_NONE = rf'(?i)[\W_]*({NO_INPUT}|none|n/?a|not applicable|null)[\W\d_]*'


@dataclass(frozen=True)
class Config:
    source: Literal[tuple(SOURCES)] = 'alpaca'  # what to download, once
    input: str = ''  # read this file instead, which may be gzipped
    out_dir: str = ''  # for the token files; '' is data/SOURCE, or data/mine
    report: bool = False  # also write a page about the data, report.html
    template: Literal[tuple(TEMPLATES)] = 'alpaca'  # how rows are written
    tokenizer: str = 'gpt2'  # or a checkpoint's folder
    max_tokens: Count = 1024  # of a row; see too_long
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of a longer one, or drop it
    val_fraction: Fraction = 0.05  # share of the prompts
    test_fraction: Fraction = 0.0  # the same for a test split
    seed: Seed = 1337  # decides which prompts those are
    # By position, as published: a prompt may be in several splits.
    split: Literal['', '85/10/5'] = ''  # per cent for train/test/val
    train_rows: Natural = 0  # then come val_rows; the rest is test
    val_rows: Natural = 1000  # only with train_rows
    shuffle_seed: Annotated[int, Range(-1)] = -1  # shuffle before; -1 does not


def text_of(value):
    """A field as text: '' for null, and for NaN, which pandas writes."""
    if value is None or value != value:
        return ''
    if not isinstance(value, str):
        raise TypeError(f'found {str(value)[:40]!r}, expected text')
    return value


def read_row(record):
    """(turns, why they are left out) of a row."""
    instruction = text_of(record['instruction'])
    # Some data sets say context and response.
    context = text_of(record.get('input', record.get('context')))
    output = text_of(record.get('output', record.get('response')))
    if not context.strip() or re.fullmatch(MEANS_NONE, context):
        context = ''
    turns = []
    for question, answer in record.get('history') or []:
        turns.append(Turn('user', text_of(question)))
        turns.append(Turn('assistant', text_of(answer)))
    turns.append(Turn('user', instruction, context))
    turns.append(Turn('assistant', output))
    system = text_of(record.get('system'))
    if system.strip():
        first = f'{system}\n\n{turns[0].text}'
        turns[0] = turns[0]._replace(text=first)
    if not output.strip():
        return turns, 'empty output'
    if not instruction.strip():
        return turns, 'empty instruction'
    return turns, ''


def prompt_of(turns):
    """The first message, whatever its case and its white space."""
    text = ' '.join(turns[0].text.split())
    context = ' '.join(turns[0].context.split())
    return f'{text}\n{context}'.casefold()


def split_by_position(n, config):
    """The splits of n rows."""
    if config.split:
        sizes = {'train': int(n * 0.85), 'test': int(n * 0.1)}
        last = 'val'
    else:
        sizes = {'train': config.train_rows, 'val': config.val_rows}
        last = 'test'
    sizes[last] = n - sum(sizes.values())
    if sizes[last] < 0:
        raise UserError(f'train_rows and val_rows are more than the {n:,} rows.')
    splits = np.repeat(list(sizes), list(sizes.values()))
    if config.shuffle_seed >= 0:
        # As datasets does: place i is taken by row order[i].
        rng = np.random.default_rng(config.shuffle_seed)
        order = rng.permutation(n)
        splits[order] = splits.copy()
    return splits.tolist()


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, SOURCES, HERE)
    rows = list(source.records(read_row, EXPECTED))
    if config.split or config.train_rows:
        rule = 'by position'
        splits = split_by_position(len(rows), config)
    else:
        rule = 'hash of the normalised prompt'
        shares = {'val': config.val_fraction, 'test': config.test_fraction}
        prompts = [prompt_of(turns) for turns, _ in rows]
        splits = [common.split_by_hash(key, config.seed, **shares) for key in prompts]
    examples = [common.Example(split, *row) for split, row in zip(splits, rows)]
    # A published file has its own folder and recipe.
    name = source.about['name']
    recipe = common.OWN_DATA
    if name in SOURCES:
        recipe = f'config/finetune_{RECIPES[name]}.py'
    else:
        name = 'mine'
    folder = config.out_dir or os.path.join(os.path.dirname(HERE), name)
    common.export(examples, source, config, folder, recipe, split_rule=rule)


if __name__ == '__main__':
    configurator.run(main)
