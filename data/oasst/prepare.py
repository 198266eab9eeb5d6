"""OpenAssistant's conversation trees -> token files of XML-tagged conversations.

    python data/oasst/prepare.py                         # download, filter, split, write .bin
    python data/oasst/prepare.py --stdout | head         # the conversations as text, to look at
    python data/oasst/prepare.py --input=trees.jsonl.gz --turns=all --lang=en,de

Reads both published forms: message trees, and flat messages that name their parents.
Source: Köpf et al. 2023, https://arxiv.org/abs/2304.07327
"""
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import configurator
from configurator import Count, Fraction, Natural, Seed
from core.conversation import Turn
from data import common

SOURCES = {
    'oasst2': {
        'url': f'{common.HUB}/datasets/OpenAssistant/oasst2/resolve/'
               '179dd21fc55192153d94adb0e0ce8f69e222bf75/2023-11-05_oasst2_ready.trees.jsonl.gz',
        'sha256': '7a886a16ccfc1173c4f00a6897523e3c95b2785a86ee44a18a98f4f2807ee29b',
        'licence': 'Apache-2.0'},
    'oasst1': {
        'url': f'{common.HUB}/datasets/OpenAssistant/oasst1/resolve/'
               'fdf72ae0827c1cda404aff25b6603abec9e3399b/2023-04-12_oasst_ready.trees.jsonl.gz',
        'sha256': '2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7',
        'licence': 'Apache-2.0'},
}
ROLES = {'prompter': 'user', 'assistant': 'assistant'}


@dataclass(frozen=True)
class Config:
    source: Literal['oasst2', 'oasst1'] = 'oasst2'  # which of them to download, once
    input: str = ''             # a local file to read instead, may be gzipped
    out_dir: str = ''           # where the token files go; '' is data/oasst
    report: bool = False        # also write report.html there, a page about the data
    stdout: bool = False        # print the conversations as text and write no files
    turns: Literal['first', 'all'] = 'first'  # the root and each direct reply, or whole threads
    lang: str = 'en'            # languages to keep, such as en,de; or all
    top_k: Natural = 0          # keep the k best-ranked replies to each message; 0 keeps all
    synthetic: bool = True      # keep messages that a model wrote
    template: Literal['xml', 'dialogpt'] = 'xml'  # how conversations are written
    tokenizer: str = 'gpt2'     # gpt2, or a folder or tokenizer.json in transformers' format
    max_tokens: Count = 1024    # a longer conversation loses turns from its end
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of an answer that is, or nothing
    val_fraction: Fraction = 0.05  # share of the trees for validation
    seed: Seed = 1337           # decides which trees those are


@dataclass(slots=True)
class Message:
    above: 'Message'  # None for the root
    role: str
    text: str
    lang: str
    drop: str = ''  # why it is left out
    blocked: str = ''  # why no thread goes through it: its own drop, or that of one above
    n_usable: int = 0  # replies that are not left out
    followed: bool = False  # by an answer, at any depth
    answered: bool = False  # by an answer that is used
    learned: bool = False  # an answer is supervised once, in the first thread that has it


def read_message(record, above, config):
    """Return the Message of a record. Raises an exception if it is not one."""
    text = record.get('text')
    role = ROLES.get(record.get('role'))
    if not isinstance(text, str) or not role:
        raise ValueError(f'expected a message with text and role, found {str(record)[:60]!r}')
    message = Message(above, role, text, str(record.get('lang') or ''))
    # A value that is missing may also be null or, from pandas, NaN.
    if record.get('deleted') is True:
        message.drop = 'deleted'
    elif record.get('review_result') is False:
        message.drop = 'review_result'
    elif not text.strip():
        message.drop = 'empty text'
    elif config.lang != 'all' and message.lang not in config.lang.replace(' ', '').split(','):
        message.drop = 'language'
    elif record.get('synthetic') is True and not config.synthetic:
        message.drop = 'synthetic'
    elif role == (above.role if above else 'assistant'):
        message.drop = 'roles'
    elif above:
        above.n_usable += 1
        if 0 < config.top_k < above.n_usable:
            message.drop = 'top_k'
    message.blocked = (above and above.blocked) or message.drop
    return message


def by_rank(record):
    """Sort replies by rank. 0 is the best; those without a rank come last."""
    rank = record.get('rank')
    if not isinstance(rank, (int, float)) or rank != rank:
        rank = float('inf')
    return rank, str(record.get('message_id'))


def read_tree(root, config):
    """Return the Messages of a tree, each before its replies, the best reply first."""
    messages = []
    waiting = [(root, None)]
    # No recursion, for threads can be long.
    while waiting:
        record, above = waiting.pop()
        message = read_message(record, above, config)
        messages.append(message)
        replies = sorted(record.get('replies') or [], key=by_rank)
        waiting += [(reply, message) for reply in reversed(replies)]
    return messages


def find_threads(messages):
    """Yield (turns, why it is dropped) for each thread of a tree.

    A thread leads from the root to an assistant message that no other one follows. If it meets
    a message that is left out, it ends with the answer above, unless another thread has that.
    """
    for message in reversed(messages[1:]):
        is_answer = message.role == 'assistant'
        message.above.followed |= is_answer or message.followed
        if not message.blocked:
            message.above.answered |= is_answer or message.answered
    ends = [m for m in messages if m.role == 'assistant' and not m.followed]
    for end in ends:
        message = end
        while message and (message.blocked or message.role == 'user'):
            message = message.above
        if not message or message.answered or message.learned:
            yield [], end.blocked
            continue
        turns = []
        while message:
            turns.append(Turn(message.role, message.text, supervised=not message.learned))
            message.learned = True
            message = message.above
        yield turns[::-1], ''


def make_examples(tree, messages, counts, config):
    """Yield the Examples of a tree."""
    key = str(tree.get('message_tree_id') or tree['prompt'].get('message_id') or messages[0].text)
    split = common.split_by_hash(key, config.seed, val=config.val_fraction)
    counts.update(trees=1, messages=len(messages))
    used = messages
    if config.turns == 'first':
        used = [m for m in messages if not m.above or not m.above.above]
    for turns, drop in find_threads(used):
        yield common.Example(key, split, turns, messages[0].lang, drop)
    counts.update(f'messages left out: {m.drop}' for m in messages if m.drop)


def nest(flat, counts):
    """Return flat messages, which may be in any order, as trees."""
    messages = {str(message.get('message_id')): message for message in flat}
    replies = defaultdict(list)
    for key, message in messages.items():
        parent = message.get('parent_id')
        replies[parent if isinstance(parent, str) else None].append(message)  # None: a root
        message['replies'] = replies[key]
    placed = list(replies[None])
    for message in placed:
        placed += message['replies']
    if len(placed) < len(flat):
        counts['messages without a root'] = len(flat) - len(placed)
    return [{**root, 'prompt': root} for root in replies[None]]


def read_examples(source, config):
    """Yield the Examples of a file of trees or of flat messages."""
    flat = []

    def read(record):
        if 'prompt' in record:
            return record, read_tree(record['prompt'], config)
        # Raises if it is none.
        read_message(record, None, config)
        return record, None

    for record, messages in source.records(read):
        if messages:
            yield from make_examples(record, messages, source.counts, config)
        else:
            flat.append(record)
    for tree in nest(flat, source.counts):
        yield from make_examples(tree, read_tree(tree['prompt'], config), source.counts, config)


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, SOURCES, HERE)
    examples = read_examples(source, config)
    if config.stdout:
        common.print_text(examples, config)
        return
    recipe = common.OWN_DATA
    if source.about['name'] in SOURCES:
        recipe = 'config/finetune_oasst.py'
        if config.max_tokens <= 513:
            recipe = 'config/finetune_oasst_cpu.py'
    common.export(examples, source, config, config.out_dir or HERE, ['train', 'val'], recipe,
                  split_rule='hash of the tree id')


if __name__ == '__main__':
    configurator.run(main)
