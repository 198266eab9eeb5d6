"""A model as a folder in transformers' form.

    python export.py --init_from=out/oasst --out=my-model

Sources: the formats as transformers 5.23 and tokenizers 0.23 read them.
"""
import json
import os
import shutil

import safetensors.torch  # comes with transformers
import torch

from core import conversation
from core.conversation import TEMPLATES
from core.pretrained import TRANSPOSED
from core.tokenizer import END_OF_TEXT
from formats.chat_template import chat_template, tokenizer_json


def to_transformers(model):
    """(config.json as a dict, {name: tensor}) for transformers' GPT2LMHeadModel."""
    c = model.config
    config = {key: getattr(c, key) for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    config |= {
        'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'],
        'n_positions': c.block_size, 'n_ctx': c.block_size,
        'activation_function': 'gelu_new' if c.gelu == 'tanh' else 'gelu',
        'layer_norm_epsilon': 1e-5,
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        # Without the padding.
        if name == 'transformer.wte.weight':
            tensor = tensor[:c.vocab_size]
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        weights[name] = tensor.contiguous()
        # transformers wants biases; of zero, they change nothing.
        if not c.bias and not name.endswith(('wte.weight', 'wpe.weight')):
            bias = name.removesuffix('weight') + 'bias'
            weights[bias] = torch.zeros(tensor.shape[-1])
    return config, weights


def contents(opened, dtype):
    """({file name: text, or what JSON holds}, {name: tensor}) of a tuned model."""
    tokenizer = opened.tokenizer
    c = opened.model.config
    # llama.cpp knows one token that ends an answer, and stops at <|endoftext|> anyway.
    eos = TEMPLATES[opened.template].assistant[-1]
    ids = {'bos_token_id': tokenizer.end_of_text, 'pad_token_id': tokenizer.end_of_text}
    config, weights = to_transformers(opened.model)
    config |= ids | {
        'eos_token_id': tokenizer.special[eos],
        'dtype': dtype,
        'conversation_template': opened.template,  # our own key
    }
    generation = ids | {
        'eos_token_id': sorted(conversation.stop_ids(tokenizer, opened.template)),
        'max_new_tokens': min(256, c.block_size // 2),
    }
    settings = {
        # Without token_type_ids, which GPT-2 would add to its input.
        'model_input_names': ['input_ids', 'attention_mask'],
        # GPT2Tokenizer would change tokenizer.json.
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': c.block_size,
        'bos_token': END_OF_TEXT, 'eos_token': eos, 'pad_token': END_OF_TEXT,
        'clean_up_tokenization_spaces': False,
    }
    files = {
        'config.json': config,
        'generation_config.json': generation,
        'tokenizer.json': tokenizer_json(tokenizer),
        'tokenizer_config.json': settings,
        'chat_template.jinja': chat_template(opened.template, tokenizer),
    }
    dtype = getattr(torch, dtype)
    return files, {name: tensor.to(dtype) for name, tensor in weights.items()}


def write(folder, files, weights):
    os.makedirs(folder)
    path = os.path.join(folder, 'model.safetensors')
    safetensors.torch.save_file(weights, path, {'format': 'pt'})
    for name, text in files.items():
        if not isinstance(text, str):
            text = json.dumps(text, indent=1, ensure_ascii=False) + '\n'
        other = os.path.join(folder, name)
        with open(other, 'w', encoding='utf-8', newline='\n') as file:
            file.write(text)
        # safetensors makes a file that nobody else may read.
        shutil.copymode(other, path)
