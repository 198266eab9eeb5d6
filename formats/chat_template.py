"""Our templates and vocabularies in the form that transformers reads: Jinja, and tokenizer.json.

    python -c "import chat_template as c, tokenizer as t; print(c.chat_template('xml', t.load('gpt2')))"

Together the two give the ids of conversation.py, which encodes each piece of a conversation by itself.
Sources: the formats as transformers 5.23 and tokenizers 0.23 read them.
"""
from itertools import takewhile

from configurator import UserError
from core.conversation import HEADINGS, TEMPLATES, Special, Turn
from core.tokenizer import to_unicode

# Two characters that Unicode keeps for such inner use; a message that has one is refused. Written by the chat
# template, taken out by tokenizer.json. BREAK: inside a tag that somebody typed, so that it is no tag. JOINT:
# between two pieces that conversation.py encodes by themselves, where together they would give other ids.
BREAK, JOINT = '\ufdd0', '\ufdd1'


def literal(text):
    """The text as Jinja writes it."""
    return "'" + text.replace('\\', '\\\\').replace("'", "\\'").replace('\n', '\\n') + "'"


def chat_template(name, tokenizer):
    """The Jinja template that gives, with tokenizer_json, the ids of conversation.encode and conversation.prompt.

    Made from TEMPLATES, by asking it for turns whose text is a mark: no form is written down twice.
    """
    form = TEMPLATES[name]

    def expression(piece):
        before, mark, after = piece.partition(JOINT)
        return ' ~ '.join(part for part in (literal(before), 'text' * bool(mark), literal(after)) if part not in ('', "''"))

    def write(pieces):
        return ''.join(f'{{{{- {expression(piece)} -}}}}' for piece, _ in pieces)

    def refuse(condition, why):
        return f'{{%- if {condition} -%}}{{{{- raise_exception({literal(why)}) -}}}}{{%- endif -%}}'

    user, answer = form.turn(Turn('user', JOINT)), form.turn(Turn('assistant', JOINT))
    before_answer = list(takewhile(lambda piece: not piece[1], answer))
    supervised = answer[len(before_answer):]
    joint = []
    if len(user) == 1 and not isinstance(user[0][0], Special) and not isinstance(answer[0][0], Special):
        # Nothing fuses where a space follows what is none, or what is none a line end that stands alone.
        joint = [f'{{%- set next = {expression(answer[0][0])} -%}}',
                 "{%- if not (at.before[-1:] | trim and next[:1] == ' '",
                 "            or at.before[-2:-1] | trim and at.before[-1:] == '\\n' and next[:1] | trim) -%}",
                 f'{{{{- {literal(JOINT)} -}}}}', '{%- endif -%}']
    unforged = ''.join(f' | replace({literal(tag)}, {literal(tag[0] + BREAK + tag[1:])})' for tag in tokenizer.special)
    blank = literal('\n\n')
    lines = [
        f'{{#- The template {name!r}. The characters U+FDD0 and U+FDD1 are taken out by tokenizer.json. -#}}',
        "{%- set at = namespace(turns=0, system='', before='') -%}",
        write(form.opening),
        '{%- for message in messages -%}',
        "{%- set role, content = message['role'], message['content'] -%}",
        refuse('content is not string', 'the content of a message must be a text'),
        refuse(f'{literal(BREAK)} in content or {literal(JOINT)} in content',
               'a message contains U+FDD0 or U+FDD1, which stand for no character'),
        "{%- if loop.first and role == 'system' -%}",
        f'{{%- set at.system = content ~ {blank} -%}}',
        '{%- else -%}',
        refuse("role != ['user', 'assistant'][at.turns % 2]",
               'the roles must be user and assistant in turn, from the user on; one system message may stand before'),
        f'{{%- set text = ((at.system if at.turns == 0 else \'\') ~ content){unforged} -%}}',
        '{%- set at.turns = at.turns + 1 -%}',
        "{%- if role == 'user' -%}",
        *(refuse(f'{literal(heading)} in {blank} ~ text ~ {blank} ~ {literal(chr(10))}',
                 f'the message contains the heading {heading.strip()!r} of the template')
          for heading in HEADINGS if name == 'alpaca'),
        f'{{%- set at.before = {expression(user[0][0])} -%}}{{{{- at.before -}}}}' if joint else write(user),
        '{%- else -%}',
        *joint,
        write(before_answer),
        f'{{%- generation -%}}{write(supervised)}{{%- endgeneration -%}}',
        '{%- endif -%}', '{%- endif -%}', '{%- endfor -%}',
        refuse('at.turns == 0', 'there is no message of a user'),
        f'{{%- if add_generation_prompt -%}}{write(before_answer)}{{%- else -%}}{write(form.closing)}{{%- endif -%}}']
    return '\n'.join(line for line in lines if line)


# ---- the vocabulary ----

def merges(tokens):
    """The pairs of tokens (bytes) that merge into each token after the 256 bytes, in order; UserError where none do."""
    ranks, found = {token: i for i, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens[256:], 256):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # as text is encoded, with the tokens before this one alone
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            if pairs[i] == rank:
                raise UserError(f'the vocabulary cannot be exported: no two tokens before it merge into its token {token!r}.')
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        found.append(tuple(parts))
    return found


def tokenizer_json(tokenizer):
    """tokenizer.json as a dict: GPT-2's encoding, in which BREAK vanishes and JOINT separates."""
    return {'version': '1.0', 'truncation': None, 'padding': None,
            # Not normalized: looked for before BREAK is taken out.
            'added_tokens': [{'id': i, 'content': piece, 'single_word': False, 'lstrip': False, 'rstrip': False,
                              'normalized': False, 'special': True} for piece, i in tokenizer.special.items()],
            'normalizer': {'type': 'Replace', 'pattern': {'String': BREAK}, 'content': ''},
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
                {'type': 'Split', 'pattern': {'String': JOINT}, 'behavior': 'Removed', 'invert': False},
                {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': True}]},
            'post_processor': None,
            'decoder': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': True},
            'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '',
                      'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                      'vocab': {to_unicode(token): i for i, token in enumerate(tokenizer.tokens)},
                      'merges': [[to_unicode(a), to_unicode(b)] for a, b in merges(tokenizer.tokens)]}}
