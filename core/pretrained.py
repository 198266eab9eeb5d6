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
from core.files import reading
from model import GPT, GPTConfig

# The files that may hold the weights, or, as .index.json, name the shards that do.
WEIGHTS = ('model.safetensors', 'model.safetensors.index.json',
           'pytorch_model.bin', 'pytorch_model.bin.index.json')
VOCABULARY = ('tokenizer.json', 'vocab.json', 'merges.txt', 'added_tokens.json')

# transformers keeps these as (in, out), torch's Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# transformers' names for the activation, and torch's for its approximation.
GELUS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
# What config.json must say, where it says it.
REQUIRED = {'model_type': ['gpt2'], 'activation_function': list(GELUS),
            'scale_attn_weights': [True], 'scale_attn_by_inverse_layer_idx': [False],
            'layer_norm_epsilon': [1e-5], 'tie_word_embeddings': [True]}


def read_config(folder):
    """config.json as a dict. UserError if it is not of a GPT-2 that this code can compute."""
    path = Path(folder, 'config.json')
    with reading(path, "Expected a model folder in transformers' form."):
        config = json.loads(path.read_text('utf-8'))
        width = 4 * config.get('n_embd', 768)
        for key, allowed in {**REQUIRED, 'n_inner': [None, width]}.items():
            if config.get(key, allowed[0]) not in allowed:
                raise UserError(f'{path} has {key}={config[key]!r}; this code computes GPT-2s '
                                f'with {allowed} only.')
    return config


def weight_files(folder):
    """The paths of the files with the weights: one, or the shards that an index names."""
    paths = [Path(folder, name) for name in WEIGHTS]
    path = next(filter(Path.exists, paths), paths[0])
    if path.suffix != '.json':
        return [path]
    with reading(path, 'Expected an index of shards.'):
        shards = json.loads(path.read_text('utf-8'))['weight_map'].values()
        return [path.with_name(shard) for shard in sorted(set(shards))]


def read_weights(folder):
    """{name: tensor} of the folder's weights."""
    weights = {}
    for path in weight_files(folder):
        with reading(path, 'Expected weights that can be read without running code.'):
            if path.suffix == '.safetensors':
                # Comes with transformers; not always needed.
                import safetensors.torch
                weights |= safetensors.torch.load_file(path)
            else:
                weights |= torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    return weights


def open_folder(name):
    """(GPT, config.json as a dict, folder) of a local folder or a hub name."""
    folder = name if os.path.isdir(name) else from_hub(name)
    config = read_config(folder)
    weights = read_weights(folder)
    with reading(folder, "Expected the weights of transformers' GPT-2."):
        return from_transformers(config, weights), config, folder


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
            # A view: copying here would delay the first token by a third.
            tensor = tensor.t()
        if name == 'transformer.wte.weight':
            tensor = F.pad(tensor, (0, 0, 0, len(p) - len(tensor)))
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model


def from_hub(name):
    """The local folder of a hub model, downloaded into transformers' cache on first use."""
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    # Comes with transformers; not always needed.
    from huggingface_hub import errors, snapshot_download
    # First without the network: most often everything is there.
    small = ['config.json', *VOCABULARY]
    try:
        folder = snapshot_download(name, allow_patterns=small, local_files_only=True)
        if all(map(os.path.exists, weight_files(folder))):
            return folder
    except errors.HFValidationError:
        raise UserError(f'{name} is neither a folder nor the name of a hub model.') from None
    except errors.LocalEntryNotFoundError:
        pass  # not in the cache
    try:
        folder = snapshot_download(name, allow_patterns=small)
        # Another architecture is refused before its weights are fetched.
        read_config(folder)
        # Old models have no safetensors.
        snapshot_download(name, allow_patterns=[*small, 'model*.safetensors*'])
        if not os.path.exists(weight_files(folder)[0]):
            snapshot_download(name, allow_patterns=[*small, 'pytorch_model*.bin*'])
    except OSError as error:  # the network's errors
        raise UserError(f'{name} is not a folder here, and could not be downloaded from the hub '
                        f'({type(error).__name__}). Check the name and the network.') from None
    for path in filter(Path.exists, weight_files(folder)):
        check_download(path)
    return folder


def check_download(path):
    """Delete a file that is not what the hub announced. UserError then."""
    # The cache names a large file by the sha256 that was announced.
    blob = path.resolve()
    digest = hashlib.file_digest(blob.open('rb'), 'sha256').hexdigest()
    if len(blob.name) == 64 and blob.name != digest:
        blob.unlink()
        raise UserError(f'{path.name} has sha256 {digest}, not {blob.name} as the hub announced. '
                        'It was deleted; try again.')
