"""Kill a training run again and again, resume it each time, and look for anything lost.

    pip install -r requirements-test.txt
    python tests/stress/kills.py                   # 200 kills, some minutes on one core
    python tests/stress/kills.py --processes=2     # with gloo: one of them dies, or both

A tiny run with dropout, evaluations, best.pt and ckpt.pt is first left undisturbed. Then it is
killed with SIGKILL: at any time; just before a random operation on a file; after a SIGTERM, while
it stops. After each kill every checkpoint must be readable, and at its end the run must have the
weights, optimizer and log of the undisturbed one, to the bit. Then it starts anew.
"""
import glob
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# These take longer to import than the run takes: each life is a fork of this process.
import conftest  # first: it puts the repository on the path
import torch
import torch._dynamo  # by the optimizer

import configurator
import train
from configurator import Count, Natural, UserError
from core import checkpoint, runlog
from core.conversation import Turn


@dataclass(frozen=True)
class Config:
    kills: Count = 200    # how many in all
    processes: Count = 1  # that train together
    seed: Natural = 0     # of the instants
    steps: Count = 48     # of the run that is killed


def make_data(folder):
    """A small data set: conversations of random letters, a token for each byte."""
    rng = random.Random(0)
    chats = []
    for _ in range(71):
        asked = ''.join(rng.choices('abcdef', k=rng.randint(5, 40)))
        chats.append([Turn('user', asked), Turn('assistant', ''.join(sorted(asked[:15])))])
    conftest.write_data(folder, conftest.BYTES, {'train': chats[8:], 'val': chats[:8]})


def start(config, out_dir, die_at=0):
    """Fork the processes of one life; returns their ids.

    die_at: the first kills itself just before so many operations on files of out_dir.
    """
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    flags = ['--init_from=resume', f'--out_dir={out_dir}']
    if not os.path.exists(f'{out_dir}/ckpt.pt'):
        flags = conftest.flags(
            os.path.dirname(out_dir), out_dir, dataset='data', n_layer=3, n_embd=96,
            gradient_accumulation_steps=4, max_iters=config.steps, lr_decay_iters=0,
            eval_interval=4, log_interval=3, learning_rate=3e-3, timeout_s=20, overwrite=True)
    numbers = itertools.count(1)

    def hook(operation, arguments):
        counts = operation in ('open', 'os.rename', 'os.remove')  # as audit hooks name them
        if counts and str(arguments[0]).startswith(out_dir) and next(numbers) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    pids = []
    for rank in range(config.processes):
        pids.append(os.fork())
        if pids[-1]:
            continue
        if rank == 0:
            sys.addaudithook(hook)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                          WORLD_SIZE=str(config.processes), MASTER_PORT=str(port))
        train_and_exit(flags, os.path.join(os.path.dirname(out_dir), 'output.txt'))
    return pids


def train_and_exit(flags, output):
    """In a child: run train.py. Never returns."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ['train.py', *flags]
    status = 1
    try:
        configurator.run(train.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def live(config, out_dir, kind, rng, seconds):
    """One life, and its end of this kind ('' is none). Returns the set of its exit codes."""
    pids = start(config, out_dir, rng.randint(1, 40) if kind == 'operation' else 0)
    if kind in ('any', 'stopping'):
        time.sleep(rng.uniform(0, seconds / 2))
        if kind == 'stopping':
            for pid in rng.sample(pids, rng.randint(1, len(pids))):
                os.kill(pid, signal.SIGTERM)
            time.sleep(rng.uniform(0, 0.1))
        for pid in rng.sample(pids, rng.randint(kind == 'any', len(pids))):
            os.kill(pid, signal.SIGKILL)
    signal.alarm(600)  # if one hangs, SIGALRM ends this script
    codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    # Of several, those that were not killed must notice, and end with a line and exit code 2.
    # Stopped, all end with 0. -SIGTERM: it came before the run listened for it.
    others = codes - {-signal.SIGKILL, -signal.SIGTERM}
    if others not in (set(), {0}, {2}) or codes == {2} or not kind and codes != {0}:
        raise UserError(f'exit codes {codes} ({kind}); see {out_dir} and output.txt beside it')
    return codes


def main(argv):
    config = configurator.load(Config, argv)
    torch.set_num_threads(1)
    runlog.plot = lambda out_dir: False  # takes longer than the run
    base = tempfile.mkdtemp(prefix='kills-')
    make_data(os.path.join(base, 'data'))
    undisturbed = os.path.join(base, 'undisturbed')
    rng = random.Random(config.seed)
    started = time.monotonic()
    live(config, undisturbed, '', rng, 0)
    seconds = time.monotonic() - started
    out_dir = os.path.join(base, 'killed')
    kinds = itertools.cycle(('any', 'operation', 'stopping'))
    n_kills = 0
    n_ends = 0
    while n_kills < config.kills or os.path.exists(out_dir):
        kind = next(kinds) if n_kills < config.kills else ''
        codes = live(config, out_dir, kind, rng, seconds)
        n_kills += -signal.SIGKILL in codes
        for path in glob.glob(f'{out_dir}/*.pt'):
            checkpoint.open_checkpoint(path)
        last = f'{out_dir}/ckpt.pt'
        # A run that was stopped after its last step has yet to evaluate it.
        saved = checkpoint.load(last) if os.path.exists(last) else None
        if saved and saved.step == config.steps and saved.val_loss is not None:
            conftest.assert_same_run(undisturbed, out_dir)
            n_ends += 1
            shutil.rmtree(out_dir)
            print(f'{n_kills} kills, {n_ends} runs came to the same end', flush=True)
    print('unreadable checkpoints, lost steps, differing bits: 0')
    shutil.rmtree(base)


if __name__ == '__main__':
    configurator.run(main)
