"""A run's steps: the learning rate, one optimizer step, evaluation and saving.

train.py makes a Trainer and calls it until the run is over.
"""
import math
import os
import sys
import time
from dataclasses import replace

import torch

from configurator import UserError
from core import checkpoint, conversation
from core.conversation import Turn
from core.device import autocast, pick_dtype
from core.files import Bar, reading
from core.generate import Sampling, generate

MOST_SKIPPED = 10  # a run ends after so many skipped steps in a row
WHAT_TO_DO = ('Nothing was saved; the last checkpoint is as it was. Try a lower --learning_rate, '
              '--grad_clip=1 or --dtype=float32.')


def learning_rate(config, step):
    """Linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    n_decay = (config.lr_decay_iters or config.max_iters) - config.warmup_iters
    done = min(1.0, (step - config.warmup_iters) / max(1, n_decay))
    share = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


class Trainer:
    """One run. Its `state`, a Checkpoint, holds all that changes from step to step."""

    def __init__(self, config, procs, opened, train_rows, val_rows=None):
        self.config = config
        self.procs = procs
        self.opened = opened
        self.state = opened.checkpoint
        self.train_rows = train_rows
        self.val_rows = val_rows  # None if the validation set is empty
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps
        self.n_skipped = 0  # steps in a row that were not applied
        self.stopped = False  # by a signal to any of the processes
        self.dtype = pick_dtype(config.dtype, procs.device)
        self.model = opened.model.to(procs.device)
        for p in self.model.parameters():
            # transformers' weights come as transposed views.
            p.data = p.data.contiguous()
        if config.compile:
            self.model.compile()
        self.loss_module = procs.wrap(self.model)
        # Weight decay is for matrices only.
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{'params': matrices, 'weight_decay': config.weight_decay},
                  {'params': others, 'weight_decay': 0.0}]
        # Each step sets the learning rate.
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.scaler = torch.amp.GradScaler('cuda', enabled=self.dtype == torch.float16)
        if self.state.optimizer:
            with reading(opened.description, checkpoint.NEW_RUN):
                self.optimizer.load_state_dict(self.state.optimizer)
                # Empty if the run was not in float16.
                if self.state.scaler:
                    self.scaler.load_state_dict(self.state.scaler)

    def epoch(self):
        """Passes over the data so far."""
        return self.state.step * self.rows_per_step / self.train_rows.n_rows

    def conditions(self):
        """What may change on a resume, but changes the bits of later steps."""
        config = self.config
        keys = ('learning_rate', 'min_lr', 'warmup_iters', 'decay_lr', 'grad_clip', 'compile')
        device = self.procs.device
        hardware = torch.backends.cpu.get_cpu_capability()
        if device.startswith('cuda'):
            hardware = torch.cuda.get_device_name()
        return {key: getattr(config, key) for key in keys} | {
            'lr_decay_iters': config.decay_lr and (config.lr_decay_iters or config.max_iters),
            'device': f'{device.split(":")[0]} {hardware}',
            'dtype': str(self.dtype).removeprefix('torch.'),
            'processes': self.procs.world,
            'threads': torch.get_num_threads(),
            'torch': str(torch.__version__)}

    def train_step(self, request):
        """One optimizer step; returns its numbers for the log.

        Its loss is the sum over the supervised tokens of all micro-batches and processes,
        divided by their number.
        """
        config = self.config
        procs = self.procs
        step = self.state.step
        started = time.perf_counter()
        start = step * self.rows_per_step
        stop = start + self.rows_per_step
        # What the loss of the step is divided by, known before any of it is computed.
        n_tokens = self.train_rows.n_supervised(start, stop)  # of all processes
        # Dropout depends on (seed, step, process), mixed with primes into one number, so that
        # a resumed run draws the same.
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + procs.rank)
        losses = []
        rows_at_once = procs.world * config.batch_size
        for first in range(start, stop, rows_at_once):
            # Of these, each process takes batch_size rows.
            begin = first + procs.rank * config.batch_size
            batch = self.train_rows.batch(begin, begin + config.batch_size)
            # Several processes exchange gradients after the last micro-batch only.
            self.loss_module.require_backward_grad_sync = first + rows_at_once == stop
            with autocast(procs.device, self.dtype):
                loss = self.loss_module(batch)
            # DistributedDataParallel divides by the number of processes: multiply by it.
            self.scaler.scale(loss * procs.world / n_tokens).backward()
            losses.append(loss.detach())
        # float16 multiplies the loss by a scale; the norm is of the true gradient.
        self.scaler.unscale_(self.optimizer)
        largest = config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest).item()
        loss_sum = sum(torch.stack(losses).tolist())
        # All processes must stop after the same step, whichever of them got the signal, and
        # skip the same steps, whichever of them found a loss that is not finite.
        loss_sum, norms, n_asked = procs.sum(loss_sum, norm, request.asked)
        self.stopped = n_asked > 0
        lr = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        if math.isfinite(loss_sum + norms):
            self.scaler.step(self.optimizer)
            self.n_skipped = 0
        else:
            self.n_skipped += 1
            # float16 begins with a few, until the scale of its loss fits.
            if procs.rank == 0 and not self.scaler.is_enabled():
                Bar.write(f'step {step + 1} is skipped: loss {loss_sum}, norm of the '
                          f'gradient {norm}', file=sys.stderr)
        if self.n_skipped == MOST_SKIPPED:
            raise UserError(f'{MOST_SKIPPED} steps in a row had a loss or a gradient that is '
                            f'not finite. {WHAT_TO_DO}')
        self.scaler.update()  # float16: a smaller scale of the loss if a gradient overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.val_loss = None  # until the next evaluation
        tokens_per_s = round(n_tokens / (time.perf_counter() - started), 1)
        return {'loss': loss_sum / n_tokens, 'learning_rate': lr, 'grad_norm': norm,
                'tokens_per_s': tokens_per_s}

    @torch.no_grad()
    def evaluate(self, request):
        """val_loss in nats per supervised token; None without data, or after a signal."""
        procs = self.procs
        if not self.val_rows:
            return None
        self.model.eval()
        loss_sum = 0.0
        n_tokens = 0
        batches = self.val_rows.batches(
            self.config.batch_size, procs.rank, procs.world, self.config.eval_iters, 'evaluating')
        for batch in batches:
            with autocast(procs.device, self.dtype):
                loss_sum += self.model.loss(batch).item()
            n_tokens += len(batch.targets)
            if request.asked:
                break
        self.model.train()
        loss_sum, n_tokens, n_asked = procs.sum(loss_sum, n_tokens, request.asked)
        self.stopped = n_asked > 0
        if self.stopped:
            return None
        if not math.isfinite(loss_sum):
            raise UserError(f'val_loss is {loss_sum}. {WHAT_TO_DO}')
        return loss_sum / n_tokens

    @torch.inference_mode()
    def answer(self):
        """What the model answers to sample_prompt now: at most 48 tokens, greedy."""
        tokenizer = self.opened.tokenizer
        template = self.opened.template
        turns = [Turn('user', self.config.sample_prompt)]
        prompt = conversation.prompt(turns, tokenizer, template)
        self.model.eval()
        stops = conversation.stop_ids(tokenizer, template)
        steps = generate(self.model, [prompt], 48, Sampling(temperature=0), stops=stops)
        answer = [token for token, in steps]
        self.model.train()
        return conversation.answer_text(answer, tokenizer, template)

    def save(self, name):
        """Write best.pt, or ckpt.pt with what resuming needs. The first process does."""
        if self.procs.rank > 0:
            return
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise UserError(f'the weights are no longer finite. {WHAT_TO_DO}')
        saved = replace(self.state, model=self.model.state_dict(),
                        optimizer=None, scaler=None, conditions=None)
        if name == 'ckpt.pt':
            saved.optimizer = self.optimizer.state_dict()
            saved.scaler = self.scaler.state_dict()
            saved.conditions = self.conditions()
        checkpoint.save(saved, os.path.join(self.config.out_dir, name))
