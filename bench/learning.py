"""Compare the time to a validation loss: speed only counts if a program learns the same.

    python data/oasst/prepare.py --max_tokens=513
    python bench/learning.py --until=6.65                  # ours and TRL's fastest, side by side

All start from the same random weights, with the same learning rate and AdamW. Only training counts:
each player stops its clock while the loss on the validation set is computed, by the same code for
all. Starting and compiling count. See training.py for the players.
"""
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import contest  # first: it puts the repository on the path
import torch
import torch.nn.functional as F

import configurator
from configurator import Count, Positive
from contest import SHAPES
from core import tokenfile
from training import TAGS_TOO, make_hugging_face_trainer, make_trainer, synchronize

PLAYERS = r'ours(-f32)?(-compiled)?|(trl|hf)-(best|f32)(-compiled)?'


@dataclass(frozen=True)
class Config:
    until: Positive = 6.65     # the validation loss to reach, nats per supervised token
    every: Count = 10          # steps between evaluations
    max_iters: Count = 1000    # give up after so many steps
    learning_rate: Positive = 5e-4  # of all steps
    data: str = 'data/oasst'   # a prepared folder
    shape: Literal[*SHAPES] = 'distilgpt2'  # of the model
    block_size: Count = 512    # positions in a row
    batch_size: Count = 4      # rows in a micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches in a step
    players: str = 'ours,trl-best'  # and ours-compiled, hf-best and so on
    other: str = ''            # a checkout of this repository, for the player other-ours
    rounds: Count = 1          # that each player plays
    device: Literal['cpu', 'cuda'] = 'cpu'  # where to train
    player: str = ''           # set for a player's own process

    def problems(self):
        """Players that do not exist."""
        yield from contest.problems(self.players, self.other, PLAYERS,
                                    'ours, trl-best, hf-best, with -compiled and so on')


class Clock:
    """Measures the time of training, and looks at the validation loss every so many steps."""

    def __init__(self, config, forward):
        self.config = config
        self.forward = forward  # ids (1, T) -> logits (1, T, at least TAGS_TOO)
        self.split = tokenfile.Split([config.data], 'val')
        self.seconds = 0.0
        self.started = time.perf_counter()

    def is_over(self, step):
        """Whether the loss is reached after this many steps, or there are enough of them."""
        config = self.config
        if step % config.every and step < config.max_iters:
            return False
        synchronize(config)
        self.seconds += time.perf_counter() - self.started
        self.val_loss = self.evaluate()
        print(f'{config.player}: step {step}, {self.seconds:.1f} s, {self.val_loss:.4f}',
              file=sys.stderr)
        self.step = step
        self.started = time.perf_counter()
        return self.val_loss <= config.until or step >= config.max_iters

    @torch.no_grad()
    def evaluate(self):
        """Nats per supervised token of the conversations that fit."""
        total = 0.0
        n_tokens = 0
        for i in range(len(self.split)):
            ids, mask = self.split[i]
            if len(ids) > self.config.block_size + 1:
                continue
            ids = torch.tensor(ids.astype(int), device=self.config.device)
            learned = torch.tensor(mask[1:] == 1, device=self.config.device)
            logits = self.forward(ids[None, :-1])[0, :, :TAGS_TOO].float()
            total += F.cross_entropy(logits[learned], ids[1:][learned], reduction='sum').item()
            n_tokens += int(learned.sum())
        return total / n_tokens

    def facts(self):
        return {'training': self.seconds, 'steps': self.step, 'val_loss': self.val_loss}


def learn_ours(config):
    """Train as train.py does; returns the Clock's facts."""
    trainer = make_trainer(config)
    trainer.config = replace(trainer.config, learning_rate=config.learning_rate,
                             decay_lr=False, warmup_iters=0)
    trainer.model.train()
    clock = Clock(config, trainer.model)
    while not clock.is_over(trainer.state.step):
        trainer.train_step(SimpleNamespace(asked=False))
    return clock.facts()


def learn_theirs(config):
    """The same with TRL or transformers, from our weights; returns the Clock's facts."""
    import transformers
    trainer = make_hugging_face_trainer(config)
    ours = make_trainer(replace(config, player='ours')).model.state_dict()
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            weight = ours[name]
            if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                weight = weight.t()  # theirs are (in, out)
            p[:len(weight)].copy_(weight)  # they have more positions
    trainer.args.learning_rate = config.learning_rate
    trainer.args.lr_scheduler_type = transformers.SchedulerType('constant')
    trainer.args.weight_decay = 0.1
    trainer.args.adam_beta2 = 0.95

    def forward(idx):
        return trainer.model(idx).logits

    class Stop(transformers.TrainerCallback):
        """Ends the training when the clock says so."""

        def on_train_begin(self, args, state, control, **more):
            clock.is_over(0)

        def on_step_end(self, args, state, control, **more):
            trainer.model.eval()
            control.should_training_stop = clock.is_over(state.global_step)
            trainer.model.train()

    trainer.add_callback(Stop())
    clock = Clock(config, forward)
    trainer.train()
    return clock.facts()


def main(argv):
    config = configurator.load(Config, argv)
    if config.player:
        learn = learn_ours if config.player.startswith('ours') else learn_theirs
        torch.manual_seed(0)
        contest.Stage().play(lambda: learn(config))
        return
    players = contest.contest(config.players.split(','), argv, config.rounds, config.other)
    print(contest.versions('torch', 'transformers', 'trl', 'accelerate'))
    print(contest.compare({player.name: [facts['training'] for facts in player.rounds]
                           for player in players}, 's', digits=1))
    for player in players:
        for facts in player.rounds:
            reached = facts['val_loss'] <= config.until
            print(f'{player.name}: val_loss {facts["val_loss"]:.4f} after {facts["steps"]} steps'
                  f'{"" if reached else ", not reached"}')


if __name__ == '__main__':
    configurator.run(main)
