"""model.gguf for llama.cpp. Its own converter makes the same, but only with GPT-2's vocabulary.

    python export.py --init_from=out/oasst --out=my-model --gguf=True
"""
import json

import torch

from configurator import UserError
from core.pretrained import TRANSPOSED


def write(path, opened, texts, weights):
    """Write an export, {file name: text} and {name: tensor}, as a GGUF file."""
    try:
        import gguf  # the package, not this file
    except ImportError:
        raise UserError('--gguf=True needs the package gguf: '
                        'pip install -r requirements-export.txt') from None
    shape = opened.model.config
    if shape.gelu != 'tanh':
        raise UserError(f'{opened.description} computes the exact GELU, as nanoGPT does, and '
                        "llama.cpp's GPT-2 does not. Leave out --gguf=True: transformers can.")
    kinds = {torch.float32: ('F32', 'ALL_F32'), torch.float16: ('F16', 'MOSTLY_F16'),
             torch.bfloat16: ('BF16', 'MOSTLY_BF16')}
    kind, file_type = kinds[weights['transformer.wte.weight'].dtype]
    writer = gguf.GGUFWriter(path, 'gpt2')
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(4 * shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[file_type])

    # The tokens, how they merge, which are special, and the chat template.
    tokenizer = opened.tokenizer
    model = json.loads(texts['tokenizer.json'])['model']
    eos_token = json.loads(texts['tokenizer_config.json'])['eos_token']
    ids = model['vocab'] | tokenizer.special
    types = dict.fromkeys(tokenizer.special.values(), gguf.TokenType.CONTROL)
    writer.add_tokenizer_model('gpt2')
    # How text is split before merging.
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(sorted(ids, key=ids.get))
    writer.add_token_types([types.get(i, gguf.TokenType.NORMAL) for i in range(len(ids))])
    writer.add_token_merges([' '.join(pair) for pair in model['merges']])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.special[eos_token])
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(texts['chat_template.jinja'])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, shape.n_layer)
    for name, tensor in weights.items():
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        values = tensor.float().contiguous().numpy()
        # llama.cpp wants whatever it adds in float32.
        adds = tensor.ndim == 1 or 'wpe' in name
        type_ = gguf.GGMLQuantizationType['F32' if adds else kind]
        writer.add_tensor(names.get_name(name, ('.weight', '.bias')), gguf.quantize(values, type_),
                          raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
