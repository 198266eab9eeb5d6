"""Kill a real training run again and again, resume it each time, and look for anything lost.

    python tests/stress/kills.py                   # 200 kills, some minutes on one core
    python tests/stress/kills.py --processes=2     # two processes with gloo: one of them dies, or both

A run of train.py, tiny but whole (dropout, several epochs, evaluations, best.pt, ckpt.pt, keep=2), is first
left undisturbed. Then it is killed with SIGKILL at instants of four kinds: any; while a file is being
written (a *.tmp is seen); just before a random file operation of the run; after a SIGTERM, while it stops.
After each, every checkpoint in the folder must be readable. When the run has come to its end, its
weights, optimizer and log must be the undisturbed one's, to the bit. Then it starts anew, until enough
kills are done. Importing torch takes longer than the run: so this process has it imported, and forks.
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

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot  # noqa: F401  (here, so that no child must import it)
import torch

from core import checkpoint
import configurator
from core import runlog
from core import tokenfile
from core import tokenizer
import train
from configurator import UserError
from core.conversation import Turn, encode

KINDS = ('any', 'writing', 'operation', 'stopping')
OPERATIONS = ('open', 'os.rename', 'os.link', 'os.remove')  # as Python's audit hooks name them
LIMIT_S = 600  # no life of a process is longer: a hang would be an error


@dataclass(frozen=True)
class Config:
    kills: int = 200      # how many in all
    processes: int = 1    # that train together
    seed: int = 0         # of the instants
    steps: int = 48       # of the run that is killed

    def problems(self):
        """What cannot work, a sentence each."""
        if min(self.kills, self.processes, self.steps) < 1:
            yield f'kills={self.kills}, processes={self.processes} and steps={self.steps} must be at least 1.'


def make_data(folder):
    """A small data set with a vocabulary of its own: 71 conversations of a few random words."""
    words, rng = 'red green blue one two three sun moon star river sea of the and'.split(), random.Random(0)
    tokenizer_path = os.path.join(folder, 'tokenizer.json')
    tokenizer.learn([' '.join(words)] * 20, 300, tokenizer_path)
    bpe = tokenizer.load(tokenizer_path)
    with tokenfile.Writer(folder, ('train', 'val')) as writer:
        for i in range(71):
            asked = rng.choices(words, k=rng.randint(3, 12))
            ids, mask, _ = encode([Turn('user', ' '.join(asked)), Turn('assistant', ' '.join(sorted(asked)))], bpe)
            writer.add('val' if i % 8 == 7 else 'train', ids, mask, [len(ids)])
        writer.finish({'template': 'xml', 'tokenizer': bpe.state()})


class Run:
    """The training run in one folder, as one life after another."""

    def __init__(self, config, base, name):
        self.config, self.base, self.out_dir = config, base, os.path.join(base, name)
        self.left = set()  # half-written checkpoints that the lives before have left
        self.keys = dict(init_from='scratch', dataset='data', data_dir=base, out_dir=self.out_dir, block_size=64, n_layer=3,
                         n_head=2, n_embd=96, batch_size=2, gradient_accumulation_steps=4, dropout=0.1, max_iters=config.steps,
                         warmup_iters=2, eval_interval=4, log_interval=3, keep=2, learning_rate=3e-3, device='cpu',
                         dtype='float32', timeout_s=20)

    def start(self, die_at=0):
        """Fork the processes of a run, new or resumed; their ids. die_at: at which file operation the first kills itself."""
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        whole = os.path.exists(os.path.join(self.out_dir, 'ckpt.pt'))
        argv = ['--init_from=resume', f'--out_dir={self.out_dir}'] if whole else \
            [f'--{key}={value}' for key, value in self.keys.items()] + ['--overwrite=True']
        pids = []
        for rank in range(self.config.processes):
            pid = os.fork()
            if not pid:
                self._live(argv, rank, port, die_at if rank == 0 else 0)
            pids.append(pid)
        return pids

    def _live(self, argv, rank, port, die_at):
        """In the child: run train.py's main; never returns."""
        with open(os.path.join(self.base, 'output.txt'), 'a') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if self.config.processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.config.processes),
                              MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))

        def hook(operation, arguments):
            nonlocal die_at
            if operation in OPERATIONS and str(arguments[0]).startswith(self.out_dir):
                die_at -= 1
                if die_at == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        sys.argv = ['train.py', *argv]
        status = 1
        try:
            configurator.run(train.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, pids, stop=lambda: False):
        """{pid: exit status} of those that have ended, when all have or stop() is true; a hang is an error."""
        ended, end = {}, time.monotonic() + LIMIT_S
        while len(ended) < len(pids) and not stop():
            for pid in set(pids) - set(ended):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                for pid in set(pids) - set(ended):
                    os.kill(pid, signal.SIGKILL)
                raise UserError(f'{len(pids) - len(ended)} of {len(pids)} processes hung for {LIMIT_S} s.')
            time.sleep(0.0002)
        return ended

    def half_written(self):
        """The checkpoints that this life is writing just now, or left."""
        return set(glob.glob(os.path.join(self.out_dir, '*.tmp'))) - self.left

    def live(self, rng, kind, seconds):
        """One life and its violent end; True where SIGKILL ended it, False where it was faster."""
        self.left |= self.half_written()
        pids = self.start(rng.randint(1, 60) if kind == 'operation' else 0)
        now, ended = time.monotonic(), {}
        if kind == 'writing':
            instant = now + rng.uniform(-seconds / 2, seconds / 2)
            ended = self.wait(pids, lambda: time.monotonic() > instant and self.half_written())
            time.sleep(rng.choice((0, 0.001, 0.003)))
        elif kind != 'operation':
            instant = now + rng.uniform(0, seconds)
            ended = self.wait(pids, lambda: time.monotonic() > instant)
        if kind == 'stopping':
            for pid in set(pids) - set(ended):
                os.kill(pid, signal.SIGTERM)
            time.sleep(rng.uniform(0, 0.1))
        alive = [pid for pid in pids if pid not in ended]
        if kind != 'operation':  # that one kills itself
            for pid in rng.sample(alive, rng.randint(1, len(alive))) if alive else ():
                os.kill(pid, signal.SIGKILL)
        ended |= self.wait(alive)
        # Of several, those that were not killed must notice, and end by themselves with one line.
        expected = {0, 2, -signal.SIGKILL, *((-signal.SIGTERM,) if kind == 'stopping' else ())}
        died = {-signal.SIGKILL, -signal.SIGTERM} & set(ended.values())  # by SIGTERM before it listens for it
        if not set(ended.values()) <= expected or 2 in ended.values() and not died:
            raise UserError(f'exit codes {list(ended.values())} after a kill of the kind {kind!r}; see output.txt')
        return -signal.SIGKILL in ended.values()

    def read(self):
        """{name: contents} of every checkpoint in the folder; UserError for one that is damaged."""
        found = {os.path.basename(path): checkpoint.load(path) for path in checkpoint.files(self.out_dir)}
        for name, contents in found.items():
            checkpoint.from_contents(contents, name)
        return found

    def result(self):
        """All that must be the same: every checkpoint but for its times and settings, and the log without times."""
        contents = {name: {key: value for key, value in found.items() if key not in ('seconds', 'config')}
                    for name, found in self.read().items()}
        rows = [{key: value for key, value in row.items() if key not in ('seconds', 'tokens_per_s')} for row in runlog.read(self.out_dir)]
        return flat({'checkpoints': contents, 'log': rows})


def flat(value, path=''):
    """{path: bytes of a tensor, or another value} of everything in nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: v for key, item in items for p, v in flat(item, f'{path}/{key}').items()}
    return {path: value.numpy().tobytes() if torch.is_tensor(value) else value}


def survive(config, base, say=print):
    """Do the kills in the folder base; the figures as a dict. UserError for anything lost."""
    os.mkdir(os.path.join(base, 'data'))
    make_data(os.path.join(base, 'data'))
    whole = Run(config, base, 'undisturbed')
    started = time.monotonic()
    if codes := set(whole.wait(whole.start()).values()) - {0}:
        raise UserError(f'the undisturbed run ended with {codes}; see {base}/output.txt')
    seconds, expected = time.monotonic() - started, whole.result()
    rng, run = random.Random(config.seed), Run(config, base, 'killed')
    kills, halves, rounds = Counter(), 0, 0
    while kills.total() < config.kills or os.path.exists(run.out_dir):
        if kills.total() < config.kills:
            kind = KINDS[(kills.total() + rounds) % len(KINDS)]
            kills[kind] += run.live(rng, kind, seconds)
        elif codes := set(run.wait(run.start()).values()) - {0}:  # enough: to the end
            raise UserError(f'resumed, it ended with {codes}; see {base}/output.txt')
        halves += len(run.half_written())
        contents = run.read()
        if 'ckpt.pt' in contents and contents['ckpt.pt']['evaluated_at'] == config.steps:
            found = run.result()
            if differ := [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]:
                raise UserError(f'after {kills.total()} kills {len(differ)} values differ, such as {min(differ)}; see {base}')
            rounds += 1
            shutil.rmtree(run.out_dir)
            say(f'{kills.total():>4} kills, {halves} in the middle of a file, {rounds} runs came to the same end')
    return {'kills': dict(kills), 'kills in all': kills.total(), 'left a file half-written': halves,
            'runs that came to the same end': rounds, 'seconds of an undisturbed run': round(seconds, 2)}


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    torch.set_num_threads(1)
    base = tempfile.mkdtemp(prefix='kills-')
    figures = survive(config, base)
    shutil.rmtree(base)
    print('\n'.join(f'{name:<32}{value}' for name, value in figures.items()))
    print('unreadable checkpoints, lost steps, differing bits: 0')


if __name__ == '__main__':
    configurator.run(main)
