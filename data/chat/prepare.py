"""Your own conversations or texts -> token files.

    python data/chat/prepare.py --input=my.jsonl --out_dir=data/mine
    python data/chat/prepare.py --input=my.csv --stdout | head     # as text, to look at

What a file holds is told by its content, and printed. Any of them may be gzipped:
- JSON, one array or one object a line, and CSV with a header, with a row for each conversation:
    messages                OpenAI's [{"role": "user", "content": "Hi"}, ...]; in CSV as JSON
    conversations           ShareGPT's [{"from": "human", "value": "Hi"}, ...]; in CSV as JSON
    prompt, completion      two texts, or two lists of messages
    question, answer        the same
    input, output           the same
- what --stdout of a prepare.py printed: <conversation><user>...
- plain text, named .txt: each document is learned whole, without a template, in pieces of
  max_tokens. Blank lines end a document, or else what --separator says.

What does not fit the templates is changed by these rules, and the table counts how often:
- An assistant speaks first: its greeting is dropped.
- Several messages of the same role in a row: they are joined by a blank line.
- System and developer messages: they are put before the first user's text. Empty ones are dropped.
- A user speaks last: the question without an answer is dropped.
A conversation is left out if it has tool calls, parts that are not text, OpenAI's weight 0, or an
empty message. A hash of the first message, or of the piece of text, decides the split.
"""
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import sys
from dataclasses import dataclass
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
ROLES = {'human': 'user', 'gpt': 'assistant'}  # ShareGPT's names
SYSTEM = ('system', 'developer')
TOOLS = ('tool', 'function', 'function_call', 'observation')
END = '</conversation><|endoftext|>'
EXPECTED = ('Expected JSON or CSV with messages, conversations, prompt and completion, question '
            'and answer, or input and output; what --stdout printed; or text in a .txt file.')


@dataclass(frozen=True)
class Config:
    input: str = ''             # the file to read
    out_dir: str = 'data/mine'  # where the token files go
    report: bool = False        # also write report.html there, a page about the data
    stdout: bool = False        # print the conversations as text and write no files
    separator: str = ''         # what stands between documents of plain text; '' is a blank line
    template: Literal[tuple(conversation.TEMPLATES)] = 'xml'  # how conversations are written
    tokenizer: str = 'gpt2'     # gpt2, or a folder or tokenizer.json in transformers' format
    max_tokens: Count = 1024    # a longer conversation loses turns from its end
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of an answer that is, or nothing
    val_fraction: Fraction = 0.05  # share of the conversations for validation
    seed: Seed = 1337        # decides which these are

    def problems(self):
        if not self.input:
            yield 'input is missing: say which file to read, such as --input=my.jsonl'


# ---- from a file to records ----

def find_form(source, separator):
    """What the file holds: JSON, CSV, XML or text; UserError if it is none of these."""
    with source.open(EXPECTED) as file:
        beginning = file.read(1 << 16).decode('utf-8-sig', errors='ignore').lstrip()
    if re.match(r'\{\s*["}]|\[\s*[{\]]', beginning):
        form = 'JSON'
    elif beginning.startswith('<conversation>'):
        form = 'XML'
    elif open_csv(io.StringIO(beginning)):
        form = 'CSV'
    elif beginning and re.search(r'\.txt(\.gz)?$', source.path.lower()):
        form = 'text'
    else:
        raise UserError(f'{source.path}: found {beginning[:40]!r}. {EXPECTED}')
    if separator and form != 'text':
        raise UserError(f'{source.path} holds {form}; --separator is only for plain text.')
    return form


def open_csv(file):
    """(the columns, a reader of the rows) of a text file; None if it does not name ours."""
    csv.field_size_limit(common.LONGEST_LINE)
    for delimiter in ',;\t':
        file.seek(0)
        # strict: a quote that is never closed is an error. Otherwise it would swallow the rest.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        with contextlib.suppress(csv.Error):
            first = next(filter(None, reader), [])  # not a blank line
            columns = [name.strip().lower() for name in first]
            if any(all(columns.count(name) == 1 for name in form) for form in FORMS):
                return columns, reader
    return None


def split_csv(file):
    """Yield a dict for each row, or a remark if it has too few or too many fields."""
    columns, reader = open_csv(io.TextIOWrapper(file, 'utf-8-sig', newline=''))
    try:
        for row in reader:
            if len(row) == len(columns):
                yield dict(zip(columns, row))
            elif row:  # not a blank line
                yield f'{len(row)} fields, but {len(columns)} columns'
    except csv.Error as error:
        raise ValueError(f'line {reader.line_num}: {error}') from None


def split_xml(file):
    """Yield {'xml': text} for each conversation that --stdout printed."""
    *whole, rest = file.read().decode('utf-8-sig').split(END)
    for text in whole:
        yield {'xml': text.strip() + END}
    if rest.strip():
        yield {'xml': rest.strip()}  # broken off


# ---- from a record to turns ----

def read_row(record, counts):
    """The messages of a row, each a dict."""
    if 'instruction' in record:
        raise ValueError('it has an instruction. For such rows use data/alpaca/prepare.py')
    forms = [names for names in FORMS if all(name in record for name in names)]
    if not forms:
        raise ValueError(f'found the columns {", ".join(record)[:60]!r}. {EXPECTED}')
    names = forms[0]
    counts[f"rows of {' and '.join(names)}"] += 1
    common.count_unused(record, names, counts)
    if len(names) == 1:
        messages = record[names[0]]
        if isinstance(messages, str):
            messages = json.loads(messages)
        return messages
    messages = []
    for name, role in zip(names, ('user', 'assistant')):
        if isinstance(record[name], list):
            messages += record[name]
        else:
            messages.append({'role': role, 'content': record[name]})
    return messages


def read_xml(record, counts):
    """The messages of a conversation that --stdout printed."""
    text = record['xml']
    found = readback.from_text(text)
    if len(found) != 1 or conversation.to_text(found[0]) != text:
        raise ValueError(f'found {text[-60:]!r}, expected a conversation as --stdout prints it')
    counts['conversations as XML'] += 1
    return [{'role': turn.role, 'content': turn.text} for turn in found[0]]


def read_message(message):
    """(role, text, why the conversation is left out) of a message in any of the forms."""
    if not isinstance(message, dict):
        raise TypeError(f'found {str(message)[:40]!r}, expected a message')
    role = message.get('role', message.get('from'))
    role = ROLES.get(role, role)
    content = message.get('content', message.get('value'))
    if role in TOOLS or message.get('tool_calls') or message.get('function_call'):
        return role, '', 'tool calls'
    if role not in ('user', 'assistant', *SYSTEM):
        raise ValueError(f'found the role {role!r}, expected user, assistant or system')
    if message.get('weight') == 0:
        return role, '', 'weight 0'
    if isinstance(content, list):
        if any(part['type'] != 'text' for part in content):
            return role, '', 'parts not text'
        content = ''.join(part['text'] for part in content)
    # pandas writes NaN.
    if content is None or content != content:
        content = ''
    if not isinstance(content, str):
        raise TypeError(f'found {str(content)[:40]!r}, expected the text of a message')
    if not content.strip() and role not in SYSTEM:
        return role, '', 'empty message'
    return role, content, ''


def read_turns(messages, counts):
    """(turns, why they are left out) of messages, by the rules that --help states."""
    kept = []
    roles = []  # without system messages
    n_greetings = 0
    for message in messages:
        role, text, drop = read_message(message)
        if drop:
            return [], drop
        if role in SYSTEM:
            if text.strip():
                kept.append({'role': role, 'content': text})
        elif role == 'assistant' and not roles:
            n_greetings += 1
        else:
            roles.append(role)
            kept.append({'role': role, 'content': text})
    if not roles:
        return [], 'no question'
    turns = readback.from_messages(kept)
    counts['  greetings dropped'] += n_greetings
    counts['  messages joined'] += len(roles) - len(turns)
    counts['  system messages moved'] += len(kept) - len(roles)
    if turns[-1].role == 'user':
        counts['  last questions dropped'] += 1
        turns.pop()
    if not turns:
        return [], 'no answer'
    return turns, ''


# ---- the examples ----

def read_conversations(source, config, form):
    """Yield the Examples of a file of conversations."""
    split_file, read = {'JSON': (common.split_json, read_row), 'CSV': (split_csv, read_row),
                        'XML': (split_xml, read_xml)}[form]

    def read_record(record):
        return read_turns(read(record, source.counts), source.counts)

    records = source.records(read_record, split_file, EXPECTED)
    for number, (turns, drop) in enumerate(records):
        split = 'train'
        if turns:
            split = common.split_by_hash(turns[0].text, config.seed, val=config.val_fraction)
        yield common.Example(number, split, turns, drop=drop)


def read_documents(source, config):
    """Yield the Examples of plain text: all of it is supervised, and each document ends."""
    vocabulary = tokenizer.load(config.tokenizer, tags=False)
    with source.open(EXPECTED) as file:
        text = io.TextIOWrapper(file, 'utf-8-sig').read()
    if config.separator:
        documents = text.split(config.separator.replace('\\n', '\n'))
    else:
        documents = re.split(r'\n(?:[ \t]*\n)+', text)
    for number, document in enumerate(documents):
        if not document.strip():
            continue
        source.counts['documents'] += 1
        drop = ''
        try:
            ids = np.append(vocabulary.encode(document.strip('\n')), vocabulary.end_of_text)
            ids = ids.astype(np.uint16)
        except ValueError:
            drop = 'cannot be encoded'
        if not drop and config.too_long == 'drop' and len(ids) > config.max_tokens:
            drop = 'too long'
        if drop:
            yield common.Example((number, 0), 'train', [], drop=drop)
            continue
        # From a last piece of one token nothing can be learned: it would only be read.
        for start in range(0, len(ids) - 1, config.max_tokens):
            piece = ids[start:start + config.max_tokens]
            split = common.split_by_hash(piece.tolist(), config.seed, val=config.val_fraction)
            yield common.Example((number, start), split, [], ids=piece.tobytes(),
                                 mask=b'\1' * len(piece))


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, {}, HERE)
    form = find_form(source, config.separator)
    print(f'{source.path} holds {form}', file=sys.stderr)
    if form == 'text':
        # Documents are no conversations: they get no tags or headings.
        config = dataclasses.replace(config, template='plain')
        examples = read_documents(source, config)
        split_rule = 'hash of the piece of text'
    else:
        split_rule = 'hash of the first message'
        examples = read_conversations(source, config, form)
    if config.stdout:
        common.print_text(examples, config)
        return
    common.export(examples, source, config, config.out_dir, ['train', 'val'], common.OWN_DATA,
                  split_rule=split_rule)


if __name__ == '__main__':
    configurator.run(main)
