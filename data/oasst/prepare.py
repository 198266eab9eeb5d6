"""OpenAssistant's conversation trees -> token files of XML-tagged conversations.

    python data/oasst/prepare.py                         # download, filter, split, write .bin
    python data/oasst/prepare.py --stdout | head         # the conversations as text, to look at
    python data/oasst/prepare.py --input=trees.jsonl.gz --turns=all --lang=en,de

Reads both published forms: message trees, and flat messages that name their parents.
Source: https://huggingface.co/datasets/OpenAssistant/oasst2 and oasst1, Apache-2.0;
Köpf et al. 2023, https://arxiv.org/abs/2304.07327
"""
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import configurator
from core import tokenizer
from configurator import UserError
from core.conversation import Turn
from data import download, pipeline, report
from data.pipeline import Unit
from core.progress import Bar

SOURCES = {
    'oasst2': {'repository': 'OpenAssistant/oasst2', 'revision': '179dd21fc55192153d94adb0e0ce8f69e222bf75',
               'file': '2023-11-05_oasst2_ready.trees.jsonl.gz', 'bytes': 54_370_156,
               'sha256': '7a886a16ccfc1173c4f00a6897523e3c95b2785a86ee44a18a98f4f2807ee29b'},
    'oasst1': {'repository': 'OpenAssistant/oasst1', 'revision': 'fdf72ae0827c1cda404aff25b6603abec9e3399b',
               'file': '2023-04-12_oasst_ready.trees.jsonl.gz', 'bytes': 34_145_252,
               'sha256': '2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7'},
}
LICENCE = 'Apache-2.0'
ROLES = {'prompter': 'user', 'assistant': 'assistant'}


@dataclass(frozen=True)
class Config:
    source: str = 'oasst2'     # oasst2 or oasst1: downloaded once, into this script's folder
    input: str = ''            # a local .jsonl or .jsonl.gz to read instead, trees or flat messages
    out_dir: str = HERE        # where the token files go
    report: bool = False       # write a page about the data there too, report.html
    stdout: bool = False       # write the conversations as text to standard output, and no files
    turns: str = 'first'       # first: the root and each direct reply; all: every whole thread
    lang: str = 'en'           # languages to keep, of each message: a comma list, or all
    top_k: int = 0             # keep the k best-ranked replies to each message; 0 keeps all
    synthetic: bool = True     # keep conversations with messages that a model wrote
    template: str = 'xml'      # xml or dialogpt
    tokenizer: str = 'gpt2'    # gpt2, or a folder or tokenizer.json in transformers' form
    max_tokens: int = 1024     # a longer conversation loses whole turns from its end
    val_fraction: float = 0.05 # share of the trees that is set aside for validation
    seed: int = 1337           # of the hash that decides which trees

    def problems(self):
        """What cannot work, a sentence each."""
        if self.source not in SOURCES:
            yield f'source={self.source!r}: expected one of {", ".join(SOURCES)}.'
        if self.turns not in ('first', 'all'):
            yield f'turns={self.turns!r}: expected first or all.'
        if self.template not in ('xml', 'dialogpt'):
            yield f'template={self.template!r}: expected xml or dialogpt.'
        if self.stdout and self.report:
            yield 'stdout writes no token files, and report shows what is in them: leave one of them out.'
        if not self.lang.strip(', '):
            yield 'lang is empty: expected a comma list such as en,de, or all.'
        if self.top_k < 0 or self.max_tokens < 16:
            yield f'top_k={self.top_k} must be 0 or more, max_tokens={self.max_tokens} 16 or more.'
        if not 0 <= self.val_fraction < 1:
            yield f'val_fraction={self.val_fraction} must be at least 0 and below 1.'


class Message(NamedTuple):
    """One message of a tree; parent is its place in the tree's list, -1 for the root."""
    parent: int
    role: str
    text: str
    drop: str  # why it is not used: '' or the reason
    lang: str


class Broken(ValueError):
    """A line that is not what the export's format says."""


def _field(record, name, kinds, default=None):
    """A field of a message, its type checked. The exporter leaves out nulls; pandas writes NaN."""
    value = record.get(name, default)
    if value is None or value != value:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise Broken(f'{name} is {type(value).__name__} {str(value)[:40]!r}')
    return value


def _order(record):
    """Siblings by rank, 0 the best, unranked last; then by id, so that both forms agree."""
    if not isinstance(record, dict):
        raise Broken(f'a reply is {type(record).__name__} {str(record)[:40]!r}')
    rank = _field(record, 'rank', (int, float))
    return rank is None, rank or 0, _field(record, 'message_id', (str,), '')


def _message(record, parent, config):
    """One message, checked, with the reason why it is left out if it is."""
    if not isinstance(record, dict):
        raise Broken(f'a message is {type(record).__name__} {str(record)[:40]!r}')
    text, role = _field(record, 'text', (str,)), _field(record, 'role', (str,))
    if text is None or role not in ROLES:
        raise Broken('text is missing' if text is None else f'role is {role!r}')
    try:
        text.encode('utf-8')
    except UnicodeEncodeError:
        raise Broken('text holds half a surrogate pair') from None
    drop, lang = '', _field(record, 'lang', (str,), '')
    if _field(record, 'deleted', (bool,)):
        drop = 'deleted'
    elif not _field(record, 'review_result', (bool,), True):
        drop = 'review_result'
    elif not text.strip():
        drop = 'empty text'
    elif config.lang != 'all' and lang not in config.lang.replace(' ', '').split(','):
        drop = 'language'
    elif not config.synthetic and _field(record, 'synthetic', (bool,)):
        drop = 'synthetic'
    return Message(parent, ROLES[role], text, drop, lang)


def read_tree(root, replies_of, config):
    """The messages of a tree, each after its parent, the best reply first.

    replies_of(record) gives the records of its replies. No recursion: threads of 10,000 occur.
    """
    messages, waiting = [], [(root, _message(root, -1, config))]
    while waiting:
        record, message = waiting.pop()
        here = len(messages)
        messages.append(message)
        replies = replies_of(record)
        if not isinstance(replies, list):
            raise Broken(f'replies is a {type(replies).__name__}')
        below, n_ranked = [], 0
        for reply in sorted(replies, key=_order):
            message = _message(reply, here, config)
            n_ranked += not message.drop  # a reply left out takes no place among the best
            if config.top_k and n_ranked > config.top_k:
                message = message._replace(drop=message.drop or 'top_k')
            below.append((reply, message))
        waiting += reversed(below)
    return messages


def threads(messages, turns):
    """(paths, dropped): paths are lists of places in `messages`, each ending on an assistant message.

    turns='first': the root and each direct reply. 'all': every thread from the root to its last
    assistant message; one that meets a message left out ends above it. dropped counts, by reason,
    the threads of which nothing is left that another thread does not have.
    """
    dropped = Counter()
    if turns == 'first':
        paths = []
        for i, message in enumerate(messages):
            if message.parent == 0:
                reason = messages[0].drop or message.drop or (
                    'roles' if (messages[0].role, message.role) != ('user', 'assistant') else '')
                if reason:
                    dropped[reason] += 1
                else:
                    paths.append([0, i])
        return paths, dropped
    # From the leaves up: the last assistant messages, in the whole tree and in what is kept of it.
    why, usable = [], []  # the first reason on the way from the root; whether the message can be used
    for message in messages:
        above = message.parent >= 0
        role_fits = message.role == ('assistant' if above and messages[message.parent].role == 'user' else 'user')
        why.append((why[message.parent] if above else '') or message.drop or ('' if role_fits else 'roles'))
        usable.append(not why[-1])
    last, last_usable = _last_answers(messages, [True] * len(messages)), _last_answers(messages, usable)
    taken = set()
    paths = []
    for end in last:
        i = end
        while i >= 0 and not (usable[i] and messages[i].role == 'assistant'):
            i = messages[i].parent
        if i in last_usable and i not in taken:
            taken.add(i)
            path = []
            while i >= 0:
                path.append(i)
                i = messages[i].parent
            paths.append(path[::-1])
        else:
            dropped[why[end]] += 1
    return paths, dropped


def _last_answers(messages, usable):
    """The usable assistant messages below which no usable one stands, in the order of the tree."""
    has_answer_below = [False] * len(messages)
    for i in range(len(messages) - 1, 0, -1):
        message = messages[i]
        if usable[i] and (message.role == 'assistant' or has_answer_below[i]):
            has_answer_below[message.parent] = True
    return {i: None for i, message in enumerate(messages)
            if usable[i] and message.role == 'assistant' and not has_answer_below[i]}


def unit_of_tree(key, messages, config, lines=1):
    """The Unit of one tree: its conversations, each assistant message supervised exactly once."""
    paths, dropped = threads(messages, config.turns)
    learned, conversations = set(), []
    for path in paths:
        conversations.append([Turn(messages[i].role, messages[i].text, supervised=i not in learned)
                              for i in path])
        learned.update(path)
    counts = {'trees': 1, 'messages': len(messages),
              'different answers': sum(messages[i].role == 'assistant' for i in learned),
              **Counter(f'messages left out: {message.drop}' for message in messages if message.drop)}
    return Unit(key, len(paths) + sum(dropped.values()), conversations, dropped, counts, lines=lines,
                languages=[messages[path[0]].lang for path in paths])


def units_of_tree_lines(config, block):
    """The Units of a block of lines in the form of message trees."""
    for number, record, problem in pipeline.parse_lines(*block):
        try:
            if problem:
                raise Broken(problem)
            root = record.get('prompt')
            messages = read_tree(root, lambda message: message.get('replies') or [], config)
            key = _field(record, 'message_tree_id', (str,)) or _field(root, 'message_id', (str,)) or \
                hashlib.sha256(messages[0].text.encode()).hexdigest()
        except Broken as error:
            yield Unit(broken=f'line {number}: {error}')
            continue
        yield unit_of_tree(key, messages, config)


KEPT_FIELDS = ('message_id', 'parent_id', 'message_tree_id', 'text', 'role', 'lang', 'rank', 'deleted',
               'review_result', 'synthetic')


def trees_of_messages(blocks, config):
    """Flat messages -> blocks of Units, one for each tree, in the order of their roots.

    Messages of a tree may stand anywhere in the file, so all are read before the first is given on.
    Counted: messages whose parent is missing (or that are their own ancestors), repeated ids.
    """
    roots, replies, broken, ids, n_repeated = [], {}, [], set(), 0
    for block in blocks:
        for number, record, problem in pipeline.parse_lines(*block):
            try:
                if problem:
                    raise Broken(problem)
                record = {name: record[name] for name in KEPT_FIELDS if name in record}
                key, parent = _field(record, 'message_id', (str,)), _field(record, 'parent_id', (str,))
                _message(record, -1, config), _order(record), _field(record, 'message_tree_id', (str,))
                if key is None:
                    raise Broken('message_id is missing')
            except Broken as error:
                broken.append(Unit(broken=f'line {number}: {error}'))
                continue
            if key in ids:
                n_repeated += 1
                continue
            ids.add(key)
            (roots if parent is None else replies.setdefault(parent, [])).append(record)
    units, n_lost = [], len(ids)
    for root in roots:
        messages = read_tree(root, lambda message: replies.get(message['message_id'], []), config)
        n_lost -= len(messages)
        key = _field(root, 'message_tree_id', (str,)) or root['message_id']
        units.append(unit_of_tree(key, messages, config, lines=len(messages)))
    lost = {'messages without a root': n_lost, 'messages repeated': n_repeated}
    lost = Unit(key='\0', counts={name: n for name, n in lost.items() if n}, lines=n_lost + n_repeated)
    units = iter(Bar([*units, lost, *broken], desc='encoding', unit=' trees'))
    while block := list(islice(units, 200)):
        yield block


def given_units(units):
    """The units of a block that is a list of units already."""
    return units


def is_flat(path):
    """Whether the file holds flat messages; told by its first line that is a tree or a message."""
    found = 'no line with a JSON object'
    for block in pipeline.read_blocks(path):
        for _, record, problem in pipeline.parse_lines(*block):
            if not problem:
                if 'prompt' in record or 'message_id' in record:
                    return 'prompt' not in record
                found = f'objects with the keys {repr(", ".join(record)[:80])[1:-1]}'  # repr: a key may hold anything
    raise UserError(f'{path} holds {found}; expected on each line a message tree (prompt, message_tree_id) '
                    'or a message (message_id, parent_id).')


def prepare(config, path, source, split_of=None):
    """Export the trees in the file at path as the configuration says; `source` goes into meta.json."""
    bpe = tokenizer.load(config.tokenizer, tags=config.template == 'xml')
    flat = is_flat(path)
    blocks = pipeline.read_blocks(path, silent=config.stdout or None)  # what is read as text may be in a pager
    if flat:
        blocks = trees_of_messages(blocks, config)
    units = given_units if flat else partial(units_of_tree_lines, config)
    job = pipeline.Job(units, bpe, config.template, config.max_tokens)
    if config.stdout:
        return pipeline.print_text(blocks, job)
    split_of = split_of or pipeline.split_by_hash(config.seed, val=config.val_fraction)
    options = {key: value for key, value in configurator.as_dict(config).items() if key not in ('out_dir', 'input', 'report')}
    meta = pipeline.export(blocks, job, split_of, config.out_dir, ('train', 'val'), source, options, by_key=True)
    if config.report:
        print(f'what the model will learn, to look at: {report.write(config.out_dir, config.seed)}')
    return meta


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    if config.input:
        path, source = config.input, pipeline.local_source(config.input)
    else:
        pin = SOURCES[config.source]
        url = f"{download.HUB}/datasets/{pin['repository']}/resolve/{pin['revision']}/{pin['file']}"
        path = download.download(url, os.path.join(HERE, pin['file']), pin['bytes'], pin['sha256'])
        source = {'name': config.source, 'url': url, 'bytes': pin['bytes'], 'sha256': pin['sha256'],
                  'licence': LICENCE}
    prepare(config, path, {'source': source, 'seed': config.seed, 'split_rule': 'hash of the tree id'})
    if not config.stdout:
        data_dir, dataset = os.path.split(os.path.abspath(config.out_dir))
        elsewhere = '' if config.out_dir == HERE else f' --data_dir={data_dir} --dataset={dataset}'
        shown = min(config.out_dir, os.path.relpath(config.out_dir), key=len)
        print(f'wrote {shown}. Next: python train.py config/finetune_oasst.py{elsewhere}')


if __name__ == '__main__':
    configurator.run(main)
