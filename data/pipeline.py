"""What every data/*/prepare.py does with a source once it can read it: encode, split, count, write.

A source comes as blocks. A worker process turns a block into units (one tree, one row: what must not
be torn apart by a split) and encodes their conversations; this process puts them in order, drops
repeated units, writes the token files and prints the table.
"""
import gc
import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from operator import itemgetter
from typing import Callable, NamedTuple

import numpy as np

from core import conversation
from core import tokenfile
from configurator import UserError
from core.progress import Bar

BLOCK = 1 << 20  # bytes of source that a worker gets at a time
LONGEST_LINE = 16 << 20  # bytes; a longer line counts as broken: of [],[],… 16 MiB are half a GB in memory
BROKEN_SHARE = 0.01  # of all lines; with more of them broken the source is refused


class Unit(NamedTuple):
    """What one tree or row of the source gave, before encoding.

    key decides the split. seen = len(conversations) + the sum of dropped. counts: whatever else
    is worth a line in the table. broken: what was wrong, for a line that is no unit at all.
    lines: of how many lines of the source it is made. languages: of its conversations, where the source
    says; after encoding, how many were kept of each.
    """
    key: str = ''
    seen: int = 0
    conversations: list = ()
    dropped: dict = {}
    counts: dict = {}
    broken: str = ''
    lines: int = 1
    languages: object = ()


class Job(NamedTuple):
    """What a worker needs to know."""
    units: Callable  # block -> iterable of Unit
    tokenizer: object
    template: str
    max_tokens: int
    as_text: bool = False


class Encoded(NamedTuple):
    """A block after encoding: ids, mask and lengths of its conversations, end to end.

    units: [(Unit without its conversations, how many of them were kept, how many truncated, text)].
    """
    units: list
    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray


@contextmanager
def opened(path, silent=None):
    """The file at path, with a progress bar for what is read of it; silent=True: without."""
    how = dict(bytes=False, desc=os.path.basename(path), unit='B', unit_scale=True, disable=silent)
    with open(path, 'rb') as file, Bar.wrapattr(file, 'read', os.path.getsize(path), **how) as shown:
        yield shown


def read_blocks(path, silent=None):
    """(number of the first line, bytes of whole lines) of a file, plain or gzip by its content."""
    try:
        with open(path, 'rb') as raw:
            zipped = raw.read(2) == b'\x1f\x8b'
        with opened(path, silent) as raw:
            file, number = gzip.open(raw) if zipped else raw, 1
            while block := file.read(BLOCK):
                block += file.readline(LONGEST_LINE)
                if len(block) > LONGEST_LINE:  # its last line is too long: a stump stands for it
                    while not block.endswith(b'\n') and (rest := file.readline(LONGEST_LINE)):
                        block = block[:BLOCK] + rest[-1:]
                    block = block[:block.rfind(b'\n', 0, BLOCK) + 1] + b'(a line of over %d MiB)\n' % (LONGEST_LINE >> 20)
                yield number, block
                number += block.count(b'\n')
    except FileNotFoundError:
        raise UserError(f'{path} not found. --input takes a .jsonl or .jsonl.gz file.') from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path} cannot be read to its end: {error}. Nothing was written.') from None


def parse_lines(number, block):
    """(line number, object or None, what is wrong) for each line of a block that is not blank."""
    for i, line in enumerate(block.split(b'\n'), number):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode('utf-8-sig'))
            problem = '' if isinstance(record, dict) else f'found a {type(record).__name__}, expected an object'
        except UnicodeDecodeError:
            problem = 'not UTF-8'
        except (ValueError, RecursionError) as error:
            problem = f'not JSON ({str(error)[:60]})'
        yield (i, None, problem) if problem else (i, record, '')


def split_by_hash(seed, **fractions):
    """A function unit key -> split name: by a hash of the key, so that adding data moves nothing."""
    def split_of(key):
        digest = hashlib.sha256(f'{seed}:{key}'.encode('utf-8', 'surrogatepass')).digest()
        at = int.from_bytes(digest[:8], 'big') / 2 ** 64
        for name, fraction in fractions.items():
            if at < fraction:
                return name
            at -= fraction
        return 'train'
    return split_of


def encode_block(job, block):
    """The Encoded of one block."""
    units, all_ids, all_masks = [], [np.zeros(0, np.uint16)], [np.zeros(0, np.uint8)]
    for unit in job.units(block):
        dropped, texts, n_truncated, n_before, languages = Counter(unit.dropped), [], 0, len(all_ids), Counter()
        for turns, language in zip_longest(unit.conversations, unit.languages):
            try:
                ids, mask, n_lost = conversation.encode(turns, job.tokenizer, job.template, job.max_tokens)
            except ValueError:
                dropped['template heading' if job.template == 'alpaca' else 'cannot be encoded'] += 1
                continue
            if ids is None:
                dropped['too long'] += 1
                continue
            n_truncated += n_lost > 0
            languages[language] += 1
            all_ids.append(ids)
            all_masks.append(mask)
            if job.as_text:
                texts.append(conversation.to_text(turns[:len(turns) - n_lost]) + '\n')
        units.append((unit._replace(conversations=(), dropped=dropped, languages=languages), len(all_ids) - n_before,
                      n_truncated, ''.join(texts)))
    return Encoded(units, np.concatenate(all_ids), np.concatenate(all_masks),
                   np.array([len(ids) for ids in all_ids[1:]], np.int64))


_job = None  # of this worker process


def _start_worker(job):
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the process that gives out the work
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job.tokenizer.remember()
    gc.disable()  # JSON makes no cycles, and looking for some cost 3 % of the time


def _leave_with_parent():
    multiprocessing.parent_process().join()  # killed, it can tell nobody: its workers would wait for ever
    os._exit(1)


def _work(block):
    return encode_block(_job, block)


def encoded_blocks(blocks, job):
    """The blocks, Encoded, in order; on all cores where there is more than one of them."""
    blocks = iter(blocks)
    first = [block for block in (next(blocks, None), next(blocks, None)) if block is not None]
    if len(first) < 2:
        job.tokenizer.remember()
        yield from (encode_block(job, block) for block in first)
        return
    n_workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with ProcessPoolExecutor(n_workers, initializer=_start_worker, initargs=(job,)) as pool:
        pending = deque(pool.submit(_work, block) for block in first)
        while pending:
            while len(pending) < 2 * n_workers and (block := next(blocks, None)) is not None:
                pending.append(pool.submit(_work, block))
            yield pending.popleft().result()


def export(blocks, job, split_of, folder, splits, meta, options, by_key=False):
    """Write the token files of a source and print the table; returns what meta.json says.

    by_key: units stand in the order of their keys, whatever their order in the source; that takes
    all of them in memory at once, where otherwise each block is written as it comes.
    """
    seen = truncated = n_lines = 0
    dropped, counts, languages, broken, keys = Counter(), Counter(), Counter(), [], set()
    units_of = {split: [] for split in splits}  # (key, ids, mask, lengths) of each unit
    with tokenfile.Writer(folder, splits) as writer:
        for encoded in encoded_blocks(blocks, job):
            ends, first = [0, *np.cumsum(encoded.lengths).tolist()], 0
            for unit, n_kept, n_truncated, _ in encoded.units:
                last = first + n_kept
                tokens, lengths = slice(ends[first], ends[last]), encoded.lengths[first:last]
                first = last
                if unit.broken:
                    broken.append(unit.broken)
                    continue
                n_lines += unit.lines
                seen += unit.seen
                if unit.key in keys:
                    counts['repeated, left out'] += 1
                    dropped['repeated'] += unit.seen
                    continue
                keys.add(unit.key)
                counts.update(unit.counts)
                languages.update(unit.languages)
                dropped.update(unit.dropped)
                truncated += n_truncated
                if n_kept:
                    units_of[split_of(unit.key)].append((unit.key, encoded.ids[tokens], encoded.mask[tokens], lengths))
            if not by_key:
                _write(writer, units_of, by_key)
        check_broken(broken, n_lines)
        _write(writer, units_of, by_key)
        kept = sum(counts['conversations'] for counts in writer.counts.values())
        assert seen == kept + dropped.total(), (seen, kept, dropped)
        if not kept:
            raise UserError(f'no conversation was kept of {seen} seen; dropped: {dict(dropped) or "none"}. '
                            'Nothing was written.')
        meta = {**meta, 'template': job.template, 'tokenizer': job.tokenizer.state(),
                'seen': seen, 'kept': kept, 'dropped': dict(dropped), 'truncated': truncated,
                'counts': dict(counts),
                'languages': {name: languages[name] for name in sorted(filter(None, languages))},
                'broken_lines': len(broken), 'options': options}
        writer.finish(meta)
    meta['splits'] = writer.counts
    print(table(meta))
    return meta


def _write(writer, units_of, by_key):
    """Write the collected units, in the order of their keys or as they came, and forget them."""
    for split, units in units_of.items():
        if units:
            _, *arrays = zip(*sorted(units, key=itemgetter(0)) if by_key else units)
            writer.add(split, *map(np.concatenate, arrays))
            units.clear()


def print_text(blocks, job):
    """The kept conversations as text on standard output, one after another."""
    keys, broken, n_lines = set(), [], 0
    for encoded in encoded_blocks(blocks, job._replace(as_text=True)):
        for unit, _, _, text in encoded.units:
            if unit.broken:
                broken.append(unit.broken)
                continue
            n_lines += unit.lines
            if unit.key not in keys:
                keys.add(unit.key)
                sys.stdout.write(text)
    check_broken(broken, n_lines)


def check_broken(broken, n_good):
    """Name the first broken lines on standard error; UserError where they are too many."""
    for line in broken[:10]:
        print(f'broken {line}', file=sys.stderr)
    if len(broken) > 10:
        print(f'… and {len(broken) - 10} more broken lines', file=sys.stderr)
    if len(broken) > BROKEN_SHARE * (len(broken) + n_good):
        raise UserError(f'{len(broken)} of {len(broken) + n_good} lines are broken, more than '
                        f'{BROKEN_SHARE:.0%}; the first: {broken[0]}. Nothing was written.')


def table(meta):
    """The counts of meta.json, for a person."""
    splits = meta['splits'].items()
    tokens = sum(counts['tokens'] for _, counts in splits)
    rows = [*meta['counts'].items(), ('broken lines', meta['broken_lines']),
            ('conversations seen', meta['seen']), ('  kept', meta['kept']),
            ('  dropped', meta['seen'] - meta['kept']),
            *((f'    {reason}', n) for reason, n in meta['dropped'].items() if n),
            ('truncated to max_tokens', meta['truncated']), ('tokens', tokens)]
    lines = [f'{name:<28}{n:>12,}' for name, n in rows]
    for name, counts in splits:
        share = counts['supervised_tokens'] / max(1, counts['tokens'])
        lines.append(f"{name:<10}{counts['conversations']:>9,} conversations{counts['tokens']:>12,} tokens, "
                     f'{share:.1%} supervised')
    return '\n'.join(lines)


def local_source(path):
    """What meta.json says of a local file: its name, size and hash, not where it lay."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}. --input takes a .jsonl or .jsonl.gz file.') from None
    return {'name': os.path.basename(path), 'url': None, 'bytes': os.path.getsize(path),
            'sha256': digest.hexdigest(), 'licence': None}
