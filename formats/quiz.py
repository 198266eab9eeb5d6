"""What evaluate.py asks, and what it measures on the answers.

    python evaluate.py --models=out/oasst --quiz=questions.jsonl

A JSON object a line. Only `question` is needed; `before` holds earlier turns:

    {"question": "And of Japan?", "before": ["What is the capital of France?", "Paris."],
     "answer": "It is Tokyo.", "wanted": "Tokyo", "group": "follow-up"}

An answer is right if `wanted` stands in its first sentence, exact if it equals `answer`.
"""
import json
import re
from typing import NamedTuple

import numpy as np

from configurator import UserError
from core.conversation import Turn
from core.files import reading
from core.readback import ROLES, decode

EXPECTED = 'Expected one JSON object a line, with "question" and other texts.'


class Question(NamedTuple):
    turns: list  # before the answer
    answer: str = ''
    wanted: str = ''
    group: str = ''


def read_question(fields):
    texts = fields.get('before', []) + [fields['question']]
    rest = [fields.get(key, '') for key in ('answer', 'wanted', 'group')]
    if not all(isinstance(text, str) for text in texts + rest):
        raise ValueError('a field is not a text')
    turns = [Turn(ROLES[i % 2], text) for i, text in enumerate(texts)]
    return Question(turns, *rest)


def read(path):
    """The Questions in a file."""
    questions = []
    with reading(path, EXPECTED), open(path, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with reading(f'{path} line {number}', EXPECTED):
                    questions.append(read_question(json.loads(line)))
    if not questions:
        raise UserError(f'{path} holds no questions. {EXPECTED}')
    return questions


def from_split(split, tokenizer, template, n):
    """The first n different prompts of a Split: all but the last answer."""
    found = {}
    for i in range(len(split)):
        if len(found) == n:
            break
        with reading(f'conversation {i} of {split.name}', 'Prepare the folder again.'):
            turns = decode(*split[i], tokenizer, template)
        while turns and turns[-1].role == 'user':
            turns.pop()
        # Threads of one tree may differ only in what is learned.
        prompt = tuple((turn.text, turn.context) for turn in turns[:-1])
        if prompt:
            found.setdefault(prompt, Question(turns[:-1], turns[-1].text))
    return list(found.values())


def words(text):
    """The words of the text in small letters, each between spaces."""
    found = re.findall(r'\w+', text.casefold())
    return f' {" ".join(found)} '


def is_right(text, wanted):
    """Whether the name stands in the first sentence of the text."""
    line = text.strip().split('\n')[0]
    # A sentence ends before a capital letter, but not in "St. John's" and "D.C."
    ends = r'(?<!\bSt\.)(?<![.\s]\w\.)(?<=[.!?])\s+(?=["\'“(]?[A-ZÀ-Þ])'
    sentence = re.split(ends, line)[0]
    return words(wanted) in words(sentence)


def grade(question, answer):
    """What the report says about an answer, as a dict."""
    ids = answer.ids
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:]))
    found = {
        'prompt': [f'{turn.text}\n\n{turn.context}'.strip() for turn in question.turns],
        'group': question.group,
        'expected': question.answer or question.wanted,
        'answer': answer.text,
        'stops by itself': answer.stopped,
        'mean length in tokens': len(ids),
        # The share of the 4-grams that came before.
        'repeated 4-grams': (len(grams) - len(set(grams))) / max(1, len(grams)),
    }
    if question.wanted:
        found['right'] = is_right(answer.text, question.wanted)
    if question.answer:
        found['exact'] = answer.stopped and answer.text == question.answer
    return found


def scores(graded):
    """{name: mean} of what `grade` found. The group `all` is everything."""
    found = {}
    for key in ('stops by itself', 'mean length in tokens', 'repeated 4-grams'):
        found[key] = float(np.mean([one[key] for one in graded]))
    groups = {'all': graded}
    for one in graded:
        groups.setdefault(one['group'], []).append(one)
    for group, members in groups.items():
        for key in ('right', 'exact'):
            marks = [one[key] for one in members if key in one]
            if group and marks:
                found[f'{key}, {group} ({len(marks)})'] = float(np.mean(marks))
    return found
