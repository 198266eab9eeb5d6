"""Countries and their capitals -> conversations in the form of OASST's trees -> token files.

    python demo/prepare.py                  # writes trees.jsonl, quiz.jsonl, tokenizer.json, .bin
    python demo/prepare.py --stdout | head  # the conversations as text, to look at

Each country is asked for by its capital and each capital by its country, in many wordings, made of
remarks, sentences, fillers and slips of the keyboard. What is never learned: the wordings of VAL (the
val split, by which the training was chosen), those of QUIZ (the demo's questions; the first of each
direction was also scored in early trials, the others chose nothing), and a few pairs (place, direction) in any wording, although the same place is learned in
the other direction. The trees go the way of OASST's, through data/oasst/prepare.py.

capitals.csv: the 193 members and the two observers of the United Nations, one capital each: where
there are several, or one that is disputed, the one that lists of capitals mostly give.
"""
import csv
import json
import os
import random
import sys
from dataclasses import dataclass
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import configurator
from core import tokenizer
from core.claim import claimed
from data import pipeline
from data.oasst import prepare as oasst

DIRECTIONS = ('forward', 'reverse')  # country -> capital, capital -> country
ALWAYS_LEARNED = ('France', 'Japan')  # the README asks for them


@dataclass(frozen=True)
class Config:
    out_dir: str = HERE        # where trees.jsonl, quiz.jsonl, tokenizer.json and the token files go
    report: bool = False       # write a page about the data there too, report.html
    stdout: bool = False       # write the conversations as text to standard output, and no token files
    rounds: int = 60           # trees for each pair (place, direction)
    held_out_pairs: int = 8    # pairs of each direction that are never learned
    vocab_size: int = 1536     # byte-level BPE tokens, learned from the training text
    seed: int = 1337           # of the wordings and of the pairs held out

    def problems(self):
        """What cannot work, a sentence each."""
        if self.stdout and self.report:
            yield 'stdout writes no token files, and report shows what is in them: leave one of them out.'
        if self.rounds < 1 or not 0 <= self.held_out_pairs <= 80:
            yield f'rounds={self.rounds} must be at least 1, held_out_pairs={self.held_out_pairs} from 0 to 80.'
        if not 256 <= self.vocab_size <= 20_000:
            yield f'vocab_size={self.vocab_size} must be from 256, which the bytes take, to 20000.'


# ---- wordings: {x} is the name given, {xs} its possessive, {n} a noun phrase ----

NOUNS = {
    'forward': ('the capital of {x}', '{xs} capital', 'the capital city of {x}', '{xs} capital city',
                'the city that is the capital of {x}', 'the capital that {x} has'),
    'reverse': ('the country whose capital is {x}', 'the country with the capital {x}',
                'the country that has {x} as its capital', 'the nation whose capital city is {x}',
                'the country that {x} is the capital of', 'the state with {x} as its capital city')}
FRAMES = ('what is {n}?', "what's {n}?", 'what is the name of {n}?', 'what do people call {n}?', '{n} is what?',
          'name {n}.', 'tell me {n}.', 'give me {n}.', '{n}?', '{n}, please.', 'do you know {n}?', 'can you name {n}?',
          'can you tell me {n}?', 'could you tell me what {n} is?', 'I want to know {n}.', 'I wonder what {n} is.',
          'I would like to know what {n} is.', 'I am looking for {n}.', 'any idea what {n} is?', 'write down {n}.',
          'explain to me what {n} is.', 'say {n}.', 'is there a name for {n}?', 'which one is {n}?')
SENTENCES = {
    'forward': (
        'which city is the capital of {x}?', 'what city is the capital of {x}?', 'the capital of {x} is which city?',
        'which capital does {x} have?', 'what capital city does {x} have?', '{x} has which capital?',
        '{x} has what city as its capital?', 'which city does {x} have as its capital?', 'does {x} have a capital? Which?',
        'in {x}, which city is the capital?', 'for {x}, what is the capital?', 'take {x}. What is its capital?',
        'take {x}. Name the capital.', 'the country is {x}. What is the capital?', 'country: {x}. Capital city?',
        'I live in {x}. What is our capital?', 'my aunt comes from {x}. What is the capital there?',
        'I read about {x} today. Which city is its capital?', 'think of {x}. Which city is the capital?',
        '{x}: which city is its capital?', 'capital of {x}?', 'capital city of {x}?', '{xs} capital?',
        'which city is {xs} capital?', 'what city is {xs} capital city?', '{xs} capital is called what?',
        'what is {xs} capital called?', "what's {xs} capital city called?", 'which city did {x} choose as its capital?',
        'do you know which city {x} has as its capital?', 'there is a country named {x}. What is its capital called?',
        'about {x} I only want to know the capital.', 'I have a friend in {x}, in the capital. What city is that?',
        'a question about {x}. Its capital is which city?', '{x} is a country. Its capital?',
        'tell me about {x}. What is the capital called?', 'where is the seat of {x}, its capital?',
        'how is the capital named that {x} has?', 'to the people of {x}, which city is the capital?',
        'we want to see {x}. The capital is which city?', 'my book is about {x}. What is the capital in it called?'),
    'reverse': (
        '{x} is the capital of which country?', '{x} is the capital of what country?', 'what is {x} the capital of?',
        '{x} is the capital city of which country?', 'what country has {x} as its capital?',
        'which country has {x} for a capital?', 'which nation has {x} as its capital city?',
        'which country has the capital {x}?', 'whose capital is {x}?', 'whose capital city is {x}?',
        "which country's capital is {x}?", "what country's capital is {x}?", '{x} is whose capital?',
        '{x} is a capital. Of which country?', 'take {x}. Which country has it as its capital?',
        'take {x}. Name the country.', 'the capital is {x}. What is the country?', 'capital: {x}. Country?',
        'I live in {x}, our capital. What is my country?', 'my aunt lives in {x}, a capital. What country is hers?',
        'I read about {x} today. Which country has it as its capital?', 'think of {x}. What is it the capital of?',
        '{x}: capital of which country?', '{x}: which country has this capital?', '{xs} country is which?',
        'what is {xs} country called?', 'do you know which country has {x} as its capital?',
        'there is a capital named {x}. What is its country called?', '{x} is a capital city. Its country?',
        'which nation calls {x} its capital?', 'a question about {x}. It is the capital of what?',
        'the city of {x} is the capital of what?', 'as a capital, {x} stands for which country?',
        'I have a friend in {x}, a capital. Which country is that?', 'is {x} a capital? Of what?',
        'what country does {x} have around it, as its capital?', 'in which land is the capital called {x}?',
        'for which country is {x} the capital city?', 'to the people of what country is {x} the capital?',
        'where is the capital {x}, in which country?', 'we want to see {x}, the capital. The country is which?',
        'my book is about {x}. What is the country whose capital it is?', 'does {x} count as a capital? Of what?')}
FOLLOW_UPS = ('and {x}?', 'and for {x}?', 'what about {x}?', 'how about {x}?', '{x}?', 'now {x}.', 'and what about {x}?',
              'and now {x}.', 'the same for {x}.', 'and how about {x}?', 'thanks, and {x}?', 'OK, and {x}?', 'next: {x}.',
              'also {x}, please.', 'please do {x} too.', 'good. {x}?', 'and with {x}?', 'try {x}.', 'can you do {x}?',
              'what if I say {x}?', 'let us go on with {x}.', 'one more: {x}.', 'in the case of {x}?', 'and when it is {x}?')

# Sentences that stand before or behind a question, what leads into it, and what interrupts it. The
# more words a model has seen stand around a name without any meaning, the less a new one disturbs it.
GREETINGS = ('hi!', 'hello.', 'good morning!', 'excuse me.', 'help me.', 'a question.', 'you know a lot.')
LEADS = ('hey,', 'so,', 'OK,', 'please:', 'sorry,', 'now,', 'question 7:', 'geography:', '{who} wants to know:',
         '{who} asked {when}:', 'for {what}:', 'not easy for {who}:', '{when} {who} asked:', 'be brief:')
REMARKS = ('thanks!', 'I forgot.', 'just curious.', 'I have no idea.', 'one sentence will do.', 'we had an argument.',
           'this is for {what}.', 'I need it for {what}.', 'I am busy with {what}.', 'it is part of {what}.',
           '{who} asked me {when}.', '{who} has no idea.', '{who} could not say.', 'I will tell {who}.',
           'I heard it {when}.', 'it came up {when}.', '{who} told me {when}.', 'it would help {who}.')
FILLERS = (', um,', ', er,', ', you know,', ', well,', ' actually', ', I mean,', ', say,', ', by the way,', ', please,',
           ' exactly', ' again', ' really', ', if I may,', ' now', ' then', ', hm,')
BLANKS = {
    '{who}': ('my aunt', 'my uncle', 'our teacher', 'the neighbour', 'my boss', 'a colleague', 'my daughter', 'my son',
              'a friend', 'somebody', 'my grandmother', 'the judge', 'a tourist', 'my doctor', 'our guest', 'a sailor',
              'the librarian', 'my cousin', 'everyone', 'the driver'),
    '{what}': ('a crossword', 'a letter', 'a novel', 'a quiz', 'my homework', 'an essay', 'a report', 'a speech', 'a poem',
               'a school play', 'a postcard', 'my stamps', 'an exam', 'a bet', 'a puzzle', 'the newspaper', 'a song',
               'a birthday card', 'a game', 'a film'),
    '{when}': ('at work', 'at school', 'on the radio', 'in the kitchen', 'on the train', 'at dinner', 'in the library',
               'last night', 'this morning', 'in class', 'on television', 'yesterday', 'over coffee', 'during lunch',
               'years ago', 'on the phone', 'in the garden', 'on Monday', 'before breakfast', 'in the office')}

VAL = {
    'forward': ('remind me which city serves as the capital of {x}.',
                'on a map of {x}, which city would be marked as the capital?',
                'I am planning a trip to {x}. Which city there is the capital?',
                'if somebody asked you for the capital of {x}, how would you reply?'),
    'reverse': ('to which country does the capital {x} belong?', 'where in the world does {x} serve as the capital?',
                'I have just landed in {x}. Of which state is this the capital?',
                'if the president lives in the capital, {x}, which country does he govern?')}
VAL_FOLLOW_UPS = ('could you do that again with {x}?', 'I should have said {x}.')
QUIZ = {
    'forward': ("what's the capital of {x}?", 'out of all the cities in {x}, which one is the capital?',
                'if I book a flight to the capital of {x}, where will I land?',
                'I never learned the capital of {x} at school, what was it again?',
                'fill in the blank: the capital of {x} is ___.'),
    'reverse': ('which country is {x} the capital of?', 'if {x} is the capital, which country are we talking about?',
                'guess my country: its capital is {x}.', 'an embassy in {x}, the capital, is an embassy to which country?',
                '{x} appears on my quiz card as a capital, but of which nation?')}
QUIZ_FOLLOW_UPS = ('and of {x}?', 'same question, but for {x}.', 'then what would it be for {x}?')


class Place(NamedTuple):
    """A row of capitals.csv."""
    country: str
    capital: str
    article: str  # 'the' where a sentence needs it: the Netherlands


class Pair(NamedTuple):
    """What can be asked: a place in one direction."""
    place: Place
    direction: str

    @property
    def given(self):
        """The name that a question gives."""
        return country_in_text(self.place) if self.direction == 'forward' else self.place.capital

    @property
    def answer(self):
        """The whole answer. One that differs from it in any character is not exact."""
        country, capital = country_in_text(self.place), self.place.capital
        return sentence(f'the capital of {country} is {capital}.' if self.direction == 'forward' else
                        f'{capital} is the capital of {country}.')


class Exchange(NamedTuple):
    """A question, its answer, and the exchanges that follow it."""
    question: str
    answer: str
    follow_ups: list = ()


def read_capitals(path=os.path.join(HERE, 'capitals.csv')):
    """The rows of capitals.csv as a list of Place."""
    with open(path, newline='', encoding='utf-8') as file:
        return [Place(**row) for row in csv.DictReader(file)]


def country_in_text(place):
    """The country as a sentence has it."""
    return f'{place.article} {place.country}'.strip()


def sentence(text):
    """The text from a capital letter on, with one full stop after Washington, D.C."""
    return text[:1].upper() + text[1:].replace('..', '.')


def fill(wording, name):
    """The question that a wording makes of a name."""
    possessive = name + ("'" if name.endswith('s') else "'s")
    return sentence(wording.replace('{xs}', possessive).replace('{x}', name))


def plain(text):
    """The words of a text, without signs and capital letters: two wordings are compared by them."""
    return ' '.join(''.join(c for c in text.lower() if c.isalnum() or c in ' {}').split()).replace('what is', 'whats')


def bodies(direction):
    """(wordings made of a frame and a noun phrase, whole sentences), all of them to be learned."""
    held_out = {plain(wording) for wording in VAL[direction] + QUIZ[direction]}
    made = [frame.replace('{n}', noun) for frame in FRAMES for noun in NOUNS[direction]]
    made = [wording for wording in made if plain(wording) not in held_out]
    return made, SENTENCES[direction]


BODIES = {direction: bodies(direction) for direction in DIRECTIONS}


def question(pair, rng):
    """A question to learn about the pair, some of its wording drawn, some of it disturbed."""
    made, whole = BODIES[pair.direction]
    body, before, behind = rng.choice(made if rng.random() < 0.4 else whole), '', ''
    if rng.random() < 0.25 and pair.place.country != pair.place.capital:  # only some words of it
        body = ' '.join(word for word in body.split(' ') if '{' in word or rng.random() < 0.5)
    if rng.random() < 0.5:
        before = rng.choice(rng.choice((GREETINGS, LEADS, REMARKS)))
    if rng.random() < 0.4:
        behind = rng.choice(REMARKS)
    for blank, choices in BLANKS.items():
        before, behind = (text.replace(blank, rng.choice(choices)) for text in (before, behind))
    if before.endswith(('.', '!')):
        body = sentence(body)
    words = f'{before} {body} {sentence(behind)}'.strip().split(' ')
    if rng.random() < 0.3:  # a filler behind some word but the last
        words[rng.randrange(max(1, len(words) - 1))] += rng.choice(FILLERS)
    if rng.random() < 0.4:
        words = [slip(word, rng) if rng.random() < 0.3 else word for word in words]
    name = pair.given.removeprefix('the ') if rng.random() < 0.1 else pair.given
    return careless(fill(' '.join(words), name), rng)


def slip(word, rng):
    """The word with letters left out, doubled, exchanged or wrong; never a name."""
    for _ in range(rng.randint(1, 3)):
        if len(word) < 3 or '{' in word:
            return word
        at = rng.randrange(len(word) - 1)
        start, letter, rest = word[:at], word[at], word[at + 1:]
        word = start + rng.choice((rest, letter + letter + rest, rest[0] + letter + rest[1:],
                               rng.choice('aeioubcdfghklmnprst') + rest))
    return word


def careless(text, rng):
    """The text; one time in five without capital letters, without its last sign, or both."""
    way = rng.random()
    if way < 0.1:
        text = text.lower()
    if 0.05 < way < 0.2:
        text = text.rstrip('.?!')
    return text


def exchange(pair, learned, rng, depth=0):
    """A random Exchange about the pair, and follow-ups about other pairs that are to be learned."""
    follow_ups = []
    if depth < 2 and rng.random() < 0.4:
        same_direction = rng.random() < 0.75  # then a few words do: "And Japan?"
        other = rng.choice(learned)
        while same_direction and other.direction != pair.direction:
            other = rng.choice(learned)
        below = exchange(other, learned, rng, depth + 1)
        if same_direction:
            below = below._replace(question=careless(fill(rng.choice(FOLLOW_UPS), other.given), rng))
        follow_ups.append(below)
    return Exchange(question(pair, rng), pair.answer, follow_ups)


def split_pairs(config):
    """(learned, held out), lists of Pair. Names that give the other away (Mexico City) are all learned."""
    places, rng = read_capitals(), random.Random(f'{config.seed} pairs')
    candidates = [place for place in places if place.country not in ALWAYS_LEARNED
                  and not set(plain(place.country).split()) & set(plain(place.capital).split())]
    chosen = rng.sample(candidates, 2 * config.held_out_pairs)
    held_out = [Pair(place, DIRECTIONS[i % 2]) for i, place in enumerate(chosen)]
    every = [Pair(place, direction) for direction in DIRECTIONS for place in places]
    return [pair for pair in every if pair not in held_out], held_out


def training(config):
    """The Exchanges to learn from."""
    learned, _ = split_pairs(config)
    rng = random.Random(f'{config.seed} training')
    return [exchange(pair, learned, rng) for _ in range(config.rounds) for pair in learned]


def validation(config):
    """The Exchanges of the val split: every learned pair in a wording of VAL, with a follow-up."""
    learned, _ = split_pairs(config)
    rng = random.Random(f'{config.seed} validation')
    found = []
    for i, pair in enumerate(learned):
        other = rng.choice([p for p in learned if p.direction == pair.direction and p != pair])
        follow_up = Exchange(fill(VAL_FOLLOW_UPS[i % len(VAL_FOLLOW_UPS)], other.given), other.answer)
        found += [Exchange(fill(wording, pair.given), pair.answer, [follow_up] if j == i % 4 else [])
                  for j, wording in enumerate(VAL[pair.direction])]
    return found


def quiz(config=Config()):
    """The questions of the demo, a list of dicts; before: the texts of the turns before the question."""
    learned, held_out = split_pairs(config)
    rng = random.Random(f'{config.seed} quiz')
    found = []

    def ask(kind, pair, wording, before=()):
        found.append({'question': fill(wording, pair.given), 'answer': pair.answer, 'direction': pair.direction,
                      'kind': kind, 'before': list(before), 'country': pair.place.country, 'capital': pair.place.capital})

    for kind, asked in (('held-out phrasing', learned), ('held-out pair', held_out)):
        for pair in asked:
            for wording in QUIZ[pair.direction]:
                ask(kind, pair, wording)
    for i, pair in enumerate(learned):
        first = rng.choice([p for p in learned if p.direction == pair.direction and p != pair])
        before = fill(rng.choice(QUIZ[pair.direction]), first.given), first.answer
        ask('follow-up', pair, QUIZ_FOLLOW_UPS[i % len(QUIZ_FOLLOW_UPS)], before)
    return found


def tree(key, root):
    """The Exchange as a message tree of OASST's export."""
    n_messages = 0

    def message(parent, role, text, replies, **more):
        nonlocal n_messages
        own = f'{key}-{n_messages}' if n_messages else key
        n_messages += 1
        return {'message_id': own, 'parent_id': parent, 'text': text, 'role': role, 'lang': 'en', 'review_count': 0,
                'review_result': True, 'deleted': False, 'synthetic': True, **more,
                'replies': [reply(own) for reply in replies]}

    def prompter(e):
        return lambda parent: message(parent, 'prompter', e.question, [assistant(e)])

    def assistant(e):
        return lambda parent: message(parent, 'assistant', e.answer, [prompter(f) for f in e.follow_ups], rank=0)

    return {'message_tree_id': key, 'tree_state': 'ready_for_export', 'prompt': prompter(root)(None)}


def texts(exchanges):
    """All questions and answers, those of the follow-ups too."""
    for e in exchanges:
        yield e.question
        yield e.answer
        yield from texts(e.follow_ups)


def write_lines(path, records):
    """A file of JSON, a record a line."""
    with open(path, 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    with claimed(config.out_dir, '.partial-*'):
        write(config)


def write(config):
    """All files of the data set."""
    train, val = training(config), validation(config)
    vocabulary, path = (os.path.join(config.out_dir, name) for name in ('tokenizer.json', 'trees.jsonl'))
    tokenizer.learn(texts(train), config.vocab_size, vocabulary)
    write_lines(path, (tree(f'{split}-{i}', e) for split, found in (('train', train), ('val', val))
                       for i, e in enumerate(found)))
    write_lines(os.path.join(config.out_dir, 'quiz.jsonl'), quiz(config))
    oasst.prepare(oasst.Config(out_dir=config.out_dir, turns='all', stdout=config.stdout, tokenizer=vocabulary, report=config.report),
                  path, {'source': {**pipeline.local_source(os.path.join(HERE, 'capitals.csv')), 'licence': 'MIT'},
                         'seed': config.seed, 'split_rule': 'wordings'}, lambda key: key.split('-')[0])


if __name__ == '__main__':
    configurator.run(main)
