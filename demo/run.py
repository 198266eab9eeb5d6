"""The demo: a base learns facts from prose, tuning teaches it to answer. Ask both.

    python demo/run.py
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import Seed, UserError

LESSON = """
The base completes {:.0f} % of the never-asked facts. Asked a question, it writes on as prose
does. Tuning taught it to answer, with questions about other countries; what it knew stays.
"""


@dataclass(frozen=True)
class Config:
    seed: Seed = 1337  # of the texts and of both trainings


def run(script, *arguments):
    """Run a script as a person would, and return the seconds that it took."""
    print(f'\n$ python {script} {" ".join(arguments)}', flush=True)
    started = time.perf_counter()
    # One thread: at this size, a second one gains nothing.
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        raise UserError(f'{script} failed: see above.')
    return time.perf_counter() - started


def ask(models):
    """What each of the models answered to the quiz."""
    run('evaluate.py', f'--models={models}', '--which=last', '--quiz=demo/quiz.jsonl',
        '--max_new_tokens=32', '--batch_size=256', '--out_dir=out/demo-report')
    path = os.path.join(ROOT, 'out/demo-report/report.json')
    with open(path, encoding='utf-8') as file:
        results = json.load(file)['models']
    return [result['quiz']['asked'] for result in results]


def percent(asked, group, mark='exact'):
    """How many of a group's answers have the mark."""
    marks = [one[mark] for one in asked if one['group'].startswith(group)]
    return 100 * sum(marks) / len(marks)


def main(argv):
    config = configurator.load(Config, argv)
    seed = f'--seed={config.seed}'
    run('demo/prepare.py', seed)
    seconds = run('train.py', 'config/demo_base.py', seed, '--overwrite=True')
    seconds += run('train.py', 'config/demo_tune.py', seed, '--overwrite=True')
    base, tuned = ask('out/demo-base,out/demo')

    # 57 reaches each of the five wordings, both ways.
    numbers = [i for i, one in enumerate(tuned) if 'never asked' in one['group']]
    for i in numbers[::57]:
        print(f'\n{tuned[i]["prompt"][0]}')
        print(f'  base   {base[i]["answer"]}')
        print(f'  tuned  {tuned[i]["answer"]}')
        print(f'  right  {tuned[i]["expected"]}')
    print(LESSON.format(percent(base, 'to complete', 'right')))
    known = percent(tuned, 'never asked')
    before = percent(base, 'never asked')
    reworded = percent(tuned, 'held-out wording')
    print(f'demo: never asked {known:.1f} % (base {before:.1f} %), '
          f'held-out wording {reworded:.1f} %, trained in {seconds:.0f} s')


if __name__ == '__main__':
    configurator.run(main)
