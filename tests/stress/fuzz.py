"""Fuzz what reads other people's bytes, guided by the coverage of our own lines.

    pip install -r requirements-fuzz.txt
    python tests/stress/fuzz.py --target=oasst --inputs=100000
    python tests/stress/fuzz.py --target=all --inputs=1000000      # shared out; about an hour on one core
    python tests/stress/fuzz.py --target=oasst --replay=out/fuzz/oasst/crash-…

What must hold stands in targets.py and readers.py. A finding ends the run with exit code 1, and its input
is kept in out_dir. atheris: https://github.com/google/atheris, libFuzzer for Python.
"""
import glob
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
sys.path.insert(0, os.path.join(ROOT, "tests"))

import configurator
from configurator import UserError

# Of a million inputs, how many go where: the reading of a checkpoint takes a hundred times as long as a flag.
SHARES = {'conversation': 0.25, 'configurator': 0.25, 'oasst': 0.12, 'alpaca': 0.12, 'tokenizer': 0.10, 'tokenfile': 0.10, 'checkpoint': 0.06}
OURS = ['checkpoint', 'configurator', 'conversation', 'tokenfile', 'tokenizer', 'data.pipeline', 'data.oasst.prepare',
        'data.alpaca.prepare']
FORBIDDEN = ('os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'subprocess.Popen', 'socket.connect', 'pty.spawn')


@dataclass(frozen=True)
class Config:
    target: str = 'all'          # all, conversation, configurator, oasst, alpaca, tokenizer, tokenfile or checkpoint
    inputs: int = 1_000_000      # how many; with all, shared out among the targets
    replay: str = ''             # run this one input instead, without the fuzzer
    seed: int = 1337             # of the fuzzer
    timeout_s: int = 20          # of processor time; an input that takes more is a finding: a hang
    memory_mb: int = 2048        # so is one that makes the process grow beyond this
    out_dir: str = 'out/fuzz'    # the inputs that reached something new, and the findings

    def problems(self):
        """What cannot work, a sentence each."""
        if self.target not in ('all', *SHARES):
            yield f'target={self.target!r}: expected all or one of {", ".join(SHARES)}.'
        if min(self.inputs, self.timeout_s, self.memory_mb) < 1:
            yield 'inputs, timeout_s and memory_mb must be at least 1.'


def make(name):
    """The target of this name."""
    from stress import readers, targets
    return {'conversation': targets.Conversation, 'configurator': targets.Configurator, 'oasst': targets.Oasst, 'alpaca': targets.Alpaca,
            'tokenizer': readers.Vocabulary, 'tokenfile': readers.TokenFile, 'checkpoint': readers.Checkpoint}[name]()


def guard(event, arguments):
    """An audit hook: nothing that is read may start a program or open a connection."""
    if event in FORBIDDEN:
        raise AssertionError(f'{event} {arguments!r}')


class Hang(BaseException):
    """Raised into an input that takes too long."""


def hang(number, frame):
    """The handler of the timer."""
    raise Hang


def fuzz(config):
    """Fuzz one target; does not return: the fuzzer ends the process."""
    try:
        import atheris
    except ImportError:
        raise UserError('atheris is not installed. Run: pip install -r requirements-fuzz.txt') from None
    import torch  # first, and as it is: to follow all of it would take minutes
    del sys.modules['configurator']  # read without being followed, for our own flags
    with atheris.instrument_imports(include=OURS):
        target = make(config.target)
    atheris.instrument_func(torch._weights_only_unpickler.Unpickler.load)
    folder = os.path.join(config.out_dir, config.target)
    os.makedirs(os.path.join(folder, 'corpus'), exist_ok=True)
    for i, seed in enumerate(target.seeds):
        with open(os.path.join(folder, 'corpus', f'seed-{i}'), 'wb') as file:
            file.write(seed)
        target.check(seed)  # warms up, too: what is imported when first used
    sys.addaudithook(guard)
    signal.signal(signal.SIGPROF, hang)
    n_checked = 0

    def check(data):
        nonlocal n_checked
        signal.setitimer(signal.ITIMER_PROF, config.timeout_s)  # processor time: on a busy machine the clock says nothing
        target.check(data)
        n_checked += 1
        if n_checked % 10_000 == 0 or n_checked == config.inputs:
            print(f'{config.target}: {n_checked:,} inputs, {target.accepted:,} of them taken', flush=True)
    atheris.Setup([sys.argv[0], f'-runs={config.inputs}', f'-seed={config.seed}', '-timeout=3600', '-report_slow_units=3600', '-print_final_stats=1',
                   f'-rss_limit_mb={config.memory_mb}', f'-artifact_prefix={folder}/', '-max_len=20000', os.path.join(folder, 'corpus')], check)
    atheris.Fuzz()


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    if config.replay:
        with open(config.replay, 'rb') as file:
            make(config.target).check(file.read())
        print(f'{config.replay}: nothing is broken')
    elif config.target != 'all':
        fuzz(config)
    else:
        failed = []
        for name, share in SHARES.items():
            flags = [f'--{key}={getattr(config, key)}' for key in ('seed', 'timeout_s', 'memory_mb', 'out_dir')]
            run = subprocess.run([sys.executable, __file__, f'--target={name}', f'--inputs={round(config.inputs * share)}', *flags], check=False)
            failed += [name] * (run.returncode != 0)
        if failed:
            found = glob.glob(os.path.join(config.out_dir, '*', '*-*'))
            raise UserError(f'findings in {", ".join(failed)}: {", ".join(sorted(found))}')


if __name__ == '__main__':
    configurator.run(main)
