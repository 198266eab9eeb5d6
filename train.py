"""Fine-tune a GPT-2 on conversations, or train a small one from scratch.

    python train.py config/finetune_oasst.py                        # one GPU, a Mac or a CPU
    torchrun --standalone --nproc_per_node=4 train.py config/finetune_oasst.py
    python train.py --init_from=resume --out_dir=out/oasst          # go on, bit for bit

Everything random in step s is a function of (seed, s, process), and so is the data it sees:
resuming needs nothing but the weights, the optimizer and the number of the step.
"""
import json
import math
import os
import shlex
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from core import checkpoint
import configurator
from core import runlog
from core import tokenfile
from core import tokenizer as tokenizers
from core.claim import claimed
from configurator import UserError
from core.conversation import TEMPLATES
from core.kernels import keep_freed_memory
from model import GPT, GPTConfig, autocast, pick_dtype
from core.processes import StopRequest, processes


@dataclass(frozen=True)
class Config:
    # where from, where to
    init_from: str = 'gpt2'          # scratch, resume, a hub name such as gpt2-medium, or a folder
    out_dir: str = 'out'             # for ckpt.pt, best.pt, log.csv, loss.png and config.json
    overwrite: bool = False          # replace a checkpoint that is in out_dir already
    dataset: str = 'oasst'           # a prepared folder in data_dir; several with commas are mixed
    data_dir: str = 'data'           # looked for here, then beside train.py
    # how long, how often
    max_iters: int = 600_000         # optimizer steps, or fewer where epochs ends before
    epochs: float = 0.0              # passes over the data; 0 sets no limit
    eval_interval: int = 100         # steps between evaluations, which also save
    eval_iters: int = 0              # batches in an evaluation; 0 is the whole validation set
    eval_only: bool = False          # evaluate once and stop
    log_interval: int = 10           # steps between lines of the log
    patience: int = 0                # stop after this many evaluations without a better one; 0 never
    always_save_checkpoint: bool = True  # False: ckpt.pt too is written only where val_loss improved
    keep: int = 0                    # older checkpoints to keep beside ckpt.pt, as ckpt-STEP.pt
    # a step: gradient_accumulation_steps micro-batches (over all processes) of batch_size rows
    batch_size: int = 4              # rows in a micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches in a step, shared among the processes
    block_size: int = 1024           # positions in a row; a longer conversation is left out, and counted
    loss_on: str = 'response'        # response: what the assistant must produce; all: every token
    # the model: its shape from scratch; a pretrained one brings its own
    n_layer: int = 12                # layers
    n_head: int = 12                 # attention heads
    n_embd: int = 768                # width of the stream
    dropout: float = 0.0             # on embeddings and both branches of a layer, not inside attention
    bias: bool = True                # biases in linear layers and norms
    # the optimizer: AdamW, linear warm-up, cosine decay
    learning_rate: float = 3e-5      # the highest
    weight_decay: float = 0.1        # of matrices; biases and norms have none
    beta1: float = 0.9               # AdamW
    beta2: float = 0.95              # AdamW
    grad_clip: float = 1.0           # largest norm of the gradient; 0 does not clip
    decay_lr: bool = True            # False keeps learning_rate after the warm-up
    warmup_iters: int = 20           # steps of warm-up
    lr_decay_iters: int = 0          # step at which min_lr is reached; 0 is max_iters
    min_lr: float = 0.0              # the lowest
    # the machine
    device: str = 'auto'             # auto, cpu, cuda, cuda:1, mps
    dtype: str = 'auto'              # auto, float32, bfloat16, float16: of matrix products
    compile: bool = False            # torch.compile: slower to start, faster after
    backend: str = 'auto'            # of torch.distributed: nccl on CUDA, gloo elsewhere
    timeout_s: int = 600             # a process that waits longer than this for the others gives up
    seed: int = 1337                 # of the order of the data, dropout and a model from scratch
    # where the numbers of log.csv go too
    log: str = ''                    # tensorboard, wandb or both with a comma, where they are installed
    wandb_log: bool = False          # nanoGPT's way to say --log=wandb
    wandb_project: str = ''          # of Weights & Biases; '' lets it choose
    wandb_run_name: str = ''         # of Weights & Biases; '' lets it choose

    def problems(self):
        """What cannot work, a sentence each."""
        for name in ('batch_size', 'gradient_accumulation_steps', 'block_size', 'eval_interval', 'log_interval',
                     'n_layer', 'n_head', 'n_embd', 'timeout_s'):
            if getattr(self, name) < 1:
                yield f'{name}={getattr(self, name)} must be at least 1.'
        for name in ('max_iters', 'eval_iters', 'patience', 'warmup_iters', 'lr_decay_iters', 'epochs',
                     'keep', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip', 'seed'):
            if not 0 <= getattr(self, name) < float('inf'):
                yield f'{name}={getattr(self, name)} must not be negative.'
        if self.n_head > 0 and self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}.'
        if not 0 <= self.dropout < 1:
            yield f'dropout={self.dropout} must be at least 0 and below 1.'
        if self.loss_on not in ('response', 'all'):
            yield f'loss_on={self.loss_on!r}: expected response or all.'
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
            yield f'dtype={self.dtype!r}: expected auto, float32, bfloat16 or float16.'
        if self.min_lr > self.learning_rate:
            yield f'min_lr={self.min_lr} is above learning_rate={self.learning_rate}.'


# A run that is resumed with one of these changed would no longer be the same run.
FIXED_ON_RESUME = ('dataset', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'loss_on', 'seed', 'dropout',
                   'n_layer', 'n_head', 'n_embd', 'bias', 'weight_decay', 'beta1', 'beta2')


def start_model(config, folders):
    """The Opened model to train, checked against the data it is to be trained on."""
    metas = [tokenfile.read_meta(folder) for folder in folders]
    for folder, meta in zip(folders, metas):
        if meta['template'] not in TEMPLATES:
            raise UserError(f"{folder} is of the template {meta['template']!r}; known are {', '.join(TEMPLATES)}.")
    if len({meta['tokenizer']['sha256'] for meta in metas}) > 1:
        raise UserError(f'the data sets {config.dataset} were prepared with different vocabularies.')
    tags = any(TEMPLATES[meta['template']].tags for meta in metas)
    vocabulary = tokenizers.from_state({**metas[0]['tokenizer'], 'tags': tags})
    if config.init_from == 'scratch':
        torch.manual_seed(config.seed)
        shape = {key: getattr(config, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'bias')}
        opened = checkpoint.Opened(GPT(GPTConfig(vocab_size=vocabulary.vocab_size, **shape)), vocabulary,
                                   metas[0]['template'], 'a new model', {})
    else:
        opened = checkpoint.open_model(config.init_from, config.out_dir, vocabulary=vocabulary)
        opened.model.set_dropout(config.dropout)
    if config.init_from != 'resume':
        opened = opened._replace(template=metas[0]['template'], contents={})
    elif missing := [key for key in ('data', 'optimizer', 'scaler') if key not in opened.contents]:
        raise UserError(f'{opened.description} holds no {missing[0]} (a best.pt never does), so no run can go on from it. '
                        'Start one that begins with its weights: --init_from=FOLDER and another --out_dir.')
    elif opened.contents['data'] != [tokenfile.fingerprint(folder) for folder in folders]:
        raise UserError(f'{config.dataset} is not the data that {config.out_dir} was trained on. Prepare it as it was, '
                        'or start anew with another --out_dir.')
    else:
        was = opened.contents['config']
        changed = [f'{key} was {was.get(key)!r} and cannot become {getattr(config, key)!r}' for key in FIXED_ON_RESUME
                   if was.get(key) != getattr(config, key)]
        if changed:
            raise UserError(f'{"; ".join(changed)} in a run that is resumed. Leave it out, or start anew.')
    positions = opened.model.config.block_size
    if config.block_size > positions:
        raise UserError(f'block_size={config.block_size} exceeds the {positions} positions of '
                        f'{opened.description}. Use --block_size={positions} or less.')
    return opened


def learning_rate(config, step):
    """Linear warm-up over warmup_iters, then a cosine down to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    end = config.lr_decay_iters or config.max_iters
    at = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * at)) * (config.learning_rate - config.min_lr)


def make_optimizer(config, model, device):
    """AdamW, fused where the device has it; weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{'params': matrices, 'weight_decay': config.weight_decay},
                              {'params': others, 'weight_decay': 0.0}], lr=config.learning_rate,
                             betas=(config.beta1, config.beta2), fused=device.split(':')[0] in ('cuda', 'cpu', 'mps'))


class Trainer:
    """One run: what changes from step to step, and the things a step needs."""

    def __init__(self, config, procs, opened, train_rows, val_rows, last_row):
        self.config, self.procs, self.train_rows, self.val_rows = config, procs, train_rows, val_rows
        self.rows_per_step, self.last_row = config.batch_size * config.gradient_accumulation_steps, last_row
        self.model = opened.model.to(procs.device)
        for p in self.model.parameters():
            p.data = p.data.contiguous()  # transformers' weights come as transposed views
        self.dtype = pick_dtype(config.dtype, procs.device)
        self.optimizer = make_optimizer(config, self.model, procs.device)
        self.scaler = torch.amp.GradScaler('cuda', enabled=self.dtype == torch.float16)
        if config.compile:
            self.model.compile()
        saved = opened.contents
        if saved:
            checkpoint.restore(saved, self.optimizer, self.scaler, opened.description)
        self.step, self.evaluated_at = saved.get('step', 0), saved.get('evaluated_at')
        self.best, self.n_worse = saved.get('best', math.inf), saved.get('n_worse', 0)
        self.loss_sum, self.n_tokens = saved.get('interval', (0.0, 0))  # since the last line of the log
        self.seconds = saved.get('seconds', 0.0)  # in steps: evaluations and saving are left out
        self.grad_norm, self.stop = 0.0, False
        for group in self.optimizer.param_groups if self.step else ():
            group['lr'] = learning_rate(config, self.step - 1)  # as the last step left it
        self.saved_at = self.step if saved and self.evaluated_at == self.step else None  # where ckpt.pt is worth keeping

    @property
    def epoch(self):
        """How many passes over the data the steps so far make."""
        return self.step * self.rows_per_step / self.train_rows.n_rows

    def conditions(self):
        """What, beside FIXED_ON_RESUME, decides the bits of the steps to come."""
        c, kind = self.config, self.procs.device.split(':')[0]
        hardware = torch.cuda.get_device_name() if kind == 'cuda' else torch.backends.cpu.get_cpu_capability()
        return {**{key: getattr(c, key) for key in ('learning_rate', 'min_lr', 'warmup_iters', 'decay_lr', 'grad_clip', 'compile')},
                'lr_decay_iters': c.decay_lr and (c.lr_decay_iters or c.max_iters), 'dtype': str(self.dtype)[6:],
                'device': f'{kind} {hardware}', 'processes': self.procs.world, 'threads': torch.get_num_threads(),
                'torch': str(torch.__version__)}

    def train_step(self, request):
        """One optimizer step: the sum of the losses over all its supervised tokens, by their number."""
        config, procs, started = self.config, self.procs, time.perf_counter()
        start = self.step * self.rows_per_step
        stop = min(start + self.rows_per_step, self.last_row)
        n_tokens = self.train_rows.n_supervised(self.train_rows.slice(start, stop))  # of all processes
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 1_009 + procs.rank)
        losses = []
        for first in range(start + procs.rank * config.batch_size, stop, procs.world * config.batch_size):
            rows = self.train_rows.slice(first, min(first + config.batch_size, stop))
            with autocast(procs.device, self.dtype):
                loss = self.model.loss(tokenfile.make_batch(self.train_rows.split, [i for row in rows for i in row]))
            self.scaler.scale(loss / n_tokens).backward()
            losses.append(loss.detach())
        procs.sum_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        if config.grad_clip:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip).item()
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate(config, self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # All processes must learn of a signal that one of them got, and stop after the same step.
        loss_sum, n_asked = procs.sum([sum(loss.item() for loss in losses), float(request.asked)])
        self.loss_sum, self.n_tokens, self.stop = self.loss_sum + loss_sum, self.n_tokens + n_tokens, n_asked > 0
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def evaluate(self, request=None):
        """val_loss: nats per supervised token of the validation set, each counting the same.

        A StopRequest ends it, in all processes, without a result: it is done again when the run goes on.
        """
        config, procs, rows = self.config, self.procs, self.val_rows
        self.model.eval()
        loss_sum, n_tokens = 0.0, 0
        for batch in rows.batches(config.batch_size, procs.rank, procs.world, config.eval_iters, what='evaluating'):
            with autocast(procs.device, self.dtype):
                loss_sum += self.model.loss(batch).item()
            n_tokens += len(batch.targets)
            if request and request.asked:
                break
        self.model.train()
        loss_sum, n_tokens, n_asked = procs.sum([loss_sum, n_tokens, float(bool(request and request.asked))])
        self.stop = n_asked > 0
        return None if self.stop else loss_sum / n_tokens

    def improved(self, val_loss):
        """Note the val_loss of this step; True where it is the best so far."""
        if val_loss is None:
            return False
        better = val_loss < self.best
        self.n_worse = 0 if better else self.n_worse + 1
        self.best = val_loss if better else self.best
        return better

    def save(self, opened, run, val_loss, names):
        """Write the checkpoints `names` (best.pt, ckpt.pt); the first process does."""
        if self.procs.rank:
            return
        contents = checkpoint.pack(self.model, opened.tokenizer, opened.template, step=self.step, val_loss=val_loss,
                                   seconds=self.seconds, **run)
        resume = dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), best=self.best,
                      n_worse=self.n_worse, evaluated_at=self.evaluated_at, interval=(self.loss_sum, self.n_tokens),
                      conditions=self.conditions())
        for name in names:
            path = os.path.join(self.config.out_dir, name)
            if name == 'ckpt.pt':
                if self.config.keep and self.saved_at not in (None, self.step):
                    checkpoint.keep_older(path, self.saved_at, self.config.keep)
                # what a stop left is not kept, so that a run that was stopped has the older ones of one that was not
                contents, self.saved_at = contents | resume, self.step if self.evaluated_at == self.step else None
            checkpoint.save(contents, path)


def loop(trainer, opened, run, log, request):
    """Steps, evaluations, lines of the log and checkpoints, until the last step or a reason to stop."""
    config = trainer.config
    mark = (trainer.step, trainer.seconds, trainer.n_tokens)  # at the last line of the log
    trainer.model.train()
    while True:
        step, done = trainer.step, trainer.step >= config.max_iters
        due = (step % config.eval_interval == 0 or done) and trainer.evaluated_at != step and not trainer.stop
        val_loss = trainer.evaluate(request) if due and trainer.val_rows else None
        if due and not trainer.stop:
            trainer.evaluated_at, better = step, trainer.improved(val_loss)
            # best.pt first: killed between the two, the run comes from the older ckpt.pt to this best.pt again
            wanted = {'best.pt': better, 'ckpt.pt': better or config.always_save_checkpoint or val_loss is None}
            names = [name for name, want in wanted.items() if want and (step or done)]
            if val_loss is not None:  # the row before the checkpoint, for the same reason
                log.write(step=step, epoch=f'{trainer.epoch:.4f}', val_loss=repr(val_loss), seconds=f'{trainer.seconds:.2f}')
            trainer.save(opened, run, val_loss, names)
            if val_loss is not None:
                log.evaluation(step, val_loss, better, names)
        if done or trainer.stop or config.patience and trainer.n_worse >= config.patience:
            break
        trainer.train_step(request)
        log.bar.update()
        step = trainer.step
        if step % config.log_interval == 0 or step == config.max_iters:
            seconds, n_steps = trainer.seconds - mark[1], step - mark[0]
            log.training(step, trainer.epoch, trainer.loss_sum / trainer.n_tokens, learning_rate(config, step - 1),
                         trainer.grad_norm, (trainer.n_tokens - mark[2]) / seconds, trainer.seconds,
                         (config.max_iters - step) * seconds / n_steps)
            trainer.loss_sum, trainer.n_tokens = 0.0, 0
            mark = (step, trainer.seconds, 0)
    resume = f'--init_from=resume --out_dir={shlex.quote(config.out_dir)}'
    if trainer.stop:
        trainer.save(opened, run, None, ['ckpt.pt'])
        log.say(f'stopped after step {step}; go on with: python train.py {resume}')
    else:
        why = '' if done else f' early: {config.patience} evaluations without a better val_loss'
        log.say(f'finished{why}. Talk to it: python sample.py {resume} --chat')


def train(config, procs):
    """Run the configuration in this process."""
    folders = tokenfile.find_folders(config.dataset, config.data_dir)
    opened = start_model(config, folders)
    run = {'config': configurator.as_dict(config), 'data': [tokenfile.fingerprint(folder) for folder in folders],
           'torchrun': os.environ.get('TORCHELASTIC_RUN_ID', 'none'),
           'origin': opened.contents.get('origin', {'init_from': config.init_from, 'data': tokenfile.sources(folders)})}
    there = [] if config.init_from == 'resume' or config.eval_only else checkpoint.files(config.out_dir)
    if there and not config.overwrite:
        raise UserError(f'{there[-1]} is there already. Go on with it: --init_from=resume; or replace it: '
                        '--overwrite=True; or use another --out_dir.')
    if there and os.path.realpath(config.init_from) == os.path.realpath(config.out_dir):
        raise UserError(f'{config.out_dir} cannot be replaced by a run that begins with it. Use another --out_dir.')
    splits = {name: tokenfile.Split(folders, name, config.loss_on, opened.tokenizer.vocab_size) for name in ('train', 'val')}
    train_rows = tokenfile.Rows(splits['train'], config.block_size, config.seed)
    val_rows = tokenfile.Rows(splits['val'], config.block_size) if len(splits['val']) else None
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    last_row = config.max_iters * rows_per_step
    if config.epochs:
        last_row = min(last_row, math.ceil(config.epochs * train_rows.n_rows))
        config = replace(config, max_iters=math.ceil(last_row / rows_per_step))
    trainer = Trainer(config, procs, opened, train_rows, val_rows, last_row)

    for path in there if procs.rank == 0 else ():  # or a kill would leave this run's log beside that one's checkpoint
        os.remove(path)
    log = runlog.RunLog(config, trainer.step, trainer.evaluated_at, silent=procs.rank > 0)
    log.say(configurator.describe(config))
    log.data(train_rows)
    log.data(val_rows) if val_rows else log.say('val: empty, so there will be no val_loss and no best.pt')
    log.say(f'{opened.description}: {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters, on '
            f'{procs.device} in {str(trainer.dtype)[6:]}, {procs.world} process{"es" * (procs.world > 1)}; '
            f'{config.max_iters:,} steps of {rows_per_step} rows are {last_row / train_rows.n_rows:.2f} epochs')
    was, now = opened.contents.get('conditions', {}), trainer.conditions()
    if changed := [f'{key} was {was[key]}, is {now[key]}' for key in now if was.get(key, now[key]) != now[key]]:
        log.say(f'from here on not bit for bit the run that was saved: {"; ".join(changed)}')
    if config.eval_only:
        log.say(f'val_loss {trainer.evaluate():.4f}')
        return
    with StopRequest(silent=procs.rank > 0) as request:
        loop(trainer, opened, run, log, request)
    log.finish()


def main(argv):
    """The script."""
    asked = configurator.load(Config, argv, check=False)
    path = os.path.join(asked.out_dir, 'ckpt.pt')
    # A checkpoint of the same torchrun: it started all anew since one process died, to go on. (Its count of
    # restarts would not do: it is 0 on a machine that was restarted because another one was.)
    torchrun = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    if torchrun != 'none' and os.path.exists(path) and checkpoint.load(path).get('torchrun') == torchrun:
        argv = [*argv, '--init_from=resume']
        asked = configurator.load(Config, argv, check=False)
    saved = {}
    if asked.init_from == 'resume':  # the keys of that run are the defaults of this one
        saved = {**checkpoint.load(path)['config'], 'init_from': 'resume', 'out_dir': asked.out_dir}
    config = configurator.load(Config, argv, saved)
    runlog.check(config)
    keep_freed_memory()
    with processes(config) as procs:
        writes = procs.rank == 0 and not config.eval_only
        with claimed(config.out_dir, '*.pt.*.tmp') if writes else nullcontext():
            train(config, procs)


if __name__ == '__main__':
    configurator.run(main)
