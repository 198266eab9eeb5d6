"""What every prepare.py shares: the source, the split, encoding, counting and writing.

A prepare.py turns the records of a Source into Examples and gives them to `export`.
"""
import dataclasses
import gzip
import hashlib
import json
import os
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
PAUSES_S = (0, 1, 2, 4, 8)  # before each attempt to download
SILENCE_S = 30  # a connection that sends nothing for so long is broken
LONGEST_LINE = 16 << 20  # bytes; parsing a hostile line takes 30 times as much memory


class Source:
    """The file to read: --input, or the published file that --source names.

    published: {name: {'url', 'sha256', 'licence'}}; it is downloaded once, into `folder`.
    """

    def __init__(self, config, published, folder):
        self.counts = Counter()  # rows of the table, filled in by the caller
        self.broken = []  # what is wrong with records that cannot be read
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

    def records(self, read):
        """Yield read(record) for each object in the file: a JSON array, or one object a line."""
        number = 0
        with reading(self.path, 'Expected JSON lines or one JSON array.'), \
                open(self.path, 'rb') as file:
            if file.peek(2)[:2] == b'\x1f\x8b':
                file = gzip.GzipFile(fileobj=file)
            # A line that is too long comes in pieces, which all count as broken.
            values = filter(bytes.strip, iter(lambda: file.readline(LONGEST_LINE), b''))
            if file.peek(64).lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'[':
                values = json.loads(file.read())
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


def download(url, folder):
    """Download a file to folder if it is not there, and return its path."""
    path = os.path.join(folder, os.path.basename(url))
    if os.path.exists(path):
        return path
    with only_writer(folder):
        for pause in PAUSES_S:
            time.sleep(pause)
            try:
                fetch(url, path + '.part')  # which the next attempt or run continues
                os.replace(path + '.part', path)
                return path
            except (OSError, ValueError) as error:  # all errors of requests are among these
                problem = f'could not download {url}: {error}'
                print(problem, file=sys.stderr)
    raise UserError(f'{problem}. Put the file at {path} yourself, or use --input=FILE.')


def fetch(url, part):
    """Append to the file `part` what is missing."""
    import requests  # takes 0.1 s, and most runs download nothing
    with open(part, 'ab') as file:
        headers = {'Range': f'bytes={file.tell()}-', 'Accept-Encoding': 'identity'}
        with requests.get(url, headers=headers, stream=True, timeout=SILENCE_S) as response:
            if response.status_code == 416:  # nothing is missing
                return
            response.raise_for_status()
            if response.status_code != 206:  # the server begins again
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
    n_lost: int = 0  # turns cut off its end


def start(*arguments):
    """Set, once in each process, what `encode` needs: tokenizer, template, max_tokens."""
    global encoder
    encoder = arguments
    encoder[0].remember()
    if parent_process():  # this is a worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process sees to Ctrl-C
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this worker when the main process was killed. It would wait for work forever."""
    parent_process().join()
    os._exit(1)


def encode(example):
    """Return the example with its ids, or with the reason why it is dropped."""
    if example.drop:
        return example
    try:
        ids, mask, n_lost = conversation.encode(example.turns, *encoder)
    except UnicodeEncodeError:
        return example._replace(drop='half a surrogate pair')
    except ValueError as error:
        heading = 'heading' in str(error)
        return example._replace(drop='template heading' if heading else 'cannot be encoded')
    if ids is None:
        return example._replace(drop='too long')
    turns = example.turns[:len(example.turns) - n_lost]
    if parent_process():
        turns = []  # the main process has no use for them, and sending them takes time
    return example._replace(turns=turns, ids=ids.tobytes(), mask=mask.tobytes(), n_lost=n_lost)


def encode_all(examples, config, n_bytes=0):
    """Yield the examples encoded, in order; on all cores if the source has many bytes."""
    tags = conversation.TEMPLATES[config.template].tags
    start(tokenizer.load(config.tokenizer, tags), config.template, config.max_tokens)
    if n_bytes < 1 << 20:  # starting the workers would take longer
        yield from map(encode, examples)
        return
    with ProcessPoolExecutor(initializer=start, initargs=encoder) as pool:
        # Takes all the examples at once, so that this process reads while the others encode.
        results = pool.map(encode, examples, chunksize=500)
        yield from Bar(results, 'encoding', unit=' conversations')


def export(examples, source, config, folder, splits, recipe, **meta):
    """Write the token files, print a table and the next command. meta: what else meta.json says."""
    with tokenfile.Writer(folder, splits) as writer:
        encoded = list(encode_all(examples, config, source.about['bytes']))
        kept = [example for example in encoded if not example.drop]
        dropped = Counter(example.drop for example in encoded if example.drop)
        if not kept:
            raise UserError(f'{source.path}: no conversation can be used. '
                            f'Dropped: {dict(dropped)}. Seen: {dict(source.counts)}')
        kept.sort(key=lambda example: example.key)
        for split in splits:
            chosen = [example for example in kept if example.split == split]
            ids = np.frombuffer(b''.join(example.ids for example in chosen), np.uint16)
            mask = np.frombuffer(b''.join(example.mask for example in chosen), np.uint8)
            writer.add(split, ids, mask, [len(example.mask) for example in chosen])
        options = dataclasses.asdict(config)
        for key in ('source', 'input', 'out_dir', 'report', 'stdout'):
            options.pop(key, None)
        languages = Counter(example.language for example in kept if example.language)
        meta |= {'source': source.about, 'template': config.template,
                 'tokenizer': encoder[0].state(), 'seed': config.seed, 'options': options,
                 'seen': len(encoded), 'kept': len(kept), 'dropped': dropped,
                 'truncated': sum(example.n_lost > 0 for example in kept),
                 'languages': dict(sorted(languages.items())),
                 'counts': source.counts, 'broken_lines': len(source.broken)}
        writer.finish(meta)
    print_table(meta, writer.counts)
    if config.report:
        sys.stdout.flush()
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'report.py')
        if subprocess.run([sys.executable, script, f'--folder={folder}']).returncode:
            raise UserError('the token files are complete, but not the page about them')
    data_dir, name = os.path.split(os.path.relpath(folder))
    print(f'wrote {folder}. Next: python train.py {recipe} --data_dir={data_dir or "."} '
          f'--dataset={name}')


def print_table(meta, splits):
    rows = {**meta['counts'], 'broken records': meta['broken_lines'],
            'conversations seen': meta['seen'], '  kept': meta['kept'],
            '  dropped': meta['seen'] - meta['kept']}
    for reason, n in meta['dropped'].items():
        rows[f'    {reason}'] = n
    rows['cut to max_tokens'] = meta['truncated']
    for name, n in rows.items():
        print(f'{name:<28}{n:>12,}')
    for name, counts in splits.items():
        share = counts['supervised_tokens'] / max(1, counts['tokens'])
        print(f"{name:<10}{counts['conversations']:>9,} conversations"
              f"{counts['tokens']:>12,} tokens, {share:.1%} supervised")
