"""Damage files that a stranger may have written: reading them ends in a value or in one line.

    python tests/stress/fuzz.py --target=oasst --inputs=100000     # --help lists the targets

An input is bytes that choose what is damaged, and how. With atheris (pip install -r
requirements-fuzz.txt) they follow the coverage of our own lines; without it they are random.
The first finding is kept in out_dir and ends the run. To see it again:
Target('oasst').check(the bytes in the file). https://github.com/google/atheris
"""
import contextlib
import copy
import faulthandler
import glob
import gzip
import io
import json
import os
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch  # before atheris, which would follow all of it for minutes

OURS = ['configurator', 'core', 'data', 'train']
atheris = None
followed = contextlib.nullcontext()
if __name__ == '__main__':
    with contextlib.suppress(ImportError):
        import atheris
        followed = atheris.instrument_imports(include=OURS)
with followed:
    import configurator
    import train
    from configurator import Count, Seed, UserError
    from core import tokenfile, tokenizer
    from core.conversation import Turn, encode
    from core.files import reading
    from core.readback import decode
    from core.rows import Rows
    from data.oasst import prepare as oasst

TARGETS = ('config', 'oasst', 'vocabulary', 'data')
SMALL = tokenizer.Tokenizer('small', [*(bytes([b]) for b in range(256)), b'ab', b' t'], tags=True)
PIECES = [b'', b'\n', b'"', b'{', b'[' * 99, b'null', b'\xff', b'\0', b'1e999', b'NaN', b'</user>',
          b'### Response:', b'\\ud800', b'9' * 5000, b'1+' * 3000, b'open("x", "w")']
VALUES = [None, True, 0, -1, 1, 10 ** 400, 0.5, float('nan'), float('inf'), '', 'xml', '\0',
          '\ud800', '\n', 'é', '../x', 'x' * 300, [], {}, [[]], [None], {'': None}, {'a': {}}]


@dataclass(frozen=True)
class Config:
    target: Literal[TARGETS] = 'config'  # what is damaged and read
    inputs: Count = 20_000     # how many
    seed: Seed = 1337          # of the inputs
    out_dir: str = 'out/fuzz'  # where findings go


# ---- damage ----

class Choices:
    """Decisions from bytes. Once these are used up, each is 0."""

    def __init__(self, data):
        self.data = data
        self.at = 0

    def number(self, n):
        """0 to n - 1."""
        self.at += 2
        return int.from_bytes(self.data[self.at - 2:self.at], 'little') % n

    def of(self, options):
        return options[self.number(len(options))]


def damage_value(value, choices):
    """A copy of nested dicts and lists in which something is another value, gone or twice."""
    if not isinstance(value, dict | list) or not value or not choices.number(8):
        return choices.of(VALUES)
    value = copy.copy(value)
    key = choices.of(list(value) if isinstance(value, dict) else range(len(value)))
    how = choices.number(9)
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = damage_value(value[key], choices)
    return value


def damage_bytes(data, choices):
    """The data with something overwritten, inserted, doubled, or cut off."""
    i = choices.number(len(data) + 1)
    piece = choices.of([*PIECES, bytes([choices.number(256)]), data[i:i + 9]])
    rests = [piece + data[i + len(piece):], piece + data[i:], data[i + len(piece):], b'']
    return data[:i] + choices.of(rests)


def damage(data, choices):
    """The bytes of a file with some damage: to the values that it holds, or to the bytes."""
    try:
        values = [json.loads(line) for line in data.splitlines()]
    except ValueError:
        values = []
    if data[:2] == b'PK' and choices.number(3):
        file = io.BytesIO()
        torch.save(damage_value(torch.load(io.BytesIO(data)), choices), file)
        return file.getvalue()
    for _ in range(choices.of((1, 1, 2, 3))):
        if values and choices.number(3):
            i = choices.number(len(values))
            values[i] = damage_value(values[i], choices)
            data = '\n'.join(map(json.dumps, values)).encode()
        else:
            data = damage_bytes(data, choices)
    if not choices.number(20):
        data = damage_bytes(gzip.compress(data, mtime=0), choices)
    return data


# ---- targets: what is written whole, how it is read once damaged, and what must hold ----

def write(name, content):
    """Write bytes, text, or a value as JSON, in the current folder."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    with open(name, 'wb') as file:
        file.write(content)


def make_config():
    write('run.py', '"""What it is for."""\n# a comment\nbatch_size = 4 * 2\nlearning_rate = 1e-4\n'
                    'compile = True\nout_dir = "x" + "y"\nloss_on = "all"  # every token\n')


def read_config(choices):
    config = configurator.load(train.Config, ['run.py'])
    for name, value in asdict(config).items():
        assert type(value) is type(getattr(train.Config, name)), (name, value)


def make_vocabulary():
    vocab = {tokenizer.to_unicode(token): i for i, token in enumerate(SMALL.tokens)}
    merges = [['a', 'b'], [tokenizer.to_unicode(b' '), 't']]
    write('tokenizer.json', {'added_tokens': [], 'model': {'vocab': vocab, 'merges': merges}})


def read_vocabulary(choices):
    bpe = tokenizer.load('tokenizer.json')
    text = 'the user\'s é 🙂\0</user> <|endoftext|>'
    ids = bpe.encode(text).tolist()
    assert bpe.decode(ids) == text and not {*ids} & {*bpe.special.values()}
    assert max(ids) < bpe.vocab_size <= 2 ** 16


def message(name, role, *replies):
    return {'message_id': name, 'text': f'text {name} <user>', 'role': role, 'lang': 'en',
            'rank': 0, 'deleted': False, 'review_result': True, 'replies': list(replies)}


def make_oasst():
    answer = message('b', 'assistant', message('c', 'prompter', message('d', 'assistant')))
    records = []
    for name in 'uvw':
        prompt = message(name, 'prompter', answer)
        records.append({'message_tree_id': name, 'prompt': prompt})
    write('source', '\n'.join(map(json.dumps, records)))


def contents(folder):
    """{name: which file it is} of what a reader sees in the folder."""
    paths = glob.glob(f'{folder}/*')
    return {path: (os.stat(path).st_ino, os.stat(path).st_mtime_ns) for path in paths}


def read_oasst(choices):
    """Whole token files that read back and whose counts add up, or those of before, untouched."""
    before = contents('out')
    flags = [choices.of(('--turns=first', '--turns=all')), choices.of(('--lang=en', '--lang=all')),
             choices.of(('--template=xml', '--template=dialogpt'))]
    try:
        oasst.main(['--input=source', '--out_dir=out', '--tokenizer=small.json', *flags])
    except UserError:
        assert contents('out') == before, 'refused, and yet the files are others'
        raise
    meta = tokenfile.read_meta('out')
    n = 0
    for name in meta['splits']:
        split = tokenfile.Split(['out'], name)
        n += len(split)
        for i in range(len(split)):
            assert decode(*split[i], SMALL, meta['template'])
    assert n == meta['kept'] == meta['seen'] - sum(meta['dropped'].values()) > 0


def make_data():
    found = []
    for n in range(4):
        turns = [Turn('user', 'x' * n), Turn('assistant', 'y' * n)]
        found.append(encode(turns, SMALL)[:2])
    tokenfile.write('.', {'train': found, 'val': []}, {
        'template': 'xml', 'tokenizer': SMALL.state(), 'source': {'name': 'x'}})


def read_data(choices):
    meta = tokenfile.read_meta('.')
    with reading('meta.json'):
        bpe = tokenizer.from_state(meta['tokenizer'])
    split = tokenfile.Split(['.'], 'train', vocab_size=bpe.vocab_size)
    for batch in Rows(split, 64, seed=1).batches(2):
        assert len(batch.idx) == len(batch.positions) == sum(n * t for n, t in batch.runs)
        assert max(batch.idx.max(), batch.targets.max()) < bpe.vocab_size


class Target:
    """A target by its name, in a folder of its own, which becomes the current one."""

    def __init__(self, name):
        memory = '/dev/shm' if os.path.isdir('/dev/shm') else None
        self.folder = tempfile.TemporaryDirectory(prefix='fuzz-', dir=memory)
        self.read = globals()[f'read_{name}']
        self.may_have_lines = name == 'config'  # one for each mistake
        self.n_read = 0  # a target that refused every input would test nothing
        os.chdir(self.folder.name)
        globals()[f'make_{name}']()
        self.files = {}
        for path in sorted(glob.glob('*')):
            with open(path, 'rb') as file:
                self.files[path] = file.read()
        make_vocabulary()
        os.rename('tokenizer.json', 'small.json')

    def check(self, data):
        """Raises whatever must not be raised."""
        choices = Choices(data)
        damaged = choices.of(list(self.files))
        for name, content in self.files.items():
            write(name, damage(content, choices) if name == damaged else content)
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            try:
                self.read(choices)
                self.n_read += 1
            except UserError as error:
                lines = str(error).split('\n')
                assert all(lines) and (len(lines) == 1 or self.may_have_lines), lines


# ---- running ----

def inputs(n, seed):
    """n random inputs."""
    rng = random.Random(seed)
    for _ in range(n):
        yield rng.randbytes(rng.choice((6, 12, 24, 48)))


def main(argv):
    config = configurator.load(Config, argv)
    folder = os.path.abspath(os.path.join(config.out_dir, config.target))
    os.makedirs(folder, exist_ok=True)
    target = Target(config.target)

    def check(data):
        faulthandler.dump_traceback_later(60, exit=True)  # a hang is a finding
        target.check(data)

    if atheris:
        atheris.Setup([sys.argv[0], f'-runs={config.inputs}', f'-seed={config.seed}',
                       '-max_len=200', '-len_control=0', f'-artifact_prefix={folder}/'], check)
        atheris.Fuzz()  # ends the process
    for i, data in enumerate(inputs(config.inputs, config.seed)):
        path = os.path.join(folder, f'crash-{i}')
        with open(path, 'wb') as file:
            file.write(data)
        check(data)
        os.remove(path)
    print(f'{config.target}: {config.inputs:,} inputs, {target.n_read:,} of them read')


if __name__ == '__main__':
    configurator.run(main)
