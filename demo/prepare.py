"""Facts about 195 countries -> prose for a base, conversations to tune it, a quiz.

    python demo/prepare.py   # writes prose/, chat/ and quiz.jsonl

The prose states every fact. The conversations ask for the capital of most countries, in
both directions, and for the other facts of all. None asks for the capital of the 40 "never
asked" countries, or for the country of those capitals: there, a tuned model can only use
what the base learned from prose. facts.csv holds the facts, wordings.toml the words.
"""
import csv
import json
import os
import random
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

# What is never asked about some countries: country -> capital, and back.
DIRECTIONS = {'capital': 'forward', 'country': 'backward'}
N_NEVER_ASKED = 40
README_ASKS = ('France', 'Japan')
# Texts, and conversations, that are set aside.
N_VAL = 400
# BPE tokens; with <|endoftext|> and the six tags they are 2,048.
VOCAB_SIZE = 2041


@dataclass(frozen=True)
class Config:
    out_dir: str = HERE              # folder for prose/, chat/ and quiz.jsonl
    n_texts: Count = 14_000          # texts of prose
    n_conversations: Count = 42_000  # conversations of one to three questions
    seed: Seed = 1337                # of the texts and of the choice of countries


# ---- facts and words ----

def read_facts():
    """The rows of facts.csv as dicts. `name` is the country without its article."""
    with open(os.path.join(HERE, 'facts.csv'), newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row['name'] = row['country']
        row['country'] = f'{row["article"]} {row["name"]}'.strip()
    return rows


def read_wordings():
    """wordings.toml as a dict, with held_out: wordings that must not be learned."""
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
    """The words of a text, in lower case between spaces, to compare texts."""
    letters = [c if c.isalnum() else ' ' for c in text.lower().replace("'", '')]
    return f' {" ".join("".join(letters).split())} '.replace(' what is ', ' whats ')


def choose_never_asked(facts, seed):
    """The rows of the countries whose capital no conversation asks for."""
    candidates = []
    for row in facts:
        # Mexico City, which shares a word with its country, would give the answer away.
        shared = set(words(row['name']).split()) & set(words(row['capital']).split())
        if not shared and row['name'] not in README_ASKS:
            candidates.append(row)
    return random.Random(f'{seed} never asked').sample(candidates, N_NEVER_ASKED)


# ---- texts ----

def make_prose(facts, wordings, config):
    """Texts of three to five sentences on a country, two of them on its capital."""
    rng = random.Random(f'{config.seed} prose')
    others = [kind for kind in wordings['prose'] if kind != 'capital']
    texts = []
    for i in range(config.n_texts):
        row = facts[i % len(facts)]
        kinds = ['capital', 'capital', *rng.sample(others, rng.randint(1, 3))]
        rng.shuffle(kinds)
        sentences = [fill(rng.choice(wordings['prose'][kind]), row) for kind in kinds]
        texts.append(' '.join(sentences))
    return texts


def question(row, kind, wordings, rng):
    """A question of this kind about the country.

    Around it and in it stand words that mean nothing: the more of them a model has seen,
    the less an unknown wording disturbs it.
    """
    ask = wordings['ask'][kind]
    around = wordings['around']
    body = ''
    while not body or any(wording in words(body) for wording in wordings['held_out']):
        if rng.random() < 0.4:
            body = rng.choice(around['frame']).replace('{n}', rng.choice(ask['nouns']))
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
    parts = body.split(' ')
    if rng.random() < 0.3:
        parts[rng.randrange(len(parts) - 1)] += rng.choice(around['filler'])
    if rng.random() < 0.4:
        parts = [misspell(part, rng) for part in parts]
    return fill(' '.join(parts), row)


def misspell(word, rng):
    """The word, or two of its letters exchanged, or one left out. Names stay."""
    if len(word) < 3 or '{' in word or rng.random() < 0.7:
        return word
    at = rng.randrange(len(word) - 1)
    letters = word[at]
    if rng.random() < 0.5:
        letters = word[at + 1] + word[at]
    return word[:at] + letters + word[at + 2:]


def make_conversations(facts, never_asked, wordings, config):
    """Lists of turns: one to three questions, about different countries."""
    rng = random.Random(f'{config.seed} conversations')
    kinds_of = {}
    for row in facts:
        kinds = [kind for kind in wordings['ask'] if kind not in DIRECTIONS]
        if row not in never_asked:
            kinds += 2 * list(DIRECTIONS)
        kinds_of[row['name']] = kinds
    askable = [row for row in facts if kinds_of[row['name']]]
    pairs = [(words(row['name']), words(row['capital'])) for row in never_asked]
    found = []
    while len(found) < config.n_conversations:
        turns = []
        for row in rng.sample(askable, rng.choice((1, 1, 1, 1, 1, 2, 3))):
            kind = rng.choice(kinds_of[row['name']])
            answer = fill(wordings['ask'][kind]['answer'], row)
            turns.append(Turn('user', question(row, kind, wordings, rng)))
            turns.append(Turn('assistant', answer))
        # Two countries can still name both of a pair, as Port of Spain names Spain.
        text = words(' '.join(turn.text for turn in turns))
        if not any(name in text and capital in text for name, capital in pairs):
            found.append(turns)
    return found


def make_quiz(facts, never_asked, wordings, which='quiz'):
    """The questions of the quiz, in the form of `evaluate.py --quiz=FILE`.

    Answers about the never asked, without the name at their end, show what the base knows.
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


# ---- files ----

def write_dataset(folder, template, examples, vocabulary):
    """Write examples, a list of (ids, mask), as a prepared folder."""
    tokenfile.write(folder, {'train': examples[N_VAL:], 'val': examples[:N_VAL]}, {
        'template': template, 'tokenizer': vocabulary.state(),
        'source': {'name': 'demo/facts.csv', 'licence': 'MIT'}})


def main(argv):
    config = configurator.load(Config, argv)
    facts = read_facts()
    wordings = read_wordings()
    never_asked = choose_never_asked(facts, config.seed)
    prose = make_prose(facts, wordings, config)
    conversations = make_conversations(facts, never_asked, wordings, config)

    # Names count three hundred times more, with and without a space before them, so that
    # most are one or two tokens: a name of four is copied from a question less reliably.
    texts = prose + [turn.text for turns in conversations for turn in turns]
    for row in facts:
        for name in (row['name'], row['capital']):
            texts += 300 * [name, f'in {name}']
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCAB_SIZE, min_frequency=0, show_progress=False)
    vocab = bpe.get_vocab()
    tokens = [to_bytes(token) for token in sorted(vocab, key=vocab.get)]
    vocabulary = Tokenizer('demo', tokens, tags=True)

    documents = []
    for text in prose:
        ids = np.append(vocabulary.encode(text), vocabulary.end_of_text)
        # Every token is learned.
        documents.append((ids, np.ones_like(ids)))
    dialogues = []
    for turns in conversations:
        ids, mask, _ = conversation.encode(turns, vocabulary)
        dialogues.append((ids, mask))
    write_dataset(f'{config.out_dir}/prose', 'plain', documents, vocabulary)
    write_dataset(f'{config.out_dir}/chat', 'xml', dialogues, vocabulary)
    with write_whole(f'{config.out_dir}/quiz.jsonl') as file:
        for q in make_quiz(facts, never_asked, wordings):
            file.write(json.dumps(q, ensure_ascii=False) + '\n')
    print(f'wrote prose, chat and quiz.jsonl into {config.out_dir}')


if __name__ == '__main__':
    configurator.run(main)
