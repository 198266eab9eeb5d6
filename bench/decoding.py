"""Writing tokens after a prompt: ours beside transformers' generate and nanoGPT, greedy, no stops.

    python bench/decoding.py                    # one answer at a time
    python bench/decoding.py --batch_size=10

All have the shape of gpt2-medium and random weights, and write the same number of tokens; what is
timed is a whole call, with the reading of the prompt.
"""
import re
import sys
from dataclasses import dataclass

import contest  # also finds the repository's modules
import torch

import configurator
from training import SHAPES


@dataclass(frozen=True)
class Config:
    shape: str = 'gpt2-medium'  # distilgpt2, gpt2 or gpt2-medium
    batch_size: int = 1         # answers at once
    prompt: int = 32            # tokens
    new_tokens: int = 128       # in each answer
    players: str = 'ours-float32,ours-bfloat16,ours-int8,ours-int8-compiled,hf-float32,hf-bfloat16'  # or nanogpt-float32
    rounds: int = 5             # each player plays so many
    device: str = 'cpu'         # or cuda
    nanogpt: str = 'nanoGPT'    # a clone of https://github.com/karpathy/nanoGPT, for its player
    player: str = ''            # set by the referee

    def problems(self):
        """What cannot work, a sentence each."""
        for name in self.players.split(','):
            if not re.fullmatch(r'(ours|hf|nanogpt)-(float32|bfloat16|float16)|ours-int8(-compiled)?', name):
                yield f'players={name!r}: expected ours, hf or nanogpt, a dash and a dtype; or ours-int8-compiled.'


def make_player(config):
    """A function prompts (B, T) -> None that writes new_tokens after each."""
    kind, dtype, *more = config.player.split('-')
    n_layer, n_head, n_embd = SHAPES[config.shape]
    torch.manual_seed(0)
    if kind == 'ours':
        from core import generate as decoding
        from core import kernels
        from model import GPT, GPTConfig
        kernels.keep_freed_memory()
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        decoding.prepare(model, config.device, dtype, 'compiled' in more)
        return lambda prompts: list(decoding.generate(model, prompts.tolist(), config.new_tokens, temperature=0))
    if kind == 'hf':
        import transformers
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        model = model.to(config.device, getattr(torch, dtype)).eval()
        return lambda prompts: model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=50256,
                                              min_new_tokens=config.new_tokens, max_new_tokens=config.new_tokens)
    sys.path.insert(0, config.nanogpt)
    sys.modules.pop('model', None)
    import model as nanogpt
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True, dropout=0.0))
    model = model.to(config.device, getattr(torch, dtype)).eval()
    return lambda prompts: model.generate(prompts, config.new_tokens, top_k=1)


def main(argv):
    """The referee, or one player."""
    config = configurator.load(Config, argv)
    if config.player:
        stage = contest.Stage()
        write = make_player(config)
        prompts = torch.randint(50257, (config.batch_size, config.prompt), device=config.device)

        def a_round():
            with torch.inference_mode():
                write(prompts)
            if config.device == 'cuda':
                torch.cuda.synchronize()
            return {'tokens': config.batch_size * config.new_tokens}
        a_round()
        stage.play(a_round)
    players = contest.contest(config.players.split(','), argv, config.rounds)
    print(contest.versions('torch', 'transformers'))
    print(f'{config.shape}, {config.batch_size} at once, {config.new_tokens} tokens after {config.prompt}')
    print(contest.table(players, 'tokens', digits=1))


if __name__ == '__main__':
    configurator.run(main)
