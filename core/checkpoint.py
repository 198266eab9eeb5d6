"""Checkpoints: what they hold, saving, resuming, and opening a model from anywhere.

    python -c "from core import checkpoint; print(checkpoint.load('out/oasst/ckpt.pt').step)"

out_dir/ckpt.pt is the last state of a run, out_dir/best.pt the one with the lowest val_loss,
without what only resuming needs. Nothing in a checkpoint can run code.
"""
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import UserError
from core import pretrained
from core import tokenizer as tokenizers
from core.conversation import TEMPLATES
from core.files import reading, write_whole
from model import GPT

FORMAT_VERSION = 1


@dataclass
class Checkpoint:
    """Every key of a checkpoint: plain types and tensors, saved as one dict."""
    model: dict  # {name: tensor}, without any wrapper's prefix
    model_args: dict  # of GPTConfig
    template: str  # '' if the model was never tuned
    tokenizer: dict  # Tokenizer.state()
    config: dict  # the run's
    step: int  # optimizer steps taken
    val_loss: float | None  # at this step, nats per supervised token
    data: list | None = None  # a fingerprint of each data set
    origin: dict | None = None  # what the run began with, and where its data came from
    best: float | None = None  # lowest val_loss so far
    best_step: int = 0  # where that was
    # Only in ckpt.pt:
    optimizer: dict | None = None
    scaler: dict | None = None
    conditions: dict | None = None  # what decides the bits of later steps, see core/trainer.py
    format_version: int = FORMAT_VERSION


def save(checkpoint, path):
    """Write the Checkpoint to path: whole, or not at all."""
    with write_whole(path, 'wb') as file:
        torch.save(vars(checkpoint), file)


def load(path):
    """The Checkpoint at path. UserError if there is none, or if it is not one of this code."""
    with reading(path, 'Expected a checkpoint. Train one: python train.py '
                       'config/finetune_oasst.py, or name its folder: --out_dir=FOLDER'):
        contents = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if 'iter_num' in contents:
            raise UserError(f"{path} is nanoGPT's. {pretrained.CONVERT}{path}")
        version = contents['format_version']
        if version != FORMAT_VERSION:
            raise UserError(f'{path} has format {version}; this code reads {FORMAT_VERSION}. '
                            'Use it with the code that wrote it.')
        values = {}
        # Other keys are ignored: an older version of this code may have written them.
        for field in fields(Checkpoint):
            value = contents.get(field.name, field.default)
            if not isinstance(value, field.type):
                raise ValueError(f'{field.name} is {str(value)[:60]!r}, not {field.type}')
            values[field.name] = value
        return Checkpoint(**values)


def find(folder, which='last'):
    """The path of a checkpoint in the folder or one level below, or None if there is none.

    Of several runs it is the one saved last; which: its 'last' or its 'best', if it has both.
    """
    names = ['best.pt', 'ckpt.pt'] if which == 'best' else ['ckpt.pt', 'best.pt']
    found = [*Path(folder).glob('*.pt'), *Path(folder).glob('*/*.pt')]
    found = [path for path in found if path.name in names]
    if not found:
        return None
    newest = max(found, key=os.path.getmtime).parent
    found = [path for path in found if path.parent == newest]
    return str(min(found, key=lambda path: names.index(path.name)))


# With one of these changed it would be another run.
FIXED_ON_RESUME = ('dataset', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'loss_on',
                   'seed', 'dropout', 'n_layer', 'n_head', 'n_embd', 'bias', 'weight_decay',
                   'beta1', 'beta2')
NEW_RUN = 'Start a new run with its weights: --init_from=FOLDER, another --out_dir.'


def check_resume(checkpoint, name, config, data):
    """UserError unless a run with this config, a dict, can go on from the Checkpoint."""
    if checkpoint.optimizer is None:
        raise UserError(f'{name} has no optimizer state; a best.pt never does. {NEW_RUN}')
    if checkpoint.data != data:
        raise UserError(f'{config["dataset"]} is not the data that {name} was trained on. '
                        f'Prepare it as it was. Or: {NEW_RUN}')
    for key in FIXED_ON_RESUME:
        was = checkpoint.config.get(key)
        now = config[key]
        if was != now:
            raise UserError(f'{key} was {was!r}, now {now!r}: that would be another run. '
                            f'Leave it as it was. Or: {NEW_RUN}')


class Opened(NamedTuple):
    """A model ready to use."""
    model: GPT
    tokenizer: tokenizers.Tokenizer
    template: str | None  # None if it was never tuned by this code
    description: str  # for a person
    checkpoint: Checkpoint | None = None  # None if it does not come from one
    folder: str = ''


def open_checkpoint(path):
    """The Opened model of the checkpoint at path."""
    saved = load(path)
    with reading(path, 'Its parts do not fit together.'):
        model = pretrained.empty_model(saved.model_args)
        model.load_state_dict(saved.model, assign=True)
        tokenizer = tokenizers.from_state(saved.tokenizer)
    val_loss = '' if saved.val_loss is None else f', val_loss {saved.val_loss:.4f}'
    description = f'{path} (step {saved.step}{val_loss})'
    template = saved.template or None
    return Opened(model, tokenizer, template, description, saved, os.path.dirname(path))


def open_model(init_from, out_dir='out', which='last', vocabulary=None, tags=False):
    """An Opened model: 'resume' (the last run under out_dir), a folder, or a hub name.

    which: 'last' or 'best' checkpoint, if there are both. vocabulary: the Tokenizer of the
    data, which must be the model's. tags: add the six tags if the model lacks them.
    """
    if init_from == 'resume':
        path = find(out_dir, which) or os.path.join(out_dir, 'ckpt.pt')
    else:
        path = find(init_from, which)
    # A checkpoint of ours, or anything in transformers' form.
    if path:
        opened = open_checkpoint(path)
    else:
        model, tokenizer, config, folder = pretrained.open_folder(init_from, vocabulary)
        template = config.get('conversation_template')
        opened = Opened(model, tokenizer, template, init_from, None, folder)
    description = opened.description
    if opened.template and opened.template not in TEMPLATES:
        raise UserError(f'{description} has the template {opened.template!r}; known are '
                        f'{", ".join(TEMPLATES)}.')
    for name, p in opened.model.named_parameters():
        if not torch.stack(p.aminmax()).isfinite().all():
            raise UserError(f'{description}: {name} holds numbers that are not finite.')
    if vocabulary and vocabulary.sha256 != opened.tokenizer.sha256:
        raise UserError(f'{description} has one vocabulary, the data another. Prepare the '
                        "data with the model's: --tokenizer=FOLDER")
    if (tags or vocabulary and vocabulary.tags) and not opened.tokenizer.tags:
        pieces = [opened.tokenizer.encode(tag).tolist() for tag in tokenizers.TAGS]
        opened.model.add_tokens(pieces)
        opened = opened._replace(tokenizer=opened.tokenizer.with_tags())
    return opened
