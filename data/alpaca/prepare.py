"""Rows of instruction, input and output -> token files: four published sets, or your own.

    python data/alpaca/prepare.py                                              # Stanford's 52,002
    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5    # the book's 1,100
    python data/alpaca/prepare.py --input=rows.jsonl --out_dir=data/mine --template=xml

A `history` of [question, answer] pairs becomes earlier turns; a `system` text is put before the
first question. A hash of the first question decides the split, so that none is in two splits.
--split and --train_rows decide by position instead, as published runs do.
Sources: Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, and those in SOURCES.
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
EXPECTED = 'Expected JSON lines or one array, of rows with instruction, input and output.'
# Inputs that say there is none, such as "No input", "<noinput>." and "N/A": 676 of Stanford's.
MEANS_NONE = re.compile(
    r'[\W_]*(no[\s_-]*inputs?( (is )?(required|needed|necessary|provided|given|available))?'
    r'|none|n/?a|not applicable|null)[\W\d_]*', re.IGNORECASE)


@dataclass(frozen=True)
class Config:
    source: Literal[tuple(SOURCES)] = 'alpaca'  # which of them to download, once
    input: str = ''             # a local file to read instead: an array or lines, may be gzipped
    out_dir: str = ''           # where the token files go; '' is data/SOURCE, or data/mine
    report: bool = False        # also write report.html there, a page about the data
    template: Literal[tuple(TEMPLATES)] = 'alpaca'  # how rows are written
    tokenizer: str = 'gpt2'     # gpt2, or the folder of a checkpoint with another vocabulary
    max_tokens: Count = 1024    # of a row
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of an answer that is, or nothing
    val_fraction: Fraction = 0.05  # share of the prompts for validation
    test_fraction: Fraction = 0.0  # share of the prompts for a test split
    seed: Seed = 1337           # decides which prompts those are
    # the split by position, as published runs have it: a prompt may be in several splits
    split: str = ''             # percentages for train/test/val, such as 85/10/5
    train_rows: Natural = 0     # rows to train on; then come val_rows, and the rest is test
    val_rows: Natural = 1000    # only with train_rows
    shuffle_seed: Annotated[int, Range(-1)] = -1  # first shuffle as datasets does; -1 does not


def text_of(value):
    """The value of a field as text: '' for null, and for NaN, which pandas writes."""
    if value is None or value != value:
        return ''
    if not isinstance(value, str):
        raise TypeError(f'found {str(value)[:40]!r}, expected text')
    return value


def read_row(record):
    """Return (turns, why they are left out) of an object."""
    # Some data sets say context and response.
    context = text_of(record.get('input', record.get('context')))
    output = text_of(record['output'] if 'output' in record else record['response'])
    instruction = text_of(record['instruction'])
    if not context.strip() or MEANS_NONE.fullmatch(context):
        context = ''
    turns = []
    for question, answer in record.get('history') or []:
        turns.append(Turn('user', text_of(question)))
        turns.append(Turn('assistant', text_of(answer)))
    turns.append(Turn('user', instruction, context))
    turns.append(Turn('assistant', output))
    system = text_of(record.get('system'))
    if system.strip():
        turns[0] = turns[0]._replace(text=f'{system}\n\n{turns[0].text}')
    drop = ''
    if not output.strip():
        drop = 'empty output'
    elif not instruction.strip():
        drop = 'empty instruction'
    return turns, drop


def prompt_of(turns):
    """The first message, without case and without differences in white space."""
    text = ' '.join(turns[0].text.split())
    context = ' '.join(turns[0].context.split())
    return f'{text}\n{context}'.casefold()


def split_by_position(n, config):
    """Return the splits of n rows."""
    if config.split:
        shares = [int(share) for share in re.findall(r'\d+', config.split)]
        if len(shares) != 3 or sum(shares) != 100:
            raise UserError(f'split={config.split!r}: expected percentages for train/test/val, '
                            'as in 85/10/5.')
        n_train = int(n * (shares[0] / 100))
        n_test = int(n * (shares[1] / 100))
        sizes = {'train': n_train, 'test': n_test, 'val': n - n_train - n_test}
    else:
        n_test = n - config.train_rows - config.val_rows
        if n_test < 0:
            raise UserError(f'train_rows={config.train_rows} and val_rows={config.val_rows} are '
                            f'more than the {n:,} rows. Use fewer.')
        sizes = {'train': config.train_rows, 'val': config.val_rows, 'test': n_test}
    splits = np.repeat(list(sizes), list(sizes.values()))
    if config.shuffle_seed >= 0:
        order = np.random.default_rng(config.shuffle_seed).permutation(n)
        # Place i is taken by row order[i].
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
        splits = [common.split_by_hash(prompt_of(turns), config.seed, **shares)
                  for turns, _ in rows]
    examples = [common.Example(split, *row) for split, row in zip(splits, rows)]
    name = source.about['name']
    if name not in SOURCES:
        name = 'mine'
    folder = config.out_dir or os.path.join(os.path.dirname(HERE), name)
    recipe = RECIPES.get(name, common.OWN_DATA)
    common.export(examples, source, config, folder, recipe, split_rule=rule)


if __name__ == '__main__':
    configurator.run(main)
