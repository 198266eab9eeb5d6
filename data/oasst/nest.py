"""OpenAssistant's flat messages, as `datasets` has them -> trees for prepare.py.

    python data/oasst/nest.py --input=messages.jsonl > trees.jsonl
    python data/oasst/prepare.py --input=trees.jsonl

Each message names the one above it in parent_id; they may be in any order.
"""
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import configurator
from data import common


@dataclass(frozen=True)
class Config:
    input: str = 'messages.jsonl'  # a message a line; may be gzipped


def clean(message):
    """The message without what is missing: null, or NaN as pandas writes it."""
    return {key: value for key, value in message.items() if value is not None and value == value}


def main(argv):
    config = configurator.load(Config, argv)
    replies = defaultdict(list)
    source = common.Source(config, {}, HERE)
    for message in source.records(clean, 'Expected a message a line.'):
        replies[message.get('parent_id')].append(message)
    for roots in list(replies.values()):
        for message in roots:
            message['replies'] = replies[message['message_id']]
    for root in replies[None]:
        print(json.dumps({'message_tree_id': root['message_tree_id'], 'prompt': root}))


if __name__ == '__main__':
    configurator.run(main)
