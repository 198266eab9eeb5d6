"""What evaluate.py asks, and what it measures on the answers.

The file of --quiz=FILE has one question a line, as JSON. One of `answer` and `wanted` is needed.
`before` (earlier questions and their answers) and `group` are optional:

    {"question": "And of Japan?", "before": ["What is the capital of France?", "Paris."],
     "answer": "It is Tokyo.", "wanted": "Tokyo", "group": "follow-up"}

An answer is right if `wanted` stands in its first sentence. It is exact if it equals `answer` and
ended by itself.
"""
import json
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from configurator import UserError
from core.conversation import Turn
from core.files import reading
from core.readback import ROLES, decode

EXPECTED = 'Expected one JSON object a line with "question", and "answer" or "wanted".'


class Question(NamedTuple):
    """A line of the file."""
    turns: list  # before the answer
    answer: str = ''
    wanted: str = ''
    group: str = ''


def read(path):
    """The Questions in a file. UserError for a line that is not one."""
    with reading(path, EXPECTED), open(path, encoding='utf-8') as file:
        lines = file.read().split('\n')
    questions = []
    # Line by line, so that an error can say which.
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(f'{path} line {number}', EXPECTED):
                questions.append(parse(line))
    if not questions:
        raise UserError(f'{path} holds no questions. {EXPECTED}')
    return questions


def parse(line):
    """The Question in a line."""
    fields = json.loads(line)
    texts = fields.get('before', []) + [fields['question']]
    rest = [fields.get(key, '') for key in ('answer', 'wanted', 'group')]
    if not all(isinstance(text, str) for text in texts + rest):
        raise ValueError('a field is not a text')
    if not rest[0] and not rest[1]:
        raise ValueError('neither "answer" nor "wanted" is given')
    if len(texts) % 2 == 0:
        raise ValueError('"before" must end with an answer')
    # The texts are the user's and the assistant's in turn.
    turns = [Turn(ROLES[i % 2], text) for i, text in enumerate(texts)]
    return Question(turns, *rest)


def from_split(split, tokenizer, template, n):
    """The first n different prompts of a tokenfile.Split: conversations up to the last answer."""
    found = []
    asked = set()
    for i in range(len(split)):
        if len(found) == n:
            break
        with reading(f'conversation {i} of split {split.name!r}', 'Prepare the folder again.'):
            turns = decode(*split[i], tokenizer, template)
        last = max((k for k, turn in enumerate(turns) if turn.role == 'assistant'), default=0)
        # The learned mark does not matter: threads of one tree may differ in it alone.
        prompt = tuple((turn.text, turn.context) for turn in turns[:last])
        if last and prompt not in asked:
            asked.add(prompt)
            found.append(Question(turns[:last], turns[last].text))
    return found


def draw(questions, n, seed):
    """n of the questions, drawn by the seed; all of them for 0."""
    if n == 0 or n >= len(questions):
        return questions
    chosen = np.random.default_rng(seed).choice(len(questions), n, replace=False)
    return [questions[i] for i in sorted(chosen)]


# ---- scores ----

def first_sentence(text):
    """The text up to a line's end, or to a sign that ends a sentence before a capital letter."""
    line = text.strip().split('\n')[0]
    # The dots in "St. John's" and "Washington, D.C." end no sentence.
    end = re.search(r'(?<!\bSt)(?<![.\s]\w)[.!?](?=\s+["\'“(]?[A-ZÀ-Þ]|\s*$)', line)
    if end:
        line = line[:end.end()]
    return line


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


def scores(answers, questions):
    """{group: {'questions': n, 'right': share, 'exact': share}}; all questions make up 'all'."""
    found = {}
    # In the order in which the groups come in the file.
    for group in dict.fromkeys(['all'] + [question.group for question in questions]):
        pairs = [(a, q) for a, q in zip(answers, questions) if group in ('all', q.group)]
        right = [is_right(a, q) for a, q in pairs if q.wanted]
        exact = [is_exact(a, q) for a, q in pairs if q.answer]
        found[group] = {'questions': len(pairs)}
        if right:
            found[group]['right'] = sum(right) / len(right)
        if exact:
            found[group]['exact'] = sum(exact) / len(exact)
    found.pop('', None)  # questions of no group
    return found


def repeated(ids):
    """The share of the 4-grams in ids that came before."""
    grams = Counter(zip(ids, ids[1:], ids[2:], ids[3:]))
    n = grams.total()
    return (n - len(grams)) / max(1, n)


def form(answers, tokenizer):
    """How answers look, whatever they say: shares from 0 to 1, and a mean."""
    special = set(tokenizer.special.values())
    n = len(answers)
    n_stopped = sum(answer.stopped for answer in answers)
    n_tokens = sum(len(answer.ids) for answer in answers)
    n_clean = sum(special.isdisjoint(answer.ids) for answer in answers)
    return {
        'stops by itself': n_stopped / n,
        'mean length in tokens': n_tokens / n,
        'repeated 4-grams': sum(repeated(answer.ids) for answer in answers) / n,
        'no stray tags': n_clean / n,
    }
