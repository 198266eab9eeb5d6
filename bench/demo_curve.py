"""Draw how knowledge is carried over: exact answers over the steps of tuning.

    python bench/demo_curve.py   # after demo/run.py; tunes again in pieces, draws docs/demo.png

Each piece resumes from the one before. Together they are, bit for bit, the run of demo/run.py.
"""
import os
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import matplotlib

import configurator
from configurator import Seed
from demo import run as demo

STEPS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000, 1300, 1700)
LINES = (
    ('held-out wording, forward', 'asked about: country → capital', 'tab:blue', '-'),
    ('held-out wording, backward', 'asked about: capital → country', 'tab:blue', '--'),
    ('never asked, forward', 'never asked about: country → capital', 'tab:orange', '-'),
    ('never asked, backward', 'never asked about: capital → country', 'tab:orange', '--'))


@dataclass(frozen=True)
class Config:
    out: str = os.path.join(ROOT, 'docs/demo.png')  # the picture
    seed: Seed = 1337                               # as in demo/run.py


def tune_to(step, out_dir, config):
    """Go on with the tuning up to this step."""
    how = '--init_from=resume'
    if step == STEPS[0]:
        how = '--overwrite=True'
    demo.run('train.py', 'config/demo_tune.py', how, f'--out_dir={out_dir}', f'--max_iters={step}',
             f'--lr_decay_iters={STEPS[-1]}', f'--seed={config.seed}')


def main(argv):
    config = configurator.load(Config, argv)
    base, = demo.ask('out/demo-base')
    known = demo.percent(base, 'to complete', 'right')
    all_answers = [base]
    for step in STEPS:
        out_dir = 'out/demo-curve'
        tune_to(step, out_dir, config)
        all_answers += demo.ask(out_dir)

    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout='constrained')
    for group, label, color, style in LINES:
        shares = [demo.percent(answers, group) for answers in all_answers]
        axes.plot((0, *STEPS), shares, style, color=color, label=label, linewidth=2)
    axes.axhline(known, color='grey', linestyle=':',
                 label='the base, completing the never-asked sentences')
    axes.axhline(0, color='black', linewidth=2, label='the base, asked')
    axes.set(xlabel='steps of tuning', ylabel='exact answers, %')
    axes.set(xlim=(0, STEPS[-1]), ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(config.out, dpi=110)
    print(f'the picture is in {config.out}')


if __name__ == '__main__':
    configurator.run(main)
