"""Convert models and data: another vocabulary, weights in parts, nanoGPT's files.

    python formats/convert.py --input=dbmdz/german-gpt2 --out_dir=out/german
    python formats/convert.py --input=../nanoGPT/out/ckpt.pt --out_dir=out/nanogpt
    python formats/convert.py --input=../nanoGPT/data/tiny --out_dir=data/tiny

A model becomes a checkpoint for --init_from=FOLDER. Data is prepared for it by
--tokenizer=FOLDER. Each window of nanoGPT's data becomes a text.
Source: https://github.com/karpathy/nanoGPT/blob/master/model.py
"""
import json
import os
import sys
from dataclasses import asdict, dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import configurator
from configurator import Count, UserError


@dataclass(frozen=True)
class Config:
    input: str = ''           # a folder or hub name, nanoGPT's ckpt.pt, or its data
    out_dir: str = 'out/converted'  # the folder to write
    tags: bool = True         # rows 50257 to 50262 of nanoGPT's model are our six tags
    window: Count = 1025      # tokens of a text of data; the last one is only predicted

    def problems(self):
        if not self.input:
            yield 'give --input=MODEL_OR_DATA.'


# torch takes seconds to import: mistakes on the command line are found before.
configurator.precheck(__name__, Config)

import numpy as np
import torch

from core import checkpoint, pretrained, tokenfile
from core import tokenizer as tokenizers
from core.files import only_writer, reading, write_whole
from core.tokenizer import CHAR_OF, END_OF_TEXT, TAGS, Tokenizer, to_bytes


def read_vocabulary(name, content):
    """The Tokenizer of a tokenizer.json. ValueError if it is no byte-level BPE."""
    vocab = content['model']['vocab']
    added = {token['content']: token['id'] for token in content['added_tokens']}
    # What is left besides special tokens is text, in the order of the ids.
    text = sorted(vocab.keys() - added.keys(), key=vocab.get)
    tags = TAGS[0] in added
    added = {piece: i for piece, i in added.items() if piece not in TAGS}
    added.setdefault(END_OF_TEXT, len(text) + len(added))
    tokens = [to_bytes(token) for token in text]
    tokenizer = Tokenizer(name, tokens, tags, added)
    # tiktoken merges in the order of the ids. A merge is 'a b', or ['a', 'b'].
    merges = [''.join(merge).replace(' ', '') for merge in content['model']['merges']]
    expected = sorted(CHAR_OF.values()) + list(dict.fromkeys(merges))
    in_order = sorted(text[:256]) + text[256:] == expected
    if not in_order or tokenizer.text_ids != [vocab[token] for token in text]:
        raise ValueError('the ids are not in the order of merging, without gaps')
    if tokenizer.with_tags().vocab_size > 2 ** 16:
        raise ValueError('more tokens than 16 bits can count')
    return tokenizer


def from_transformers(name):
    """(GPT, Tokenizer, template) of a model in transformers' form."""
    import transformers
    with reading(name, "Expected a GPT-2 in transformers' form, with its vocabulary."):
        config = transformers.AutoConfig.from_pretrained(name).to_dict()
        pretrained.check_config(config, name)
        whole = transformers.GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32)
        model = pretrained.from_transformers(config, whole.state_dict())
        bpe = transformers.AutoTokenizer.from_pretrained(name).backend_tokenizer
        tokenizer = read_vocabulary(os.path.basename(name), json.loads(bpe.to_str()))
    return model, tokenizer, config.get('conversation_template') or ''


def from_nanogpt(path, tags):
    """(GPT, Tokenizer, no template) of nanoGPT's checkpoint."""
    with reading(path, "Expected a ckpt.pt of nanoGPT's train.py."):
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        shape = dict(saved['model_args'])
        shape.pop('dropout', None)
        n_rows = shape['vocab_size']
        if n_rows not in (50257, 50304):
            raise ValueError(f"{n_rows} tokens instead of GPT-2's 50257 or 50304")
        # nanoGPT computes the exact GELU where GPT-2 computes an approximation.
        model = pretrained.empty_model(shape | {'gelu': 'none'})
        # torch.compile adds the prefix.
        weights = {}
        for name, tensor in saved['model'].items():
            weights[name.removeprefix('_orig_mod.')] = tensor
        weights = {name: weights[name] for name in model.state_dict()}
        wte = weights['transformer.wte.weight']
        padding = (0, 0, 0, 50304 - n_rows)
        weights['transformer.wte.weight'] = torch.nn.functional.pad(wte, padding)
        model.load_state_dict(weights, assign=True)
    return model, tokenizers.load('gpt2', tags=tags and n_rows == 50304), ''


def convert_data(folder, out_dir, window):
    """Write nanoGPT's token files as a prepared folder, whose every token is learned."""
    splits = {}
    for name in ('train', 'val'):
        path = os.path.join(folder, f'{name}.bin')
        with reading(path, "Expected two bytes for each token, of GPT-2's vocabulary."):
            ids = np.fromfile(path, np.uint16)
            learned = os.path.exists(os.path.join(folder, 'meta.pkl'))
            if learned or (ids > 50256).any():
                raise ValueError('another vocabulary')
        texts = [ids[i:i + window] for i in range(0, len(ids) - 1, window)]
        splits[name] = [(text, np.ones_like(text)) for text in texts]
    state = tokenizers.load('gpt2', tags=False).state()
    tokenfile.write(out_dir, splits, {'template': 'plain', 'tokenizer': state})


def main(argv):
    config = configurator.load(Config, argv)
    out_dir = config.out_dir
    if os.path.exists(os.path.join(config.input, 'train.bin')):
        convert_data(config.input, out_dir, config.window)
        data_dir, name = os.path.split(os.path.normpath(out_dir))
        print(f'wrote {out_dir}. Next: python train.py config/finetune_own.py '
              f'--data_dir={data_dir or "."} --dataset={name} --out_dir=out/{name}')
        return
    if config.input.endswith('.pt'):
        model, tokenizer, template = from_nanogpt(config.input, config.tags)
    else:
        model, tokenizer, template = from_transformers(config.input)
    n_rows = model.config.vocab_size
    if n_rows < tokenizer.vocab_size:
        raise UserError(f'{config.input} has {n_rows} tokens, its vocabulary '
                        f'{tokenizer.vocab_size}.')
    # Rows that no token stands for are padding.
    model.set_embedding(model.transformer.wte.weight[:tokenizer.vocab_size])
    state = tokenizer.state()
    saved = checkpoint.Checkpoint(
        model=model.state_dict(), model_args=asdict(model.config), template=template,
        tokenizer=state, config={}, step=0, val_loss=None,
        origin={'init_from': config.input})
    with only_writer(out_dir):
        with write_whole(os.path.join(out_dir, 'vocabulary.json')) as file:
            json.dump(state, file)
        checkpoint.save(saved, os.path.join(out_dir, 'best.pt'))
    print(f'wrote {out_dir}. Next: python sample.py --init_from={out_dir} --start=Hi')


if __name__ == '__main__':
    configurator.run(main)
