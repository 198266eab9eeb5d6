"""Fine-tune a GPT-2 on conversations, or train a small one from scratch.

    python train.py config/finetune_oasst.py                        # one GPU, a Mac or a CPU
    torchrun --standalone --nproc_per_node=4 train.py config/finetune_oasst.py
    python train.py --init_from=resume --out_dir=out/oasst          # go on, bit for bit

Everything random in step s, and the data it sees, is a function of (seed, s, process). So resuming
needs only the weights, the optimizer's state and the number of the step.
"""
import math
import os
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Annotated, Literal

import configurator
from configurator import Count, Fraction, Natural, NonNegative, Range, Seed, UserError


@dataclass(frozen=True)
class Config:
    # where from, where to
    init_from: str = 'gpt2'     # scratch, resume, a hub name such as gpt2-medium, or a folder
    out_dir: str = 'out'        # for ckpt.pt, best.pt, log.csv and loss.png
    overwrite: bool = False     # replace the run that is in out_dir
    dataset: str = 'oasst'      # a prepared folder in data_dir; several, with commas, are mixed
    data_dir: str = 'data'      # looked for here, then beside train.py
    # how long, how often
    max_iters: Natural = 0      # optimizer steps; 0 sets no limit
    epochs: Annotated[float, Range(0, 1e6)] = 0.0  # passes; without max_iters, 0 means 3
    eval_interval: Count = 100  # steps between evaluations, which also save
    eval_iters: Natural = 0     # batches in an evaluation; 0 for the whole validation set
    eval_only: bool = False     # evaluate once and stop
    log_interval: Count = 10    # steps between lines; log.csv has every step
    sample_every: Natural = 0   # steps between answers to sample_prompt; 0 for none
    sample_prompt: str = "What's the capital of France?"  # asked in the template
    patience: Natural = 0       # stop after so many evaluations without a better one; 0 never
    always_save_checkpoint: bool = True  # False: write ckpt.pt only if val_loss improved
    # a step: gradient_accumulation_steps micro-batches of batch_size rows, over all processes
    batch_size: Count = 4       # rows in a micro-batch
    gradient_accumulation_steps: Count = 4  # micro-batches, shared among the processes
    block_size: Count = 1024    # positions in a row; longer conversations are left out
    loss_on: Literal['response', 'all'] = 'response'  # the tokens that are learned
    # the shape of a model from scratch; a pretrained one brings its own
    n_layer: Count = 12         # layers
    n_head: Count = 12          # attention heads
    n_embd: Count = 768         # width
    bias: bool = True           # biases in linear layers and norms
    dropout: Fraction = 0.0     # on the embeddings and after each half of a layer
    # the optimizer: AdamW, linear warm-up, cosine decay
    learning_rate: NonNegative = 3e-5  # the highest
    weight_decay: NonNegative = 0.1  # of matrices; biases and norms have none
    beta1: Fraction = 0.9       # AdamW
    beta2: Fraction = 0.95      # AdamW
    grad_clip: NonNegative = 1.0  # largest norm of the gradient; 0 does not clip
    decay_lr: bool = True       # False keeps learning_rate after the warm-up
    warmup_iters: Natural = 20  # steps of warm-up
    lr_decay_iters: Natural = 0  # step at which min_lr is reached; 0 for the last
    min_lr: NonNegative = 0.0   # the lowest
    # the machine
    device: str = 'auto'        # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products
    compile: bool = False       # torch.compile: slower to start, faster afterwards
    timeout_s: Count = 600      # a process ends if another does not answer for so long
    seed: Seed = 1337           # of the order of the data, dropout and a new model
    # where the numbers of log.csv go as well
    tensorboard: bool = False   # to out_dir/tensorboard
    wandb_log: bool = False     # to Weights & Biases
    wandb_project: str = ''     # of Weights & Biases
    wandb_run_name: str = ''    # of Weights & Biases

    def problems(self):
        """Combinations that cannot work."""
        if self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}.'
        if self.min_lr > self.learning_rate:
            yield f'min_lr={self.min_lr} is above learning_rate={self.learning_rate}.'
        for package, wanted in (('tensorboard', self.tensorboard), ('wandb', self.wandb_log)):
            if wanted and not find_spec(package):
                yield f'{package} is not installed. Run: pip install {package}'


# torch takes seconds to import: mistakes on the command line are found before.
configurator.precheck(__name__, Config, check=False)
# torch reads this when it is imported; it means Linux's large pages. Without them, the memory
# that keep_freed_memory (below) keeps grows: 6 GB after 60 steps of distilgpt2, not 4.4.
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

import torch

from core import checkpoint, tokenfile
from core import tokenizer as tokenizers
from core.checkpoint import Checkpoint
from core.conversation import TEMPLATES
from core.device import keep_freed_memory
from core.files import only_writer, reading
from core.processes import StopRequest, processes
from core.rows import Rows
from core.runlog import RunLog
from core.trainer import Trainer
from model import GPT, GPTConfig

# The keys that give a new model its shape.
SHAPE = ('n_layer', 'n_head', 'n_embd', 'bias', 'block_size', 'dropout')


def open_model(config, folders):
    """The checkpoint.Opened to train. Its checkpoint is where the run begins or goes on."""
    metas = [tokenfile.read_meta(folder) for folder in folders]
    # The first data set decides the template. The tags are added if any of them needs them.
    template = metas[0]['template']
    tags = any(TEMPLATES[meta['template']].tags for meta in metas)
    with reading(config.dataset, 'Prepare the data again.'):
        tokenizer = tokenizers.from_state(metas[0]['tokenizer'] | {'tags': tags})
        hashes = {meta['tokenizer']['sha256'] for meta in metas}
    if hashes != {tokenizer.sha256}:
        raise UserError(f'{config.dataset} were prepared with different vocabularies.')
    if config.init_from == 'scratch':
        torch.manual_seed(config.seed)
        shape = {key: getattr(config, key) for key in SHAPE}
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
        opened = checkpoint.Opened(model, tokenizer, template, 'a new model')
    else:
        opened = checkpoint.open_model(config.init_from, config.out_dir, vocabulary=tokenizer)
    positions = opened.model.config.block_size
    if config.block_size > positions:
        raise UserError(f'block_size={config.block_size} exceeds the {positions} positions '
                        f'of {opened.description}. Use --block_size={positions} or less.')
    opened.model.config.dropout = config.dropout
    # A resumed run must have the data that it began with; a new one records it.
    data = [tokenfile.fingerprint(meta) for meta in metas]
    if config.init_from == 'resume':
        checkpoint.check_resume(opened.checkpoint, opened.description, asdict(config), data)
        opened.checkpoint.config = asdict(config)
        return opened
    sources = []
    for folder, meta in zip(folders, metas):
        sources.append({'dataset': os.path.basename(folder),
                        'source': meta.get('source'),
                        'tokens': sum(n['tokens'] for n in meta['splits'].values())})
    # Trainer.save fills in the weights.
    state = Checkpoint(
        model={}, model_args=asdict(opened.model.config), template=template,
        tokenizer=opened.tokenizer.state(), config=asdict(config), step=0, val_loss=None,
        data=data, origin={'init_from': config.init_from, 'data': sources})
    return opened._replace(template=template, checkpoint=state)


def evaluate_and_save(trainer, log, request):
    """Evaluate, log it, and write the checkpoints that are due."""
    config = trainer.config
    state = trainer.state
    val_loss = trainer.evaluate(request)
    if trainer.stopped:
        return
    state.val_loss = val_loss
    better = False
    if val_loss is not None:
        better = state.best is None or val_loss < state.best
        log.write(state.step, epoch=trainer.epoch(), val_loss=val_loss)
        log.say(f'step {state.step}/{config.max_iters} | val_loss {val_loss:.4f}'
                f'{" (best so far)" if better else ""}')
        log.draw()
    if better:
        state.best = val_loss
        state.best_step = state.step
    # First best.pt: killed in between, the run comes back from the older ckpt.pt and writes
    # both again. Nothing is learned at step 0.
    if better and state.step:
        trainer.save('best.pt')
    if state.step and (better or val_loss is None or config.always_save_checkpoint):
        trainer.save('ckpt.pt')


def loop(trainer, log, request):
    """Steps, evaluations, log lines and checkpoints, until the last step or a signal."""
    config = trainer.config
    state = trainer.state
    started = time.monotonic()
    first_step = state.step
    recent = []  # the numbers of the steps since the last line
    trainer.model.train()
    while not trainer.stopped:
        is_last = state.step >= config.max_iters
        due = is_last or state.step % config.eval_interval == 0
        # A run that goes on may have been evaluated here before.
        if due and state.val_loss is None:
            evaluate_and_save(trainer, log, request)
        n_worse = (state.step - state.best_step) // config.eval_interval
        lost_patience = due and state.best is not None and 0 < config.patience <= n_worse
        if trainer.stopped or is_last or lost_patience:
            break

        numbers = trainer.train_step(request)
        log.write(state.step, epoch=trainer.epoch(), **numbers)
        log.bar.update()
        recent.append(numbers)
        progress = f'step {state.step}/{config.max_iters}'
        if state.step % config.log_interval == 0 or state.step == config.max_iters:
            # A mean of steps, to look at; log.csv has each one.
            loss = sum(step['loss'] for step in recent) / len(recent)
            speed = sum(step['tokens_per_s'] for step in recent) / len(recent)
            seconds_per_step = (time.monotonic() - started) / (state.step - first_step)
            seconds_left = (config.max_iters - state.step) * seconds_per_step
            log.say(f'{progress} | loss {loss:.4f} | lr {numbers["learning_rate"]:.2e} | '
                    f'{speed:,.0f} supervised tokens/s | '
                    f'{timedelta(seconds=round(seconds_left))} left')
            recent = []
        if config.sample_every and state.step % config.sample_every == 0 and not log.silent:
            log.say(f'{progress} | {config.sample_prompt} -> {trainer.answer()!r}')
    log.bar.close()
    resume = f'--init_from=resume --out_dir={shlex.quote(config.out_dir)}'
    if trainer.stopped:
        trainer.save('ckpt.pt')
        log.say(f'stopped after step {state.step}. Go on: python train.py {resume}')
        return
    if state.step < config.max_iters:
        log.say(f'no better val_loss in {config.patience} evaluations')
    log.draw()
    log.say(f'the curve is in {log.out_dir}/loss.png, the numbers are in {log.path}')
    log.say(f'finished. Talk to it: python sample.py {resume} --chat')


def clear_out_dir(config):
    """Remove the run that is in out_dir if --overwrite says so; UserError if not."""
    paths = [os.path.join(config.out_dir, name) for name in ('ckpt.pt', 'best.pt')]
    for path in filter(os.path.exists, paths):
        if not config.overwrite:
            raise UserError(f'{path} is there already. Go on with it: --init_from=resume; '
                            'or replace it: --overwrite; or use another --out_dir.')
        os.remove(path)


def train(config, procs):
    """Run the configuration in this process."""
    # The model, and the data packed into rows.
    folders = tokenfile.find_folders(config.dataset, config.data_dir)
    opened = open_model(config, folders)
    vocab_size = opened.tokenizer.vocab_size
    train_split = tokenfile.Split(folders, 'train', config.loss_on, vocab_size)
    val_split = tokenfile.Split(folders, 'val', config.loss_on, vocab_size)
    train_rows = Rows(train_split, config.block_size, config.seed)
    val_rows = Rows(val_split, config.block_size) if len(val_split) else None

    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    if config.epochs or not config.max_iters:
        n_steps = math.ceil((config.epochs or 3) * train_rows.n_rows / rows_per_step)
        config = replace(config, max_iters=min(config.max_iters or n_steps, n_steps))
    was = opened.checkpoint.conditions
    trainer = Trainer(config, procs, opened, train_rows, val_rows)
    silent = procs.rank > 0
    request = StopRequest(silent)
    if config.eval_only:
        if not val_rows:
            raise UserError(f'{config.dataset} has no validation data to evaluate on.')
        val_loss = trainer.evaluate(request)
        if val_loss is not None and not silent:
            print(f'val_loss {val_loss:.4f}')
        return

    if not silent and config.init_from != 'resume':
        clear_out_dir(config)
    log = RunLog(config, trainer.state, silent)
    log.say(train_rows.describe())
    log.say(val_rows.describe() if val_rows else 'val: empty, so there is no val_loss')
    conditions = trainer.conditions()
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    log.say(f'{opened.description}: {n_parameters / 1e6:.1f} M parameters, in '
            f'{conditions["dtype"]} on {procs.device}, processes: {procs.world}')
    n_epochs = config.max_iters * rows_per_step / train_rows.n_rows
    log.say(f'{config.max_iters:,} steps of {rows_per_step} rows are {n_epochs:.2f} epochs')
    for key, now in conditions.items():
        if was and repr(was.get(key)) != repr(now):
            log.say('from here on not bit for bit the saved run: '
                    f'{key} was {was.get(key)}, is {now}')
    loop(trainer, log, request)


def main(argv):
    config = configurator.load(Config, argv, check=False)
    if config.init_from == 'resume':
        # The keys of that run are the defaults of this one.
        path = checkpoint.find(config.out_dir) or os.path.join(config.out_dir, 'ckpt.pt')
        saved = checkpoint.load(path).config | {'init_from': 'resume'}
        config = configurator.load(Config, argv, saved)
        config = replace(config, out_dir=os.path.dirname(path))
    else:
        config = configurator.load(Config, argv)
    keep_freed_memory()
    with processes(config) as procs:
        writes = procs.rank == 0 and not config.eval_only
        with only_writer(config.out_dir) if writes else nullcontext():
            train(config, procs)


if __name__ == '__main__':
    configurator.run(main)
