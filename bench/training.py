"""Compare steps of fine-tuning: ours, TRL's SFTTrainer, the Hugging Face Trainer and nanoGPT.

    python data/oasst/prepare.py --max_tokens=513
    python bench/training.py --data=data/oasst
    python bench/training.py --players=ours,other-ours --other=FOLDER   # another checkout of ours
    python bench/training.py --device=cuda --players=ours,ours-compiled,trl-best,nanogpt

All train a model of the same shape, from random weights, on the same data. What counts is how many
supervised tokens they learn in a second. trl-default and hf-default do what the first example of
their documentation does. In those with -best and -f32, everything is on that made them faster here.
Further players: gemm, the fastest matrix product that the machine can do; nanogpt; ours-f32,
trl-f32, hf-f32. All but gemm take -compiled.
"""
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import contest  # first: it puts the repository on the path
import torch

import configurator
from configurator import Count
from contest import SHAPES
from core import tokenfile

WARM_UP = 4  # steps before the first round
TAGS_TOO = 50263  # GPT-2's vocabulary and the six tags
PADDED = 50304  # the same in whole blocks of 128
PLAYERS = (r'gemm|ours(-f32)?(-compiled)?|nanogpt(-compiled)?|'
           r'(trl|hf)-(default|(best|f32)(-compiled)?)')


@dataclass(frozen=True)
class Config:
    data: str = 'data/oasst'   # a prepared folder
    shape: Literal[*SHAPES] = 'distilgpt2'  # of the model
    block_size: Count = 512    # positions in a row
    batch_size: Count = 4      # rows in a micro-batch; who pads takes conversations to fill them
    gradient_accumulation_steps: Count = 1  # micro-batches in a step
    players: str = 'ours,ours-compiled,trl-best,trl-default,hf-best,hf-default'  # see above
    other: str = ''            # a checkout of this repository, for the player other-ours
    rounds: Count = 5          # that each player plays
    steps: Count = 1           # in a round
    device: Literal['cpu', 'cuda'] = 'cpu'  # where to train
    nanogpt: str = 'nanoGPT'   # a clone of https://github.com/karpathy/nanoGPT, for its player
    player: str = ''           # set for a player's own process

    def problems(self):
        """Players that do not exist."""
        expected = ('gemm, ours, nanogpt, trl-default, trl-best, hf-default, hf-best, or one of '
                    'them with -compiled, or -f32 instead of -best')
        return contest.problems(self.players, self.other, PLAYERS, expected)


def synchronize(config):
    """Wait for the GPU, if there is one."""
    if config.device != 'cpu':
        torch.cuda.synchronize()


# ---- ours ----

def play_ours(stage, config):
    """Steps as train.py takes them."""
    trainer = make_trainer(config)
    trainer.model.train()
    request = SimpleNamespace(asked=False)  # nobody asks it to stop

    def a_round():
        first = trainer.state.step * trainer.rows_per_step
        for _ in range(config.steps):
            trainer.train_step(request)
        synchronize(config)
        last = trainer.state.step * trainer.rows_per_step
        learned = trainer.train_rows.n_supervised(first, last)
        return {'supervised tokens': learned, 'TFLOP': tera_operations(trainer, first, last)}

    for _ in range(WARM_UP):
        trainer.train_step(request)
    stage.play(a_round)


def tera_operations(trainer, first, last):
    """What training on these rows takes, forward and backward.

    6 operations for each weight and token, the head's for supervised tokens only. Attention: two
    products under the causal mask, 6 for each pair of tokens.
    """
    rows = trainer.train_rows
    shape = trainer.model.config
    lengths = rows.split.lengths[rows.conversations(first, last)] - 1
    n = 12 * shape.n_layer * shape.n_embd ** 2 * lengths.sum()
    n += trainer.model.transformer.wte.weight.numel() * rows.n_supervised(first, last)
    n += shape.n_layer * shape.n_embd * (lengths ** 2).sum()
    return 6 * float(n) / 1e12


def make_trainer(config):
    """The Trainer that train.py would make."""
    import train
    from core.device import keep_freed_memory
    from core.processes import Processes
    from core.rows import Rows
    from core.trainer import Trainer
    keep_freed_memory()
    n_layer, n_head, n_embd = SHAPES[config.shape]
    data_dir, dataset = os.path.split(os.path.abspath(config.data))
    settings = train.Config(
        init_from='scratch', dataset=dataset, data_dir=data_dir, block_size=config.block_size,
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps, device=config.device,
        compile='compiled' in config.player,
        dtype='float32' if 'f32' in config.player else 'bfloat16')
    opened = train.open_model(settings, [config.data])
    rows = Rows(tokenfile.Split([config.data], 'train'), config.block_size, settings.seed)
    procs = Processes(0, 1, config.device)
    return Trainer(settings, procs, opened, rows)


# ---- TRL and the Hugging Face Trainer ----

def play_hugging_face(stage, config):
    """TRL's SFTTrainer or transformers' Trainer, in its own loop; rounds begin and end in it."""
    import transformers
    trainer = make_hugging_face_trainer(config)
    plain_step = trainer.training_step
    learned = 0

    def training_step(model, inputs, *rest, **more):
        nonlocal learned
        learned += int((inputs['labels'][:, 1:] != -100).sum())
        return plain_step(model, inputs, *rest, **more)

    class Rounds(transformers.TrainerCallback):
        """After the first steps: ready, then a round of `steps` steps whenever the referee asks."""
        started = None

        def on_step_begin(self, args, state, control, **more):
            nonlocal learned
            if state.global_step >= WARM_UP and (state.global_step - WARM_UP) % config.steps == 0:
                if self.started is None:
                    stage.say(ready=True)
                if not stage.wait():
                    os._exit(0)
                learned = 0
                self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **more):
            if self.started and (state.global_step - WARM_UP) % config.steps == 0:
                synchronize(config)
                seconds = time.perf_counter() - self.started
                stage.say(**{'seconds': seconds, 'supervised tokens': learned})

    trainer.training_step = training_step
    trainer.add_callback(Rounds())
    trainer.train()


def make_hugging_face_trainer(config):
    """The player's trainer, with our conversations."""
    import transformers
    from datasets import Dataset
    kind, *how = config.player.split('-')  # trl or hf; default, best or f32; more switches
    best = 'default' not in how
    packing = kind == 'trl' and best
    n_layer, n_head, n_embd = SHAPES[config.shape]
    shape = {'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'vocab_size': TAGS_TOO}
    if best:
        shape |= {'attn_pdrop': 0.0, 'embd_pdrop': 0.0, 'resid_pdrop': 0.0, 'vocab_size': PADDED}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))

    ids, masks = conversations(config)
    options = {
        'output_dir': tempfile.mkdtemp(), 'max_steps': 10 ** 6, 'use_cpu': config.device == 'cpu',
        'gradient_accumulation_steps': config.gradient_accumulation_steps, 'seed': 0,
        'per_device_train_batch_size': 8, 'dataloader_pin_memory': False, 'disable_tqdm': True,
        'report_to': 'none', 'save_strategy': 'no', 'logging_strategy': 'no'}
    if best:
        size = config.batch_size  # rows, or as many conversations as would fill them
        if not packing:
            mean_length = sum(map(len, ids)) / len(ids)
            size = round(size * config.block_size / mean_length)
        options |= {'per_device_train_batch_size': size, 'bf16': 'f32' not in how,
                    'gradient_checkpointing': False, 'torch_compile': 'compiled' in how}

    if kind == 'trl':
        import trl
        if best:
            options |= {'packing': packing, 'max_length': config.block_size}
        data = Dataset.from_dict({'input_ids': ids, 'assistant_masks': masks})
        return trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=data,
                              processing_class=tiny_tokenizer())
    labels = []
    for conversation, mask in zip(ids, masks):
        labels.append([i if m else -100 for i, m in zip(conversation, mask)])
    return transformers.Trainer(
        model, transformers.TrainingArguments(**options),
        train_dataset=Dataset.from_dict({'input_ids': ids, 'labels': labels}),
        data_collator=transformers.DataCollatorForSeq2Seq(tiny_tokenizer()))


def conversations(config):
    """The ids and the masks of the training split, two lists of lists."""
    split = tokenfile.Split([config.data], 'train')
    all_ids = []
    all_masks = []
    for i in range(len(split)):
        ids, mask = split[i]
        if len(ids) <= config.block_size and mask.any():
            all_ids.append(ids.tolist())
            all_masks.append(mask.tolist())
    return all_ids, all_masks


def tiny_tokenizer():
    """A tokenizer that pads. The peers want one, although the data is tokenized already."""
    import tokenizers
    import transformers
    model = tokenizers.models.WordLevel({'<|endoftext|>': 50256}, '<|endoftext|>')
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        eos_token='<|endoftext|>', pad_token='<|endoftext|>')


# ---- nanoGPT ----

def play_nanogpt(stage, config):
    """nanoGPT's model, optimizer and batches, in the loop of its train.py.

    It learns every token, and texts in a row see each other. Only our supervised share counts.
    """
    import numpy as np
    sys.path.insert(0, config.nanogpt)
    from model import GPT, GPTConfig
    n_layer, n_head, n_embd = SHAPES[config.shape]
    model = GPT(GPTConfig(block_size=config.block_size, vocab_size=PADDED, n_layer=n_layer,
                          n_head=n_head, n_embd=n_embd, dropout=0.0, bias=False))
    model.to(config.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), config.device)
    if 'compiled' in config.player:
        model = torch.compile(model)
    data = np.memmap(os.path.join(config.data, 'train.bin'), np.uint16, mode='r')
    counts = tokenfile.read_meta(config.data)['splits']['train']
    share = counts['supervised_tokens'] / counts['tokens']
    rows_in_round = config.steps * config.gradient_accumulation_steps * config.batch_size

    def get_batch():
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,))
        spans = [data[i:i + config.block_size + 1].astype(np.int64) for i in starts]
        rows = torch.from_numpy(np.stack(spans)).to(config.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def a_round():
        for _ in range(config.steps):
            for _ in range(config.gradient_accumulation_steps):
                with torch.amp.autocast(config.device, torch.bfloat16):
                    _, loss = model(*get_batch())
                (loss / config.gradient_accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(config)
        return {'supervised tokens': share * rows_in_round * config.block_size}

    for _ in range(WARM_UP):
        a_round()
    stage.play(a_round)


# ---- what the machine can do at all ----

def play_gemm(stage, config):
    """The fastest bfloat16 matrix product among a few large ones."""
    pairs = []
    for k, n in ((768, 3072), (3072, 768), (4096, 4096), (768, 50304)):
        a = torch.randn(2048, k, device=config.device).bfloat16()
        b = torch.randn(k, n, device=config.device).bfloat16()
        pairs.append((a, b))

    def a_round():
        best = 0.0
        for a, b in pairs:
            a @ b
            synchronize(config)
            started = time.perf_counter()
            for _ in range(5):
                a @ b
            synchronize(config)
            seconds = (time.perf_counter() - started) / 5
            flop = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            best = max(best, flop / seconds / 1e12)
        return {'TFLOP/s': best}

    stage.play(a_round)


def play(config):
    """One player, in its own process."""
    kind = config.player.split('-')[0]
    players = {'ours': play_ours, 'nanogpt': play_nanogpt, 'gemm': play_gemm,
               'trl': play_hugging_face, 'hf': play_hugging_face}
    players[kind](contest.Stage(), config)


def main(argv):
    config = configurator.load(Config, argv)
    if config.player:
        play(config)
        return
    players = contest.contest(config.players.split(','), argv, config.rounds, config.other)
    print(contest.versions('torch', 'transformers', 'trl', 'accelerate'))
    learners = [player for player in players if player.name != 'gemm']
    if learners:
        print(contest.table(learners, 'supervised tokens'))
    for gemm in players:
        if gemm.name != 'gemm':
            continue
        peak = statistics.median(facts['TFLOP/s'] for facts in gemm.rounds)
        print(f'fastest bfloat16 product: {peak:.3f} TFLOP/s')
        for player in learners:
            if 'ours' in player.name:
                reached = statistics.median(player.rates('TFLOP'))
                print(f'{player.name}: {reached:.3f} TFLOP/s, {reached / peak:.0%} of that')


if __name__ == '__main__':
    configurator.run(main)
