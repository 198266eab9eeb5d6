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
EXPECTED = ("Expected OpenAssistant's message trees, one JSON object a line. Flat messages: "
            'see data/oasst/nest.py')


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
    tokenizer: str = 'gpt2'     # gpt2, or the folder of a checkpoint with another vocabulary
    max_tokens: Count = 1024    # a longer conversation loses turns from its end
    too_long: Literal['cut', 'drop'] = 'cut'  # keep the beginning of too long an answer, or drop it
    val_fraction: Fraction = 0.05  # share of the trees for validation
    seed: Seed = 1337           # decides which trees those are


def why_left_out(message, config):
    """Return why a message is left out, or ''."""
    languages = config.lang.replace(' ', '').split(',')
    reasons = {
        'deleted': message.get('deleted'),
        # Before the review it is null.
        'review_result': message.get('review_result') is False,
        'empty text': not message['text'].strip(),
        'language': languages != ['all'] and message.get('lang') not in languages,
        'synthetic': message.get('synthetic') and not config.synthetic,
    }
    return next((reason for reason, holds in reasons.items() if holds), '')


def by_rank(message):
    """Sort replies by rank. 0 is the best; those without a rank come last."""
    rank = message.get('rank')
    return rank is None, rank, message.get('message_id')


def find_threads(replies, config, above, dropped):
    """Return the threads, lists of messages, that begin with `above` and go on with a reply.

    A thread ends with an answer that nothing usable follows, or, with turns=first, with the
    first answer. For each reply that is left out, with all below it, `dropped` gets the reason.
    """
    threads = []
    n_usable = 0
    for message in sorted(replies, key=by_rank):
        drop = why_left_out(message, config)
        n_usable += not drop
        if not drop and 0 < config.top_k < n_usable:
            drop = 'top_k'
        if drop:
            dropped.append(drop)
            continue
        thread = [*above, message]
        below = []
        if config.turns == 'all' or not above:
            below = find_threads(message.get('replies') or [], config, thread, dropped)
        if not below and message['role'] == 'assistant':
            below = [thread]
        threads += below
    return threads


def read_tree(tree, config):
    """Return the Examples of a tree. An answer is supervised once, in its first thread."""
    key = str(tree['message_tree_id'])
    split = common.split_by_hash(key, config.seed, val=config.val_fraction)
    examples = []
    dropped = []
    learned = set()
    for thread in find_threads([tree['prompt']], config, [], dropped):
        turns = []
        for message in thread:
            supervised = id(message) not in learned
            turns.append(Turn(ROLES[message['role']], message['text'], supervised=supervised))
            learned.add(id(message))
        examples.append(common.Example(split, turns, key=key))
    return examples + [common.Example(split, [], drop) for drop in dropped]


def main(argv):
    config = configurator.load(Config, argv)
    source = common.Source(config, SOURCES, HERE)
    trees = source.records(lambda tree: read_tree(tree, config), EXPECTED)
    examples = chain.from_iterable(trees)
    if config.stdout:
        common.print_text(examples)
        return
    recipe = 'config/finetune_oasst.py'
    # What fits a row of 512: the last token is only predicted.
    if config.max_tokens <= 513:
        recipe = 'config/finetune_oasst_cpu.py'
    common.export(examples, source, config, config.out_dir or HERE, recipe,
                  split_rule='hash of the tree id')


if __name__ == '__main__':
    configurator.run(main)
