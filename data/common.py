"""What every prepare.py shares: it turns the records of a Source into Examples for `export`."""
import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from typing import NamedTuple

from configurator import REPOSITORY, UserError
from core import conversation, tokenfile, tokenizer
from core.files import Bar, reading

HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
# The recipe for whatever is not a published file.
OWN_DATA = 'config/finetune_own.py'


class Example(NamedTuple):
    """A conversation, or a piece of plain text."""
    split: str
    turns: list
    drop: str = ''  # why it is left out
    key: str = ''  # examples are written in the order of their keys
    encoded: tuple = ()  # instead of turns, for a piece of text: ids, mask, 0


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

    def records(self, read, expected, split=split_json):
        """Yield read(record) for each record that split(file) finds."""
        with self.open(expected) as file:
            for number, record in enumerate(split(file), 1):
                with reading(f'record {number} of {self.path}', expected):
                    if isinstance(record, bytes):
                        record = json.loads(record)
                    found = read(record)
                yield found


def download(url, folder):
    """Download a file to folder if it is not there, and return its path."""
    path = os.path.join(folder, os.path.basename(url))
    if os.path.exists(path):
        return path
    import requests  # here, because most runs download nothing
    try:
        # Go on where an earlier run broke off.
        with open(f'{path}.part', 'ab') as file:
            headers = {'Range': f'bytes={file.tell()}-', 'Accept-Encoding': 'identity'}
            response = requests.get(url, headers=headers, stream=True, timeout=30)
            # 200: the server begins again. 416: there is nothing after what we have.
            if response.status_code in (200, 416):
                file.truncate(0)
            response.raise_for_status()
            for block in Bar(response.iter_content(1 << 20), path, unit=' MB'):
                file.write(block)
        os.replace(f'{path}.part', path)
    except OSError as error:  # all errors of requests are among these
        raise UserError(f'could not download {url}: {error}. Run this again to go on, or '
                        f'put the file at {path} yourself.') from None
    return path


def split_by_hash(key, seed, **shares):
    """Return the split of a key: one of shares, or train. It never depends on other keys."""
    digest = hashlib.sha256(f'{seed}:{key}'.encode('utf-8', 'surrogatepass')).digest()
    at = int.from_bytes(digest[:8], 'big') / 2 ** 64
    for name, share in shares.items():
        if at < share:
            return name
        at -= share
    return 'train'


def print_text(examples):
    """Print the conversations as text, none of them cut."""
    for example in examples:
        if not example.drop:
            print(conversation.to_text(example.turns))


def export(examples, source, config, folder, recipe, **meta):
    """Write the token files, print the counts and the next command. meta: more for meta.json."""
    template = conversation.TEMPLATES[config.template]
    vocabulary = tokenizer.load(config.tokenizer, template.tags)
    # The threads of a tree share most of their turns.
    vocabulary.encode = lru_cache(64)(vocabulary.encode)
    splits = {'train': [], 'val': []}
    dropped = Counter()
    truncated = 0
    lost = 0  # tokens of answers that do not fit
    examples = sorted(examples, key=lambda example: example.key)
    # Encode everything, and see what can be used.
    for example in Bar(examples, 'encoding', unit=' conversations'):
        if example.drop:
            dropped[example.drop] += 1
            continue
        written = (example.turns, vocabulary, config.template)
        try:
            ids, mask, _ = example.encoded or conversation.encode(*written)
        except ValueError:
            # Half a surrogate pair, or a heading of the template inside a message.
            dropped['cannot be encoded'] += 1
            continue
        if len(ids) > config.max_tokens:
            lost += int(mask.sum())
            cut = config.too_long == 'cut'
            ids, mask, _ = conversation.encode(*written, config.max_tokens, cut)
            if ids is None:
                dropped['too long'] += 1
                continue
            lost -= int(mask.sum())
            truncated += 1
        splits.setdefault(example.split, []).append((ids, mask))
    kept = sum(map(len, splits.values()))
    if not splits['train']:
        raise UserError(f'{source.path}: no conversation can be used for training. '
                        f'Put aside: {kept}. Dropped: {dict(dropped)}')

    # Leave out this machine's paths: meta.json may be published.
    options = asdict(config) | {'input': '', 'out_dir': '', 'tokenizer': vocabulary.name}
    meta |= {'source': source.about, 'template': config.template,
             'tokenizer': vocabulary.state(), 'seed': config.seed, 'options': options,
             'seen': len(examples), 'kept': kept, 'dropped': dropped,
             'truncated': truncated, 'answer_tokens_lost': lost}
    meta = tokenfile.write(folder, splits, meta)

    # The same counts for a person, and what to do next.
    print(f'{len(examples):,} conversations, {kept:,} kept, {truncated:,} of these cut to fit')
    for reason, n in dropped.items():
        print(f'dropped: {n:,} {reason}')
    print(f'{lost:,} tokens of answers did not fit')
    for name, n in meta['splits'].items():
        print(f"{name}: {n['conversations']:,} conversations, {n['tokens']:,} tokens, "
              f"{n['supervised_tokens']:,} supervised")
    if config.report:
        script = os.path.join(REPOSITORY, 'data', 'report.py')
        subprocess.run([sys.executable, script, f'--folder={folder}'])
    data_dir, name = os.path.split(os.path.relpath(folder))
    command = f'python train.py {recipe} --dataset={name} --out_dir=out/{name}'
    if data_dir != 'data':
        command += f' --data_dir={data_dir or "."}'
    print(f'wrote {folder}. Next: {command}')
