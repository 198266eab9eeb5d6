"""The demo: prepare, train a small GPT from scratch, question it, and an untrained one beside it.

    python demo/run.py

Asked are wordings that no training example has. An answer is exact where it is the expected
sentence, character for character, and ended by itself.
"""
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from core import checkpoint
import configurator
import evaluate
from core import runlog
from configurator import UserError
from demo import prepare

UNTRAINED, TRAINED = 'out/capitals-untrained', 'out/capitals'


@dataclass(frozen=True)
class Config:
    """Nothing to choose: it is the same for everybody."""


def run(script, *arguments):
    """Run one of the scripts in the repository's folder, as a person would; returns its seconds."""
    print(f'\n$ python {" ".join((script, *arguments))}', flush=True)
    started = time.perf_counter()
    # One thread: at this size a second one gains nothing, and where other programs want the cores the
    # two wait for each other (a hundred times slower, measured beside one busy process).
    done = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode:
        raise UserError(f'{script} ended with exit code {done.returncode}; what it said stands above.')
    return time.perf_counter() - started


def answers_of(out_dir, questions):
    """The greedy evaluate.Answers of the model in out_dir."""
    opened = checkpoint.open_model('resume', os.path.join(ROOT, out_dir))
    opened.model.eval()
    return evaluate.answer_all(opened, opened.template, [evaluate.turns_of(q) for q in questions], max_new_tokens=32,
                               what=f'asking {out_dir}')


def shown(text, width):
    """The text on one line of at most width printable characters."""
    text = ''.join(c if c.isprintable() else '·' for c in text)
    return text if len(text) <= width else text[:width - 1] + '…'


def side_by_side(questions, untrained, trained):
    """Print a question of each wording, with both answers."""
    width = max(100, min(160, shutil.get_terminal_size((130, 24)).columns))
    columns = (width * 5 // 11, width * 2 // 11, width * 4 // 11)
    line = lambda *cells: print(' '.join(f'{shown(c, w):<{w}}' for c, w in zip(cells, columns)).rstrip())  # noqa: E731
    line('never seen in training', 'untrained', 'trained')
    line(*('─' * width for width in columns))
    met = set()
    for i, q in enumerate(questions):
        # A wording's first place would be Afghanistan's each time: take another for each.
        wording = q['question'].replace(q['country'], '').replace(q['capital'], '').replace('the ', '')
        if q['kind'] == 'held-out phrasing' and (i % 83 == 0 or q['country'] == 'France') and len(met) < 12 and wording not in met:
            met.add(wording)
            line(q['question'], untrained[i].text, trained[i].text)


def main(argv):
    """The script."""
    configurator.load(Config, argv)
    run('demo/prepare.py')
    run('train.py', 'config/demo_capitals.py', f'--out_dir={UNTRAINED}', '--max_iters=0', '--overwrite=True')
    seconds = run('train.py', 'config/demo_capitals.py', f'--out_dir={TRAINED}', '--overwrite=True')
    questions = prepare.quiz()
    untrained, trained = (answers_of(out_dir, questions) for out_dir in (UNTRAINED, TRAINED))
    print()
    side_by_side(questions, untrained, trained)

    before, after = (evaluate.quiz_scores(found, questions) for found in (untrained, trained))
    print(f'\n{"exact answers":<32}{"questions":>10}{"untrained":>12}{"trained":>10}')
    for group in after:
        if group != 'all':
            print(f'{group:<32}{after[group]["questions"]:>10,}{before[group]["exact"]:>11.1%} {after[group]["exact"]:>9.1%}')
    losses = [float(row['loss']) for row in runlog.read(os.path.join(ROOT, TRAINED)) if row['loss']]
    print(f'training loss at the end {losses[-1]:.4f} nats per supervised token; of a held-out pair no wording was learned\n')
    held_out = [i for i, q in enumerate(questions) if q['kind'] == 'held-out phrasing']
    share = [100 * sum(evaluate.is_exact(found[i], questions[i]) for i in held_out) / len(held_out) for found in (untrained, trained)]
    print(f'capitals: held-out exact {share[1]:.1f} % (untrained {share[0]:.1f} %), trained in {seconds:.0f} s')


if __name__ == '__main__':
    configurator.run(main)
