"""What a conversation is, and the one way from it to ids: the templates and the loss mask.

    python -c "from core import conversation as c; print(c.to_text([c.Turn('user', 'Hi')]))"

The template `xml`, its supervised tokens underlined:

    <conversation><user>Hi</user><assistant>Hello</assistant></conversation><|endoftext|>
                                            ~~~~~~~~~~~~~~~~~
The loss mask is 1 on what the assistant must produce, its text and what ends it, else 0.
"""
import codecs
import math
import re
from bisect import bisect_left
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from core.tokenizer import END_OF_TEXT, TAGS


class Turn(NamedTuple):
    """One message."""
    role: str  # user or assistant
    text: str
    context: str = ''  # what Alpaca calls input
    supervised: bool = True  # whether an answer is learned


class Template(NamedTuple):
    """How a conversation is written. A part without {text} is one special token."""
    user: tuple  # {text} and {context} stand for the turn's
    assistant: tuple  # its last two: '{text}' or ' {text}', and what ends the answer
    user_with_context: tuple = ()  # by default the context is put below the text
    opening: tuple = ()
    closing: tuple = ()
    headings: tuple = ()  # a user's text with one is refused: it would forge the form

    @property
    def tags(self):
        """Whether the vocabulary needs the six tags."""
        return self.assistant[0] in TAGS

    @property
    def lead(self):
        """What stands before an answer's text: a space or nothing."""
        return self.assistant[-2].removesuffix('{text}')

    def turn(self, turn):
        """Yield the pieces of a turn, (piece, is_text, supervised)."""
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
        supervised = False
        for part in parts:
            is_text = '{text}' in part
            if is_text:
                part = part.format(text=text, context=turn.context)
                # From here on, the end of the answer included.
                supervised = turn.role == 'assistant' and turn.supervised
            yield part, is_text, supervised


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
        opening=('<conversation>',),
        user=('<user>', '{text}', '</user>'),
        assistant=('<assistant>', '{text}', '</assistant>'),
        closing=('</conversation>', END_OF_TEXT)),
    'alpaca': ALPACA,
    # Without the first sentences.
    'alpaca-short': ALPACA._replace(
        user=(SECTIONS,), user_with_context=(SECTIONS_WITH_INPUT,)),
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
        assistant=('{text}', END_OF_TEXT))}


def encode(turns, tokenizer, template='xml', max_tokens=math.inf, cut=False):
    """ids (n,) uint16, loss mask (n,) uint8, and how many turns are not whole in them.

    Too long a conversation loses turns from the end; `cut` keeps the beginning of the next
    answer, as far as it fits. (None, None, len(turns)) if nothing supervised fits.
    ValueError for text that cannot be encoded, or that would forge the template's form.
    """
    form = TEMPLATES[template]
    ids = [tokenizer.special[tag] for tag in form.opening]
    closing = [tokenizer.special[tag] for tag in form.closing]
    mask = [0] * len(ids)
    ends = [len(ids)]  # of the opening and of each turn
    for turn in turns:
        for piece, is_text, supervised in form.turn(turn):
            if is_text:
                ids += tokenizer.encode(piece).tolist()
            else:
                ids.append(tokenizer.special[piece])
            mask += [supervised] * (len(ids) - len(mask))
        ends.append(len(ids))

    # Drop turns from the end until the rest fits and ends with an answer.
    n = len(turns)
    while n and ends[n] + len(closing) > max_tokens:
        n -= 1
    while 0 < n < len(turns) and turns[n - 1].role == 'user':
        n -= 1
    end = ends[n]
    if cut and n < len(turns):
        # Go on as far as it fits, up to the last whole character of an answer.
        end = min(max_tokens, len(ids))
        stop = tokenizer.special[form.assistant[-1]]
        while end > ends[n]:
            # A character has up to four bytes, and a token at least one.
            half = tokenizer.decode(ids[max(0, end - 4):end]).endswith('\ufffd')
            if mask[end - 1] and ids[end - 1] != stop and not half:
                n = bisect_left(ends, end) - 1
                closing = []
                break
            end -= 1

    ids = ids[:end] + closing
    mask = mask[:end] + [0] * len(closing)
    if n < len(turns) and not any(mask):
        return None, None, len(turns)
    return np.array(ids, np.uint16), np.array(mask, np.uint8), len(turns) - n


def prompt(turns, tokenizer, template='xml'):
    """The ids (list) that `encode` puts before the text of the assistant's next turn."""
    # Only the answer is supervised, so the prompt ends where the mask begins.
    before = [turn._replace(supervised=False) for turn in turns]
    ids, mask, _ = encode([*before, Turn('assistant', '')], tokenizer, template)
    return ids[:mask.argmax()].tolist()


def recent(turns, tokenizer, template, n_tokens):
    """The last turns whose `prompt` has at most n_tokens; at least the last one."""
    n = 1
    while n < len(turns) and len(prompt(turns[-n - 2:], tokenizer, template)) <= n_tokens:
        n += 2
    return turns[-n:]


def stop_ids(tokenizer, template='xml'):
    """The ids, of those that the tokenizer has, that end an answer."""
    stops = (TEMPLATES[template].assistant[-1], END_OF_TEXT)
    return {tokenizer.special[piece] for piece in stops if piece in tokenizer.special}


class AnswerText:
    """The text of an answer that a model writes after `prompt`, as its ids come."""

    def __init__(self, tokenizer, template):
        self.tokenizer = tokenizer
        self.lead = TEMPLATES[template].lead if template else ''
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def add(self, ids, final=False):
        """The text that these ids add. Half a character waits, unless final."""
        text = self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        if text:
            text = text.removeprefix(self.lead)
            self.lead = ''
        return text


def answer_text(ids, tokenizer, template='xml'):
    """The text of a whole answer, up to the first id that ends it."""
    stops = stop_ids(tokenizer, template)
    ids = takewhile(lambda i: i not in stops, ids)
    return AnswerText(tokenizer, template).add(list(ids), final=True)


# A literal tag in a message gets a backslash: <user> is shown as <\user>, and <\user> as
# <\\user>, so that the text reads back as it was.
TAG_NAMES = '|'.join(re.escape(tag[1:]) for tag in (*TAGS, END_OF_TEXT))
LITERAL_TAG = re.compile(rf'<(\\*)({TAG_NAMES})')


def to_text(turns):
    """The conversation in the template `xml` as text, literal tags in messages escaped."""
    form = TEMPLATES['xml']
    text = ''.join(form.opening)
    for turn in turns:
        for piece, is_text, _ in form.turn(turn):
            if is_text:
                piece = LITERAL_TAG.sub(r'<\\\1\2', piece)
            text += piece
    return text + ''.join(form.closing)
