"""The demo: a base learns facts from prose, fine-tuning teaches it to answer. Then ask both.

    python demo/run.py
"""
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import Seed, UserError
from demo import quiz

LESSON = """
The base knows the facts: given all of a never-asked sentence but the name, it completes {:.0f} %.
But it answers no question. Tuning taught it how to answer, with questions about other countries,
and what it knew is carried over to the never asked.
"""


@dataclass(frozen=True)
class Config:
    seed: Seed = 1337  # of the texts, the choice of countries and both trainings


def run(script, *arguments):
    """Run a script as a person would, and return the seconds that it took."""
    print(f'\n$ python {script} {" ".join(arguments)}', flush=True)
    started = time.perf_counter()
    # One thread: a second one gains nothing at this size, and beside other programs it costs much.
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, env=environment)
    if done.returncode:
        raise UserError(f'{script} failed. What it said is above.')
    return time.perf_counter() - started


def print_columns(texts):
    """The texts side by side. One that is too long is cut."""
    cells = [textwrap.shorten(text, 38, placeholder='…').ljust(40) for text in texts]
    print(''.join(cells).rstrip())


def main(argv):
    config = configurator.load(Config, argv)
    seed = f'--seed={config.seed}'
    run('demo/prepare.py', seed)
    seconds = run('train.py', 'config/demo_base.py', seed, '--overwrite=True')
    seconds += run('train.py', 'config/demo_tune.py', seed, '--overwrite=True')

    questions = quiz.read_questions()
    base = quiz.open_model(os.path.join(ROOT, 'out/demo-base'))
    tuned = quiz.open_model(os.path.join(ROOT, 'out/demo'))
    base_answers = quiz.ask(base, questions, 'question')
    tuned_answers = quiz.ask(tuned, questions, tuned.template)
    groups = sorted({q['group'] for q in questions}, reverse=True)

    print()
    print_columns(('base', 'tuned', 'right answer'))
    for group in groups:
        members = [i for i, q in enumerate(questions) if q['group'] == group]
        for i in members[::len(members) // 2 + 1]:
            q = questions[i]
            print(f'\n{q["question"]} ({group})')
            print_columns((base_answers[i][0], tuned_answers[i][0], q['answer']))

    print(f'\n{"exact answers":<28}{"questions":>10}{"base":>10}{"tuned":>10}')
    for group in groups:
        n = sum(q['group'] == group for q in questions)
        before = quiz.exact(questions, base_answers, group)
        after = quiz.exact(questions, tuned_answers, group)
        print(f'{group:<28}{n:>10,}{before:>8.1f} %{after:>8.1f} %')
    print(LESSON.format(quiz.completed(base, questions, 'never asked')))
    print(f'demo: never asked {quiz.exact(questions, tuned_answers, "never asked"):.1f} % '
          f'(base {quiz.exact(questions, base_answers, "never asked"):.1f} %), '
          f'held-out wording {quiz.exact(questions, tuned_answers, "held-out wording"):.1f} %, '
          f'trained in {seconds:.0f} s')


if __name__ == '__main__':
    configurator.run(main)
