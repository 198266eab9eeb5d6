"""What every prepare.py shares: it turns the records of a Source into Examples for `export`."""
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import parent_process
from typing import NamedTuple

import numpy as np

from configurator import REPOSITORY, UserError
from core import conversation, tokenfile, tokenizer
from core.files import Bar, reading

HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
# The recipe for whatever is not a published file.
OWN_DATA = 'config/finetune_own.py'


def split_json(file):
    """The objects of a JSON array, or the lines of a file of JSON lines."""
    if file.peek(64).lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'[':
        return json.loads(file.read())
    return filter(bytes.strip, file)


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
        self.about = {'name': os.path.basename(self.path), 'url': None, 'licence': None,
                      'bytes': os.path.getsize(self.path), 'sha256': sha256}
        for name, entry in published.items():
            if entry['sha256'] == sha256:
                self.about |= {'name': name, **entry}
                print(f"{name}: licence {entry['licence']}", file=sys.stderr)
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

    def records(self, read, split=split_json, expected='Expected JSON lines or one JSON array.'):
        """Yield read(record) for each record that split(file) finds."""
        number = 0
        with self.open(expected) as file:
            for number, record in enumerate(split(file), 1):
                try:
                    if isinstance(record, bytes):
                        record = json.loads(record)
                    found = read(record)
                except Exception as error:  # a malformed record can make a reader raise anything
                    problem = f'record {number}: {type(error).__name__} {error}'
                    self.broken.append(problem[:200])
                else:
                    yield found
        if len(self.broken) > number / 100:
            raise UserError(f'{len(self.broken)} of {number} records of {self.path} are broken, '
                            f'more than 1 %. The first: {self.broken[0]}. {expected}')
        for problem in self.broken[:10]:
            print(f'broken {problem}', file=sys.stderr)


def download(url, folder):
    """Download a file to folder if it is not there, and return its path."""
    path = os.path.join(folder, os.path.basename(url))
    if os.path.exists(path):
        return path
    # Takes 0.1 s, and most runs download nothing.
    import requests
    try:
        # What a run before left is continued.
        with open(f'{path}.part', 'ab') as file:
            headers = {'Range': f'bytes={file.tell()}-', 'Accept-Encoding': 'identity'}
            response = requests.get(url, headers=headers, stream=True, timeout=30)
            response.raise_for_status()
            if response.status_code != 206:
                file.truncate(0)  # the server begins again
            for block in Bar(response.iter_content(1 << 20), path, unit=' MB'):
                file.write(block)
        os.replace(f'{path}.part', path)
    except OSError as error:  # all errors of requests are among these
        raise UserError(f'could not download {url}: {error}. Run this again to go on, or put the '
                        f'file at {path} yourself.') from None
    return path


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
    n_lost: int = 0  # tokens of answers that do not fit


def start(name, template, max_tokens, cut):
    """Set, once in each process, what `encode` needs. name: of the vocabulary."""
    global encoder
    vocabulary = tokenizer.load(name, conversation.TEMPLATES[template].tags)
    # The threads of a tree share most of their turns.
    vocabulary.encode = lru_cache(64)(vocabulary.encode)
    encoder = (vocabulary, template, max_tokens, cut)
    if parent_process():
        # This is a worker. The main process sees to Ctrl-C.
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
        ids, mask, n_not_whole = conversation.encode(example.turns, *encoder)
    except UnicodeEncodeError:
        return example._replace(drop='half a surrogate pair')
    except ValueError as error:
        heading = 'heading' in str(error)
        return example._replace(drop='template heading' if heading else 'cannot be encoded')
    if n_not_whole:
        _, whole, _ = conversation.encode(example.turns, *encoder[:2])
        kept = [] if mask is None else mask
        example = example._replace(n_lost=int(np.sum(whole) - np.sum(kept)))
    if ids is None:
        return example._replace(drop='too long')
    if parent_process():
        # Sending them takes time, and nobody needs them.
        example = example._replace(turns=[])
    return example._replace(ids=ids.tobytes(), mask=mask.tobytes())


def encode_all(examples, config, n_bytes=0):
    """Yield the examples encoded, in order; on all cores if the source has many bytes."""
    settings = (config.tokenizer, config.template, config.max_tokens, config.too_long == 'cut')
    start(*settings)
    # Starting the workers would take longer.
    if n_bytes < 1 << 20:
        yield from map(encode, examples)
        return
    with ProcessPoolExecutor(initializer=start, initargs=settings) as pool:
        # Takes all the examples at once, so that this process reads while the others encode.
        results = pool.map(encode, examples, chunksize=500)
        yield from Bar(results, 'encoding', unit=' conversations')


def print_text(examples, config):
    """Print the conversations as text. One that is too long is shown whole."""
    for example in encode_all(examples, config):
        if example.turns and not example.drop:
            print(conversation.to_text(example.turns))
        elif example.ids:  # a piece of plain text
            print(encoder[0].decode(np.frombuffer(example.ids, np.uint16)))


def export(examples, source, config, folder, splits, recipe, **meta):
    """Write the token files, print a table and the next command. meta: more for meta.json."""
    # Encode everything, and see what can be used.
    encoded = list(encode_all(examples, config, source.about['bytes']))
    kept = [example for example in encoded if not example.drop]
    dropped = Counter(example.drop for example in encoded if example.drop)
    if all(example.split != 'train' for example in kept):
        raise UserError(f'{source.path}: no conversation can be used for training. Dropped: '
                        f'{dict(dropped)}. Put aside: {len(kept)}. Found: {dict(source.counts)}')
    kept.sort(key=lambda example: example.key)
    files = {split: [] for split in splits}
    for example in kept:
        ids = np.frombuffer(example.ids, np.uint16)
        mask = np.frombuffer(example.mask, np.uint8)
        files[example.split].append((ids, mask))
    # Leave out this machine's paths: meta.json may be published.
    options = dataclasses.asdict(config) | {'input': '', 'out_dir': ''}
    meta |= {'source': source.about, 'template': config.template,
             'tokenizer': encoder[0].state(), 'seed': config.seed, 'options': options,
             'seen': len(encoded), 'kept': len(kept), 'dropped': dropped,
             'truncated': sum(example.n_lost > 0 for example in kept),
             'answer_tokens_lost': sum(example.n_lost for example in encoded),
             'languages': Counter(example.language for example in kept if example.language),
             'counts': source.counts, 'broken_lines': len(source.broken)}
    meta = tokenfile.write(folder, files, meta)
    # The same counts for a person, and what to do next.
    rows = {**source.counts, 'broken records': len(source.broken),
            'conversations seen': len(encoded), '  kept': len(kept),
            '  of these, truncated': meta['truncated']}
    for reason, n in dropped.items():
        rows[f'  dropped: {reason}'] = n
    n_lost = meta['answer_tokens_lost']
    n_tokens = n_lost + sum(n['supervised_tokens'] for n in meta['splits'].values())
    rows[f'answer tokens lost, {n_lost / n_tokens:.1%}'] = n_lost
    for name, n in rows.items():
        print(f'{name:<28}{n:>12,}')
    for name, n in meta['splits'].items():
        share = n['supervised_tokens'] / max(1, n['tokens'])
        print(f"{name:<10}{n['conversations']:>9,} conversations{n['tokens']:>12,} tokens, "
              f"{share:.1%} supervised")
    if config.report:
        script = os.path.join(REPOSITORY, 'data', 'report.py')
        subprocess.run([sys.executable, script, f'--folder={folder}'])
    data_dir, name = os.path.split(os.path.relpath(folder))
    command = f'python train.py {recipe} --dataset={name} --out_dir=out/{name}'
    if data_dir != 'data':
        command += f' --data_dir={data_dir or "."}'
    print(f'wrote {folder}. Next: {command}')


def count_unused(record, used, counts):
    """Count the columns of a record that hold something and that nobody reads, by name."""
    for name, value in record.items():
        if name not in used and value not in ('', None, [], {}):
            counts[f'  not used: {name[:40]!r}'] += 1
