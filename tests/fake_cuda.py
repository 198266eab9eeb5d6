"""Run the CUDA paths on fake CUDA tensors: they have shapes, dtypes and devices, but no values.

    python tests/fake_cuda.py LIBRARY       # made of fake_cuda.cpp, see tests/test_cuda_paths.py

Prints what each case did, as a line of JSON. torch looks for devices only once in a process.
"""
import ctypes
import json
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

ctypes.CDLL(sys.argv[1])  # before torch looks for devices

import torch
import torch._dynamo  # while torch.Generator is still a type, see main
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import conftest
import train
from core.decoding_weights import prepare
from core.generate import Sampling, generate
from core.processes import Processes
from core.rows import Rows
from core.trainer import Trainer
from web.batching import Batch, Request


class NoValues(FakeTensorMode):
    """Tensors without values, not even those that torch.tensor makes."""
    avoid_device_init = True

    def may_turn_const(self, tensor):
        return False


class Record(TorchDispatchMode):
    """Counts operators, and what goes between CPU and GPU. Answers when a value is read."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.dtypes = set()  # of matrix products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ('_local_scalar_dense', 'item', 'is_nonzero'):
            self.counts['reads'] += args[0].is_cuda
            return args[0].dtype.is_floating_point or args[0].dtype == torch.bool or 3
        result = func(*args, **(kwargs or {}))
        self.counts[name] += 1
        if name in ('mm', 'addmm', 'linear'):
            self.dtypes.add(str(result.dtype).removeprefix('torch.'))
        if name in ('_to_copy', 'copy_', 'to'):
            *_, source = filter(torch.is_tensor, args)
            self.counts['copies'] += result.is_cuda and not source.is_cuda
        return result

    def facts(self):
        """What was counted since the last call."""
        facts = {**self.counts, 'dtypes': sorted(self.dtypes)}
        self.counts.clear()
        return facts


@contextmanager
def gpu(capability):
    """A machine with one GPU of this compute capability; yields a Record."""
    def is_bf16_supported(including_emulation=True):
        return including_emulation or capability >= (8, 0)

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.is_bf16_supported = is_bf16_supported
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory = lambda tensor: tensor
    with NoValues(allow_non_fake_inputs=True), Record() as record:
        yield record


def make_model(n_layer):
    """A real model on the CPU; its weights lose their values when they are moved to the GPU."""
    model = conftest.tiny(n_layer=n_layer)
    for block in model.transformer.h:  # transposed views, as those of transformers' files are
        block.mlp.c_fc.weight.data = block.mlp.c_fc.weight.data.t().contiguous().t()
    return model


def train_step(model, record, dtype):
    """An optimizer step of two micro-batches, and an evaluation."""
    config = train.Config(batch_size=1, gradient_accumulation_steps=2, block_size=32,
                          dtype=dtype, max_iters=9, dropout=0.1)
    state = SimpleNamespace(step=0, optimizer=None)
    opened = SimpleNamespace(model=model, checkpoint=state, description='')
    rows = Rows(conftest.Conversations([5, 9, 17, 8, 30]), 32, seed=1)
    trainer = Trainer(config, Processes(0, 1, 'cuda'), opened, rows, rows)
    trainer.model.train()
    request = SimpleNamespace(asked=False)
    record.facts()
    trainer.train_step(request)
    facts = record.facts()
    trainer.evaluate(request)
    return facts


def write(model, record, dtype):
    """Four tokens of answers to prompts of different and of equal lengths."""
    prepare(model, 'cuda', dtype)
    sampled = Sampling(1.0, 5, 0.9, 0.1, 1.1, 2)  # in every way
    for sampling in (sampled, Sampling(temperature=0)):
        record.facts()
        list(generate(model, [[1, 2], [3, 4, 5], [6, 7]], 4, sampling, num_samples=2))
    return record.facts() | {'cudnn': torch.backends.cuda.cudnn_sdp_enabled()}


def write_together(model, record, dtype):
    """Three requests in two places: answers join and leave, and a text goes on from another."""
    ends = []
    prepare(model, 'cuda', dtype)
    record.facts()
    batch = Batch(model, size=2)
    for prompt in ([1, 2, 4], [5, 6], [1, 2, 4, 3, 9]):
        request = Request(prompt, 4, lambda ids, end: ends.append(end), Sampling(top_k=5))
        batch.waiting.append(request)
    with torch.inference_mode():
        while batch.waiting or batch.busy:
            batch.round()
    return record.facts() | {'finishes': [end for end in ends if end]}


def main():
    torch.Generator = lambda device: torch.default_generator  # the CPU build has none for CUDA
    results = {}
    for case in (train_step, write, write_together):
        for name in ('float32', 'bfloat16', 'float16', 'auto', 'deep', 'T4'):
            dtype = 'auto' if name in ('deep', 'T4') else name
            model = make_model(n_layer=5 if name == 'deep' else 2)
            with gpu(capability=(7, 5) if name == 'T4' else (9, 0)) as record:
                found = case(model, record, dtype)
                found['contiguous'] = all(p.is_contiguous() for p in model.parameters())
            results[f'{case.__name__} {name}'] = found
    print(json.dumps(results))


if __name__ == '__main__':
    main()
