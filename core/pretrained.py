"""GPT-2s in transformers' form: a folder of your own, or one from the Hugging Face hub.

    python -c "from core import pretrained; print(pretrained.open_folder('gpt2')[0])"

No code from a file is run: weights are read as safetensors, or as a checkpoint with weights_only.
"""
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import UserError
from core import tokenizer as tokenizers
from core.files import reading
from model import GPT, GPTConfig

WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
CONVERT = 'Convert it: python formats/convert.py --input='

# transformers keeps these as (in, out), torch's Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# transformers' names for the activation, and torch's for its approximation.
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
# What config.json must say about these, unless it leaves them out.
REQUIRED = {'model_type': ['gpt2'], 'activation_function': list(GELUS),
            'scale_attn_weights': [True], 'scale_attn_by_inverse_layer_idx': [False],
            'layer_norm_epsilon': [1e-5], 'tie_word_embeddings': [True]}


def open_folder(name, vocabulary=None):
    """(GPT, Tokenizer, config.json as a dict, folder) of a local folder or a hub name.

    vocabulary: the Tokenizer to assume if the folder has none; by default GPT-2's.
    """
    folder = name if os.path.isdir(name) else from_hub(name)
    config = read_config(folder)
    with reading(folder, "Expected a GPT-2 in transformers' form."):
        pieces = read_pieces(folder)
    if pieces:
        vocabulary = tokenizers.load('gpt2', tags=tokenizers.TAGS[0] in pieces)
        if pieces != vocabulary.pieces():
            raise UserError(f"{name} has another vocabulary than GPT-2. {CONVERT}{name}")
    else:
        vocabulary = (vocabulary or tokenizers.load('gpt2')).with_tags(False)
    weights = read_weights(folder)
    with reading(folder, "Expected a GPT-2 in transformers' form."):
        model = from_transformers(config, weights)
    n_rows = model.config.vocab_size
    if n_rows < vocabulary.vocab_size:
        raise UserError(f'{name} has {n_rows} tokens, its vocabulary {vocabulary.vocab_size}. '
                        'Expected a folder with the vocabulary it was trained with.')
    if n_rows > vocabulary.vocab_size:
        # Rows that no token stands for: padding.
        model.set_embedding(model.transformer.wte.weight[:vocabulary.vocab_size])
    return model, vocabulary, config, folder


def read_config(folder):
    """config.json as a dict. UserError if it is not of a GPT-2 that this code can compute."""
    path = Path(folder, 'config.json')
    with reading(path, "Expected a model folder in transformers' form."):
        config = json.loads(path.read_text('utf-8'))
        check_config(config, path)
    return config


def check_config(config, path):
    """UserError unless this code can compute such a model."""
    width = 4 * config.get('n_embd', 768)
    for key, allowed in {**REQUIRED, 'n_inner': [None, width]}.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f'{path} has {key}={config[key]!r}; this code computes GPT-2s with '
                            f'{allowed} only.')


def read_pieces(folder):
    """{piece of text: id} of the folder's vocabulary; {} if it names none."""
    path = Path(folder, 'tokenizer.json')
    if path.exists():
        content = json.loads(path.read_text('utf-8'))
        added = {token['content']: token['id'] for token in content['added_tokens']}
        return content['model']['vocab'] | added
    path = Path(folder, 'vocab.json')
    return json.loads(path.read_text('utf-8')) if path.exists() else {}


def find_weights(folder):
    """The path of the file with the weights, or None."""
    paths = [Path(folder, name) for name in WEIGHTS]
    return next(filter(Path.exists, paths), None)


def read_weights(folder):
    """{name: tensor} of the folder's weights."""
    path = find_weights(folder)
    if not path:
        raise UserError(f'{folder} has no {" or ".join(WEIGHTS)}. Weights in parts, or of another '
                        f'kind? {CONVERT}{folder}')
    with reading(path, 'Expected weights that can be read without running code.'):
        if path.suffix == '.safetensors':
            import safetensors.torch  # comes with transformers
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)


def empty_model(shape):
    """A GPT without memory, to load a file's weights into. shape: GPTConfig's keys."""
    with torch.device('meta'):
        return GPT(GPTConfig(**shape))


def from_transformers(config, weights):
    """A GPT with the weights of transformers' GPT-2: config.json as a dict, {name: tensor}."""
    shape = {key: config[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    shape['block_size'] = config.get('n_positions', 1024)
    shape['gelu'] = GELUS[config.get('activation_function', 'gelu_new')]
    model = empty_model(shape)
    if 'wte.weight' in weights:
        # Older files have bare names, and hold mask buffers, which are left out below.
        weights = {f'transformer.{name}': tensor for name, tensor in weights.items()}
    state = {}
    for name, p in model.state_dict().items():
        tensor = weights[name].float()
        if name.endswith(TRANSPOSED):
            # A view: copying here would make sample.py's first token a third later.
            tensor = tensor.t()
        if name == 'transformer.wte.weight':
            tensor = F.pad(tensor, (0, 0, 0, len(p) - len(tensor)))
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model


def from_hub(name):
    """The local folder of a hub model, downloaded into transformers' cache on first use."""
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    # It comes with transformers. Imported here, because it is slow.
    from huggingface_hub import snapshot_download
    small = ['config.json', 'tokenizer.json', 'vocab.json']
    try:
        # First without the network: most often everything is there.
        folder = snapshot_download(name, allow_patterns=small, local_files_only=True)
        if find_weights(folder):
            return folder
    except (OSError, ValueError):
        pass  # it is not in the cache
    try:
        folder = snapshot_download(name, allow_patterns=small)
        # Another architecture is refused before its weights are fetched.
        read_config(folder)
        # Old models have no safetensors: then the other file is tried.
        for file in WEIGHTS:
            if not find_weights(folder):
                snapshot_download(name, allow_patterns=[*small, file])
    except (OSError, ValueError) as error:  # no network, or no such name
        raise UserError(f'{name} is not a folder here, and could not be downloaded from the hub '
                        f'({type(error).__name__}). Check the name and the network.') from None
    # The cache names a large file by the sha256 that the hub announced.
    path = find_weights(folder)
    blob = path and path.resolve()
    if blob and len(blob.name) == 64:
        with open(blob, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        if digest != blob.name:
            blob.unlink()
            raise UserError(f'{path} has sha256 {digest}, not {blob.name} as the hub announced. '
                            'It was deleted; try again.')
    return folder
