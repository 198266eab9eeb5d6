"""What a conversation is, and the one way from it to ids: the templates and the loss mask.

    python -c "from core import conversation as c; print(c.to_text([c.Turn('user', 'Hi')]))"

The template `xml`, its supervised tokens underlined:

    <conversation><user>Hi</user><assistant>Hello</assistant></conversation><|endoftext|>
                                             ~~~~~~~~~~~~~~~~~
The loss mask is 1 on what the assistant must produce, its text and what ends it, and 0 elsewhere.
"""
import codecs
import math
import re
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np

from core.tokenizer import END_OF_TEXT, TAGS


class Turn(NamedTuple):
    """One message. context: what Alpaca calls input. supervised: whether an answer is learned."""
    role: str  # user or assistant
    text: str
    context: str = ''
    supervised: bool = True


class Special(str):
    """A piece that is one token, never made from a message's text."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written, in special tokens and text: opening, turns, closing."""
    user: tuple  # {text} and {context} stand for the turn's
    assistant: tuple  # the last two are the answer's text and the token that ends it
    user_with_context: tuple = ()  # by default the context is put below the text
    opening: tuple = ()
    closing: tuple = ()
    headings: tuple = ()  # a message that contains one is refused: it would forge the form

    @property
    def tags(self):
        """Whether the vocabulary needs the six tags."""
        return self.assistant[0] in TAGS

    @property
    def lead(self):
        """What stands before an answer's text without belonging to it: a space or nothing."""
        return self.assistant[-2].removesuffix('{text}')

    def turn(self, turn):
        """The turn as pieces, [(text or Special, supervised), …]."""
        parts = self.assistant
        text = turn.text
        if turn.role == 'user':
            parts = self.user
            for heading in self.headings:
                if heading in f'\n\n{text}\n\n{turn.context}\n':
                    raise ValueError(f'the message contains the heading {heading.strip()!r}')
            if turn.context and self.user_with_context:
                parts = self.user_with_context
            elif turn.context:
                text = f'{text}\n\n{turn.context}'
        # Everything from the answer's text on is supervised, its end included.
        pieces = []
        supervised = False
        for part in parts:
            piece = Special(part)
            if '{text}' in part:
                piece = part.format(text=text, context=turn.context)
                supervised = turn.role == 'assistant' and turn.supervised
            pieces.append((piece, supervised))
        return pieces


# Stanford's prompts: https://github.com/tatsu-lab/stanford_alpaca
TASK = 'Below is an instruction that describes a task'
INPUT = ', paired with an input that provides further context'
REQUEST = '. Write a response that appropriately completes the request.\n\n'
SECTIONS = '### Instruction:\n{text}\n\n### Response:\n'
SECTIONS_WITH_INPUT = '### Instruction:\n{text}\n\n### Input:\n{context}\n\n### Response:\n'
ALPACA = Template(
    user=(TASK + REQUEST + SECTIONS,),
    user_with_context=(TASK + INPUT + REQUEST + SECTIONS_WITH_INPUT,),
    assistant=('{text}', END_OF_TEXT),
    headings=('\n\n### Instruction:\n', '\n\n### Input:\n', '\n\n### Response:\n'))

# To add a template, add it here: everything else follows from the object.
TEMPLATES = {
    'xml': Template(
        user=('<user>', '{text}', '</user>'),
        assistant=('<assistant>', '{text}', '</assistant>'),
        opening=('<conversation>',),
        closing=('</conversation>', END_OF_TEXT)),
    'alpaca': ALPACA,
    # Without the first sentences.
    'alpaca-short': replace(
        ALPACA, user=(SECTIONS,), user_with_context=(SECTIONS_WITH_INPUT,)),
    'plain': Template(
        user=('{text}',),
        user_with_context=('{text} {context}',),
        assistant=(' {text}', END_OF_TEXT)),
    # For models that were never tuned.
    'question': Template(
        user=('Question: {text}\nAnswer:',),
        assistant=(' {text}', END_OF_TEXT),
        headings=('\nAnswer:',)),
    'dialogpt': Template(
        user=('{text}', END_OF_TEXT),
        assistant=('{text}', END_OF_TEXT)),
}


def encode(turns, tokenizer, template='xml', max_tokens=math.inf, cut=False):
    """ids (n,) uint16, loss mask (n,) uint8, and how many turns are not whole in them.

    A conversation that is too long loses whole turns from the end, so that it ends with an answer.
    With `cut`, the beginning of the next answer is kept, as far as it fits. (None, None,
    len(turns)) if nothing supervised is left. ValueError for text that cannot be encoded, or that
    would forge the template's form.
    """
    form = TEMPLATES[template]
    opening = [([tokenizer.special[tag]], False) for tag in form.opening]
    closing = [([tokenizer.special[tag]], False) for tag in form.closing]
    body = [encode_turn(turn, tokenizer, form) for turn in turns]

    # Drop turns from the end until the rest fits and ends with an answer.
    lengths = [sum(len(ids) for ids, _ in pieces) for pieces in body]
    n_tokens = len(opening) + sum(lengths) + len(closing)
    n = len(turns)
    while n and n_tokens > max_tokens:
        n -= 1
        n_tokens -= lengths[n]
    while 0 < n < len(turns) and turns[n - 1].role == 'user':
        n -= 1
    ids, mask = join([opening, *body[:n], closing])

    # Instead of closing, begin the next answer, if something that is learned of it fits.
    roles = [turn.role for turn in turns[n:]]
    if cut and 'assistant' in roles:
        answer = n + roles.index('assistant')
        begun, begun_mask = join([opening, *body[:answer + 1]])
        # Without the token that ends the answer, and not up to the middle of a character.
        begun = begun[:-1][:max_tokens]
        while tokenizer.decode(begun[-4:]).endswith('\ufffd'):
            begun = begun[:-1]
        begun_mask = begun_mask[:len(begun)]
        if begun_mask.sum() > mask.sum():
            ids = begun
            mask = begun_mask
            n = answer
    if n < len(turns) and not mask.any():
        return None, None, len(turns)
    return ids, mask, len(turns) - n


def encode_turn(turn, tokenizer, form):
    """The turn as [(ids, supervised), …]."""
    encoded = []
    for piece, supervised in form.turn(turn):
        if isinstance(piece, Special):
            encoded.append(([tokenizer.special[piece]], supervised))
        else:
            encoded.append((tokenizer.encode(piece), supervised))
    return encoded


def join(parts):
    """The ids and the loss mask of lists of encoded pieces, one after another."""
    pieces = [([], False), *chain.from_iterable(parts)]
    ids = np.concatenate([ids for ids, _ in pieces], dtype=np.uint16, casting='unsafe')
    flags = np.array([supervised for _, supervised in pieces], np.uint8)
    return ids, flags.repeat([len(ids) for ids, _ in pieces])


def prompt(turns, tokenizer, template='xml'):
    """The ids (list) that `encode` puts before the text of the assistant's next turn."""
    # Only the answer is supervised, so the prompt ends where the mask begins.
    before = [turn._replace(supervised=False) for turn in turns]
    ids, mask, _ = encode([*before, Turn('assistant', '')], tokenizer, template)
    return ids[:mask.argmax()].tolist()


def recent(turns, tokenizer, template, n_tokens):
    """The last turns, without the oldest exchanges, whose `prompt` has at most n_tokens."""
    n_form = len(prompt([], tokenizer, template))
    lengths = [len(prompt([turn], tokenizer, template)) - n_form for turn in turns]
    first = 0
    while n_form + sum(lengths[first:]) > n_tokens and len(turns) - first > 2:
        first += 2
    return turns[first:]


def stop_ids(tokenizer, template='xml'):
    """The ids that end an answer, of those that the tokenizer has."""
    stops = (TEMPLATES[template].assistant[-1], END_OF_TEXT)
    return {tokenizer.special[piece] for piece in stops if piece in tokenizer.special}


class AnswerText:
    """The text of an answer that a model writes after `prompt`, as its ids come."""

    def __init__(self, tokenizer, template):
        self.tokenizer = tokenizer
        self.lead = TEMPLATES[template].lead if template else ''
        self.held = ''  # may turn out to be the lead
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def add(self, ids, final=False):
        """The text that these ids add. What may be half of something waits for its rest."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        if self.lead.startswith(self.held) and not final:
            return ''
        text = self.held.removeprefix(self.lead)
        self.held = ''
        self.lead = ''
        return text


def answer_text(ids, tokenizer, template='xml'):
    """The text of a whole answer, up to the first id that ends it."""
    stops = stop_ids(tokenizer, template)
    ids = list(takewhile(lambda i: i not in stops, ids))
    return AnswerText(tokenizer, template).add(ids, final=True)


# A literal tag in a message gets a backslash: <user> is shown as <\user>, and <\user> as
# <\\user>, so that the text reads back as it was.
TAG_NAMES = '|'.join(re.escape(tag[1:]) for tag in (*TAGS, END_OF_TEXT))
LITERAL_TAG = re.compile(rf'<(\\*)({TAG_NAMES})')


def to_text(turns):
    """The conversation in the template `xml` as text, literal tags in messages escaped."""
    form = TEMPLATES['xml']
    text = ''.join(form.opening)
    for turn in turns:
        for piece, _ in form.turn(turn):
            if not isinstance(piece, Special):
                piece = LITERAL_TAG.sub(r'<\\\1\2', piece)
            text += piece
    return text + ''.join(form.closing)
