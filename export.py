"""A checkpoint as a folder that the rest of the world opens: transformers, TRL, lm-eval, llama.cpp.

    python export.py --init_from=out/oasst --out=my-model
    python export.py --init_from=out/oasst --out=my-model --dtype=bfloat16 --gguf=True --overwrite=True

The folder holds the weights, the vocabulary, our template as a chat template, when to stop, and a
model card. apply_chat_template gives the ids of conversation.py, and --init_from=my-model goes back in.
Sources: the formats as transformers 5.23, tokenizers 0.23 and gguf 0.19 read them.
"""
import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from itertools import takewhile

import safetensors.torch  # comes with transformers
import torch

import card
import checkpoint
import configurator
import conversation
from claim import claimed
from configurator import UserError
from conversation import TEMPLATES, Special, Turn
from model import TRANSPOSED, to_transformers
from tokenizer import END_OF_TEXT, to_unicode

DTYPES = ('float32', 'bfloat16', 'float16')
FILES = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
         'chat_template.jinja', 'README.md', 'model.gguf'}


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = 'resume'  # resume (a checkpoint in out_dir), or a folder with a checkpoint or an export
    out_dir: str = 'out'       # where the checkpoint is
    which: str = 'best'        # best: by val_loss, where there is one; last: as training left it
    # where to
    out: str = ''              # the folder to write: whole, or not at all
    overwrite: bool = False    # replace an export that is there already
    # how
    dtype: str = 'float32'     # of the weights: float32, bfloat16, float16
    gguf: bool = False         # also write model.gguf for llama.cpp, with any vocabulary; needs requirements-export.txt
    report: str = ''           # report.json of evaluate.py: its scores of this model go into the card

    def problems(self):
        """What cannot work, a sentence each."""
        if not self.out:
            yield 'say where to write: --out=FOLDER.'
        if self.which not in ('best', 'last'):
            yield f'which={self.which!r}: expected best or last.'
        if self.dtype not in DTYPES:
            yield f'dtype={self.dtype!r}: expected one of {", ".join(DTYPES)}.'


# ---- the template, as Jinja ----

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
          for heading in conversation.HEADINGS if name == 'alpaca'),
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


# ---- llama.cpp ----

def write_gguf(path, opened, texts, weights):
    """model.gguf, as llama.cpp's own converter makes it of the folder; that one knows vocabularies by their hash, GPT-2's alone."""
    try:
        import gguf
    except ImportError:
        raise UserError('--gguf=True needs the package gguf: pip install -r requirements-export.txt') from None
    tokenizer, c = opened.tokenizer, opened.model.config
    dtype = weights['transformer.wte.weight'].dtype
    kinds = {torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
             torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
             torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16)}
    writer = gguf.GGUFWriter(path, 'gpt2')
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(kinds[dtype][1])
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')  # how text is split before merging
    model, settings = (json.loads(texts[name]) for name in ('tokenizer.json', 'tokenizer_config.json'))
    writer.add_token_list([*model['model']['vocab'], *tokenizer.special])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokenizer.tokens) + [gguf.TokenType.CONTROL] * len(tokenizer.special))
    writer.add_token_merges([' '.join(pair) for pair in model['model']['merges']])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.special[settings['eos_token']])
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(texts['chat_template.jinja'])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for name, tensor in weights.items():
        tensor = (tensor.t() if name.endswith(TRANSPOSED) else tensor).float().contiguous().numpy()
        small = tensor.ndim == 1 or 'wpe' in name  # what llama.cpp adds, it wants in float32
        kind = gguf.GGMLQuantizationType.F32 if small else kinds[dtype][0]
        writer.add_tensor(names.get_name(name, ('.weight', '.bias')), gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- the folder ----

def contents(opened, dtype):
    """({file name: text}, {name: tensor}) of the export, all but the model card."""
    tokenizer, template, window = opened.tokenizer, opened.template, opened.model.config.block_size
    # What ends an answer: the first of the template's stops. llama.cpp and others know one such token, and would
    # write on behind </assistant> if it were <|endoftext|>; that one they stop at by its name, too.
    eos, stops = TEMPLATES[template].stops[0], sorted(conversation.stop_ids(tokenizer, template))
    ids = {'bos_token_id': tokenizer.end_of_text, 'pad_token_id': tokenizer.end_of_text}
    config, weights = to_transformers(opened.model)
    dropout = opened.model.config.dropout
    config |= {**ids, 'eos_token_id': tokenizer.special[eos], 'dtype': dtype, 'conversation_template': template,
               'embd_pdrop': dropout, 'resid_pdrop': dropout, 'attn_pdrop': 0.0}
    files = {'config.json': config, 'tokenizer.json': tokenizer_json(tokenizer),
             'generation_config.json': {**ids, 'eos_token_id': stops, 'max_new_tokens': min(256, window // 2)},
             # The class that takes tokenizer.json as it is; GPT2Tokenizer would make its own of it.
             'tokenizer_config.json': {
                 'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': window, 'bos_token': END_OF_TEXT,
                 'eos_token': eos, 'pad_token': END_OF_TEXT, 'add_bos_token': False, 'clean_up_tokenization_spaces': False,
                 'extra_special_tokens': [piece for piece in tokenizer.special if piece not in (END_OF_TEXT, eos)]}}
    texts = {name: json.dumps(value, indent=1, ensure_ascii=False) + '\n' for name, value in files.items()}
    texts['chat_template.jinja'] = chat_template(template, tokenizer)
    return texts, {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}


def write(folder, texts, weights):
    """Write the files into a new folder."""
    os.mkdir(folder)
    for name, text in texts.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8', newline='\n') as file:
            file.write(text)
    safetensors.torch.save_file(weights, os.path.join(folder, 'model.safetensors'), {'format': 'pt'})
    shutil.copymode(os.path.join(folder, 'config.json'), os.path.join(folder, 'model.safetensors'))  # it is for nobody else


def check_free(out, overwrite):
    """UserError where the folder holds what must not be replaced."""
    there = set(os.listdir(out)) if os.path.isdir(out) else {out} if os.path.lexists(out) else set()
    if there and not overwrite:
        raise UserError(f'{out} is there already. Replace an export by --overwrite=True, or write elsewhere: --out=FOLDER')
    others = sorted(there - FILES)
    ours = False
    if there and not others:
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError), \
                open(os.path.join(out, 'config.json'), encoding='utf-8') as file:
            ours = 'conversation_template' in json.load(file)
    if there and not ours:
        raise UserError(f'{out} is not replaced: {f"it holds {others[0]}, which no export wrote" if others else "no export of ours"}. '
                        'Write elsewhere: --out=FOLDER')


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    folder, out = config.out_dir if config.init_from == 'resume' else config.init_from, os.path.normpath(config.out)
    check_free(out, config.overwrite)
    opened = checkpoint.open_model(config.init_from, config.out_dir, config.which)
    if not opened.template:
        raise UserError(f'{opened.description} was never tuned here and has no template to export. Train it first: '
                        'python train.py config/finetune_oasst.py')
    texts, weights = contents(opened, config.dtype)
    texts['README.md'] = card.card(os.path.basename(os.path.abspath(out)), opened, folder, config.dtype, config.report)
    partial = f'{out}.partial'
    new, old = os.path.join(partial, 'new'), os.path.join(partial, 'old')
    try:
        with claimed(partial, '*', 'out'):
            try:
                write(new, texts, weights)
                if config.gguf:
                    write_gguf(os.path.join(new, 'model.gguf'), opened, texts, weights)
                for name in os.listdir(new):  # onto the disk, or a power cut could leave a folder of empty files
                    with open(os.path.join(new, name), 'rb') as file:
                        os.fsync(file.fileno())
                if os.path.isdir(out):
                    os.rename(out, old)
                os.rename(new, out)
            finally:
                if os.path.isdir(old) and not os.path.isdir(out):
                    os.rename(old, out)
                for left in (new, old):
                    shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(partial)  # there from before, of an export that was killed
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'cannot write {out}: {getattr(error, "strerror", None) or error}. Make room, or use --out=FOLDER.') from None
    print(f'wrote {out}: {opened.description}, {config.dtype}, template {opened.template}. '
          f'Talk to it: python sample.py --init_from={out} --chat')


if __name__ == '__main__':
    configurator.run(main)
