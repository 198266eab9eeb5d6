"""Facts about 195 countries -> prose for a base, conversations to tune it, a quiz.

    python demo/prepare.py   # writes prose/, chat/ and quiz.jsonl

The prose states every fact, and the conversations ask for them. But none asks for the
capital of the 40 "never asked" countries, or for the country of those capitals: a tuned
model can know these only from the prose.
"""
import csv
import json
import os
import random
import re
import sys
import tomllib
from dataclasses import dataclass

import numpy as np
import tokenizers

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import configurator
from configurator import Count, Seed
from core import conversation, tokenfile
from core.conversation import Turn
from core.files import write_whole
from core.tokenizer import Tokenizer, to_bytes

# country -> capital, and back
DIRECTIONS = {'capital': 'forward', 'country': 'backward'}
N_NEVER_ASKED = 40
README_ASKS = ('France', 'Japan')
N_VAL = 400  # texts, and conversations
VOCAB_SIZE = 2041  # with <|endoftext|> and the six tags 2,048


@dataclass(frozen=True)
class Config:
    out_dir: str = HERE  # for prose/, chat/ and quiz.jsonl
    n_texts: Count = 14_000  # of prose
    n_conversations: Count = 42_000  # of one to three questions
    seed: Seed = 1337  # of the texts and the never asked


# ---- facts and words ----

def read_facts():
    """The rows of facts.csv; `name` is the country without its article."""
    path = os.path.join(HERE, 'facts.csv')
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row['name'] = row['country']
        row['country'] = f'{row["article"]} {row["name"]}'.strip()
    return rows


def read_wordings():
    """wordings.toml, and `held_out`: what must not be learned."""
    with open(os.path.join(HERE, 'wordings.toml'), 'rb') as file:
        wordings = tomllib.load(file)
    wordings['held_out'] = []
    for kind in DIRECTIONS:
        ask = wordings['ask'][kind]
        wordings['held_out'] += [words(wording) for wording in ask['val'] + ask['quiz']]
    return wordings


def fill(wording, values):
    """The wording with the values in it, as a sentence."""
    text = wording.format(**values)
    return text[0].upper() + text[1:]


def words(text):
    """The words of a text, in lower case between spaces."""
    found = re.findall(r'[^\W_]+', text.lower().replace("'", ''))
    return f' {" ".join(found)} '.replace(' what is ', ' whats ')


def choose_never_asked(facts, seed):
    """The rows of the never asked countries."""
    candidates = []
    for row in facts:
        name = words(row['name']).split()
        capital = words(row['capital']).split()
        # Mexico City would give its country away.
        if set(name).isdisjoint(capital) and row['name'] not in README_ASKS:
            candidates.append(row)
    rng = random.Random(f'{seed} never asked')
    return rng.sample(candidates, N_NEVER_ASKED)


# ---- texts ----

def make_prose(facts, wordings, config):
    """Texts of three to five sentences, two of them on the capital."""
    rng = random.Random(f'{config.seed} prose')
    others = [kind for kind in wordings['prose'] if kind != 'capital']
    texts = []
    for i in range(config.n_texts):
        row = facts[i % len(facts)]
        kinds = ['capital', 'capital', *rng.sample(others, rng.randint(1, 3))]
        rng.shuffle(kinds)
        chosen = [rng.choice(wordings['prose'][kind]) for kind in kinds]
        texts.append(' '.join(fill(wording, row) for wording in chosen))
    return texts


def question(row, kind, wordings, rng):
    """A question of this kind about the country, amid words that mean nothing.

    The more of these a model has seen, the less an unknown wording disturbs it.
    """
    ask = wordings['ask'][kind]
    around = wordings['around']
    held_out = wordings['held_out']
    body = ''
    while not body or any(wording in words(body) for wording in held_out):
        if rng.random() < 0.4:
            frame = rng.choice(around['frame'])
            body = frame.replace('{n}', rng.choice(ask['nouns']))
        else:
            body = rng.choice(ask['sentences'])
    blanks = {name: rng.choice(around[name]) for name in ('who', 'what', 'when')}
    if rng.random() < 0.5:
        before = fill(rng.choice(around['before']), blanks)
        if before[-1] in '.!':
            body = body[0].upper() + body[1:]
        body = f'{before} {body}'
    if rng.random() < 0.4:
        body += ' ' + fill(rng.choice(around['behind']), blanks)
    # Filler and slips between the words
    parts = body.split(' ')
    if rng.random() < 0.3:
        parts[rng.randrange(len(parts) - 1)] += rng.choice(around['filler'])
    if rng.random() < 0.4:
        parts = [misspell(part, rng) for part in parts]
    return fill(' '.join(parts), row)


def misspell(word, rng):
    """The word, perhaps with a slip of the keyboard. Names stay."""
    if len(word) < 3 or '{' in word or rng.random() < 0.7:
        return word
    at = rng.randrange(len(word) - 1)
    letters = word[at]
    if rng.random() < 0.5:
        letters = word[at + 1] + word[at]
    return word[:at] + letters + word[at + 2:]


def make_conversations(facts, never_asked, wordings, config):
    """Lists of turns: questions about one to three countries."""
    rng = random.Random(f'{config.seed} conversations')
    others = [kind for kind in wordings['ask'] if kind not in DIRECTIONS]
    kinds = others + 2 * list(DIRECTIONS)
    pairs = [(words(row['name']), words(row['capital'])) for row in never_asked]
    found = []
    while len(found) < config.n_conversations:
        turns = []
        for row in rng.sample(facts, rng.choice((1, 1, 1, 1, 1, 2, 3))):
            kind = rng.choice(others if row in never_asked else kinds)
            answer = fill(wordings['ask'][kind]['answer'], row)
            turns.append(Turn('user', question(row, kind, wordings, rng)))
            turns.append(Turn('assistant', answer))
        # Port of Spain names Spain: both of a pair can still be there.
        text = words(' '.join(turn.text for turn in turns))
        if not any(name in text and capital in text for name, capital in pairs):
            found.append(turns)
    return found


def make_quiz(facts, never_asked, wordings, which='quiz'):
    """The questions, in the form of formats/quiz.py.

    The base completes answers about the never asked: that shows what it knows.
    """
    found = []
    for row in facts:
        for kind, direction in DIRECTIONS.items():
            wanted = {'capital': row['capital'], 'country': row['name']}[kind]
            answer = fill(wordings['ask'][kind]['answer'], row)
            group = f'held-out wording, {direction}'
            if row in never_asked:
                group = f'never asked, {direction}'
                beginning = answer.rpartition(f' {wanted}')[0]
                found.append({'question': beginning, 'wanted': wanted,
                              'group': 'to complete'})
            for wording in wordings['ask'][kind][which]:
                found.append({'question': fill(wording, row), 'answer': answer,
                              'wanted': wanted, 'group': group})
    return found


def write_dataset(folder, template, examples, vocabulary):
    """Write examples, a list of (ids, mask), as a prepared folder."""
    splits = {'train': examples[N_VAL:], 'val': examples[:N_VAL]}
    source = {'name': 'demo/facts.csv', 'licence': 'MIT'}
    meta = {'template': template, 'tokenizer': vocabulary.state(), 'source': source}
    tokenfile.write(folder, splits, meta)


def main(argv):
    config = configurator.load(Config, argv)
    facts = read_facts()
    wordings = read_wordings()
    never_asked = choose_never_asked(facts, config.seed)
    prose = make_prose(facts, wordings, config)
    conversations = make_conversations(facts, never_asked, wordings, config)

    # Make names common, so that most become one or two tokens: a name of four is
    # copied from a question less reliably.
    texts = prose + [turn.text for turns in conversations for turn in turns]
    for row in facts:
        for name in (row['name'], row['capital']):
            texts += 300 * [name, f'in {name}']
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCAB_SIZE, min_frequency=0, show_progress=False)
    vocab = bpe.get_vocab()
    tokens = map(to_bytes, sorted(vocab, key=vocab.get))
    vocabulary = Tokenizer('demo', list(tokens), tags=True)

    # What is learned from prose, and from conversations.
    examples = []
    for text in prose:
        ids = np.append(vocabulary.encode(text), vocabulary.end_of_text)
        # Every token is learned.
        examples.append((ids, np.ones_like(ids)))
    write_dataset(f'{config.out_dir}/prose', 'plain', examples, vocabulary)
    examples = [conversation.encode(turns, vocabulary)[:2] for turns in conversations]
    write_dataset(f'{config.out_dir}/chat', 'xml', examples, vocabulary)
    with write_whole(f'{config.out_dir}/quiz.jsonl') as file:
        for q in make_quiz(facts, never_asked, wordings):
            file.write(json.dumps(q, ensure_ascii=False) + '\n')
    print(f'wrote prose, chat and quiz.jsonl into {config.out_dir}')


if __name__ == '__main__':
    configurator.run(main)
