"""GPT-2s in transformers' form: a folder of your own, or one from the Hugging Face hub.

    python -c "from core import pretrained; print(pretrained.open_folder('gpt2')[0])"

No code from a file is run: weights are read as safetensors, or as a checkpoint with weights_only.
"""
import hashlib
import json
import os

import torch
import torch.nn.functional as F

from configurator import UserError, checked
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
# What config.json must say, where it says it, for us to compute the same as transformers.
REQUIRED = {'model_type': 'gpt2', 'scale_attn_weights': True, 'layer_norm_epsilon': 1e-5,
            'scale_attn_by_inverse_layer_idx': False, 'tie_word_embeddings': True}


def read_config(folder):
    """config.json as a dict. UserError if it is not of a GPT-2 that this code can compute."""
    path = os.path.join(folder, 'config.json')
    with reading(path, "Expected a model folder in transformers' form."):
        with open(path, encoding='utf-8') as file:
            config = json.load(file)
        # These two depend on other keys or have several good values.
        expected = REQUIRED | {'activation_function': tuple(GELUS),
                               'n_inner': (None, 4 * config.get('n_embd', 768))}
        for key, value in expected.items():
            allowed = value if isinstance(value, tuple) else (value,)
            if config.get(key, allowed[0]) not in allowed:
                raise UserError(f'{path} has {key}={config[key]!r}; this code computes GPT-2s '
                                f'with {value!r} only.')
    return config


def read_weights(folder):
    """{name: tensor} of the folder's weights."""
    # In order of preference.
    paths = [os.path.join(folder, name) for name in WEIGHTS]
    path = next(filter(os.path.exists, paths), paths[0])
    if not path.endswith('.index.json'):
        return read_weight_file(path)
    weights = {}
    for shard in shards(path):
        weights |= read_weight_file(os.path.join(folder, shard))
    return weights


def shards(path):
    """The names of the files that an index of shards lists."""
    with reading(path, 'Expected an index of shards.'):
        with open(path, encoding='utf-8') as file:
            names = set(json.load(file)['weight_map'].values())
        return sorted(os.path.basename(name) for name in names)


def read_weight_file(path):
    """{name: tensor} of one file."""
    with reading(path, 'Expected weights that can be read without running code.'):
        if path.endswith('.safetensors'):
            # Comes with transformers; not always needed.
            import safetensors.torch
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)


def open_folder(name):
    """(GPT, config.json as a dict, folder) of a local folder or a hub name."""
    folder = name
    if not os.path.isdir(folder):
        folder = from_hub(name)
    config = read_config(folder)
    weights = read_weights(folder)
    with reading(folder, "Expected the weights of transformers' GPT-2."):
        return from_transformers(config, weights), config, folder


def from_transformers(config, weights):
    """A GPT with the weights of transformers' GPT-2: config.json as a dict, {name: tensor}.

    Older files lack 'transformer.' before the names, or hold mask buffers and the tied head; both
    are fine. Raises KeyError, ValueError and others if the parts do not fit together.
    """
    shape = {key: config[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    shape['block_size'] = config.get('n_positions', 1024)
    shape['gelu'] = GELUS[config.get('activation_function', 'gelu_new')]
    model = empty_model(shape, weights)
    if 'transformer.wte.weight' not in weights:
        weights = {f'transformer.{name}': tensor for name, tensor in weights.items()}
    state = {name: weights[name] for name in model.state_dict()}
    check_tensors(state)
    # In our shapes.
    for name, p in model.state_dict().items():
        tensor = state[name].float()
        if name.endswith(TRANSPOSED):
            # A view: copying here would delay the first token by a third.
            tensor = tensor.t()
        if name == 'transformer.wte.weight':
            tensor = F.pad(tensor, (0, 0, 0, p.shape[0] - tensor.shape[0]))
        if tensor.shape != p.shape:
            raise ValueError(f'{name} is {tuple(tensor.shape)}, expected {tuple(p.shape)}')
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model


# ---- checks, for any file with weights ----

def empty_model(shape, weights):
    """A GPT on torch's meta device, of a shape: GPTConfig's keys. weights: the file's, by name."""
    config = checked(GPTConfig, shape)
    # Checked first, because a file may claim a billion layers.
    if sum(name.endswith('ln_1.weight') for name in weights) != config.n_layer:
        raise ValueError(f'n_layer={config.n_layer}, the weights have another number of layers')
    # The meta device allocates nothing: the file's tensors become the weights.
    with torch.device('meta'):
        return GPT(config)


def check_tensors(tensors):
    """ValueError unless {name: tensor} are dense and finite, and their storages hold them."""
    needed = 0
    held = {}
    for name, tensor in tensors.items():
        is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not (is_dense and tensor.is_floating_point() and tensor.device.type == 'cpu'):
            raise ValueError(f'{name} is not a dense tensor of floating-point numbers')
        needed += tensor.nbytes
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    # Views of one element would take gigabytes once they are copied.
    if needed > sum(held.values()):
        raise ValueError('the tensors need more memory than their storages hold')
    for name, tensor in tensors.items():
        # One pass, an eighth of the time that isfinite takes.
        if not torch.stack(torch.aminmax(tensor)).float().isfinite().all():
            raise ValueError(f'{name} holds numbers that are not finite')


# ---- the hub ----

def from_hub(name):
    """The local folder of a hub model, downloaded into transformers' cache on first use."""
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    # Comes with transformers; not always needed.
    import huggingface_hub as hub
    import requests
    try:
        return fetch(hub, name, local_files_only=True)
    except hub.errors.EntryNotFoundError:
        pass  # not in the cache
    except hub.errors.HFValidationError:
        raise UserError(f'{name} is neither a folder nor the name of a hub model.') from None
    try:
        # The hub's client would retry for a minute before it says that there is no network.
        requests.head(hub.hf_hub_url(name, 'config.json'), timeout=5)
        return fetch(hub, name, local_files_only=False)
    except (OSError, hub.errors.EntryNotFoundError) as error:  # OSError: the network's errors
        raise UserError(
            f'{name} is not a folder here, not in the cache, and could not be downloaded from the '
            f'hub ({type(error).__name__}). Check the name and the network, or use '
            '--init_from=FOLDER.') from None


def fetch(hub, name, local_files_only):
    """The folder with a hub model's files. EntryNotFoundError if one that is needed is missing."""
    def get(file, needed=True):
        try:
            path = hub.hf_hub_download(name, file, local_files_only=local_files_only)
        except hub.errors.EntryNotFoundError:
            if needed:
                raise
            return None
        if not local_files_only:
            check_download(name, path)
        return path

    folder = os.path.dirname(get('config.json'))
    # Check the small file before fetching the weights.
    read_config(folder)
    found = None
    for file in WEIGHTS:
        found = found or get(file, needed=file == WEIGHTS[-1])
    if found.endswith('.index.json'):
        for shard in shards(found):
            get(shard)
    for file in VOCABULARY:
        get(file, needed=False)
    return folder


def check_download(name, path):
    """Delete a file that is not what the hub announced. UserError then."""
    # The cache keeps a large file under the hash that was announced.
    blob = os.path.realpath(path)
    announced = os.path.basename(blob)
    if len(announced) < 64:
        return
    with open(blob, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if digest != announced:
        os.remove(blob)
        raise UserError(f'{name}: {os.path.basename(path)} arrived with sha256 {digest}, expected '
                        f'{announced}. It was deleted; try again.')
