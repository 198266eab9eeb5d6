"""Your own conversations or texts -> token files.

    python data/chat/prepare.py --input=my.jsonl --out_dir=data/mine
    python data/chat/prepare.py --input=my.csv --stdout | head   # as text

The content says what a file holds, which may be gzipped:
- JSON, one array or one object a line, or CSV with a header. Its columns are one of
    messages            OpenAI's [{"role": "user", "content": "Hi"}, ...]; in CSV as JSON
    conversations       ShareGPT's [{"from": "human", "value": "Hi"}, ...]; the same
    prompt, completion  two texts, or two lists of messages
    question, answer; or input, output  the same
- what --stdout of a prepare.py printed: <conversation><user>...
- plain text, if named .txt: learned whole, without a template, in pieces of max_tokens

These rules make it fit the templates:
- A greeting of the assistant, and a last question without an answer, are dropped.
- Messages of the same role in a row are joined by a blank line.
- System and developer messages go before the first user's text.
- A conversation with tool calls, anything but text or an empty message is left out.
A hash of the first message, or of the piece of text, decides the split.
"""
import csv
import io
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import configurator
from configurator import Count, Fraction, Seed, UserError
from core import conversation, readback, tokenizer
from data import common

# The columns of a row.
FORMS = (('messages',), ('conversations',), ('prompt', 'completion'),
         ('question', 'answer'), ('input', 'output'))
SHAREGPT_ROLES = {'human': 'user', 'gpt': 'assistant'}
EXPECTED = 'Expected JSON or CSV, what --stdout prints, or a .txt file: see --help.'


@dataclass(frozen=True)
class Config:
    input: str = ''  # the file to read
    out_dir: str = 'data/mine'  # for the token files
    report: bool = False  # also write a page about the data, report.html
    stdout: bool = False  # print the conversations, and write no files
    separator: str = '\n\n'  # between plain documents; \n is a line break
    template: Literal[tuple(conversation.TEMPLATES)] = 'xml'  # how they are written
    tokenizer: str = 'gpt2'  # or a checkpoint's folder
    max_tokens: Count = 1024  # a longer conversation loses its last turns
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of an answer, or drop it
    val_fraction: Fraction = 0.05  # share of the conversations
    seed: Seed = 1337  # decides which these are

    def problems(self):
        if not self.input:
            yield 'input is missing. Name a file, such as --input=my.jsonl'


def find_form(source):
    """What the file holds, and the function that splits it into records."""
    with source.open(EXPECTED) as file:
        text = file.read(1 << 10).decode('utf-8-sig', 'ignore')
    beginning = text.lstrip()
    if beginning.startswith('<conversation>'):
        return 'XML', split_xml
    # Text may begin with a bracket, too.
    if re.match(r'\{\s*["}]|\[\s*[{\]]', beginning):
        return 'JSON', common.split_json
    if re.search(r'\.txt(\.gz)?$', source.path.lower()):
        return 'text', None
    return 'CSV', split_csv


def split_csv(file):
    """The rows as dicts, by the columns that the first line names."""
    file = io.TextIOWrapper(file, 'utf-8-sig', newline='')
    header = file.readline().lower()
    delimiter = max(',;\t', key=header.count)
    names = next(csv.reader([header], delimiter=delimiter))
    columns = [name.strip() for name in names]
    # strict: a quote that is never closed would swallow the rest.
    return csv.DictReader(file, columns, delimiter=delimiter, strict=True)


def split_xml(file):
    """Yield the messages of each conversation that --stdout printed."""
    text = file.read().decode('utf-8-sig')
    for turns in readback.from_text(text):
        messages = [{'role': turn.role, 'content': turn.text} for turn in turns]
        yield {'messages': messages}


def read_row(record):
    """The messages of a row of any form, each a dict."""
    if 'instruction' in record:
        raise ValueError('it has an instruction: use data/alpaca/prepare.py')
    if None in record:
        raise ValueError('it has more fields than columns')
    forms = [names for names in FORMS if record.keys() >= set(names)]
    if not forms:
        raise ValueError(f'found the columns {", ".join(record)[:60]!r}')
    messages = []
    for name, role in zip(forms[0], readback.ROLES):
        value = record[name]
        if len(forms[0]) == 1 and isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, list):
            messages += value
        else:
            messages.append({'role': role, 'content': value})
    return messages


def read_turns(record):
    """(turns, why they are left out) of a row, by the rules above."""
    messages = []
    for message in read_row(record):
        # ShareGPT's keys are from and value.
        role = message.get('role', message.get('from'))
        role = SHAREGPT_ROLES.get(role, role)
        text = message.get('content', message.get('value')) or ''
        if role not in (*readback.ROLES, 'system', 'developer'):
            return [], f'the role {role!r}'
        if message.get('tool_calls'):
            return [], 'tool calls'
        # OpenAI's newer form: a list of parts
        if isinstance(text, list):
            if any(part['type'] != 'text' for part in text):
                return [], 'parts not text'
            text = ''.join(part['text'] for part in text)
        if text.strip():
            messages.append({'role': role, 'content': text})
        elif role in readback.ROLES:
            return [], 'empty message'
    if 'user' not in [message['role'] for message in messages]:
        return [], 'no question'
    turns = readback.from_messages(messages)
    if turns[0].role == 'assistant':
        turns.pop(0)
    if turns[-1].role == 'user':
        turns.pop()
    if not turns:
        return [], 'no answer'
    return turns, ''


def read_conversations(source, config, split_records):
    for turns, drop in source.records(read_turns, EXPECTED, split_records):
        first = turns[0].text if turns else ''
        split = common.split_by_hash(first, config.seed, val=config.val_fraction)
        yield common.Example(split, turns, drop)


def read_documents(source, config):
    """Yield the Examples of plain text: all of it is supervised."""
    vocabulary = tokenizer.load(config.tokenizer, tags=False)
    size = config.max_tokens
    with source.open(EXPECTED) as file:
        text = io.TextIOWrapper(file, 'utf-8-sig').read()
    for document in text.split(config.separator.replace('\\n', '\n')):
        if not document.strip():
            continue
        ids = vocabulary.encode(document.strip('\n'))
        ids = np.append(ids, vocabulary.end_of_text)
        # From a piece of one token nothing can be learned.
        for start in range(0, len(ids) - 1, size):
            piece = ids[start:start + size]
            key = piece.tolist()
            split = common.split_by_hash(key, config.seed, val=config.val_fraction)
            encoded = (piece, np.ones_like(piece), 0)
            yield common.Example(split, [], encoded=encoded)


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, {}, HERE)
    form, split_records = find_form(source)
    print(f'{source.path} holds {form}', file=sys.stderr)
    if form == 'text':
        if config.stdout:
            raise UserError('--stdout prints conversations, and the input is plain text.')
        # No tags or headings.
        config = replace(config, template='plain')
        examples = read_documents(source, config)
    else:
        examples = read_conversations(source, config, split_records)
    if config.stdout:
        common.print_text(examples)
        return
    common.export(examples, source, config, config.out_dir, common.OWN_DATA,
                  split_rule='hash of the first message, or of the piece of text')


if __name__ == '__main__':
    configurator.run(main)
