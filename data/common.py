"""What every prepare.py shares: the source, the split, encoding, counting and writing.

A prepare.py turns the records of a Source into Examples and gives them to `export`.
"""
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import parent_process
from typing import NamedTuple

import numpy as np

from configurator import UserError
from core import conversation, tokenfile, tokenizer
from core.files import Bar, only_writer, reading

HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
# Before each attempt to download.
PAUSES_S = (0, 1, 2, 4, 8)
# The recipe for whatever is not a published file.
OWN_DATA = 'config/finetune_own.py'
# A connection that sends nothing for so long is broken.
SILENCE_S = 30
# bytes; parsing a hostile line takes 30 times as much memory.
LONGEST_LINE = 16 << 20
UNUSED = 20  # columns that the table names


class Source:
    """The file to read: --input, or the published file that --source names.

    published: {name: {'url', 'sha256', 'licence'}}; it is downloaded once, into `folder`.
    """

    def __init__(self, config, published, folder):
        # Rows of the table, filled in by the caller.
        self.counts = Counter()
        # What is wrong with records that cannot be read.
        self.broken = []
        self.path = config.input or download(published[config.source]['url'], folder)
        with reading(self.path), open(self.path, 'rb') as file:
            sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
        # What meta.json says about it. A published file is recognised wherever it is.
        self.about = {'name': os.path.basename(self.path), 'url': None, 'licence': None}
        for name, entry in published.items():
            if entry['sha256'] == sha256:
                self.about = {'name': name, **entry}
                print(f"{name}: licence {entry['licence']}", file=sys.stderr)
        self.about |= {'bytes': os.path.getsize(self.path), 'sha256': sha256}
        if not config.input and self.about['name'] != config.source:
            raise UserError(f'{self.path} is not the published file: its sha256 is {sha256}. '
                            'Delete it and run this again.')

    @contextlib.contextmanager
    def open(self, expected):
        """Yield the file, unpacked if it is gzipped. expected: what it should hold, for errors."""
        with reading(self.path, expected), open(self.path, 'rb') as file:
            if file.peek(2)[:2] == b'\x1f\x8b':
                file = gzip.GzipFile(fileobj=file)
            yield file

    def records(self, read, split=None, expected='Expected JSON lines or one JSON array.'):
        """Yield read(record) for each record; split(file) yields them, by default from JSON."""
        number = 0
        with self.open(expected) as file:
            values = (split or split_json)(file)
            for number, value in enumerate(values, 1):
                try:
                    if isinstance(value, bytes):
                        value = json.loads(value)
                    if not isinstance(value, dict):
                        raise TypeError(f'found {str(value)[:40]!r}, expected an object')
                    found = read(value)
                except Exception as error:  # a hostile record can make a reader raise anything
                    self.broken.append(f'record {number}: {error}'[:200])
                else:
                    yield found
        for problem in self.broken[:10]:
            print(f'broken {problem}', file=sys.stderr)
        if len(self.broken) > number / 100:
            raise UserError(f'{len(self.broken)} of {number} records of {self.path} are broken, '
                            f'more than 1 %. The first: {self.broken[0]}')


def split_json(file):
    """The objects of a JSON array, or the lines of a file of JSON lines."""
    if file.peek(64).lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'[':
        return json.loads(file.read())
    # A line that is too long comes in pieces, which all count as broken.
    return filter(bytes.strip, iter(lambda: file.readline(LONGEST_LINE), b''))


def count_unused(record, used, counts):
    """Count the columns of a record that hold something and that nobody reads, by name."""
    for name, value in record.items():
        if name in used or value in ('', None, [], {}) or value != value:  # NaN, from pandas
            continue
        row = f'  not used: {name[:40]!r}'
        if row not in counts and sum(key.startswith('  not used') for key in counts) >= UNUSED:
            row = '  not used: other columns'
        counts[row] += 1


def download(url, folder):
    """Download a file to folder if it is not there, and return its path."""
    path = os.path.join(folder, os.path.basename(url))
    if os.path.exists(path):
        return path
    with only_writer(folder):
        for pause in PAUSES_S:
            time.sleep(pause)
            try:
                # The next attempt, or the next run, continues the file.
                fetch(url, path + '.part')
                os.replace(path + '.part', path)
                return path
            except (OSError, ValueError) as error:  # all errors of requests are among these
                problem = f'could not download {url}: {error}'
                print(problem, file=sys.stderr)
    raise UserError(f'{problem}. Put the file at {path} yourself, or use --input=FILE.')


def fetch(url, part):
    """Append to the file `part` what is missing."""
    # Takes 0.1 s, and most runs download nothing.
    import requests
    with open(part, 'ab') as file:
        headers = {'Range': f'bytes={file.tell()}-', 'Accept-Encoding': 'identity'}
        with requests.get(url, headers=headers, stream=True, timeout=SILENCE_S) as response:
            # Nothing is missing.
            if response.status_code == 416:
                return
            response.raise_for_status()
            # The server begins again.
            if response.status_code != 206:
                file.truncate(0)
            size = int(response.headers.get('Content-Length', 0))
            with Bar(desc=part, total=size, unit='B', unit_scale=True) as bar:
                for block in response.iter_content(1 << 16):
                    file.write(block)
                    bar.update(len(block))


def split_by_hash(key, seed, **shares):
    """Return the split of a key: one of shares, or train. New data moves no key to another."""
    digest = hashlib.sha256(f'{seed}:{key}'.encode('utf-8', 'surrogatepass')).digest()
    at = int.from_bytes(digest[:8], 'big') / 2 ** 64
    for name, share in shares.items():
        if at < share:
            return name
        at -= share
    return 'train'


class Example(NamedTuple):
    """A conversation. `encode` fills in what follows `drop`."""
    key: object  # examples are written in the order of their keys
    split: str
    turns: list
    language: str = ''
    drop: str = ''  # why it is left out
    ids: bytes = b''  # uint16
    mask: bytes = b''
    n_answers: int = 0  # that are learned, one that is cut among them
    n_cut: int = 0  # 1 if the last of these has no end
    n_lost: int = 0  # answers that are not learned because they are too long
    n_tokens_lost: int = 0  # supervised ones, of the answers that are cut or lost


def start(*arguments):
    """Set, once in each process, what `encode` needs: tokenizer, template, max_tokens, cut."""
    global encoder
    encoder = arguments
    encoder[0].remember()
    if parent_process():  # this is a worker
        # The main process sees to Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this worker when the main process was killed. It would wait for work forever."""
    parent_process().join()
    os._exit(1)


def encode(example):
    """Return the example with its ids, or with the reason why it is dropped."""
    if example.drop or example.ids:
        return example
    try:
        ids, mask, n_lost = conversation.encode(example.turns, *encoder)
    except UnicodeEncodeError:
        return example._replace(drop='half a surrogate pair')
    except ValueError as error:
        heading = 'heading' in str(error)
        return example._replace(drop='template heading' if heading else 'cannot be encoded')
    example = count_answers(example, ids, mask, n_lost)
    if ids is None:
        return example._replace(drop='too long')
    if parent_process():
        # Sending them takes time, and nobody needs them.
        example = example._replace(turns=[])
    return example._replace(ids=ids.tobytes(), mask=mask.tobytes())


def count_answers(example, ids, mask, n_not_whole):
    """The example with the turns that are learned, even in part, and its counts of answers."""
    turns = example.turns
    n_kept = len(turns) - n_not_whole
    n_cut = 0
    n_tokens_lost = 0
    if n_not_whole:
        # Users and assistants take turns: a first turn that is not whole is an answer only if
        # its question is whole, and then a part of it is there.
        n_cut = int(ids is not None and turns[n_kept].role == 'assistant')
        tokenizer, template = encoder[:2]
        whole = conversation.encode(turns, tokenizer, template)[1]
        n_tokens_lost = int(whole.sum())
        if ids is not None:
            n_tokens_lost -= int(mask.sum())
    kept = turns[:n_kept + n_cut]
    n_answers = count_supervised(kept)
    n_lost = count_supervised(turns) - n_answers
    return example._replace(turns=kept, n_answers=n_answers, n_cut=n_cut, n_lost=n_lost,
                            n_tokens_lost=n_tokens_lost)


def count_supervised(turns):
    return sum(turn.role == 'assistant' and turn.supervised for turn in turns)


def encode_all(examples, config, n_bytes=0):
    """Yield the examples encoded, in order; on all cores if the source has many bytes."""
    tags = conversation.TEMPLATES[config.template].tags
    vocabulary = tokenizer.load(config.tokenizer, tags)
    start(vocabulary, config.template, config.max_tokens, config.too_long == 'cut')
    # Starting the workers would take longer.
    if n_bytes < 1 << 20:
        yield from map(encode, examples)
        return
    with ProcessPoolExecutor(initializer=start, initargs=encoder) as pool:
        # Takes all the examples at once, so that this process reads while the others encode.
        results = pool.map(encode, examples, chunksize=500)
        yield from Bar(results, 'encoding', unit=' conversations')


def print_text(examples, config):
    """Print the conversations as text. An answer that is cut is shown whole."""
    for example in encode_all(examples, config):
        if example.turns and not example.drop:
            print(conversation.to_text(example.turns))
        elif not example.drop:  # a piece of plain text
            print(encoder[0].decode(np.frombuffer(example.ids, np.uint16)))


def export(examples, source, config, folder, splits, recipe, **meta):
    """Write the token files, print a table and the next command. meta: what else meta.json says."""
    encoded = list(encode_all(examples, config, source.about['bytes']))
    kept = [example for example in encoded if not example.drop]
    dropped = Counter(example.drop for example in encoded if example.drop)
    if not kept:
        raise UserError(f'{source.path}: no conversation can be used. '
                        f'Dropped: {dict(dropped)}. Seen: {dict(source.counts)}')
    if all(example.split != 'train' for example in kept):
        raise UserError(f'{source.path}: none of the {len(kept)} conversations is for train. '
                        'Put fewer aside, such as --val_fraction=0')
    kept.sort(key=lambda example: example.key)
    files = {split: [] for split in splits}
    for example in kept:
        ids = np.frombuffer(example.ids, np.uint16)
        mask = np.frombuffer(example.mask, np.uint8)
        files[example.split].append((ids, mask))
    answers = {'learned': sum(example.n_answers for example in encoded),
               'cut': sum(example.n_cut for example in encoded),
               'lost': sum(example.n_lost for example in encoded),
               'tokens_lost': sum(example.n_tokens_lost for example in encoded)}
    options = dataclasses.asdict(config)
    for key in ('source', 'input', 'out_dir', 'report', 'stdout'):
        options.pop(key, None)
    languages = Counter(example.language for example in kept if example.language)
    meta |= {'source': source.about, 'template': config.template,
             'tokenizer': encoder[0].state(), 'seed': config.seed, 'options': options,
             'seen': len(encoded), 'kept': len(kept), 'dropped': dropped,
             'truncated': sum(example.n_tokens_lost > 0 for example in kept),
             'answers': answers,
             'languages': dict(sorted(languages.items())),
             'counts': source.counts, 'broken_lines': len(source.broken)}
    meta = tokenfile.write(folder, files, meta)
    print_table(meta, meta['splits'])
    if config.report:
        sys.stdout.flush()
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'report.py')
        if subprocess.run([sys.executable, script, f'--folder={folder}']).returncode:
            raise UserError('the token files are complete, but not the page about them')
    print(f'wrote {folder}. Next: {next_command(recipe, folder)}')


def print_table(meta, splits):
    rows = {**meta['counts'], 'broken records': meta['broken_lines'],
            'conversations seen': meta['seen'], '  kept': meta['kept'],
            '  dropped': meta['seen'] - meta['kept']}
    for reason, n in meta['dropped'].items():
        rows[f'    {reason}'] = n
    answers = meta['answers']
    if answers['learned']:  # plain text has none
        n_lost = answers['tokens_lost']
        n_tokens = n_lost + sum(counts['supervised_tokens'] for counts in splits.values())
        rows['answers learned'] = answers['learned']
        rows['  too long, cut'] = answers['cut']
        rows['answers too long, lost'] = answers['lost']
        rows[f'answer tokens lost, {n_lost / n_tokens:.1%}'] = n_lost
    for name, n in rows.items():
        print(f'{name:<28}{n:>12,}')
    for name, counts in splits.items():
        share = counts['supervised_tokens'] / max(1, counts['tokens'])
        print(f"{name:<10}{counts['conversations']:>9,} conversations"
              f"{counts['tokens']:>12,} tokens, {share:.1%} supervised")


def next_command(recipe, folder):
    """The command that trains on the folder."""
    data_dir, name = os.path.split(os.path.relpath(folder))
    command = ['python', 'train.py', recipe]
    if data_dir != 'data':
        command.append(f'--data_dir={data_dir or "."}')
    command += [f'--dataset={name}', f'--out_dir=out/{name}']
    return shlex.join(command)
