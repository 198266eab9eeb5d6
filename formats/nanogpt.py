"""Convert what nanoGPT wrote: a checkpoint, or a folder with train.bin and val.bin.

    python formats/nanogpt.py --input=out-owt/ckpt.pt --out=my-nanogpt
    python sample.py --init_from=my-nanogpt --start="Once upon a time"

    python formats/nanogpt.py --input=../nanoGPT/data/shakespeare --out=data/shakespeare
    python train.py config/finetune_own.py --dataset=shakespeare --out_dir=out/shakespeare

A checkpoint becomes a folder in transformers' form. Of data, each window becomes a text of its own.
nanoGPT computes the exact GELU where GPT-2 computes an approximation; config.json says so.
Source: https://github.com/karpathy/nanoGPT/blob/master/model.py
"""
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import configurator
from configurator import Count, UserError
from core import tokenfile
from core import tokenizer as tokenizers
from core.files import reading
from core.pretrained import empty_model
from formats.chat_template import tokenizer_json
from formats.folder import as_json, to_transformers, write


@dataclass(frozen=True)
class Config:
    input: str = 'out/ckpt.pt'  # a checkpoint, or a folder with data
    out: str = 'my-nanogpt'     # the folder to write, a new one
    tags: bool = True           # a checkpoint's rows 50257 to 50262 are our six tags
    window: Count = 1025        # tokens of a text of data; the last one is only predicted


def convert(path, tags):
    """(GPT, Tokenizer) of nanoGPT's checkpoint at path."""
    with reading(path, "Expected a ckpt.pt of nanoGPT's train.py."):
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        # torch.compile adds the prefix; older versions kept a causal mask as attn.bias.
        weights = {name.removeprefix('_orig_mod.'): tensor
                   for name, tensor in saved['model'].items() if not name.endswith('.attn.bias')}
        del weights['lm_head.weight']  # tied to wte
        wte = weights['transformer.wte.weight']
        if len(wte) not in (50257, 50304):
            raise ValueError(f"{len(wte)} tokens instead of GPT-2's 50257 or 50304")
        tokenizer = tokenizers.load('gpt2', tags=tags and len(wte) == 50304)
        keys = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')
        shape = {key: saved['model_args'][key] for key in keys}
        model = empty_model(shape | {'vocab_size': tokenizer.vocab_size, 'gelu': 'none'})
        # Rows that stand for no token are padding.
        wte = wte[:tokenizer.vocab_size]
        padding = model.config.padded_vocab_size - len(wte)
        weights['transformer.wte.weight'] = F.pad(wte, (0, 0, 0, padding))
        model.load_state_dict(weights, assign=True)
    return model, tokenizer


def convert_data(folder, out, window):
    """Write nanoGPT's token files, of GPT-2's ids, as a prepared folder that is learned whole."""
    splits = {}
    for name in ('train', 'val'):
        path = os.path.join(folder, f'{name}.bin')
        with reading(path, "Expected two bytes for each token, of GPT-2's vocabulary."):
            ids = np.fromfile(path, np.uint16)
            if os.path.exists(os.path.join(folder, 'meta.pkl')) or (ids > 50256).any():
                raise ValueError('another vocabulary')
        starts = range(0, len(ids) - 1, window)
        splits[name] = [(ids[i:i + window], np.ones(len(ids[i:i + window]))) for i in starts]
    tokenizer = tokenizers.load('gpt2', tags=False)
    tokenfile.write(out, splits, {'template': 'plain', 'tokenizer': tokenizer.state()})


def main(argv):
    config = configurator.load(Config, argv)
    if os.path.isdir(config.input):
        convert_data(config.input, config.out, config.window)
        print(f'wrote {config.out}')
        return
    model, tokenizer = convert(config.input, config.tags)
    shape, weights = to_transformers(model)
    # config.json comes last: without it the folder is not taken for a model.
    texts = {'tokenizer.json': as_json(tokenizer_json(tokenizer)), 'config.json': as_json(shape)}
    try:
        write(config.out, texts, weights)
    except OSError as error:
        raise UserError(f'cannot make {config.out}: {error.strerror}. Use --out=FOLDER.') from None
    print(f'wrote {config.out}. Next: python sample.py --init_from={config.out} --start=Hi')


if __name__ == '__main__':
    configurator.run(main)
