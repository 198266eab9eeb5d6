"""A step of fine-tuning, ours beside TRL's SFTTrainer, the Hugging Face Trainer and nanoGPT.

    python data/oasst/prepare.py --max_tokens=513
    python bench/training.py --data=data/oasst
    python bench/training.py --data=data/oasst --players=ours,ours-compiled,trl-best,nanogpt --device=cuda

All train a model of the same shape from random weights on the same tokens, and are compared by the
supervised tokens they learn in a second. trl-default and hf-default are what their documentation's
first example does; the players ending in -best and -f32 have what made them faster here switched on.
"""
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace

import contest  # also finds the repository's modules
import torch

import configurator
from core import tokenfile

WARM_UP = 4  # steps before the first round, for everybody
SHAPES = {'distilgpt2': (6, 12, 768), 'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024)}


@dataclass(frozen=True)
class Config:
    data: str = 'data/oasst'   # a prepared folder
    shape: str = 'distilgpt2'  # distilgpt2, gpt2 or gpt2-medium
    block_size: int = 512      # positions in a row
    batch_size: int = 4        # rows in a micro-batch; players that pad take as many conversations as fill them
    gradient_accumulation_steps: int = 1  # micro-batches in a step
    players: str = 'ours,ours-compiled,trl-best,trl-default,hf-best,hf-default'  # or ours-f32, trl-f32, hf-f32, nanogpt, gemm
    rounds: int = 5            # each player plays so many
    steps: int = 1             # in a round
    device: str = 'cpu'        # or cuda
    nanogpt: str = 'nanoGPT'   # a clone of https://github.com/karpathy/nanoGPT, for its player
    player: str = ''           # set by the referee

    def problems(self):
        """What cannot work, a sentence each."""
        if self.shape not in SHAPES:
            yield f'shape={self.shape!r}: expected one of {", ".join(SHAPES)}.'
        for name in self.players.split(','):
            if not re.fullmatch(r'gemm|(ours|nanogpt)(-f32)?(-compiled)?|(trl|hf)-(default|(best|f32)(-padded)?(-sorted)?(-compiled)?)', name):
                yield (f'players={name!r}: expected gemm, ours, nanogpt, trl-default, trl-best, hf-default, hf-best, '
                       'or one of them with -compiled, -padded, -sorted, or -f32 instead of -best.')


def synchronize(config):
    """Wait for the GPU, if there is one."""
    if config.device == 'cuda':
        torch.cuda.synchronize()


def play_ours(stage, config):
    """train.Trainer, as train.py uses it."""
    from core import kernels
    from core import processes
    import train
    kernels.keep_freed_memory()
    n_layer, n_head, n_embd = SHAPES[config.shape]
    folder, name = os.path.split(os.path.abspath(config.data))
    settings = train.Config(init_from='scratch', dataset=name, data_dir=folder, block_size=config.block_size, n_layer=n_layer,
                            n_head=n_head, n_embd=n_embd, batch_size=config.batch_size,
                            gradient_accumulation_steps=config.gradient_accumulation_steps, device=config.device,
                            compile='compiled' in config.player,
                            dtype='float32' if 'f32' in config.player else 'bfloat16')
    folders = tokenfile.find_folders(name, folder)
    rows = tokenfile.Rows(tokenfile.Split(folders, 'train'), config.block_size, settings.seed)
    procs = processes.Processes(0, 1, config.device)
    trainer = train.Trainer(settings, procs, train.start_model(settings, folders), rows, None, 10 ** 9)
    trainer.model.train()
    nobody = SimpleNamespace(asked=False)  # to stop
    n_head_weights = trainer.model.transformer.wte.weight.numel()
    n_body_weights = 12 * n_layer * n_embd ** 2

    def a_round():
        first, tokens, flops = trainer.step, trainer.n_tokens, 0
        for _ in range(config.steps):
            trainer.train_step(nobody)
        synchronize(config)
        learned = trainer.n_tokens - tokens
        for row in rows.slice(first * trainer.rows_per_step, trainer.step * trainer.rows_per_step):
            lengths = rows.split.lengths[row] - 1
            # 6 a weight and token; two products of queries, keys and values under the causal mask, 3 times with backward
            flops += 6 * n_body_weights * lengths.sum() + 6 * n_layer * n_embd * (lengths ** 2).sum()
        return {'supervised tokens': learned, 'TFLOP': float(flops + 6 * n_head_weights * learned) / 1e12}
    for _ in range(WARM_UP):
        trainer.train_step(nobody)
    stage.play(a_round)


def conversations(config):
    """Lists of ids and of masks, each as long as its conversation, of the train split."""
    split = tokenfile.Split([config.data], 'train')
    usable = [i for i in range(len(split)) if split.lengths[i] <= config.block_size and split.n_supervised[i]]
    return [split[i][0].tolist() for i in usable], [split[i][1].tolist() for i in usable]


def play_hugging_face(stage, config):
    """TRL's SFTTrainer or transformers' Trainer, in its own loop; rounds are taken at its step's ends."""
    import transformers
    from datasets import Dataset
    kind, how = config.player.split('-', 1)  # trl or hf; default, f32 or best, with more switches
    best = 'default' not in how
    n_layer, n_head, n_embd = SHAPES[config.shape]
    no_dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0) if best else {}
    vocab_size = 50304 if best else 50263  # whole blocks, or GPT-2's and the six tags
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, **no_dropout))
    ids, masks = conversations(config)
    mean = sum(map(len, ids)) / len(ids)
    packing = kind == 'trl' and best and 'padded' not in how
    size = (config.batch_size if packing else round(config.batch_size * config.block_size / mean)) if best else 8
    common = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, max_steps=10 ** 6,
                  gradient_accumulation_steps=config.gradient_accumulation_steps, report_to='none',
                  save_strategy='no', logging_strategy='no', disable_tqdm=True, use_cpu=config.device == 'cpu', seed=0,
                  dataloader_pin_memory=False)
    if best:
        common |= dict(bf16='f32' not in how, gradient_checkpointing=False, torch_compile='compiled' in how,
                       group_by_length=not packing and 'sorted' in how)
        if not packing and 'sorted' in how:
            common['train_sampling_strategy'] = 'group_by_length'
        common.pop('group_by_length')
    vocabulary = tiny_tokenizer()
    if kind == 'trl':
        import trl
        more = dict(packing=packing, max_length=config.block_size) if best else {}
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**common, **more), processing_class=vocabulary,
                                 train_dataset=Dataset.from_dict({'input_ids': ids, 'assistant_masks': masks}))
    else:
        labels = [[i if m else -100 for i, m in zip(*pair)] for pair in zip(ids, masks)]
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**common),
                                       train_dataset=Dataset.from_dict({'input_ids': ids, 'labels': labels}),
                                       data_collator=transformers.DataCollatorForSeq2Seq(vocabulary))
    tokens, plain_step = [0], trainer.training_step

    def training_step(model, inputs, *rest, **more):
        tokens[0] += int((inputs['labels'][:, 1:] != -100).sum())
        return plain_step(model, inputs, *rest, **more)
    trainer.training_step = training_step

    class Rounds(transformers.TrainerCallback):
        """Says ready after the first steps, then waits before every `steps`th step."""
        started = None

        def on_step_begin(self, args, state, control, **more):
            if state.global_step >= WARM_UP and (state.global_step - WARM_UP) % config.steps == 0:
                if self.started is None:
                    stage.say(ready=True)
                stage.wait()
                tokens[0], self.started = 0, time.perf_counter()

        def on_step_end(self, args, state, control, **more):
            if self.started and (state.global_step - WARM_UP) % config.steps == 0:
                synchronize(config)
                stage.say(**{'seconds': time.perf_counter() - self.started, 'supervised tokens': tokens[0]})
    trainer.add_callback(Rounds())
    trainer.train()


def tiny_tokenizer():
    """Something that pads: the peers want a tokenizer, though all is tokenized already."""
    import tokenizers
    import transformers
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({'<|endoftext|>': 50256}, '<|endoftext|>')),
        eos_token='<|endoftext|>', pad_token='<|endoftext|>')


def play_nanogpt(stage, config):
    """nanoGPT's model, optimizer and batches in the loop of its train.py: every token, no isolation."""
    import numpy as np
    sys.path.insert(0, config.nanogpt)
    sys.modules.pop('model', None)
    from model import GPT, GPTConfig
    n_layer, n_head, n_embd = SHAPES[config.shape]
    model = GPT(GPTConfig(block_size=config.block_size, vocab_size=50304, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                          dropout=0.0, bias=False)).to(config.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), config.device)
    if 'compiled' in config.player:
        model = torch.compile(model)
    data = np.memmap(os.path.join(config.data, 'train.bin'), np.uint16, mode='r')
    meta = tokenfile.read_meta(config.data)['splits']['train']
    share = meta['supervised_tokens'] / meta['tokens']

    def get_batch():
        at = torch.randint(len(data) - config.block_size, (config.batch_size,))
        x, y = (torch.stack([torch.from_numpy(data[i + k:i + k + config.block_size].astype(np.int64)) for i in at])
                for k in (0, 1))
        return x.to(config.device), y.to(config.device)

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
        return {'supervised tokens': share * config.steps * config.gradient_accumulation_steps * config.batch_size * config.block_size}
    for _ in range(-(-WARM_UP // config.steps)):
        a_round()
    stage.play(a_round)


def play_gemm(stage, config):
    """The fastest bfloat16 matrix product among a few large ones: what the machine can do at all."""
    pairs = [(torch.randn(2048, k, device=config.device).bfloat16(), torch.randn(k, n, device=config.device).bfloat16())
             for k, n in ((768, 3072), (3072, 768), (4096, 4096), (768, 50304))]

    def a_round():
        best = 0.0
        for a, b in pairs:
            a @ b
            synchronize(config)
            started = time.perf_counter()
            for _ in range(5):
                a @ b
            synchronize(config)
            best = max(best, 5 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - started) / 1e12)
        return {'best': best}
    stage.play(a_round)


def main(argv):
    """The referee, or one player."""
    config = configurator.load(Config, argv)
    if config.player:
        kind = config.player.split('-')[0]
        play = {'ours': play_ours, 'nanogpt': play_nanogpt, 'gemm': play_gemm}.get(kind, play_hugging_face)
        play(contest.Stage(), config)
    players = contest.contest(config.players.split(','), argv, config.rounds)
    print(contest.versions('torch', 'transformers', 'trl', 'accelerate'))
    peaks = [facts['best'] for p in players if p.name == 'gemm' for facts in p.rounds]
    learners = [player for player in players if player.name != 'gemm']
    print(contest.table(learners, 'supervised tokens'))
    for player in learners:
        if peaks and player.name.startswith('ours'):
            reached, peak = sorted(player.rates('TFLOP'))[len(player.rounds) // 2], sorted(peaks)[len(peaks) // 2]
            print(f'{player.name}: {reached:.3f} TFLOP/s, {reached / peak:.0%} of the fastest bfloat16 product ({peak:.3f})')


if __name__ == '__main__':
    configurator.run(main)
