"""Our templates and vocabularies as transformers reads them.

    python export.py --init_from=out/oasst --out=my-model

Together they give the ids of core/conversation.py, which encodes each piece by itself and
takes no tag from a message. Two characters that Unicode sets aside make it possible: the
template writes them, the tokenizer takes them out.
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
# Between two pieces that would be encoded as one.
JOINT = '\ufdd1'

ENVIRONMENT = jinja2.Environment(
    '<%', '%>', '<<', '>>', '<#', '#>', trim_blocks=True, lstrip_blocks=True,
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)))


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
    """The chat template, from turns whose text is JOINT."""
    form = TEMPLATES[name]
    user = [piece for piece, _, _ in form.turn(Turn('user', JOINT))]
    assistant = list(form.turn(Turn('assistant', JOINT)))
    before_answer = [piece for piece, _, supervised in assistant if not supervised]
    answer = [piece for piece, _, supervised in assistant if supervised]
    # Two texts side by side could fuse to other tokens.
    fuses = '{text}' in form.user[-1] and not before_answer
    # A typed tag is broken after its <.
    tags = [(literal(tag), literal(f'<{BREAK}{tag[1:]}')) for tag in tokenizer.special]
    text = ENVIRONMENT.get_template('chat_template.jinja').render(
        name=name, form=form, user=user, before_answer=before_answer, answer=answer,
        fuses=fuses, tags=tags, BREAK=literal(BREAK), JOINT=literal(JOINT),
        write=write, refuse=refuse, expression=expression, literal=literal)
    return '\n'.join(filter(None, text.split('\n')))


def merges(tokens):
    """The pairs of tokens that merge into those after the 256 bytes, in order."""
    ranks = {token: i for i, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens[256:], 256):
        # As a text is encoded, with the earlier tokens alone.
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        found.append(tuple(parts))
    return found


def tokenizer_json(tokenizer):
    """tokenizer.json as a dict. It drops BREAK and splits at JOINT."""
    tokens = tokenizer.tokens
    vocab = dict(zip(map(to_unicode, tokens), tokenizer.text_ids))
    vocab |= tokenizer.special
    pairs = [(to_unicode(a), to_unicode(b)) for a, b in merges(tokens)]
    bpe = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    bpe.normalizer = normalizers.Replace(BREAK, '')
    split = pre_tokenizers.Split(JOINT, 'removed')
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    # Looked for before normalizing, while BREAK still stands in the text.
    for piece in tokenizer.special:
        bpe.add_special_tokens([tokenizers.AddedToken(piece, normalized=False)])
    return json.loads(bpe.to_str())
