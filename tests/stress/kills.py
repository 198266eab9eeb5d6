"""Kill a training run again and again, resume it each time, and look for anything lost.

    python tests/stress/kills.py                   # 200 kills, some minutes on one core
    python tests/stress/kills.py --processes=2     # with gloo: one of them dies, or both

A tiny run with dropout, evaluations, best.pt and ckpt.pt is first left undisturbed. Then it is
killed with SIGKILL: at any time; while a file is being written; just before a random operation on
a file; after a SIGTERM, while it stops. After each kill every checkpoint must be readable, and at
its end the run must have the weights, optimizer and log of the undisturbed one, to the bit. Then
it starts anew, until there were enough kills.
"""
import glob
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

# These take longer to import than the run takes: each life is a fork of this process.
import torch
import torch._dynamo  # by the optimizer

import configurator
import train
from configurator import Count, Natural, UserError
from core import checkpoint, runlog, tokenfile
from core.conversation import Turn, encode
from core.tokenizer import Tokenizer

KINDS = ('any', 'writing', 'operation', 'stopping')
OPERATIONS = ('open', 'os.rename', 'os.remove')  # as Python's audit hooks name them
LIMIT_S = 600  # a life that takes longer hangs


@dataclass(frozen=True)
class Config:
    kills: Count = 200    # how many in all
    processes: Count = 1  # that train together
    seed: Natural = 0     # of the instants
    steps: Count = 48     # of the run that is killed


def make_data(folder):
    """A small data set: 71 conversations of random letters, a token for each byte."""
    rng = random.Random(0)
    tokens = Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
    splits = {'train': [], 'val': []}
    for i in range(71):
        asked = ''.join(rng.choices('abcdef', k=rng.randint(5, 40)))
        turns = [Turn('user', asked), Turn('assistant', ''.join(sorted(asked[:15])))]
        splits['val' if i % 8 == 7 else 'train'].append(encode(turns, tokens)[:2])
    tokenfile.write(folder, splits, {'template': 'xml', 'tokenizer': tokens.state()})


class Run:
    """The training run in one folder, which has many lives."""

    def __init__(self, config, base, name):
        self.n_processes = config.processes
        self.base = base
        self.out_dir = os.path.join(base, name)
        self.flags = [
            '--init_from=scratch', '--dataset=data', f'--data_dir={base}', '--block_size=64',
            '--n_layer=3', '--n_head=2', '--n_embd=96', '--batch_size=2', '--dropout=0.1',
            '--gradient_accumulation_steps=4', f'--max_iters={config.steps}', '--warmup_iters=2',
            '--eval_interval=4', '--log_interval=3', '--learning_rate=3e-3', '--device=cpu',
            '--dtype=float32', '--timeout_s=20', '--overwrite']

    def start(self, die_at=0):
        """Fork the processes of a life. die_at: number of the operation before which one dies."""
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        flags = self.flags
        if os.path.exists(os.path.join(self.out_dir, 'ckpt.pt')):
            flags = ['--init_from=resume']
        pids = []
        for rank in range(self.n_processes):
            pid = os.fork()
            if not pid:
                self.live(flags, rank, port, die_at if rank == 0 else 0)
            pids.append(pid)
        return pids

    def live(self, flags, rank, port, die_at):
        """In the child: train. Never returns."""
        with open(os.path.join(self.base, 'output.txt'), 'a') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if self.n_processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                              WORLD_SIZE=str(self.n_processes), MASTER_PORT=str(port))
        n_operations = 0

        def hook(operation, arguments):
            nonlocal n_operations
            if operation in OPERATIONS and str(arguments[0]).startswith(self.out_dir):
                n_operations += 1
                if n_operations == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        sys.argv = ['train.py', *flags, f'--out_dir={self.out_dir}']
        status = 1
        try:
            configurator.run(train.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, pids, stop=None):
        """{pid: exit status} of those that have ended, once all have or stop() is true."""
        ended = {}
        started = time.monotonic()
        while len(ended) < len(pids) and not (stop and stop()):
            for pid in set(pids) - set(ended):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() - started > LIMIT_S:
                raise UserError(f'{len(pids) - len(ended)} processes hang, such as {pids}')
            time.sleep(0.0002)
        return ended

    def finish(self):
        """Let it come to its end."""
        codes = set(self.wait(self.start()).values())
        if codes != {0}:
            raise UserError(f'it ended with {codes}; see {self.base}/output.txt')

    def half_written(self):
        """The checkpoints that a life is writing, or left half-written: {(path, when)}."""
        found = set()
        for path in glob.glob(os.path.join(self.out_dir, '*.pt.tmp')):
            if os.path.exists(path):  # it may have got its name meanwhile
                found.add((path, os.path.getmtime(path)))
        return found

    def kill(self, rng, kind, seconds):
        """One life and its violent end. Returns whether SIGKILL ended it, and within a checkpoint.

        seconds: how long an undisturbed life takes.
        """
        left = self.half_written()
        pids = self.start(rng.randint(1, 40) if kind == 'operation' else 0)
        instant = time.monotonic() + rng.uniform(0, seconds)
        ended = {}
        if kind == 'writing':
            instant -= seconds / 2
            ended = self.wait(
                pids, lambda: time.monotonic() > instant and self.half_written() - left)
            time.sleep(rng.choice((0, 0.001, 0.003)))
        elif kind != 'operation':  # that one kills itself
            ended = self.wait(pids, lambda: time.monotonic() > instant)
        alive = [pid for pid in pids if pid not in ended]
        if kind == 'stopping':
            for pid in alive:
                os.kill(pid, signal.SIGTERM)
            time.sleep(rng.uniform(0, 0.1))
        if kind != 'operation' and alive:
            for pid in rng.sample(alive, rng.randint(1, len(alive))):
                os.kill(pid, signal.SIGKILL)
        ended |= self.wait(alive)
        # Of several, those that were not killed must notice, and end with a line and exit code 2.
        codes = set(ended.values())
        killed = {-signal.SIGKILL}
        if kind == 'stopping':
            killed.add(-signal.SIGTERM)  # it came before the run listened for it
        if not codes <= killed | {0, 2} or (2 in codes and not codes & killed):
            raise UserError(f'exit codes {codes} after a kill of the kind {kind!r}; see '
                            f'{self.base}/output.txt')
        return -signal.SIGKILL in codes, bool(self.half_written() - left)

    def read(self):
        """{name: Checkpoint} of every checkpoint in the folder. UserError for a damaged one."""
        paths = glob.glob(os.path.join(self.out_dir, '*.pt'))
        return {os.path.basename(path): checkpoint.open_checkpoint(path).checkpoint
                for path in paths}

    def result(self):
        """{name: value} of all that must be the same, which is everything but the times."""
        found = {}
        for name, saved in self.read().items():
            for key, value in vars(saved).items():
                if key not in ('seconds', 'config'):
                    found[f'{name} {key}'] = value
        for i, row in enumerate(runlog.read(self.out_dir)):
            found[f'row {i}'] = row | {'seconds': '', 'tokens_per_s': ''}
        return found


def same(one, two):
    """Whether two nested values are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def survive(config, base):
    """Do the kills in the folder base. UserError for anything lost."""
    os.mkdir(os.path.join(base, 'data'))
    make_data(os.path.join(base, 'data'))
    undisturbed = Run(config, base, 'undisturbed')
    started = time.monotonic()
    undisturbed.finish()
    seconds = time.monotonic() - started
    expected = undisturbed.result()
    rng = random.Random(config.seed)
    run = Run(config, base, 'killed')
    kills = Counter()
    n_half = 0
    n_ends = 0
    while kills.total() < config.kills or os.path.exists(run.out_dir):
        if kills.total() < config.kills:
            kind = KINDS[(kills.total() + n_ends) % len(KINDS)]
            was_killed, was_writing = run.kill(rng, kind, seconds)
            kills[kind] += was_killed
            n_half += was_writing
        else:
            run.finish()
        last = run.read().get('ckpt.pt')
        if last and last.evaluated_at == config.steps:
            found = run.result()
            for key in expected | found:
                if not same(expected.get(key), found.get(key)):
                    raise UserError(f'after {kills.total()} kills {key} differs; see {base}')
            n_ends += 1
            shutil.rmtree(run.out_dir)
            print(f'{kills.total()} kills, {n_half} in the middle of a checkpoint; '
                  f'{n_ends} runs came to the same end', flush=True)
    print(f'{dict(kills)}\nunreadable checkpoints, lost steps, differing bits: 0')


def main(argv):
    config = configurator.load(Config, argv)
    torch.set_num_threads(1)
    runlog.plot = lambda out_dir: False  # takes longer than the run
    base = tempfile.mkdtemp(prefix='kills-')
    survive(config, base)
    shutil.rmtree(base)


if __name__ == '__main__':
    configurator.run(main)
