"""What a conversation is, and the one way from it to ids: the templates and the loss mask.

    python -c "from core import conversation as c; print(c.to_text([c.Turn('user', 'Hi')]))"

The template `xml`, its supervised tokens underlined:

    <conversation><user>Hi</user><assistant>Hello</assistant></conversation><|endoftext|>
                                             ~~~~~~~~~~~~~~~~~
The loss mask is 1 on what the assistant must produce, its text and what ends it, and 0 elsewhere.
Sources: the recipes in the README; prompts of https://github.com/tatsu-lab/stanford_alpaca
"""
import codecs
import re
from dataclasses import dataclass
from itertools import takewhile
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
    """A piece that is one token of its own, never made from a message's text."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written: opening, then each turn, then closing.

    Each is a tuple of special tokens and of text; {text} and {context} stand for the turn's.
    """
    user: tuple
    assistant: tuple
    user_with_context: tuple = ()  # by default the context is put below the text
    opening: tuple = ()
    closing: tuple = ()
    headings: tuple = ()  # text that a message must not contain, because it would forge the form

    @property
    def tags(self):
        """Whether the vocabulary needs the six tags."""
        return self.assistant[0] in TAGS

    @property
    def stops(self):
        """The special tokens that end an answer, the usual one first."""
        return tuple(dict.fromkeys((self.assistant[-1], END_OF_TEXT)))

    @property
    def lead(self):
        """What stands before an answer's text without belonging to it: a space or nothing."""
        before, = (part for part in self.assistant if '{text}' in part)
        return before.removesuffix('{text}')

    def turn(self, turn):
        """The turn as pieces [(text or Special, supervised)]; ValueError if it forges the form."""
        parts = self.assistant
        if turn.role == 'user':
            parts = self.user
            if turn.context and self.user_with_context:
                parts = self.user_with_context
            for heading in self.headings:
                if heading in f'\n\n{turn.text}\n\n{turn.context}\n':
                    raise ValueError(f'the message contains the heading {heading.strip()!r}')
        # Everything from the answer's text on is supervised, its end included.
        pieces = []
        supervised = False
        for part in parts:
            if '{text}' in part:
                supervised = turn.role == 'assistant' and turn.supervised
                pieces.append((fill(part, turn), supervised))
            else:
                pieces.append((Special(part), supervised))
        return pieces


def fill(form, turn):
    """The form with the turn in it. Not str.format: the message may contain braces."""
    before, after = form.split('{text}')
    if '{context}' in after:
        return before + turn.text + after.replace('{context}', turn.context)
    if turn.context:
        return f'{before}{turn.text}\n\n{turn.context}{after}'
    return before + turn.text + after


# Stanford's prompts: https://github.com/tatsu-lab/stanford_alpaca
TASK = 'Below is an instruction that describes a task'
TASK_WITH_INPUT = f'{TASK}, paired with an input that provides further context'
REQUEST = 'Write a response that appropriately completes the request.'
SECTIONS = '### Instruction:\n{text}\n\n### Response:\n'
SECTIONS_WITH_INPUT = '### Instruction:\n{text}\n\n### Input:\n{context}\n\n### Response:\n'
HEADINGS = ('\n\n### Instruction:\n', '\n\n### Input:\n', '\n\n### Response:\n')

# To add a template, add it here: everything else follows from the object.
TEMPLATES = {
    'xml': Template(
        user=('<user>', '{text}', '</user>'),
        assistant=('<assistant>', '{text}', '</assistant>'),
        opening=('<conversation>',),
        closing=('</conversation>', END_OF_TEXT)),
    'alpaca': Template(
        user=(f'{TASK}. {REQUEST}\n\n{SECTIONS}',),
        user_with_context=(f'{TASK_WITH_INPUT}. {REQUEST}\n\n{SECTIONS_WITH_INPUT}',),
        assistant=('{text}', END_OF_TEXT),
        headings=HEADINGS),
    # Without the first sentences.
    'alpaca-short': Template(
        user=(SECTIONS,),
        user_with_context=(SECTIONS_WITH_INPUT,),
        assistant=('{text}', END_OF_TEXT),
        headings=HEADINGS),
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


# ---- conversations to ids ----

def encode_pieces(pieces, tokenizer):
    """[(ids, supervised), …] of pieces."""
    encoded = []
    for piece, supervised in pieces:
        if isinstance(piece, Special):
            encoded.append(([tokenizer.special[piece]], supervised))
        else:
            encoded.append((tokenizer.encode(piece), supervised))
    return encoded


def encode(turns, tokenizer, template='xml', max_tokens=None, cut=False):
    """ids (n,) uint16, loss mask (n,) uint8, and how many turns are not whole in them.

    A conversation that is too long loses whole turns from the end, so that it still ends on the
    assistant. With `cut`, the beginning of the next answer is kept, as far as it fits, without its
    end. (None, None, len(turns)) if no supervised answer is left. ValueError for text that cannot
    be encoded or would forge the template's form.
    """
    form = TEMPLATES[template]
    body = [encode_pieces(form.turn(turn), tokenizer) for turn in turns]
    lengths = [sum(len(ids) for ids, _ in turn) for turn in body]
    n = len(form.opening) + sum(lengths) + len(form.closing)
    # Drop turns from the end until the rest fits and ends with an answer.
    n_kept = len(turns)
    if max_tokens is not None:
        while n > max_tokens and n_kept:
            n_kept -= 1
            n -= lengths[n_kept]
            while n_kept and turns[n_kept - 1].role != 'assistant':
                n_kept -= 1
                n -= lengths[n_kept]
    pieces = [([tokenizer.special[piece]], False) for piece in form.opening]
    for turn in body[:n_kept]:
        pieces += turn
    beginning = []
    if cut and n_kept < len(turns):
        beginning = begin_answer(turns, body, n_kept, max_tokens - n + len(form.closing), tokenizer)
    if beginning:
        pieces += beginning
        while turns[n_kept].role == 'user':
            n_kept += 1  # it is whole
    else:
        pieces += [([tokenizer.special[piece]], False) for piece in form.closing]
    n = sum(len(ids) for ids, _ in pieces)
    # One array for all pieces, and the mask beside it.
    ids = np.empty(n, np.uint16)
    mask = np.zeros(n, np.uint8)
    at = 0
    for piece_ids, supervised in pieces:
        end = at + len(piece_ids)
        ids[at:end] = piece_ids
        mask[at:end] = supervised
        at = end
    if n_kept < len(turns) and not mask.any():
        return None, None, len(turns)
    return ids, mask, len(turns) - n_kept


def begin_answer(turns, body, first, room, tokenizer):
    """The encoded pieces of the turns from `first` on up to as much of the next answer as fits.

    [] if none of it does, or if it is not supervised.
    """
    pieces = []
    for turn, encoded in zip(turns[first:], body[first:]):
        if turn.role == 'user':
            pieces += encoded
            continue
        # The last piece is what ends the answer.
        *lead, (text, supervised), _ = encoded
        pieces += lead
        room -= sum(len(ids) for ids, _ in pieces)
        text = text[:max(room, 0)]
        while len(text) and b'\xef\xbf\xbd' in tokenizer.decode(text[-4:]).encode()[-3:]:
            # This token ends inside a character.
            text = text[:-1]
        return pieces + [(text, True)] if supervised and len(text) else []
    return []


def prompt(turns, tokenizer, template='xml'):
    """The ids (list) after which the model is to write the assistant's next turn.

    They are exactly the ids that `encode` puts before the first token of that answer.
    """
    form = TEMPLATES[template]
    pieces = [(Special(piece), False) for piece in form.opening]
    for turn in turns:
        pieces += form.turn(turn)
    answer = form.turn(Turn('assistant', ''))
    pieces += takewhile(lambda piece: not piece[1], answer)
    found = []
    for ids, _ in encode_pieces(pieces, tokenizer):
        found += [int(i) for i in ids]
    return found


def recent(turns, tokenizer, template, n_tokens):
    """The turns without the oldest exchanges, so that `prompt` has at most n_tokens.

    The last turn always stays.
    """
    lengths = []
    for turn in turns:
        pieces = encode_pieces(TEMPLATES[template].turn(turn), tokenizer)
        lengths.append(sum(len(ids) for ids, _ in pieces))
    n = len(prompt([], tokenizer, template)) + sum(lengths)
    first = 0
    while n > n_tokens and len(turns) - first > 2:
        n -= lengths[first] + lengths[first + 1]
        first += 2
    return turns[first:]


# ---- answers ----

def stop_ids(tokenizer, template='xml'):
    """The ids that end an answer, of those that the tokenizer has."""
    stops = TEMPLATES[template].stops
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


# ---- as text, to look at ----

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
