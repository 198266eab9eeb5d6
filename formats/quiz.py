"""What evaluate.py asks, and what it measures on the answers.

    python evaluate.py --models=out/oasst --quiz=questions.jsonl

The file has one question a line, as JSON. All but `question` is optional; `before` holds
earlier questions and their answers:

    {"question": "And of Japan?", "before": ["What is the capital of France?", "Paris."],
     "answer": "It is Tokyo.", "wanted": "Tokyo", "group": "follow-up"}

An answer is right if `wanted` stands in its first sentence, and exact if it equals `answer`.
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


def read(path):
    """The Questions in a file."""
    with reading(path, EXPECTED), open(path, encoding='utf-8') as file:
        lines = list(file)
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # Line by line, so that an error can say which.
        with reading(f'{path} line {number}', EXPECTED):
            fields = json.loads(line)
            texts = fields.get('before', []) + [fields['question']]
            rest = [fields.get(key, '') for key in ('answer', 'wanted', 'group')]
            if not all(isinstance(text, str) for text in texts + rest):
                raise ValueError('a field is not a text')
            # The texts are the user's and the assistant's in turn.
            turns = [Turn(ROLES[i % 2], text) for i, text in enumerate(texts)]
            questions.append(Question(turns, *rest))
    if not questions:
        raise UserError(f'{path} holds no questions. {EXPECTED}')
    return questions


def from_split(split, tokenizer, template, n):
    """The first n different prompts of a Split: conversations up to the last answer."""
    found = {}
    for i in range(len(split)):
        if len(found) == n:
            break
        with reading(f'conversation {i} of split {split.name!r}', 'Prepare the folder again.'):
            turns = decode(*split[i], tokenizer, template)
        while turns and turns[-1].role == 'user':
            turns.pop()
        # Threads of one tree may differ in what is learned alone.
        prompt = tuple((turn.text, turn.context) for turn in turns[:-1])
        if prompt:
            found.setdefault(prompt, Question(turns[:-1], turns[-1].text))
    return list(found.values())


def words(text):
    """The words of the text in small letters, each between spaces."""
    return ' ' + ' '.join(re.findall(r'\w+', text.casefold())) + ' '


def is_right(text, wanted):
    """Whether the name that is wanted stands in the first sentence of the text."""
    line = text.strip().split('\n')[0]
    # A sign ends a sentence before a capital letter, but not in "St. John's" and "D.C."
    ends = r'(?<!\bSt\.)(?<![.\s]\w\.)(?<=[.!?])\s+(?=["\'“(]?[A-ZÀ-Þ])'
    sentence = re.split(ends, line)[0]
    return words(wanted) in words(sentence)


def grade(question, answer):
    """What the report says about an answer, as a dict."""
    grams = list(zip(answer.ids, answer.ids[1:], answer.ids[2:], answer.ids[3:]))
    found = {
        'prompt': [f'{turn.text}\n\n{turn.context}'.strip() for turn in question.turns],
        'group': question.group,
        'expected': question.answer or question.wanted,
        'answer': answer.text,
        'stops by itself': answer.stopped,
        'mean length in tokens': len(answer.ids),
        # The share of the 4-grams that came before.
        'repeated 4-grams': (len(grams) - len(set(grams))) / max(1, len(grams)),
    }
    if question.wanted:
        found['right'] = is_right(answer.text, question.wanted)
    if question.answer:
        found['exact'] = answer.stopped and answer.text == question.answer
    return found


def scores(graded):
    """{name: mean} of what `grade` found; the group `all` is all questions together."""
    found = {}
    for key in ('stops by itself', 'mean length in tokens', 'repeated 4-grams'):
        found[key] = float(np.mean([one[key] for one in graded]))
    # In the order in which the groups come in the file.
    for group in dict.fromkeys(['all'] + [one['group'] for one in graded]):
        for key in ('right', 'exact'):
            members = [one for one in graded if group in ('all', one['group'])]
            marks = [one[key] for one in members if key in one]
            if group and marks:
                found[f'{key}, {group} ({len(marks)})'] = float(np.mean(marks))
    return found
