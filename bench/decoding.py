"""Compare how fast tokens are written after a prompt: ours, transformers, CTranslate2, nanoGPT.

    python bench/decoding.py                    # one answer at a time
    python bench/decoding.py --batch_size=10
    python bench/decoding.py --players=ours-int8,ct2-int8,ours-float32,ct2-float32
    python bench/decoding.py --players=ours-int8,other-ours-int8 --other=FOLDER

All have random weights in the same shape, take the likeliest token, and write the same number of
them. A round is one whole call, the reading of the prompt included.
"""
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

import contest  # first: it puts the repository on the path
import starting
import torch

import configurator
from configurator import Count
from contest import SHAPES

DEFAULT = 'ours-float32,ours-bfloat16,ours-int8,hf-float32,hf-bfloat16'
PLAYERS = r'(ours|hf|nanogpt)-(float32|bfloat16|float16)|ours-int8|ct2-(float32|int8)'


@dataclass(frozen=True)
class Config:
    shape: Literal[*SHAPES] = 'gpt2-medium'  # of the model
    batch_size: Count = 1   # answers at a time
    prompt: Count = 32      # tokens
    new_tokens: Count = 128  # in each answer
    players: str = DEFAULT  # also ct2-int8, nanogpt-float32, other-ours-float32 and so on
    other: str = ''         # a checkout of this repository, for the players other-ours-…
    rounds: Count = 5       # that each player plays
    device: Literal['cpu', 'cuda'] = 'cpu'  # where to compute
    nanogpt: str = 'nanoGPT'  # a clone of https://github.com/karpathy/nanoGPT, for its player
    player: str = ''        # set for a player's own process

    def problems(self):
        """Players that do not exist."""
        expected = 'ours, hf, nanogpt or ct2, a dash and a dtype'
        return contest.problems(self.players, self.other, PLAYERS, expected)


def make_ours(config, dtype):
    """A function that continues prompts (B, T)."""
    from core.decoding_weights import prepare
    from core.device import keep_freed_memory
    from core.generate import Sampling, generate
    from model import GPT, GPTConfig
    keep_freed_memory()
    n_layer, n_head, n_embd = SHAPES[config.shape]
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    prepare(model, config.device, dtype)

    def write(prompts):
        likeliest = Sampling(temperature=0)
        for _ in generate(model, prompts.tolist(), config.new_tokens, likeliest):
            pass
    return write


def make_hf(config, dtype):
    """The same with transformers."""
    import transformers
    n_layer, n_head, n_embd = SHAPES[config.shape]
    shape = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = transformers.GPT2LMHeadModel(shape)
    model = model.to(config.device, getattr(torch, dtype)).eval()

    def write(prompts):
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                       pad_token_id=50256, min_new_tokens=config.new_tokens,
                       max_new_tokens=config.new_tokens)
    return write


def make_ct2(config, dtype):
    """The same with CTranslate2, which converts a folder in transformers' form."""
    import ctranslate2
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model = starting.make_folder(config.shape, folder)
        # CTranslate2 wants tokens that we have no use for.
        wanted = {'bos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>'}
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **wanted)
        tokenizer.save_pretrained(model)
        converted = os.path.join(folder, 'converted')
        ctranslate2.converters.TransformersConverter(model).convert(converted, quantization=dtype)
        generator = ctranslate2.Generator(
            converted, config.device, compute_type=dtype, intra_threads=torch.get_num_threads())

    def write(prompts):
        texts = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts.tolist()]
        answers = generator.generate_batch(
            texts, sampling_topk=1, include_prompt_in_result=False,
            min_length=config.new_tokens, max_length=config.new_tokens)
        assert all(len(answer.sequences_ids[0]) == config.new_tokens for answer in answers)
    return write


def make_nanogpt(config, dtype):
    """The same with nanoGPT."""
    sys.path.insert(0, config.nanogpt)
    from model import GPT, GPTConfig
    n_layer, n_head, n_embd = SHAPES[config.shape]
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=0.0))
    model = model.to(config.device, getattr(torch, dtype)).eval()

    def write(prompts):
        model.generate(prompts, config.new_tokens, top_k=1)
    return write


def play(config):
    """One player, in its own process."""
    stage = contest.Stage()
    torch.manual_seed(0)
    kind, dtype = config.player.split('-')
    make = {'ours': make_ours, 'hf': make_hf, 'ct2': make_ct2, 'nanogpt': make_nanogpt}
    write = make[kind](config, dtype)
    prompts = torch.randint(50257, (config.batch_size, config.prompt), device=config.device)

    def a_round():
        with torch.inference_mode():
            write(prompts)
        if config.device == 'cuda':
            torch.cuda.synchronize()
        return {'tokens': config.batch_size * config.new_tokens}

    a_round()
    stage.play(a_round)


def main(argv):
    config = configurator.load(Config, argv)
    if config.player:
        play(config)
        return
    players = contest.contest(config.players.split(','), argv, config.rounds, config.other)
    print(contest.versions('torch', 'transformers', 'ctranslate2'))
    print(f'{config.shape}: {config.new_tokens} tokens after a prompt of {config.prompt}, '
          f'{config.batch_size} at a time')
    print(contest.table(players, 'tokens', digits=1))


if __name__ == '__main__':
    configurator.run(main)
