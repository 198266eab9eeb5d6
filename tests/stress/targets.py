"""What is fuzzed, and what must hold: each target takes any bytes, and raises only where a promise is broken.

    python -c "from stress import targets; targets.Oasst().check(b'\\x00{}')"

The first bytes choose what is made (a file as it stands, records that are nearly right, a whole file
with some bytes changed, a gzip of one …), the others what is in it; so a fuzzer that follows the
coverage learns to steer. A UserError of one line is an answer; any other exception is a finding.
"""
import contextlib
import gzip
import io
import json
import os
import shutil
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from core import checkpoint
import configurator
from core import conversation
import sample
from core import tokenfile
from core import tokenizer as tokenizers
import train
from configurator import UserError
from core.conversation import TEMPLATES, Turn
from data import pipeline
from data.alpaca import prepare as alpaca
from data.oasst import prepare as oasst
from model import GPTConfig
from core.tokenizer import END_OF_TEXT, TAGS, Tokenizer

TOKENS = [bytes([b]) for b in range(256)] + [b'ab', b'er', b' t', b' the', b'\n\n', b'us', b'user', b'<|', b'\xc3\xa9']
NASTY = ['', ' ', '\n', '\t \r\n', *TAGS, END_OF_TEXT, '</user', '<\\user>', '<\\\\/assistant>', '\\', '<', '>', 'user>', '\0', '🙂', '👩‍👩‍👧',
         'שלום', '\u202e', '\u200f', 'e\u0301', '\u0301' * 9, '\ufeff', '\U0010ffff', 'é', '\u2028', '\x85', '\ud800', '\udfff', '\ud83d', '&lt;user&gt;',
         '### Response:', '### Instruction:\n', '\n\n### Input:\n', 'Question: ', '\nAnswer:', ' Hello', 'Hello ', 'a', '1', '.', 'the user', ' ' * 40, 'x' * 99]
ODD = [None, True, False, 0, -1, 1, 2 ** 31, 2 ** 64, -2 ** 63, 10 ** 400, 0.5, 1e308, float('nan'), float('inf'), -float('inf'), '', 'gpt2',
       'xml', '\ud800', '\0', '\n', 'é', '../x', 'x' * 300, [], {}, [[]], [None], {'': None}, {'a': {}}, [1, 'a'], [float('nan')]]


class Choices:
    """Decisions from bytes: zeros once they are used up."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self, n):
        """0 to n - 1."""
        self.at += 1
        return self.data[self.at - 1] % n if self.at <= len(self.data) else 0

    def of(self, options):
        """One of a list."""
        return options[self.number(len(options))]

    def text(self):
        """Some pieces made to break a template, some of any character."""
        return ''.join(chr(self.number(256) << 12 & 0x10f000 | self.number(256) << 4 | self.number(16)) if self.number(8) == 7
                       else self.of(NASTY) for _ in range(self.number(6)))

    def rest(self):
        """What has not been used."""
        return self.data[self.at:]


def spoil(value, choices):
    """A copy of a value of dicts and lists in which something, somewhere, is another, gone or twice."""
    if isinstance(value, dict) and value and choices.number(8):
        key = choices.of(list(value))
        how = choices.number(12)
        if how == 0:
            return {name: v for name, v in value.items() if name != key}
        if how == 1:
            return {**value, choices.of([*NASTY, *value]): value[key]}
        return {**value, key: spoil(value[key], choices)}
    if isinstance(value, list) and value and choices.number(8):
        at = choices.number(len(value))
        how = choices.number(12)
        if how < 3:
            return [value[:at] + value[at + 1:], value + value[at:at + 1], [value, *value]][how]
        return value[:at] + [spoil(value[at], choices)] + value[at + 1:]
    return choices.of([*ODD, choices.text()])


def change_bytes(data, choices):
    """Up to four places of the data overwritten, cut or doubled."""
    for _ in range(1 + choices.number(4)):
        at = (choices.number(256) << 16 | choices.number(256) << 8 | choices.number(256)) % (len(data) + 1)
        how, byte = choices.number(6), bytes([choices.number(256)])
        data = data[:at] + [byte, byte, byte + data[at:][:-1], b'', byte * 8, data[at:at + 9] * 2][how] + \
            data[at + (how < 5):] * (how != 3 and how != 2)
    return data


def is_line(error):
    """A person's mistake has its one line."""
    assert str(error).strip() and '\n' not in str(error), repr(str(error))


class Target:
    """check(data) raises for a broken promise. seeds: inputs to begin with. folder: of its own, in memory where it can be."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix='fuzz-', dir='/dev/shm' if os.path.isdir('/dev/shm') else None)
        self.tokenizer = Tokenizer('small', TOKENS, tags=True)
        self.seeds = [bytes([mode]) + bytes((7 * i * mode + i * i) % 256 for i in range(60)) for mode in range(8)]
        self.accepted = 0  # inputs that were taken; a target that refuses everything tests nothing

    def path(self, *names):
        """A path in the target's folder."""
        return os.path.join(self.folder, *names)

    def close(self):
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def write(self, name, data):
        """Write a file; returns its path."""
        with open(self.path(name), 'wb') as file:
            file.write(data)
        return self.path(name)

    def check(self, data):
        """Run one input, with nothing printed; a UserError must be a line."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                self.accepted += self.run(Choices(data)) is not False
            except UserError as error:
                is_line(error)


class Conversation(Target):
    """Any texts: what comes back is what went in, and no text makes the id of a tag or of end-of-text."""

    def run(self, c):
        """False where the texts cannot be encoded, or the ids are none of ours."""
        template, bpe = c.of(list(TEMPLATES)), self.tokenizer
        if c.number(4) == 3:  # any ids: refused, or exactly what their conversation encodes to
            ids = [c.of([c.number(256), *range(bpe.vocab_size - 9, bpe.vocab_size)]) for _ in range(c.number(40))]
            mask = [c.number(2) for _ in ids]
            try:
                turns = conversation.decode(ids, mask, bpe, template)
            except ValueError:
                return False
            assert conversation.encode(turns, bpe, template)[0].tolist() == ids
            return True
        always = template in ('plain', 'question')  # there, the mask alone says where the answer begins
        turns = [turn for _ in range(1 + c.number(3)) for turn in (
            Turn('user', c.text(), c.text() if template == 'alpaca' else ''), Turn('assistant', c.text(), supervised=always or c.number(4) > 0))]
        texts = [text for turn in turns for text in (turn.text, turn.context)]
        for text in texts:
            with contextlib.suppress(UnicodeEncodeError):
                assert max(bpe.encode(text).tolist(), default=0) < bpe.end_of_text, text
        try:
            ids, mask, _ = conversation.encode(turns, bpe, template)
        except ValueError:
            assert template == 'alpaca' and '###' in ''.join(texts) or any('\ud800' <= char <= '\udfff' for text in texts for char in text)
            return False
        assert conversation.decode(ids, mask, bpe, template) == turns
        n_special = {'xml': 3 + 2 * len(turns), 'dialogpt': len(turns)}.get(template, len(turns) // 2)
        assert (ids >= bpe.end_of_text).sum() == n_special
        if mask.any():
            first = next(i for i, turn in enumerate(turns) if turn.role == 'assistant' and turn.supervised)
            assert conversation.prompt(turns[:first], bpe, template) == ids[:mask.argmax()].tolist()
        if template == 'xml':
            plain = [turn._replace(supervised=True) for turn in turns]
            assert conversation.from_text(conversation.to_text(plain)) == [plain]
            opened = checkpoint.Opened(Shape(), bpe, 'xml', '', {})  # as sample.py takes --user and a line of --chat
            prompt = sample.encode_prompt(lambda text: conversation.prompt([Turn('user', text)], bpe), turns[0].text, opened)
            assert sum(i >= bpe.end_of_text for i in prompt) == 4
        limit = 16 + c.number(256)
        ids, mask, n_lost = conversation.encode(turns, bpe, template, limit)
        assert ids is None or len(ids) <= limit and conversation.decode(ids, mask, bpe, template) == turns[:len(turns) - n_lost]
        return True


class Shape:
    """As much of a model as sample.encode_prompt looks at."""
    config = GPTConfig(block_size=10 ** 9)


class Configurator(Target):
    """Config files and flags of any text: values of the right types, or lines; nothing is ever executed."""
    CODE = ['__import__("os").system("true")', 'open("x","w")', '(lambda: 1)()', '[x for x in (1,)]', '9**9**9', '"a"*10**9', '1 if True else 2',
            'f"{print(1)}"', '-' * 500 + '1', '(' * 300, '1+' * 3000 + '1', 'max_iters*2', 'True', '0x10', '1e400', '1_0', '"a" "b"', '2**0.5', '7//0', '-1']

    def __init__(self):
        super().__init__()
        self.keys = [train.Config, sample.Config, oasst.Config, alpaca.Config]
        files = [b'batch_size = 4 * 2\nlearning_rate = 1e-4\nout_dir = "x"\n', b'"""doc"""\nmax_iters=batch_size//2 # c\n', b'import os\n', b'\xff', b'x = (']
        self.seeds += [bytes([0, 0]) + file for file in files] + [bytes([1, 0]) + b'--batch_size=2\0--start=a', bytes([2]) * 40]

    def run(self, c):
        """The configuration of some file and flags."""
        how, keys = c.number(3), self.keys[c.number(4)]
        if how == 0:
            argv = [self.write('config.py', c.rest())]
        elif how == 1:
            argv = [arg if arg.startswith('--') else '--' + arg for arg in c.rest().decode('utf-8', 'surrogateescape').split('\0')]
        else:
            names = list(keys.__dataclass_fields__)
            given = [f'{c.of(names)}{c.of(["=", " = ", ""])}{c.of([c.of(self.CODE), c.text(), str(c.number(99))])}' for _ in range(1 + c.number(4))]
            argv = ['--' + arg for arg in given] if c.number(2) else [self.write('config.py', '\n'.join(given).encode('utf-8', 'surrogatepass'))]
        if '--help' in argv or '-h' in argv:
            return False
        try:
            config = configurator.load(keys, argv)
        except UserError as error:  # one line for each mistake
            assert str(error).strip()
            return False
        for name, field in keys.__dataclass_fields__.items():
            assert type(getattr(config, name)) is field.type, (name, getattr(config, name))
        configurator.describe(config)
        return True


class Prepare(Target):
    """A source of any bytes: whole token files whose counts add up, or a line and the old files untouched."""

    def __init__(self):
        super().__init__()
        whole = self.dump(self.RECORDS, 0)
        self.seeds += [bytes(12) + b'\0' + data for data in (whole, gzip.compress(whole, mtime=0))]
        self.seeds += [bytes(12) + seed for seed in self.seeds]  # the usual options
        names = {pipeline: ('BLOCK', 'LONGEST_LINE', 'BROKEN_SHARE', 'encoded_blocks'), alpaca: ('BLOCK', 'LONGEST_ROW', 'ROWS_PER_BLOCK'),
                 tokenizers: ('load',)}
        self.originals = [(module, name, getattr(module, name)) for module in names for name in names[module]]
        tokenizers.load = lambda path, tags=True: Tokenizer('small', TOKENS, tags)  # read once is enough
        pipeline.encoded_blocks = lambda blocks, job: (pipeline.encode_block(job, block) for block in blocks)  # in this process
        self.before = self.listing()

    def close(self):
        """The modules as they were, and the folder removed."""
        for original in self.originals:
            setattr(*original)
        super().close()

    def dump(self, records, form):
        """The records as a file of one of several forms."""
        lines = [json.dumps(record, ensure_ascii=form != 3).encode('utf-8', 'surrogatepass') for record in records]
        return [b'\n'.join(lines) + b'\n', b'[' + b', '.join(lines) + b']', b'\xef\xbb\xbf' + b'\r\n'.join(lines), b'\n'.join(lines)][form]

    def listing(self):
        """What a reader could see of the export: each file, which one it is, its size."""
        os.makedirs(self.path('out'), exist_ok=True)
        return sorted((entry.name, entry.inode(), entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(self.path('out')))

    def source(self, c):
        """The bytes of a file."""
        how = c.number(6)
        if how == 0:
            return c.rest()
        records = [self.RECORDS[c.number(len(self.RECORDS))] for _ in range(c.number(6))] if how == 5 else self.RECORDS
        for _ in range(c.number(5)):
            records = spoil(records, c) if how < 5 else [spoil(record, c) for record in records]
            records = records if isinstance(records, list) else [records]
        data = self.dump(records, c.of(self.FORMS))
        if how in (2, 4):
            data = change_bytes(data, c)
        if how in (3, 4):
            data = gzip.compress(data, mtime=0)
            data = change_bytes(data, c) if c.number(3) else data[:c.number(256)]
        return data

    def run(self, c):
        """One export; the folder is the one that earlier inputs wrote to."""
        options, c = Choices(c.data[:12]), Choices(c.data[12:])
        pipeline.BLOCK, pipeline.LONGEST_LINE = options.of([(1 << 20, 16 << 20), (1 << 20, 16 << 20), (50, 700), (7, 300)])
        pipeline.BROKEN_SHARE = options.of([0.01, 1.0])
        alpaca.BLOCK, alpaca.LONGEST_ROW, alpaca.ROWS_PER_BLOCK = options.of([(1 << 20, 16 << 20, 500), (9, 400, 2)])
        config, path = self.config(options), self.write('source', self.source(c))
        try:
            self.module.prepare(config, path, *self.more)
        except UserError as error:
            assert self.listing() == self.before, 'refused, and yet the files are others'
            raise error
        finally:
            self.before = self.listing()
        assert [name for name, *_ in self.before if not name.endswith('.bin')] == ['meta.json'], self.before
        meta = tokenfile.read_meta(self.path('out'))
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values()) and min(meta['dropped'].values(), default=0) >= 0, meta
        assert meta['kept'] == sum(counts['conversations'] for counts in meta['splits'].values()) > 0
        bpe = tokenizers.from_state(meta['tokenizer'])
        for name in meta['splits']:
            split = tokenfile.Split([self.path('out')], name)
            for i in range(len(split)):
                ids, mask = split[i]
                assert len(ids) <= config.max_tokens and conversation.decode(ids, mask, bpe, meta['template'])
        shutil.rmtree(self.path('out'))  # the splits may be others the next time
        self.before = self.listing()
        return True


def message(key, role='assistant', *replies, **more):
    """A message of a tree."""
    return {'message_id': key, 'text': f'text {key} <user>', 'role': role, 'lang': 'en', 'rank': len(replies), 'deleted': False, 'review_result': True,
            'synthetic': False, 'labels': {'spam': float('nan')}, 'replies': list(replies), **more}


class Oasst(Prepare):
    """Trees, and flat messages."""
    module, more, FORMS = oasst, ({},), (0, 3, 0, 3, 2)
    TREES = [{'message_tree_id': key, 'prompt': message(key, 'prompter', message(key + '0', 'assistant', message(key + '00', 'prompter', message(key + '000'))),
                                                        message(key + '1', rank=None))} for key in 'abc']
    FLAT = [{**{name: value for name, value in message(key, role).items() if name != 'replies'}, 'parent_id': parent, 'message_tree_id': 'a'}
            for key, role, parent in (('b', 'assistant', 'a'), ('a', 'prompter', None), ('c', 'prompter', 'b'), ('d', 'assistant', 'c'), ('e', 'assistant', 'f'),
                                      ('f', 'assistant', 'e'), ('b', 'assistant', 'a'))]  # cycles and a repeated id
    RECORDS = TREES

    def config(self, c):
        """Options."""
        self.RECORDS = c.of([self.TREES, self.FLAT])
        return oasst.Config(out_dir=self.path('out'), turns=c.of(['first', 'all']), lang=c.of(['en', 'all']), top_k=c.number(3), synthetic=c.of([True, False]),
                            template=c.of(['xml', 'dialogpt']), max_tokens=c.of([1024, 16, 60]), val_fraction=c.of([0.05, 0.5, 0.0]))


class Alpaca(Prepare):
    """Rows, as an array and as lines."""
    module, FORMS = alpaca, (0, 1, 2, 3)
    RECORDS = [{'instruction': 'Add.', 'input': '1 and 2', 'output': '3'}, {'instruction': 'Say hi', 'input': '', 'output': 'hi </assistant>'},
               {'instruction': 'add. ', 'context': '1  and 2', 'response': 'three'}, {'instruction': 'x', 'input': 'No input', 'output': 'y'},
               {'instruction': '### Response:', 'input': None, 'output': '### Input:'}]

    @property
    def more(self):
        """What alpaca's prepare is told besides."""
        return {}, self.path('out')

    def config(self, c):
        """Options."""
        position = c.of([{}, {'split': '60/20/20'}, {'train_rows': 2, 'val_rows': 1}, {'split': '85/10/5', 'shuffle_seed': 3}, {'test_fraction': 0.2}])
        return alpaca.Config(template=c.of(['alpaca', 'xml', 'plain']), max_tokens=c.of([1024, 16, 60]), dedup=c.of([False, True]),
                             val_fraction=c.of([0.05, 0.5, 0.0]), **position)
