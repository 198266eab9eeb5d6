"""What a conversation is, and its one way into ids and back: the templates and the loss mask.

    python -c "import conversation as c; print(c.to_text([c.Turn('user', 'Hi'), c.Turn('assistant', 'Hello')]))"

The template `xml`, its supervised tokens underlined:

    <conversation><user>Hi</user><assistant>Hello</assistant></conversation><|endoftext|>
                                             ~~~~~~~~~~~~~~~~~
The loss mask is 1 on what the assistant must produce, its text and what ends it, and 0 elsewhere.
Sources: the five recipes in the README; Stanford's prompts, https://github.com/tatsu-lab/stanford_alpaca
"""
import re
from itertools import takewhile
from typing import Callable, NamedTuple

import numpy as np

from core.tokenizer import END_OF_TEXT, TAGS

ROLES = ('user', 'assistant')


class Turn(NamedTuple):
    """One message. `context` is what Alpaca calls input; a turn that is not supervised is only read."""
    role: str
    text: str
    context: str = ''
    supervised: bool = True  # of an assistant's turn; a user's never is


class Special(str):
    """A piece that stands for one id of its own, and is never made from a message's text."""


class Template(NamedTuple):
    """A conversation is opening + turn(t) for each t + closing: lists of (piece, supervised)."""
    opening: list
    turn: Callable
    closing: list
    stops: tuple  # the pieces that end an answer
    tags: bool  # whether the six tags are needed


def _special(text, supervised=False):
    return Special(text), supervised


def _request(turn, joint='\n\n'):
    """A turn's text; a template that has no place for the context has it behind the text."""
    return turn.text + joint + turn.context if turn.context else turn.text


def _xml(turn):
    supervised = turn.role == 'assistant' and turn.supervised
    return [_special(f'<{turn.role}>'), (_request(turn), supervised), _special(f'</{turn.role}>', supervised)]


def _dialogpt(turn):
    supervised = turn.role == 'assistant' and turn.supervised
    return [(_request(turn), supervised), _special(END_OF_TEXT, supervised)]


def _plain(turn):
    if turn.role == 'user':
        return [(_request(turn, ' '), False)]
    return [(' ' + turn.text, turn.supervised), _special(END_OF_TEXT, turn.supervised)]


def _question(turn):
    if turn.role == 'user':
        return [(f'Question: {_request(turn)}\nAnswer:', False)]
    return [(' ' + turn.text, turn.supervised), _special(END_OF_TEXT, turn.supervised)]


_TASK = 'Below is an instruction that describes a task'
_WITH_INPUT = ', paired with an input that provides further context'
_REQUEST = '. Write a response that appropriately completes the request.'
HEADINGS = _INSTRUCTION, _INPUT, _RESPONSE = '\n\n### Instruction:\n', '\n\n### Input:\n', '\n\n### Response:\n'


def _alpaca(turn):
    if turn.role == 'assistant':
        return [(turn.text, turn.supervised), _special(END_OF_TEXT, turn.supervised)]
    for heading in HEADINGS:
        # The headings are plain text, so a message could forge one: refused, not guessed at.
        if heading in '\n\n' + turn.text + '\n\n' + turn.context + '\n':
            raise ValueError(f'the message contains the heading {heading.strip()!r} of the template')
    context = _INPUT + turn.context if turn.context else ''
    return [(_TASK + _WITH_INPUT * bool(context) + _REQUEST + _INSTRUCTION + turn.text + context
             + _RESPONSE, False)]


TEMPLATES = {
    'xml': Template([_special('<conversation>')], _xml,
                    [_special('</conversation>'), _special(END_OF_TEXT)],
                    ('</assistant>', END_OF_TEXT), tags=True),
    'alpaca': Template([], _alpaca, [], (END_OF_TEXT,), tags=False),
    'plain': Template([], _plain, [], (END_OF_TEXT,), tags=False),
    'question': Template([], _question, [], (END_OF_TEXT,), tags=False),  # for models that were never tuned
    'dialogpt': Template([], _dialogpt, [], (END_OF_TEXT,), tags=False),
}


def from_messages(messages):
    """The turns of [{'role': …, 'content': …}, …], as chat interfaces have them; ValueError for what is none.

    user and assistant in turn, from the user on. A system message may stand before: no template has a
    place for it, so it becomes the beginning of the first user's text.
    """
    system, turns = '', []
    for i, message in enumerate(messages):
        role, content = message['role'], message['content']
        if i == 0 and role == 'system':
            system = content + '\n\n'
            continue
        if role != ROLES[len(turns) % 2]:
            raise ValueError(f'message {i} has the role {role!r}, expected {ROLES[len(turns) % 2]!r}')
        turns.append(Turn(role, system + content if not turns else content))
    if not turns:
        raise ValueError('there is no message of a user')
    return turns


def _encode_pieces(pieces, tokenizer):
    """[(ids, supervised), …] of pieces: a Special is its one id, a text is ordinary text."""
    return [([tokenizer.special[piece]] if isinstance(piece, Special) else tokenizer.encode(piece),
             supervised) for piece, supervised in pieces]


def encode(turns, tokenizer, template='xml', max_tokens=None):
    """ids (n,) uint16, loss mask (n,) uint8, and how many turns were lost to max_tokens.

    A conversation of more than max_tokens loses whole turns from the end, so that it still ends on
    the assistant. (None, None, len(turns)) where no answer that is to be learned fits. ValueError
    for a text that cannot be encoded: a lone surrogate, or a forged heading in `alpaca`.
    """
    form = TEMPLATES[template]
    opening, closing = _encode_pieces(form.opening, tokenizer), _encode_pieces(form.closing, tokenizer)
    body = [_encode_pieces(form.turn(turn), tokenizer) for turn in turns]
    lengths = [sum([len(ids) for ids, _ in turn]) for turn in body]
    n = sum(lengths) + len(opening) + len(closing)  # those two are specials alone, one id each
    n_kept = len(turns)
    while max_tokens is not None and n > max_tokens and n_kept:
        n_kept -= 1
        n -= lengths[n_kept]
        while n_kept and turns[n_kept - 1].role != 'assistant':
            n_kept -= 1
            n -= lengths[n_kept]
    ids, mask, at = np.empty(n, np.uint16), np.zeros(n, np.uint8), 0
    for piece_ids, supervised in (*opening, *(piece for turn in body[:n_kept] for piece in turn), *closing):
        end = at + len(piece_ids)
        ids[at:end] = piece_ids
        if supervised:
            mask[at:end] = 1
        at = end
    if n_kept < len(turns) and not mask.any():
        return None, None, len(turns)
    return ids, mask, len(turns) - n_kept


def prompt(turns, tokenizer, template='xml'):
    """The ids (list) after which the model is to write the assistant's next turn.

    Exactly the ids that `encode` gives before the first token of that turn's answer.
    """
    form = TEMPLATES[template]
    opening_of_answer = takewhile(lambda piece: not piece[1], form.turn(Turn('assistant', '')))
    pieces = [*form.opening, *(piece for turn in turns for piece in form.turn(turn)), *opening_of_answer]
    return [int(i) for ids, _ in _encode_pieces(pieces, tokenizer) for i in ids]


def recent(turns, tokenizer, template, n_tokens):
    """The turns without the oldest exchanges, so many that `prompt` has at most n_tokens; the last turn stays."""
    while len(turns) > 2 and len(prompt(turns, tokenizer, template)) > n_tokens:
        turns = turns[2:]
    return turns


def stop_ids(tokenizer, template='xml'):
    """The ids that end an answer; a tag that the tokenizer lacks is left out."""
    return {tokenizer.special[piece] for piece in TEMPLATES[template].stops if piece in tokenizer.special}


def answer_text(ids, tokenizer, template='xml'):
    """The message in the ids that a model wrote after `prompt`, up to the first that ends it."""
    stops = stop_ids(tokenizer, template)
    text = tokenizer.decode(list(takewhile(lambda i: i not in stops, ids)))
    return text.removeprefix(' ') if template in ('plain', 'question') else text


def decode(ids, mask, tokenizer, template='xml'):
    """The turns that `encode` made these ids and this mask from; ValueError for any other ids."""
    ids, mask = [int(i) for i in ids], [bool(m) for m in mask]
    try:
        turns = (_decode_xml if template == 'xml' else _decode_exchanges)(ids, mask, tokenizer, template)
        if encode(turns, tokenizer, template)[0].tolist() == ids:
            return turns
    except (KeyError, ValueError):  # an id that there is not, half a character, a forged heading
        pass
    raise ValueError(f'not a conversation of the template {template!r}: the ids {str(ids[:20])[1:-1]} …')


def _text(ids, tokenizer):
    return tokenizer.decode_bytes(ids).decode('utf-8')


def _decode_xml(ids, mask, tokenizer, template):
    """Whatever stands between a role's two tags, in order; `decode` checks all that stands around."""
    turns, start = [], 0
    for i, token in enumerate(ids):
        for role in ROLES:
            if token == tokenizer.special[f'<{role}>']:
                start = i + 1
            elif token == tokenizer.special[f'</{role}>']:
                turns.append(Turn(role, _text(ids[start:i], tokenizer),
                                  supervised=role == 'user' or mask[i]))
    return turns


def _decode_exchanges(ids, mask, tokenizer, template):
    """The templates without tags: <|endoftext|> ends a message, or an exchange of two."""
    turns, start = [], 0
    for i, token in enumerate(ids):
        if token != tokenizer.end_of_text:
            continue
        message = ids[start:i]
        if template == 'dialogpt':
            role = ROLES[len(turns) % 2]
            turns.append(Turn(role, _text(message, tokenizer), supervised=role == 'user' or mask[i]))
        elif template in ('plain', 'question'):  # only the mask says where the answer begins
            cut = (mask[start:i + 1] + [True]).index(True)
            request = _text(message[:cut], tokenizer)
            if template == 'question':
                request = request.removeprefix('Question: ').removesuffix('\nAnswer:')
            turns += [Turn('user', request),
                      Turn('assistant', _text(message[cut:], tokenizer)[1:], supervised=mask[i])]
        else:
            request, _, answer = _text(message, tokenizer).partition(_RESPONSE)
            instruction, _, context = request.partition(_INSTRUCTION)[2].partition(_INPUT)
            turns += [Turn('user', instruction, context), Turn('assistant', answer, supervised=mask[i])]
        start = i + 1
    return turns


# As text, to look at: a literal tag in a message gets a backslash, <user> is shown as <\\user>, one
# that has backslashes there already gets one more, so that the text reads back as it was.
_TAG = '|'.join(re.escape(tag[1:]) for tag in (*TAGS, END_OF_TEXT))
_ESCAPE, _UNESCAPE = re.compile(rf'<(\\*)({_TAG})'), re.compile(rf'<\\(\\*)({_TAG})')


def to_text(turns):
    """The conversation in the template `xml` as text, literal tags in messages escaped."""
    pieces = [*TEMPLATES['xml'].opening, *(piece for turn in turns for piece in _xml(turn)),
              *TEMPLATES['xml'].closing]
    return ''.join(piece if isinstance(piece, Special) else _ESCAPE.sub(r'<\\\1\2', piece)
                   for piece, _ in pieces)


def from_text(text):
    """The conversations in text that `to_text` has written: a list of lists of turns."""
    message = re.compile(r'<(user|assistant)>(.*?)</\1>', re.DOTALL)
    return [[Turn(role, _UNESCAPE.sub(r'<\1\2', body)) for role, body in message.findall(whole)]
            for whole in re.findall(r'<conversation>(.*?)</conversation>', text, re.DOTALL)]
