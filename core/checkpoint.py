"""What a checkpoint holds, saving it whole or not at all, and opening models from anywhere.

    python -c "import checkpoint; print(checkpoint.load('out/ckpt.pt').keys())"

A checkpoint is one dict of plain types and tensors, read with weights_only=True: nothing in it can
run code. out_dir/ckpt.pt is the last one, with all that resuming needs; out_dir/best.pt the one
with the lowest val_loss, without the optimizer.
"""
import glob
import hashlib
import json
import os
import re
from dataclasses import asdict, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from core import tokenizer as tokenizers
from configurator import UserError
from core.conversation import TEMPLATES
from model import VOCAB_MULTIPLE, GPT, GPTConfig, from_transformers
from core.progress import Bar

FORMAT_VERSION = 1
KEYS = {'format_version': int, 'model': dict, 'model_args': dict, 'template': str, 'tokenizer': dict, 'config': dict,
        'step': int, 'val_loss': (float, type(None))}
HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2', 'microsoft/DialoGPT-small',
             'microsoft/DialoGPT-medium', 'microsoft/DialoGPT-large')

WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')


def pack(model, tokenizer, template, config, step, val_loss, **more):
    """The dict to save. config: the run's, as a dict; more: what only resuming needs."""
    return {'format_version': FORMAT_VERSION, 'model': model.state_dict(), 'model_args': asdict(model.config),
            'template': template, 'tokenizer': tokenizer.state(), 'config': config, 'step': step,
            'val_loss': val_loss, **more}


def save(contents, path):
    """Write the dict to path: under another name first, flushed, renamed. UserError if it cannot be."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        how = dict(bytes=False, desc=f'saving {os.path.basename(path)}', unit='B', unit_scale=True)
        with open(temporary, 'wb') as file, Bar.wrapattr(file, 'write', **how) as shown:
            torch.save(contents, shown)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)  # or a power cut could undo the renaming
        os.close(folder)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(error.__context__, OSError):  # what torch's writer met says more than what it made of it
            error = error.__context__
        raise UserError(f'could not save {path}: {error}. The checkpoint that was there before still is.') from None


def files(folder):
    """The paths of all checkpoints in the folder: ckpt.pt, best.pt, ckpt-STEP.pt."""
    found = glob.glob(os.path.join(glob.escape(folder), '*.pt'))
    return sorted(path for path in found if re.fullmatch(r'ckpt|best|ckpt-\d+', os.path.basename(path)[:-3]))


def keep_older(path, step, n):
    """Keep the checkpoint at `path`, ckpt.pt of this step, as ckpt-STEP.pt too; of these, the last n up to it."""
    def step_of(kept):
        return int(kept[len(path) - 2:-3])
    kept = f'{path[:-3]}-{step:06}.pt'
    try:
        if os.path.exists(kept):
            os.remove(kept)
        os.link(path, kept)  # a second name: at no instant is there no ckpt.pt, and nothing is copied
        older = [other for other in files(os.path.dirname(path)) if '-' in os.path.basename(other)]
        for other in sorted((other for other in older if step_of(other) <= step), key=step_of)[:-n]:
            os.remove(other)
    except OSError as error:
        raise UserError(f'could not keep {path} as {kept}: {error.strerror}. --keep=0 does without.') from None


def load(path):
    """The checkpoint at path, a dict; UserError for what is none, or none of this code."""
    contents = _read(path)
    if is_nanogpt(contents):
        raise UserError(f"{path} is nanoGPT's: no run of this code can go on from it. Start one that begins with its weights: "
                        f'--init_from={os.path.dirname(path) or "."} and another --out_dir.')
    return _checked(contents, path)


def _read(path):
    """The dict at path, read without running anything in it; UserError where that cannot be."""
    if not os.path.exists(path):
        raise UserError(f'{path} not found. Train first: python train.py config/finetune_oasst.py, '
                        'or name the folder: --out_dir=FOLDER')
    try:
        contents = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if not isinstance(contents, dict):
            raise ValueError(f'found a {type(contents).__name__}, expected a dict')
        return contents
    except Exception as error:  # the reader meets whatever a damaged or hostile file makes it meet
        reason = str(error).strip().split('\n')[0][:120]
        raise UserError(f'{path} is not a checkpoint that can be read safely: {type(error).__name__} {reason}') from None


def _checked(contents, path):
    """The dict, which must be a checkpoint of this code and of this format."""
    missing = [key for key in KEYS if key not in contents]
    wrong = [key for key in KEYS if key not in missing and not isinstance(contents[key], KEYS[key])]
    version = contents.get('format_version')
    if type(version) is int and version != FORMAT_VERSION:
        raise UserError(f'{path} is of format {version}, {"older" if version < FORMAT_VERSION else "newer"} than this code, '
                        f'which reads {FORMAT_VERSION}. Use it with the code that wrote it.')
    if missing or version != FORMAT_VERSION:
        raise UserError(f'{path} is not a checkpoint of format {FORMAT_VERSION}: found format {version!r}, '
                        f'missing {", ".join(missing) or "nothing"}.')
    if wrong:
        raise UserError(f'{path} is not a checkpoint of this code: wrong types of {", ".join(wrong)}.')
    return contents


def restore(contents, optimizer, scaler, path):
    """Give the optimizer and the scaler the state in a checkpoint's dict. UserError where it is not theirs."""
    kinds = {'best': (float, int), 'n_worse': int, 'seconds': (float, int), 'evaluated_at': (int, type(None)), 'scaler': dict}
    try:
        wrong = [key for key, kind in kinds.items() if not isinstance(contents[key], kind)]
        loss_sum, n_tokens = contents['interval']
        wrong += ['interval'] * (not isinstance(loss_sum + n_tokens, (float, int)))
        # The groups hold settings, which come from the configuration.
        groups = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict({'state': contents['optimizer']['state'], 'param_groups': groups})
        scaler.load_state_dict(contents['scaler'])
        for group in optimizer.param_groups:
            for p in group['params'] if optimizer.state else ():
                shapes = {key: (value.shape, value.is_floating_point()) for key, value in optimizer.state[p].items()}
                if shapes != {'step': ((), True), 'exp_avg': (p.shape, True), 'exp_avg_sq': (p.shape, True)}:
                    wrong = ['optimizer']
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        wrong = [f'{type(error).__name__} {" ".join(str(error).split())[:80]}']
    if wrong:
        raise UserError(f'{path} cannot be resumed: what it holds does not fit this run ({", ".join(wrong)}). Start one that '
                        'begins with its weights: --init_from=FOLDER and another --out_dir.')


class Opened(NamedTuple):
    """A model ready to use. template is None for one that was never tuned by this code."""
    model: GPT
    tokenizer: tokenizers.Tokenizer
    template: str
    description: str
    contents: dict  # the whole checkpoint; {} for any other source


def from_contents(contents, description=''):
    """The Opened model of a checkpoint's dict; UserError where its parts do not fit together."""
    try:
        config, state = GPTConfig(**contents['model_args']), contents['model']
        shape = asdict(config)
        if any(type(shape[field.name]) is not field.type for field in fields(config)) or config.gelu not in ('tanh', 'none') \
                or min(value for value in shape.values() if not isinstance(value, str)) < 0:
            raise ValueError(f'model_args are {shape}')
        if sum(name.endswith('.ln_1.weight') for name in state) != config.n_layer:  # before a billion are made
            raise ValueError('the number of layers')
        with torch.device('meta'):
            model = GPT(config)
        model.load_state_dict(state, assign=True)
        tokenizer, template = tokenizers.from_state(contents['tokenizer']), contents['template']
        if tokenizer.vocab_size != config.vocab_size or template is not None and TEMPLATES[template].tags > tokenizer.tags:
            raise ValueError('the vocabulary')
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError) as error:
        reason = ' '.join(str(error).split())[:120]
        raise UserError(f'{description} does not fit together: {type(error).__name__} {reason}') from None
    return Opened(model, tokenizer, template, description, contents)


def is_nanogpt(contents):
    """Whether the dict is a ckpt.pt of https://github.com/karpathy/nanoGPT."""
    kinds = {'model': dict, 'model_args': dict, 'iter_num': int}
    return 'format_version' not in contents and all(isinstance(contents.get(key), kind) for key, kind in kinds.items())


def from_nanogpt(contents, path):
    """The Opened model of nanoGPT's checkpoint. It has GPT-2's vocabulary, and our tags where it has rows for them."""
    try:
        # torch.compile puts the prefix there; a mask lies there from before there was scaled_dot_product_attention
        state = {name.removeprefix('_orig_mod.'): tensor.float() for name, tensor in contents['model'].items()
                 if not name.endswith('.attn.bias')}
        wte = state['transformer.wte.weight']
        if not torch.equal(state.pop('lm_head.weight', wte), wte):
            raise ValueError('its head is not tied to the embedding')
        if len(wte) not in (50257, 50304):
            raise UserError(f"{path} is nanoGPT's with a vocabulary of {len(wte)} tokens; expected GPT-2's, 50257 or 50304. "
                            'A model of single characters cannot be opened here.')
        tokenizer = tokenizers.load('gpt2', tags=len(wte) == 50304)
        state['transformer.wte.weight'] = F.pad(wte[:tokenizer.vocab_size], (0, 0, 0, -tokenizer.vocab_size % VOCAB_MULTIPLE))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f'{path} does not fit together: {type(error).__name__} {" ".join(str(error).split())[:120]}') from None
    args = {'bias': True, **contents['model_args'], 'vocab_size': tokenizer.vocab_size, 'gelu': 'none'}  # it computes the exact one
    description = f"{path} (nanoGPT's, step {contents['iter_num']})"
    opened = from_contents({'model_args': args, 'model': state, 'tokenizer': tokenizer.state(), 'template': None}, description)
    return opened._replace(contents={})


def open_model(init_from, out_dir='out', which='last', vocabulary=None, tags=False):
    """An Opened model: 'resume' (the checkpoint in out_dir), a folder, or a hub name.

    A folder may hold a checkpoint of this code or of nanoGPT, or a model in transformers' form. which: 'last' or
    'best', of the checkpoints, where both are there. vocabulary: the Tokenizer of the data to train on; without one, the
    model's own, or GPT-2's, which `tags` gives the six tags. The model gets rows for tags it lacks.
    """
    folder = out_dir if init_from == 'resume' else init_from
    paths = [os.path.join(folder, name) for name in (('best.pt', 'ckpt.pt') if which == 'best' else ('ckpt.pt', 'best.pt'))]
    found = next((path for path in paths if os.path.exists(path)), None)
    if found or init_from == 'resume':
        contents = _read(found or os.path.join(folder, 'ckpt.pt'))
        if is_nanogpt(contents):
            opened = from_nanogpt(contents, found)
        else:
            loss = '' if _checked(contents, found)['val_loss'] is None else f", val_loss {contents['val_loss']:.4f}"
            opened = from_contents(contents, f"{found} (step {contents['step']}{loss})")
    else:
        opened = _open_transformers(init_from, vocabulary or None)
    wanted = vocabulary or opened.tokenizer
    if opened.tokenizer.sha256 != wanted.sha256:
        raise UserError(f'{opened.description} has the vocabulary {opened.tokenizer.name!r}, the data another, '
                        f'{wanted.name!r}. Prepare the data with the vocabulary of the model: --tokenizer=FOLDER')
    if (tags or wanted.tags) and not opened.tokenizer.tags:
        tagged = tokenizers.Tokenizer(wanted.name, wanted.tokens, tags=True)
        opened.model.add_tokens(tagged.tag_pieces())
        opened = opened._replace(tokenizer=tagged)
    return opened


def _open_transformers(init_from, vocabulary):
    """The Opened model of a folder or a hub name; its vocabulary is its own, else the one given, else GPT-2's."""
    folder = init_from if os.path.isdir(init_from) else _from_hub(init_from)
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError(f'config.json holds a {type(config).__name__}')
        weights = _read_weights(folder)
        if sum(name.endswith('ln_1.weight') for name in weights) != config.get('n_layer'):  # before a billion are made
            raise ValueError(f"config.json has n_layer={config.get('n_layer')!r}, the weights another number of layers")
        model, template = from_transformers(config, weights), config.get('conversation_template')
        if template is not None and (type(template) is not str or template not in TEMPLATES):
            raise ValueError(f'config.json has conversation_template={str(template)[:40]!r}, known are {", ".join(TEMPLATES)}')
    except UserError as error:
        raise UserError(f'{init_from} cannot be used: {error}') from None
    except (OSError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{init_from} is not a model folder in transformers' form: {error}. "
                        'Expected config.json and model.safetensors.') from None
    own = any(os.path.exists(os.path.join(folder, name)) for name in ('tokenizer.json', 'vocab.json'))
    tokenizer = tokenizers.load(folder, tags=False) if own and folder == init_from else vocabulary or tokenizers.load('gpt2')
    tokenizer = tokenizers.Tokenizer(tokenizer.name, tokenizer.tokens, model.config.vocab_size == len(tokenizer.tokens) + 7)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(f'{init_from} has {model.config.vocab_size} tokens, the vocabulary {tokenizer.name!r} has '
                        f'{tokenizer.vocab_size}. Prepare the data with the vocabulary of the model: --tokenizer=FOLDER')
    if template and TEMPLATES[template].tags > tokenizer.tags:
        raise UserError(f'{init_from} says that it was tuned as {template!r}, and lacks the tags of that. Delete '
                        'conversation_template from its config.json, and name the template where it is asked for.')
    return Opened(model, tokenizer, template, init_from, {})


def _read_weights(folder):
    """{name: tensor} of model.safetensors or pytorch_model.bin; no pickled code is run."""
    path = os.path.join(folder, WEIGHT_FILES[0])
    if os.path.exists(path):
        import safetensors.torch
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # SafetensorError, or whatever a damaged header leads to
            raise UserError(f'model.safetensors is damaged: {error}.') from None
    path = os.path.join(folder, WEIGHT_FILES[1])
    if not os.path.exists(path):
        raise UserError('it holds neither model.safetensors nor pytorch_model.bin.')
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f'pytorch_model.bin cannot be read safely: {type(error).__name__}.') from None


def _from_hub(name):
    """The local folder of a hub model, downloaded into transformers' own cache on first use."""
    if name not in HUB_NAMES:
        raise UserError(f'init_from={name!r} is neither a folder nor a model that is known here. '
                        f'Expected scratch, resume, a folder, or one of {", ".join(HUB_NAMES)}.')
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')  # no requests but for the files themselves
    import huggingface_hub as hub  # comes with transformers
    cached = {file: hub.try_to_load_from_cache(name, file) for file in ('config.json', *WEIGHT_FILES)}
    cached = {file: path for file, path in cached.items() if isinstance(path, str)}
    if 'config.json' in cached and len(cached) > 1:
        return os.path.dirname(cached['config.json'])
    try:
        try:
            _download(hub, name, WEIGHT_FILES[0])
        except hub.errors.EntryNotFoundError:
            _download(hub, name, WEIGHT_FILES[1])
        return os.path.dirname(_download(hub, name, 'config.json'))
    except UserError:
        raise
    except Exception as error:  # whatever the hub's client or the network raises
        raise UserError(f'{name} is not in the cache and could not be downloaded ({type(error).__name__}). '
                        'Connect once, or download its files elsewhere and use --init_from=FOLDER.') from None


def _download(hub, name, file):
    """The path of a hub model's file, now in the cache; a large one is checked by its sha256."""
    path = hub.hf_hub_download(name, file)
    blob = os.path.realpath(path)  # large files are kept under the hash that the hub announced
    if len(os.path.basename(blob)) == 64:
        with open(blob, 'rb') as opened:
            digest = hashlib.file_digest(opened, 'sha256').hexdigest()
        if digest != os.path.basename(blob):
            os.remove(blob)
            raise UserError(f'{name}: {file} arrived with sha256 {digest}, expected {os.path.basename(blob)}; it was '
                            'deleted. Try again.')
    return path
