"""OpenAssistant's conversation trees -> token files of XML-tagged conversations.

    python data/oasst/prepare.py                         # download, filter, split, write .bin
    python data/oasst/prepare.py --stdout | head         # the conversations as text, to look at
    python data/oasst/prepare.py --input=trees.jsonl.gz --turns=all --lang=en,de

Source: Köpf et al. 2023, https://arxiv.org/abs/2304.07327
"""
import os
import sys
from dataclasses import dataclass
from itertools import chain
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


def why_left_out(message, before, config):
    """Return why a message is left out, or ''. before: the role of the message above."""
    if message.get('deleted'):
        return 'deleted'
    # It is null before the review.
    if message.get('review_result') is False:
        return 'review_result'
    if not message['text'].strip():
        return 'empty text'
    if config.lang != 'all' and message.get('lang') not in config.lang.replace(' ', '').split(','):
        return 'language'
    if message.get('synthetic') and not config.synthetic:
        return 'synthetic'
    if message['role'] == before:
        return 'roles'
    return ''


def by_rank(message):
    """Sort replies by rank. 0 is the best; those without a rank come last."""
    rank = message.get('rank')
    return rank is None, rank, message.get('message_id')


def find_threads(message, config, above=(), blocked=''):
    """Return [(messages, why it is dropped)] of the threads that go through a message.

    A thread leads from the root to an assistant message that no other one follows. If it meets
    a message that is left out, it ends with the answer above, unless another thread has that.
    above: the messages from the root to here. blocked: why one of them, or this, is left out.
    """
    found = []
    thread = [*above, message]
    n_usable = 0
    replies = sorted(message.get('replies') or [], key=by_rank)
    if config.turns == 'first' and above:
        replies = []
    for reply in replies:
        drop = why_left_out(reply, message['role'], config)
        n_usable += not drop
        if not drop and 0 < config.top_k < n_usable:
            drop = 'top_k'
        found += find_threads(reply, config, thread, blocked or drop)
    if ROLES[message['role']] == 'assistant' and all(drop for _, drop in found):
        if not blocked:
            # The first of the threads that are left out below ends here.
            found[:1] = [(thread, '')]
        elif not found:
            found = [([], blocked)]
    return found


def count_messages(message):
    """Return how many messages there are from this one on."""
    return 1 + sum(map(count_messages, message.get('replies') or []))


def read_tree(tree, config, counts):
    """Return the Examples of a tree. An answer is supervised once, in its first thread."""
    root = tree['prompt']
    key = str(tree['message_tree_id'])
    split = common.split_by_hash(key, config.seed, val=config.val_fraction)
    examples = []
    learned = set()
    blocked = why_left_out(root, 'assistant', config)
    for thread, drop in find_threads(root, config, blocked=blocked):
        turns = []
        for message in thread:
            supervised = id(message) not in learned
            turns.append(Turn(ROLES[message['role']], message['text'], supervised=supervised))
            learned.add(id(message))
        examples.append(common.Example(key, split, turns, root.get('lang') or '', drop))
    counts.update(trees=1, messages=count_messages(root))
    return examples


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, SOURCES, HERE)
    expected = ("Expected OpenAssistant's message trees, one JSON object a line. Flat messages: "
                'see data/oasst/nest.py')
    trees = source.records(lambda tree: read_tree(tree, config, source.counts), expected=expected)
    examples = chain.from_iterable(trees)
    if config.stdout:
        common.print_text(examples, config)
        return
    recipe = 'config/finetune_oasst.py'
    if config.max_tokens <= 513:
        recipe = 'config/finetune_oasst_cpu.py'
    common.export(examples, source, config, config.out_dir or HERE, ['train', 'val'], recipe,
                  split_rule='hash of the tree id')


if __name__ == '__main__':
    configurator.run(main)
