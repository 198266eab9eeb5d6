"""Rows of instruction, input and output -> token files: four published sets, or a file of your own.

    python data/alpaca/prepare.py                                              # Stanford's 52,002
    python data/alpaca/prepare.py --source=instruction-data --split=85/10/5    # the book's 1,100
    python data/alpaca/prepare.py --input=rows.jsonl --out_dir=data/mine --template=xml

A source is a JSON array or JSON lines, told apart by content, and read a block at a time, twice: once
to decide each row's split, once to encode it. By default a hash of the prompt decides, so that no
prompt stands in two splits; --split and --train_rows go by position instead, as published runs do.
Sources: https://github.com/tatsu-lab/stanford_alpaca (Taori et al. 2023), its cleaned form
https://github.com/gururise/AlpacaDataCleaned, https://github.com/rasbt/LLMs-from-scratch, chapter 7,
and https://huggingface.co/datasets/hakurei/open-instruct-v1
"""
import codecs
import hashlib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import configurator
from core import tokenizer
from configurator import UserError
from core.conversation import Turn
from data import download, pipeline, report
from data.pipeline import Unit

GITHUB, DATASETS = 'https://raw.githubusercontent.com', f'{download.HUB}/datasets'
SOURCES = {
    'alpaca': {
        'url': f'{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json',
        'bytes': 22_773_992, 'sha256': '2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419',
        'licence': 'CC-BY-NC-4.0', 'notice': 'not for commercial use',
        'next': 'config/finetune_alpaca.py'},
    'alpaca-cleaned': {  # 51,760 rows
        'url': f'{DATASETS}/yahma/alpaca-cleaned/resolve/12567cabf869d7c92e573c7c783905fc160e9639/'
               'alpaca_data_cleaned.json',
        'bytes': 44_307_561, 'sha256': 'bd844b8247a0f543804b6ce0882b0aaec4bbf5e8d66167df6213a0f1e4fe878b',
        'licence': 'CC-BY-4.0', 'notice': "so its page says; but it is Stanford's set corrected, and that is "
                                          'CC-BY-NC-4.0: not for commercial use',
        'next': 'config/finetune_alpaca.py --dataset=alpaca-cleaned --out_dir=out/alpaca-cleaned'},
    'instruction-data': {  # 1,100 rows
        'url': f'{GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/'
               'ch07/01_main-chapter-code/instruction-data.json',
        'bytes': 203_524, 'sha256': '7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944',
        'licence': 'Apache-2.0', 'notice': '',
        'next': 'config/finetune_instruction_data.py'},
    'open-instruct': {  # 222,650 rows; load_dataset of the whole repository gives 498,813, its parts twice
        'url': f'{DATASETS}/hakurei/open-instruct-v1/resolve/403db13fd46bfc7c3333052f96cb621c8a79de7c/'
               'instruct_data.json',
        'bytes': None,  # its page says 104 MB, no more exactly: the hash, also from there, decides
        'sha256': '63779ed0fb8c037355dd8079eb70cef4b92086b5340a458e1b21e0b3d7964876',
        'licence': 'Apache-2.0', 'notice': "so its page says; but 51,759 of its rows are Stanford's, and those are "
                                           'CC-BY-NC-4.0: not for commercial use',
        'next': 'config/finetune_open_instruct.py'},
}
TEMPLATES = ('alpaca', 'xml', 'plain')
BLOCK = 1 << 20  # bytes of a JSON array that are read at a time
LONGEST_ROW = 16 << 20  # characters
ROWS_PER_BLOCK = 500  # that a worker gets at a time


@dataclass(frozen=True)
class Config:
    source: str = 'alpaca'     # alpaca, alpaca-cleaned, instruction-data or open-instruct: downloaded once
    input: str = ''            # a local file to read instead: a JSON array, or .jsonl, plain or gzip
    out_dir: str = ''          # where the token files go; '' is data/SOURCE
    report: bool = False       # write a page about the data there too, report.html
    template: str = 'alpaca'   # alpaca, xml or plain
    tokenizer: str = 'gpt2'    # gpt2, or a folder or tokenizer.json in transformers' form
    max_tokens: int = 1024     # a longer row is dropped, and counted; none is cut
    dedup: bool = False        # drop a row whose prompt and output have both been seen before
    # the split by a hash of the prompt
    val_fraction: float = 0.05 # share of the prompts for validation
    test_fraction: float = 0.0 # share of the prompts for a test split
    seed: int = 1337           # of the hash
    # the splits by position, as published runs have them: one prompt may stand in several
    split: str = ''            # percent for train/test/val, such as 85/10/5
    train_rows: int = 0        # so many rows to train, val_rows to val, the rest to test
    val_rows: int = 1000       # with train_rows alone
    shuffle_seed: int = -1     # first shuffle as datasets' shuffle(seed) does; -1: in the file's order

    def problems(self):
        """What cannot work, a sentence each."""
        if self.source not in SOURCES:
            yield f'source={self.source!r}: expected one of {", ".join(SOURCES)}; or a file of your own: --input=FILE.'
        if self.template not in TEMPLATES:
            yield f'template={self.template!r}: expected one of {", ".join(TEMPLATES)}.'
        if self.max_tokens < 16:
            yield f'max_tokens={self.max_tokens} must be 16 or more.'
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            yield (f'val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must not be negative, '
                   'and together below 1.')
        if self.split and percentages(self.split) is None:
            yield f'split={self.split!r}: expected three percentages, train/test/val, that make 100: 85/10/5.'
        if self.split and self.train_rows:
            yield 'split and train_rows are two ways to say one thing: leave one of them out.'
        if min(self.train_rows, self.val_rows) < 0 or self.shuffle_seed < -1:
            yield (f'train_rows={self.train_rows} and val_rows={self.val_rows} must not be negative, '
                   f'shuffle_seed={self.shuffle_seed} not below -1.')
        if self.by_position and self.test_fraction:
            yield 'test_fraction belongs to the split by hash: leave it out, or split and train_rows.'
        if self.shuffle_seed >= 0 and not self.by_position:
            yield 'shuffle_seed belongs to the splits by position: add --split=85/10/5 or --train_rows=N.'

    @property
    def by_position(self):
        """Whether rows are split by where they stand rather than by their prompts."""
        return bool(self.split or self.train_rows)


def percentages(text):
    """'85/10/5' -> [85.0, 10.0, 5.0]; None for what is not three percentages that make 100."""
    try:
        parts = [float(part) for part in text.split('/')]
    except ValueError:
        return None
    return parts if len(parts) == 3 and min(parts) >= 0 and abs(sum(parts) - 100) < 1e-6 else None


def read_rows(path):
    """(where, object or None, what is wrong) for each row of a JSON array or of JSON lines.

    UserError for an array that is broken: what follows the break cannot be told apart any more.
    """
    with open(path, 'rb') as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b'['):
        for number, row in enumerate(read_array(path), 1):
            problem = '' if isinstance(row, dict) else f'found a {type(row).__name__}, expected an object'
            yield (f'row {number}', None, problem) if problem else (f'row {number}', row, '')
        return
    for block in pipeline.read_blocks(path):
        for number, row, problem in pipeline.parse_lines(*block):
            yield f'line {number}', row, problem


def read_text(path):
    """The file's text, a block at a time. UserError for what is not UTF-8."""
    decoder, n_bytes = codecs.getincrementaldecoder('utf-8-sig')(), 0
    with pipeline.opened(path) as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(f'{path} is not UTF-8 from about byte {n_bytes + error.start:,} on. '
                                'Nothing was written.') from None
            if not block:
                return
            n_bytes += len(block)
            yield text


def read_array(path):
    """The elements of a JSON array, of which no more than a block and an element are in memory."""
    blocks, decode, space = read_text(path), json.JSONDecoder().raw_decode, re.compile(r'[ \t\r\n]*')
    text, sign, n_rows, n_before = '', 0, 0, 0  # n_before: characters of the file before those of text
    while True:
        # One step: the sign before an element ([ or ,), the element, and the sign behind it, which must
        # be in memory too: what reads as 12 may be the beginning of 123.
        try:
            here = sign = space.match(text, sign).end()
            if not n_rows and text[sign] != '[':
                raise json.JSONDecodeError('Expecting [', text, sign)
            here = space.match(text, sign + 1).end()
            if not n_rows and text[here] == ']':
                sign = here
                break
            row, end = decode(text, here)
            here = space.match(text, end).end()
            if text[here] not in ',]':
                raise json.JSONDecodeError('Expecting , or ]', text, here)
        except (IndexError, ValueError, RecursionError) as error:
            # An error close to the end may only mean that the rest is not here yet; so may a string
            # without an end, which is reported at its beginning.
            what = getattr(error, 'msg', None) or str(error)[:60]
            where = getattr(error, 'pos', here)
            unfinished = where > len(text) - 16 or what.startswith('Unterminated')
            more, n_here = [], len(text) - sign
            # As much again as is here already: read anew for each block, a long row would cost its square.
            while unfinished and n_here < LONGEST_ROW and sum(map(len, more)) <= n_here:
                if (block := next(blocks, None)) is None:
                    break
                more.append(block)
            if not more:
                what = 'the file ends here' if isinstance(error, IndexError) else what
                raise UserError(f'{path}: the JSON array is broken in row {n_rows + 1}, at character '
                                f'{n_before + where + 1:,}: {what}. Nothing was written.') from None
            n_before += sign
            text, sign = text[sign:] + ''.join(more), 0
            continue
        yield row
        sign, n_rows = here, n_rows + 1
        if text[sign] == ']':
            break
    if text[sign + 1:].strip() or any(block.strip() for block in blocks):
        raise UserError(f'{path}: something follows the end of the JSON array. Nothing was written.')


class Row(NamedTuple):
    """A row in our terms. context: what Alpaca calls input, '' for none. drop: '' or why it is not used."""
    instruction: str
    context: str
    output: str
    drop: str
    quirks: list  # for the table


FIELDS = {'instruction': ('instruction',), 'input': ('input', 'context'), 'output': ('output', 'response')}

# Inputs that say there is none: 676 of Stanford's, from "No input" over "<noinput>." to ":\n<noinput>"
# and "<noinput> 8". An input that has more to say than that stays.
MEANS_NONE = re.compile(r'[\W_]*(no[\s_-]*inputs?( (is )?(required|needed|necessary|provided|given|available))?'
                        r'|none|n/?a|not applicable|null)[\W\d_]*', re.IGNORECASE)


def read_row(record):
    """The Row of an object."""
    values, quirks, drop = [], [], ''
    for field, names in FIELDS.items():
        name = next((name for name in names if name in record), None)
        value = record.get(name)
        if name not in (None, field):
            quirks.append(f'{field} under {name!r}')
        if value is None or value != value:  # pandas writes NaN
            quirks.append(f'{field} is null' if name else f'no field {field}')
            value = ''
        elif not isinstance(value, str):
            drop, value = drop or f'{field} not text', ''
        elif not value.isascii() and re.search('[\ud800-\udfff]', value):
            drop = drop or 'half a surrogate pair'
        values.append(value)
    instruction, context, output = values
    if not output.strip():
        drop = drop or 'empty output'
    if not instruction.strip():
        drop = drop or 'empty instruction'
    if context and MEANS_NONE.fullmatch(context):
        quirks.append('input that means none')
        context = ''
    return Row(instruction, context if context.strip() else '', output, drop, quirks)


class Plan(NamedTuple):
    """What the first reading decides: names of the splits; of each row, by number, split and repeated.

    split (rows,) int8: its split's place in names; repeated (rows,) bool: to be dropped as such.
    prompts: for meta.json, how many rows repeat a prompt, and how many prompts of train leaked.
    """
    names: tuple
    split: np.ndarray
    repeated: np.ndarray
    prompts: dict


def normalised_prompt(row):
    """The prompt without case and differences in white space: what must not stand in two splits."""
    return '\n'.join(' '.join(text.split()).casefold() for text in (row.instruction, row.context))


def _digest(text):
    return hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest()


def make_plan(path, config):
    """Read the file once and decide: the Plan."""
    names = ('train', 'val', 'test') if config.by_position or config.test_fraction else ('train', 'val')
    split_of = pipeline.split_by_hash(config.seed, val=config.val_fraction, test=config.test_fraction)
    prompts, split, kept, repeated, pairs, keys = [], [], [], [], set(), None
    for _, record, problem in read_rows(path):
        if problem:
            continue
        keys = keys or list(record)
        row = read_row(record)
        prompt = normalised_prompt(row)
        prompts.append(_digest(prompt))
        split.append(0 if config.by_position else names.index(split_of(prompt)))
        pair = _digest(prompt + '\0' + ' '.join(row.output.split())) if config.dedup and not row.drop else None
        repeated.append(pair in pairs)
        if pair:
            pairs.add(pair)
        kept.append(not row.drop and not repeated[-1])
    if prompts and not any(kept):
        raise UserError(f'{path}: no row can be used; the first has the keys {repr(", ".join(keys)[:80])[1:-1]}. '
                        'Expected text under instruction, input and output.')
    prompts, split, kept = np.array(prompts, 'S8'), np.array(split, np.int8), np.array(kept, bool)
    if config.by_position:
        split = split_by_position(len(prompts), names, config, path)
    in_train = np.isin(prompts, prompts[kept & (split == 0)]) & kept
    leaked = {name: int(in_train[split == number].sum()) for number, name in enumerate(names) if number}
    n_repeats = int(kept.sum()) - len(np.unique(prompts[kept]))
    return Plan(names, split, np.array(repeated, bool), {'rows_repeating_a_prompt': n_repeats, 'also_in_train': leaked})


def split_by_position(n, names, config, path):
    """(n,) int8: for each row, the place of its split in names."""
    if config.split:
        train, test, _ = percentages(config.split)
        sizes = {'train': int(n * (train / 100)), 'test': int(n * (test / 100))}
        sizes['val'] = n - sum(sizes.values())
    else:
        sizes = {'train': config.train_rows, 'val': config.val_rows}
        sizes['test'] = n - sum(sizes.values())
        if sizes['test'] < 0:
            raise UserError(f'train_rows={config.train_rows} and val_rows={config.val_rows} are more than the '
                            f'{n:,} rows of {path}. Use smaller ones.')
    # Row order[i] comes to stand at place i, as with datasets' Dataset.shuffle(seed).
    order = np.arange(n) if config.shuffle_seed < 0 else np.random.default_rng(config.shuffle_seed).permutation(n)
    split = np.empty(n, np.int8)
    split[order] = np.repeat([names.index(name) for name in sizes], list(sizes.values()))
    return split


def numbered_blocks(path, repeated):
    """Blocks of (number, object, what is wrong, repeated), as a worker gets them."""
    block, number = [], 0
    for where, record, problem in read_rows(path):
        block.append((number, record, problem and f'{where}: {problem}', not problem and repeated[number]))
        number += not problem
        if len(block) == ROWS_PER_BLOCK:
            yield block
            block = []
    yield block


def units_of_rows(block):
    """The Units of a block of rows; a row's key is its number."""
    for number, record, problem, repeated in block:
        if problem:
            yield Unit(broken=problem)
            continue
        row = read_row(record)
        drop = 'repeated' if repeated else row.drop
        turns = [Turn('user', row.instruction, row.context), Turn('assistant', row.output)]
        counts = Counter({'rows': 1, **{f'  {quirk}': 1 for quirk in row.quirks}})
        yield Unit(str(number), 1, [] if drop else [turns], {drop: 1} if drop else {}, counts)


def prepare(config, path, source, folder):
    """Export the rows in the file at path as the configuration says; `source` goes into meta.json."""
    bpe = tokenizer.load(config.tokenizer, tags=config.template == 'xml')
    plan = make_plan(path, config)
    meta = {'source': source, 'seed': config.seed, 'prompts': plan.prompts,
            'split_rule': 'by position' if config.by_position else 'hash of the normalised prompt'}
    options = {key: value for key, value in configurator.as_dict(config).items()
               if key not in ('source', 'input', 'out_dir', 'report')}
    job = pipeline.Job(units_of_rows, bpe, config.template, config.max_tokens)
    meta = pipeline.export(numbered_blocks(path, plan.repeated), job, lambda key: plan.names[plan.split[int(key)]],
                           folder, plan.names, meta, options)
    print(f"{'rows that repeat a prompt':<28}{plan.prompts['rows_repeating_a_prompt']:>12,}")
    leaked = {name: n for name, n in plan.prompts['also_in_train'].items() if n}
    if leaked:
        print('the prompt is in train too of ' + ' and '.join(f'{n:,} rows of {name}' for name, n in leaked.items())
              + ': the split by hash, without --split and --train_rows, has none of these')
    if config.report:
        print(f'what the model will learn, to look at: {report.write(folder, config.seed)}')
    return meta


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    name = config.source
    if config.input:
        path, source = config.input, pipeline.local_source(config.input)
        name = next((name for name, pin in SOURCES.items() if pin['sha256'] == source['sha256']), None)
        if not name and not config.out_dir:
            raise UserError(f'{path} is none of the pinned files: say where its token files are to go, such as '
                            '--out_dir=data/mine.')
    else:
        pin = SOURCES[name]
        path = os.path.join(HERE, os.path.basename(pin['url']))
        download.download(pin['url'], path, pin['bytes'], pin['sha256'])
    if name:
        pin = SOURCES[name]
        source = {'name': name, 'url': pin['url'], 'bytes': os.path.getsize(path), 'sha256': pin['sha256'],
                  'licence': pin['licence']}
        print(f"{name}: {pin['licence']}{', ' * bool(pin['notice'])}{pin['notice']}")
    folder = config.out_dir or os.path.join(os.path.dirname(HERE), name)
    prepare(config, path, source, folder)
    how = SOURCES[name]['next'] if name else ''
    if config.out_dir:
        parent, base = os.path.split(os.path.normpath(folder))
        how += f" --data_dir={parent or '.'} --dataset={base}"
    print(f'wrote {os.path.relpath(folder)}. Next: python train.py {how.strip()}')


if __name__ == '__main__':
    configurator.run(main)
