"""Check every CUDA path on your card, then time it, in about 9 minutes. Nothing is downloaded.

    python bench/gpu.py                              # or: make gpu
    python bench/gpu.py --device=cpu --shape=tiny    # does this script work?

Weights and conversations are random. Each part stands alone: if one fails, its traceback is printed
and the others go on; the exit code is 1 then. Written without a GPU: the limits in the checks are
estimates, see docs/speed.md.
"""
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal

import contest  # first: it puts the repository on the path
import numpy as np
import torch

import configurator
import train
from configurator import UserError
from contest import SHAPES
from core.checkpoint import Checkpoint
from core.decoding_weights import prepare
from core.device import autocast, pick_device, pick_dtype
from core.generate import Sampling, generate
from core.processes import Processes
from core.rows import Rows
from core.trainer import Trainer
from model import GPT, DocumentAttention, GPTConfig
from training import synchronize, tera_operations
from web.batching import Batch, Request

GREEDY = Sampling(temperature=0)
NOBODY = SimpleNamespace(asked=False)  # asks the trainer to stop


@dataclass(frozen=True)
class Config:
    shape: Literal[*SHAPES] = 'gpt2-medium'  # of the model that is timed
    device: str = 'cuda'      # cuda, cuda:1 or cpu
    parts: str = 'attention,gradients,steps,answers,training,decoding'  # what to do

    def problems(self):
        """Parts that do not exist."""
        for name in self.parts.split(','):
            if name not in PARTS:
                yield f'parts={name!r}: expected {", ".join(PARTS)}.'


class Conversations:
    """Stands for a tokenfile.Split: random conversations, about as long as those of OASST."""
    name = 'train'

    def __init__(self, n, longest, vocab_size):
        rng = np.random.default_rng(0)
        self.lengths = np.clip(rng.lognormal(5.1, 0.8, n).astype(int), 4, longest + 1)
        self.ids = [rng.integers(0, vocab_size, length) for length in self.lengths]
        self.n_supervised = self.lengths - self.lengths // 3  # the prompt is a third

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = np.arange(self.lengths[i]) >= self.lengths[i] // 3
        return self.ids[i], mask.astype(np.uint8)


def make_model(shape, device):
    """A random GPT; sizes follow the shape."""
    n_layer, n_head, n_embd = SHAPES[shape]
    sizes = {'block_size': 64, 'vocab_size': 509} if shape == 'tiny' else {}
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, **sizes)).to(device)


def make_trainer(config, dtype, n=400, rows=4, accumulate=4, **changes):
    """A Trainer of a random model, on n conversations."""
    model = make_model(config.shape, config.device)
    block_size = model.config.block_size
    settings = train.Config(
        batch_size=rows, gradient_accumulation_steps=accumulate, block_size=block_size,
        dtype=dtype, max_iters=10 ** 6, device=config.device, warmup_iters=2, **changes)
    state = Checkpoint({}, {}, '', {}, {}, 0, None)
    opened = SimpleNamespace(model=model, checkpoint=state, description='a random model')
    split = Conversations(n, block_size, model.config.vocab_size)
    trainer = Trainer(settings, Processes(0, 1, config.device), opened,
                      Rows(split, block_size, seed=1))
    trainer.model.train()
    return trainer


def timed(config, call, n=5):
    """Median seconds of call(), after one to warm up."""
    seconds = []
    for _ in range(n + 1):
        synchronize(config)
        started = time.perf_counter()
        call()
        synchronize(config)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def apart(a, b):
    """The distance of two tensors relative to the length of the second."""
    return ((a - b).norm() / b.norm()).item()


def dtypes(config):
    """Those that the device trains in."""
    return ('float32', 'bfloat16') if config.device == 'cpu' else ('float32', 'bfloat16', 'float16')


# ---- right or wrong ----

def attention(config):
    """Documents in one call: what comes out, and the gradient, beside float32 one by one."""
    torch.manual_seed(0)
    runs = [(3, 1), (1, 17), (2, 64), (1, 700)]
    lengths = [length for count, length in runs for _ in range(count)]
    starts = torch.tensor([0, *lengths], device=config.device).cumsum(0)
    n = sum(lengths)
    exact = torch.randn(n, 3 * 1024, device=config.device)
    weight = torch.randn(n, 1024, device=config.device)
    results = {}
    for dtype in dtypes(config):
        qkv = exact.to(getattr(torch, dtype), copy=True).requires_grad_()
        y = DocumentAttention(runs, n_head=16, starts=starts)(0, qkv).float()
        (y * weight).sum().backward()
        results[dtype] = torch.cat([y.detach(), qkv.grad.float()], dim=1)
        distance = apart(results[dtype], results['float32'])
        print(f'  {dtype}: {distance:.1e} from float32')
        assert distance < 0.02, distance


def gradients(config):
    """Loss and gradients in all dtypes beside the CPU's in float32."""
    shape = 'tiny' if config.shape == 'tiny' else 'gpt2'
    results = []
    for device, dtype in (('cpu', 'float32'), *((config.device, one) for one in dtypes(config))):
        model = make_model(shape, device)
        rows = Rows(Conversations(20, 64, model.config.vocab_size), 64, seed=1)
        batch = rows.batch(0, 4)
        with autocast(device, getattr(torch, dtype)):
            loss = model.loss(batch) / len(batch.targets)
        (loss * 1024).backward()  # float16 has no tiny numbers
        grad = torch.cat([p.grad.reshape(-1).cpu() for p in model.parameters()])
        results.append(grad)
        distance = apart(grad, results[0])
        print(f'  {dtype} on {device}: loss {loss.item():.4f}, gradient {distance:.1e} away')
        assert distance < (0.01 if dtype == 'float32' else 0.05), distance


def steps(config):
    """Twelve steps on the same six conversations: the loss falls alike in all dtypes."""
    config = replace(config, shape='tiny' if config.shape == 'tiny' else 'gpt2')
    last = {}
    for dtype in dtypes(config):
        trainer = make_trainer(config, dtype, n=6, rows=1, accumulate=2, learning_rate=1e-3)
        losses = []
        for _ in range(12):
            losses.append(trainer.train_step(NOBODY)['loss'])
        last[dtype] = losses[-1]
        print(f'  {dtype}: {losses[0]:.3f} ... {losses[-1]:.3f}')
        # float16 skips the first steps, until the scale of the loss fits.
        assert losses[-1] < losses[0] - 0.1 or dtype == 'float16', losses
        assert abs(last[dtype] / last['float32'] - 1) < 0.1 or dtype == 'float16', last


def answers(config):
    """Decoding with the cache, alone and in company, gives the tokens of the plain model."""
    torch.set_float32_matmul_precision('highest')  # TF32 could change a token
    model = make_model('tiny', config.device)
    prepare(model, config.device, 'float32')
    window = model.config.block_size
    prompts = [[1, 2, 3], [4], list(range(window)), list(range(40))]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        with torch.inference_mode():
            while len(text) <= window and len(text) < len(prompt) + 9:
                logits = model(torch.tensor([text], device=config.device))
                text.append(logits[0, -1].argmax().item())
        expected.append(text[len(prompt):])
    for n in (1, 9):  # one new token, too: then the cache is as long as the longest prompt
        found = in_one_batch(model, prompts, n)
        assert found == [answer[:n] for answer in expected], (found, expected)
    assert batched(model, prompts, 9) == expected, 'batching writes something else'


def in_one_batch(model, prompts, n):
    """The greedy answers of up to n tokens that generate writes."""
    steps = zip(*generate(model, prompts, n, GREEDY))
    return [[token for token in answer if token is not None] for answer in steps]


def batched(model, prompts, n, size=3):
    """The greedy answers of up to n tokens that web/batching.py writes."""
    written = [[] for _ in prompts]
    batch = Batch(model, size=size)
    for prompt, answer in zip(prompts, written):
        def deliver(ids, finish, answer=answer):
            assert finish != 'error'
            answer.extend(ids)
        batch.waiting.append(Request(prompt, n, deliver, GREEDY))
    with torch.inference_mode():
        while batch.waiting or batch.busy:
            batch.round()
    return written


# ---- how fast ----

def training(config):
    """Steps as train.py takes them, with and without torch.compile; and how much memory."""
    a = torch.randn(4096, 4096, device=config.device).to(pick_dtype('auto', config.device))
    peak = 2 * 4096 ** 3 / timed(config, partial(torch.mm, a, a)) / 1e12
    print(f'  a product of two matrices of 4096 x 4096: {peak:.1f} TFLOP/s')
    for rows in (4, 16):
        for compiled in (False, True) if config.device != 'cpu' else (False,):
            if config.device != 'cpu':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainer = make_trainer(config, 'auto', rows=rows, compile=compiled)
            seconds = timed(config, partial(trainer.train_step, NOBODY))
            n_rows = trainer.train_rows.n_rows  # of all conversations
            steps_per_second = trainer.rows_per_step / n_rows / seconds
            n_tokens = (trainer.train_rows.split.lengths - 1).sum()
            reached = steps_per_second * tera_operations(trainer, 0, n_rows)
            memory = ''
            if config.device != 'cpu':
                memory = f', {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB'
            print(f'  {rows} rows{", compiled" if compiled else ""}: '
                  f'{steps_per_second * n_tokens:,.0f} tokens/s, '
                  f'{reached:.1f} TFLOP/s, {reached / peak:.0%} of that product{memory}')
            del trainer


def decoding(config):
    """Tokens a second: one answer, several at once, and several people who are served."""
    model = make_model(config.shape, config.device)
    name = prepare(model, config.device)
    n = 128 if model.config.block_size > 128 else 8
    rng = np.random.default_rng(0)
    for B in (1, 8, 32):
        prompts = rng.integers(0, 500, (B, 32)).tolist()
        alone = timed(config, partial(in_one_batch, model, prompts, n), 3)
        together = timed(config, partial(batched, model, prompts, n, B), 3)
        print(f'  {name}, {B} at once: {B * n / alone:,.0f} tokens/s, '
              f'{B * n / together:,.0f} by web/batching.py')


PARTS = {part.__name__: part
         for part in (attention, gradients, steps, answers, training, decoding)}


def main(argv):
    config = configurator.load(Config, argv)
    if config.device != 'cpu' and not torch.cuda.is_available():
        raise UserError('bench/gpu.py needs CUDA, and torch finds none here. To see whether the '
                        'script itself works: --device=cpu --shape=tiny')
    config = replace(config, device=pick_device(config.device))
    print(contest.versions('torch'), f'dtype auto: {pick_dtype("auto", config.device)}')
    if config.device != 'cpu':
        print(torch.cuda.get_device_properties(config.device))
    failed = []
    for name in config.parts.split(','):
        print(f'{name}: {PARTS[name].__doc__}', flush=True)
        try:
            PARTS[name](config)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    if failed:
        sys.exit(f'FAILED: {", ".join(failed)}')
    print('nothing failed')


if __name__ == '__main__':
    configurator.run(main)
