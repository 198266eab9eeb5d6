"""model.gguf for llama.cpp, for any vocabulary.

    python export.py --init_from=out/oasst --out=my-model --gguf=True
"""
from configurator import UserError
from core.pretrained import TRANSPOSED


def write(path, opened, files, weights):
    """Write what folder.contents returned."""
    try:
        import gguf  # the package, not this file
    except ImportError:
        raise UserError('--gguf needs: pip install -r requirements-export.txt') from None
    shape = opened.model.config
    if shape.gelu != 'tanh':
        raise UserError(f'{opened.description} has the exact GELU, which llama.cpp lacks. '
                        'Leave out --gguf.')
    # The shape.
    config = files['config.json']
    kind = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[config['dtype']]
    file_type = 'ALL_F32' if kind == 'F32' else f'MOSTLY_{kind}'
    writer = gguf.GGUFWriter(path, 'gpt2')
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(4 * shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[file_type])

    # The vocabulary and the chat template.
    tokenizer = opened.tokenizer
    model = files['tokenizer.json']['model']
    types = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    for i in tokenizer.special.values():
        types[i] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')  # how text is split before merging
    writer.add_token_list(sorted(model['vocab'], key=model['vocab'].get))
    writer.add_token_types(types)
    writer.add_token_merges([' '.join(pair) for pair in model['merges']])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(config['eos_token_id'])
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(files['chat_template.jinja'])

    # The weights.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, shape.n_layer)
    for name, tensor in weights.items():
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        values = tensor.float().contiguous().numpy()
        # llama.cpp wants whatever it adds in float32.
        is_added = tensor.ndim == 1 or 'wpe' in name
        type_ = gguf.GGMLQuantizationType['F32' if is_added else kind]
        name = names.get_name(name, ('.weight', '.bias'))
        values = gguf.quantize(values, type_)
        writer.add_tensor(name, values, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
