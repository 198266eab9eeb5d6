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

import safetensors.torch  # comes with transformers
import torch

from formats import card
from core import checkpoint
import configurator
from core import conversation
from formats.chat_template import chat_template, tokenizer_json
from core.claim import claimed
from configurator import UserError
from core.conversation import TEMPLATES
from model import TRANSPOSED, to_transformers
from core.tokenizer import END_OF_TEXT

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


# ---- llama.cpp ----

def write_gguf(path, opened, texts, weights):
    """model.gguf, as llama.cpp's own converter makes it of the folder; of vocabularies like ours that one knows GPT-2's alone."""
    if opened.model.config.gelu != 'tanh':
        raise UserError(f"{opened.description} computes the exact GELU, as nanoGPT does; llama.cpp's GPT-2 has the one by tanh. "
                        'Leave out --gguf=True: the folder itself says which it is.')
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
             # No token_type_ids, which transformers 4 would make and GPT-2 add to what it reads.
             'tokenizer_config.json': {
                 'model_input_names': ['input_ids', 'attention_mask'],
                 'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': window, 'bos_token': END_OF_TEXT,
                 'eos_token': eos, 'pad_token': END_OF_TEXT, 'add_bos_token': False, 'clean_up_tokenization_spaces': False,
                 'additional_special_tokens': [piece for piece in tokenizer.special if piece not in (END_OF_TEXT, eos)]}}
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
