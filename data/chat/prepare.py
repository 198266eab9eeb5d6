"""Your own conversations or texts -> token files.

    python data/chat/prepare.py --input=my.jsonl --out_dir=data/mine
    python data/chat/prepare.py --input=my.csv --stdout | head     # as text, to look at

What a file holds is told by its content, and printed. Any of them may be gzipped:
- JSON, one array or one object a line, and CSV with a header, with a row for each conversation:
    messages                OpenAI's [{"role": "user", "content": "Hi"}, ...]; in CSV as JSON
    conversations           ShareGPT's [{"from": "human", "value": "Hi"}, ...]; in CSV as JSON
    prompt, completion      two texts, or two lists of messages
    question, answer; or input, output      the same
- what --stdout of a prepare.py printed: <conversation><user>...
- plain text, named .txt: documents are learned whole, without a template, in pieces of max_tokens

What does not fit the templates is changed by these rules:
- An assistant's greeting at the beginning, and a last question without an answer, are dropped.
- Several messages of the same role in a row are joined by a blank line.
- System and developer messages are put before the first user's text.
- A conversation with tool calls, parts that are not text or an empty message is left out.
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

# The columns of a row, in the order in which they are looked for.
FORMS = (('messages',), ('conversations',), ('prompt', 'completion'), ('question', 'answer'),
         ('input', 'output'))
SHAREGPT_ROLES = {'human': 'user', 'gpt': 'assistant'}
EXPECTED = ('Expected JSON or CSV with messages, conversations, prompt and completion, question '
            'and answer, or input and output; what --stdout printed; or text in a .txt file.')


@dataclass(frozen=True)
class Config:
    input: str = ''             # the file to read
    out_dir: str = 'data/mine'  # where the token files go
    report: bool = False        # also write report.html there, a page about the data
    stdout: bool = False        # print the conversations as text and write no files
    separator: str = '\n\n'     # what stands between documents of plain text; \n is a line break
    template: Literal[tuple(conversation.TEMPLATES)] = 'xml'  # how conversations are written
    tokenizer: str = 'gpt2'     # gpt2, or the folder of a checkpoint with another vocabulary
    max_tokens: Count = 1024    # a longer conversation loses turns from its end
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of an answer that is, or nothing
    val_fraction: Fraction = 0.05  # share of the conversations for validation
    seed: Seed = 1337        # decides which these are

    def problems(self):
        if not self.input:
            yield 'input is missing: say which file to read, such as --input=my.jsonl'


# ---- from a file to records ----

def find_form(source):
    """What the file holds, and the function that splits it into records."""
    with source.open(EXPECTED) as file:
        beginning = file.read(1 << 10).decode('utf-8-sig', errors='ignore').lstrip()
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
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    # strict: a quote that is never closed is an error. Otherwise it would swallow the rest.
    return csv.DictReader(file, columns, delimiter=delimiter, strict=True)


def split_xml(file):
    """Yield the messages of each conversation that --stdout printed."""
    for turns in readback.from_text(file.read().decode('utf-8-sig')):
        yield {'messages': [{'role': turn.role, 'content': turn.text} for turn in turns]}


# ---- from a record to turns ----

def read_row(record):
    """The messages of a row of any form, each a dict."""
    if 'instruction' in record:
        raise ValueError('it has an instruction. For such rows use data/alpaca/prepare.py')
    if None in record:
        raise ValueError('it has more fields than there are columns')
    forms = [names for names in FORMS if all(name in record for name in names)]
    if not forms:
        raise ValueError(f'found the columns {", ".join(record)[:60]!r}')
    messages = []
    for name, role in zip(forms[0], ('user', 'assistant')):
        value = record[name]
        if name in ('messages', 'conversations') and isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, list):
            messages += value
        else:
            messages.append({'role': role, 'content': value})
    return messages


def read_turns(record):
    """(turns, why they are left out) of a row, by the rules that --help states."""
    messages = []
    for message in read_row(record):
        role = message.get('role', message.get('from'))
        role = SHAREGPT_ROLES.get(role, role)
        text = message.get('content', message.get('value')) or ''
        if role not in ('user', 'assistant', 'system', 'developer'):
            return [], f'the role {role!r}'
        if message.get('tool_calls'):
            return [], 'tool calls'
        if isinstance(text, list):
            if any(part['type'] != 'text' for part in text):
                return [], 'parts not text'
            text = ''.join(part['text'] for part in text)
        if text.strip():
            messages.append({'role': role, 'content': text})
        elif role in ('user', 'assistant'):
            return [], 'empty message'
    if not any(message['role'] == 'user' for message in messages):
        return [], 'no question'
    turns = readback.from_messages(messages)
    if turns[0].role == 'assistant':
        turns.pop(0)
    if turns[-1].role == 'user':
        turns.pop()
    if not turns:
        return [], 'no answer'
    return turns, ''


# ---- the examples ----

def read_conversations(source, config, split_file):
    for turns, drop in source.records(read_turns, EXPECTED, split_file):
        first = turns[0].text if turns else ''
        split = common.split_by_hash(first, config.seed, val=config.val_fraction)
        yield common.Example(split, turns, drop)


def read_documents(source, config):
    """Yield the Examples of plain text: all of it is supervised, and each document ends."""
    vocabulary = tokenizer.load(config.tokenizer, tags=False)
    with source.open(EXPECTED) as file:
        text = io.TextIOWrapper(file, 'utf-8-sig').read()
        separator = config.separator.replace('\\n', '\n')
        for document in text.split(separator):
            if not document.strip():
                continue
            ids = np.append(vocabulary.encode(document.strip('\n')), vocabulary.end_of_text)
            # From a last piece of one token nothing can be learned: it would only be read.
            for start in range(0, len(ids) - 1, config.max_tokens):
                piece = ids[start:start + config.max_tokens]
                split = common.split_by_hash(piece.tolist(), config.seed, val=config.val_fraction)
                yield common.Example(split, [], encoded=(piece, np.ones_like(piece), 0))


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, {}, HERE)
    form, split_file = find_form(source)
    print(f'{source.path} holds {form}', file=sys.stderr)
    if form == 'text':
        if config.stdout:
            raise UserError(f'--stdout prints conversations, and {source.path} is plain text.')
        # Documents are no conversations: they get no tags or headings.
        config = replace(config, template='plain')
        examples = read_documents(source, config)
    else:
        examples = read_conversations(source, config, split_file)
    if config.stdout:
        common.print_text(examples)
    else:
        common.export(examples, source, config, config.out_dir, common.OWN_DATA,
                      split_rule='hash of the first message, or of the piece of text')


if __name__ == '__main__':
    configurator.run(main)
