"""Damage conversation trees at random: prepare.py writes whole files or says one line.

    python tests/stress/fuzz.py --inputs=100000

A finding ends the run with a traceback. --first=NUMBER --inputs=1 shows it again.
"""
import contextlib
import glob
import io
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from conftest import BYTES, read_back  # puts the repository on the path
import configurator
from configurator import Count, Natural, UserError
from core import tokenfile, tokenizer
from data.oasst import prepare as oasst

PIECES = [b'', b'\n', b'"', b'[' * 99, b'null', b'\xff', b'\0', b'1e999', b'9' * 5000]
VALUES = [None, True, -1, 0.5, float('nan'), '', '\0', '\ud800', '\n', [], {}, [None], {'': None}]


@dataclass(frozen=True)
class Config:
    inputs: Count = 20_000     # how many
    first: Natural = 0         # number of the first of them


def damage_value(value, rng):
    """Nested dicts and lists in which something is replaced by another value."""
    if not isinstance(value, dict | list) or not value:
        return rng.choice(VALUES)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = damage_value(value[key], rng)
    return value


def damage(data, rng):
    """The data with a JSON value replaced, or bytes overwritten, inserted, left out or cut off."""
    if rng.random() < 0.7:
        lines = data.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(damage_value(json.loads(lines[i]), rng)).encode()
        return b'\n'.join(lines)
    i = rng.randrange(len(data) + 1)
    piece = rng.choice([*PIECES, rng.randbytes(1), data[i:i + 9]])
    end = i + len(piece)
    return data[:i] + rng.choice([piece + data[end:], piece + data[i:], data[end:], b''])


def message(name, role, *replies):
    return {'message_id': name, 'text': f'text {name} <user>', 'role': role, 'lang': 'en',
            'rank': 0, 'deleted': False, 'review_result': True, 'replies': replies}


def make():
    """Three trees, the bytes to damage."""
    answer = message('b', 'assistant', message('c', 'prompter', message('d', 'assistant')))
    lines = []
    for name in 'uvw':
        tree = {'message_tree_id': name, 'prompt': message(name, 'prompter', answer)}
        lines.append(json.dumps(tree))
    return '\n'.join(lines).encode()


def prepare():
    """Whole token files that read back and whose counts add up, or those of before, untouched."""
    before = {path: os.stat(path).st_ino for path in glob.glob('out/*')}
    try:
        with mock.patch.object(tokenizer, 'load', return_value=BYTES):
            oasst.main(['--input=trees.jsonl', '--out_dir=out'])
    except UserError:
        assert before == {path: os.stat(path).st_ino for path in glob.glob('out/*')}
        raise
    meta = tokenfile.read_meta('out')
    n = 0
    for name in meta['splits']:
        talks = read_back('out', name)
        assert all(talks)
        n += len(talks)
    assert n == meta['kept'] == meta['seen'] - sum(meta['dropped'].values()) > 0


def check(data, number):
    """Read the data with some damage, in the current folder. Returns whether it could be read."""
    with open('trees.jsonl', 'wb') as file:
        file.write(damage(data, random.Random(number)))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare()
    except UserError as error:
        assert '\n' not in str(error)
        return False
    except Exception as error:
        error.add_note(f'Found with --first={number}.')
        raise
    return True


def main(argv):
    config = configurator.load(Config, argv)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        numbers = range(config.first, config.first + config.inputs)
        n_read = sum(check(make(), number) for number in numbers)
    print(f'{config.inputs:,} inputs, {n_read:,} of them read')


if __name__ == '__main__':
    configurator.run(main)
