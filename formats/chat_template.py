"""Our templates and vocabularies as transformers reads them.

    python export.py --init_from=out/oasst --out=my-model

Together, chat_template.jinja and tokenizer.json give the ids of core/conversation.py, which
encodes each piece of a conversation by itself and takes no tag from a message. Two characters
that Unicode sets aside make it possible: the one writes them, the other takes them out again.
Sources: the formats as transformers 5.23 and tokenizers 0.23 read them.
"""
import json
import os

import jinja2  # comes with torch
import tokenizers  # comes with transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from core.conversation import TEMPLATES, Turn
from core.tokenizer import to_unicode

# Inside a tag that somebody typed, so that it is not one.
BREAK = '\ufdd0'
# Between two pieces that would have other ids if they were encoded together.
JOINT = '\ufdd1'

ENVIRONMENT = jinja2.Environment(
    '<%', '%>', '<<', '>>', '<#', '#>', trim_blocks=True, lstrip_blocks=True,
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)), undefined=jinja2.StrictUndefined)


def literal(text):
    """The text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)


def expression(piece):
    """A piece in which JOINT stands for the message, as a Jinja expression."""
    whole = literal(piece).replace(JOINT, '" ~ text ~ "')
    return whole.removeprefix('"" ~ ').removesuffix(' ~ ""')


def write(pieces):
    """Jinja that writes the pieces."""
    return ''.join(f'{{{{- {expression(piece)} -}}}}' for piece in pieces)


def refuse(why):
    """Jinja that stops with an error."""
    return f'{{{{- raise_exception({literal(why)}) -}}}}'


def chat_template(name, tokenizer):
    """The chat template of transformers for one of TEMPLATES.

    The form comes from the Template itself, which is asked for turns whose text is JOINT.
    """
    template = TEMPLATES[name]
    user = [piece for piece, _, _ in template.turn(Turn('user', JOINT))]
    assistant = list(template.turn(Turn('assistant', JOINT)))
    before_answer = [piece for piece, _, supervised in assistant if not supervised]
    answer = [piece for piece, _, supervised in assistant if supervised]
    # Two texts side by side would be encoded as one, and could fuse to other tokens.
    fuses = '{text}' in template.user[-1] and not before_answer
    tags = [(literal(tag), literal(tag[0] + BREAK + tag[1:])) for tag in tokenizer.special]
    text = ENVIRONMENT.get_template('chat_template.jinja').render(
        name=name, opening=template.opening, closing=template.closing, user=user,
        before_answer=before_answer, answer=answer, fuses=fuses, tags=tags,
        headings=template.headings, write=write, refuse=refuse, expression=expression,
        literal=literal, BREAK=literal(BREAK), JOINT=literal(JOINT))
    return '\n'.join(line for line in text.split('\n') if line)


def merges(tokens):
    """The pair of tokens that merges into each token after the 256 bytes, in order."""
    ranks = {token: i for i, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens[256:], 256):
        # As a text is encoded, with the tokens before this one alone.
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        found.append(tuple(parts))
    return found


def tokenizer_json(tokenizer):
    """tokenizer.json as a dict: GPT-2's, but it drops BREAK and splits at JOINT."""
    text = [to_unicode(token) for token in tokenizer.tokens]
    vocab = dict(zip(text, tokenizer.text_ids)) | tokenizer.special
    pairs = [(to_unicode(a), to_unicode(b)) for a, b in merges(tokenizer.tokens)]
    bpe = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    bpe.normalizer = normalizers.Replace(BREAK, '')
    split = pre_tokenizers.Split(JOINT, 'removed')
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    # Not normalized: they are looked for while BREAK still stands in the text.
    for piece in tokenizer.special:
        bpe.add_special_tokens([tokenizers.AddedToken(piece, normalized=False)])
    return json.loads(bpe.to_str())
