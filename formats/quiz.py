"""What evaluate.py asks, and what it measures on the answers.

The file of --quiz=FILE has one question a line, as JSON. One of `answer` and `wanted` is needed.
`before` (earlier questions and their answers) and `group` are optional:

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

EXPECTED = 'Expected one JSON object a line with "question", and "answer" or "wanted".'


class Question(NamedTuple):
    turns: list  # before the answer
    answer: str = ''
    wanted: str = ''
    group: str = ''


def read(path):
    """The Questions in a file."""
    with reading(path, EXPECTED), open(path, encoding='utf-8') as file:
        lines = file.read().split('\n')
    questions = []
    # Line by line, so that an error can say which.
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f'{path} line {number}', EXPECTED):
            fields = json.loads(line)
            texts = fields.get('before', []) + [fields['question']]
            rest = [fields.get(key, '') for key in ('answer', 'wanted', 'group')]
            if not all(isinstance(text, str) for text in texts + rest):
                raise ValueError('a field is not a text')
            if not rest[0] and not rest[1]:
                raise ValueError('neither "answer" nor "wanted" is given')
            # The texts are the user's and the assistant's in turn.
            turns = [Turn(ROLES[i % 2], text) for i, text in enumerate(texts)]
            questions.append(Question(turns, *rest))
    if not questions:
        raise UserError(f'{path} holds no questions. {EXPECTED}')
    return questions


def from_split(split, tokenizer, template, n):
    """The first n different prompts of a tokenfile.Split: conversations up to the last answer."""
    found = {}
    for i in range(len(split)):
        if len(found) == n:
            break
        with reading(f'conversation {i} of split {split.name!r}', 'Prepare the folder again.'):
            turns = decode(*split[i], tokenizer, template)
        while turns and turns[-1].role == 'user':
            turns.pop()
        # The learned mark does not matter: threads of one tree may differ in it alone.
        prompt = tuple((turn.text, turn.context) for turn in turns[:-1])
        if prompt:
            found.setdefault(prompt, Question(turns[:-1], turns[-1].text))
    return list(found.values())


def draw(questions, n, seed):
    """n of the questions, drawn by the seed; all of them for 0."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:n or None]
    return [questions[i] for i in sorted(chosen)]


# ---- scores ----

def first_sentence(text):
    """The text up to a line's end, or to a sign that ends a sentence before a capital letter."""
    line = text.strip().split('\n')[0]
    # The dots in "St. John's" and "Washington, D.C." end no sentence.
    return re.split(r'(?<!\bSt\.)(?<![.\s]\w\.)(?<=[.!?])\s+(?=["\'“(]?[A-ZÀ-Þ])', line)[0]


def words(text):
    """The words of the text in small letters, each between spaces."""
    return ' ' + ' '.join(re.findall(r'\w+', text.casefold())) + ' '


def is_right(answer, question):
    """Whether the name that is wanted stands in the first sentence of the answer."""
    if not question.wanted:
        return False
    return words(question.wanted) in words(first_sentence(answer.text))


def is_exact(answer, question):
    """Whether the answer is the expected one, character for character, and ended by itself."""
    return answer.stopped and answer.text == question.answer


def repeated(ids):
    """The share of the 4-grams in ids that came before."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:]))
    return (len(grams) - len(set(grams))) / max(1, len(grams))


def scores(answers, questions, tokenizer):
    """{name: value}: how the answers look, and the shares of each group that are right and exact.

    All are shares from 0 to 1, but for the mean. All questions together are the group `all`.
    """
    special = set(tokenizer.special.values())
    found = {
        'stops by itself': np.mean([answer.stopped for answer in answers]),
        'mean length in tokens': np.mean([len(answer.ids) for answer in answers]),
        'repeated 4-grams': np.mean([repeated(answer.ids) for answer in answers]),
        'no stray tags': np.mean([special.isdisjoint(answer.ids) for answer in answers]),
    }
    # In the order in which the groups come in the file.
    for group in filter(None, dict.fromkeys(['all'] + [question.group for question in questions])):
        pairs = [(a, q) for a, q in zip(answers, questions) if group in ('all', q.group)]
        right = [is_right(a, q) for a, q in pairs if q.wanted]
        exact = [is_exact(a, q) for a, q in pairs if q.answer]
        if right:
            found[f'right, {group} ({len(right)})'] = np.mean(right)
        if exact:
            found[f'exact, {group} ({len(exact)})'] = np.mean(exact)
    return {name: float(value) for name, value in found.items()}
