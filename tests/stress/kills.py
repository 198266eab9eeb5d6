"""Kill a training run again and again, resume it each time, and look for anything lost.

    python tests/stress/kills.py                   # 200 kills, some minutes on one core
    python tests/stress/kills.py --processes=2     # with gloo: one of them dies, or both

A tiny run with dropout, evaluations, best.pt and ckpt.pt is first left undisturbed. Then it is
killed with SIGKILL: at any time; just before a random operation on a file; after a SIGTERM, while
it stops. After each kill every checkpoint must be readable, and at its end the run must have the
weights, optimizer and log of the undisturbed one, to the bit. Then it starts anew.
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

KINDS = ('any', 'operation', 'stopping')
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


def start(config, out_dir, die_at=0):
    """Fork the processes of one life; returns their ids.

    die_at: the first one kills itself just before this many operations on files of out_dir.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(config.processes):
        pid = os.fork()
        if not pid:
            live(config, out_dir, rank, port, die_at if rank == 0 else 0)
        pids.append(pid)
    return pids


def live(config, out_dir, rank, port, die_at):
    """In a child: train, from the checkpoint if there is one. Never returns."""
    base = os.path.dirname(out_dir)
    with open(os.path.join(base, 'output.txt'), 'a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                      WORLD_SIZE=str(config.processes), MASTER_PORT=str(port))
    n_operations = 0

    def hook(operation, arguments):
        nonlocal n_operations
        if operation in OPERATIONS and str(arguments[0]).startswith(out_dir):
            n_operations += 1
            if n_operations == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    flags = ['--init_from=resume']
    if not os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
        flags = ['--init_from=scratch', '--dataset=data', f'--data_dir={base}', '--block_size=64',
                 '--n_layer=3', '--n_head=2', '--n_embd=96', '--batch_size=2', '--dropout=0.1',
                 '--gradient_accumulation_steps=4', f'--max_iters={config.steps}',
                 '--warmup_iters=2', '--eval_interval=4', '--log_interval=3', '--device=cpu',
                 '--learning_rate=3e-3', '--dtype=float32', '--timeout_s=20', '--overwrite']
    sys.argv = ['train.py', *flags, f'--out_dir={out_dir}']
    status = 1
    try:
        configurator.run(train.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pids, until=float('inf')):
    """{pid: exit status} of those that have ended, when all have, or at this time."""
    ended = {}
    limit = time.monotonic() + LIMIT_S
    while len(ended) < len(pids) and time.monotonic() < until:
        for pid in set(pids) - set(ended):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            raise UserError(f'{len(pids) - len(ended)} processes hang, such as {pids}')
        time.sleep(0.0002)
    return ended


def finish(config, out_dir):
    """Let it come to its end."""
    codes = set(wait(start(config, out_dir)).values())
    if codes != {0}:
        raise UserError(f'it ended with {codes}; see {out_dir} and output.txt beside it')


def kill(config, out_dir, rng, kind, seconds):
    """One life and its violent end. Returns whether SIGKILL ended it.

    seconds: how long an undisturbed life takes.
    """
    die_at = rng.randint(1, 40) if kind == 'operation' else 0
    pids = start(config, out_dir, die_at)
    ended = {}
    if kind != 'operation':
        ended = wait(pids, time.monotonic() + rng.uniform(0, seconds / 2))
        alive = [pid for pid in pids if pid not in ended]
        if kind == 'stopping':
            for pid in alive:
                os.kill(pid, signal.SIGTERM)
            time.sleep(rng.uniform(0, 0.1))
        for pid in rng.sample(alive, rng.randint(1, len(alive)) if alive else 0):
            os.kill(pid, signal.SIGKILL)
    ended |= wait([pid for pid in pids if pid not in ended])
    # Of several, those that were not killed must notice, and end with a line and exit code 2.
    # -SIGTERM: it came before the run listened for it.
    codes = set(ended.values())
    if not codes <= {-signal.SIGKILL, -signal.SIGTERM, 0, 2} or codes == {2}:
        raise UserError(f'exit codes {codes} after a kill; see {out_dir} and output.txt beside it')
    return -signal.SIGKILL in codes


def result(out_dir):
    """{name: value} of all that must be the same, which is everything but the times.

    UserError for a damaged checkpoint.
    """
    found = {}
    for path in glob.glob(os.path.join(out_dir, '*.pt')):
        saved = checkpoint.open_checkpoint(path).checkpoint
        for key, value in vars(saved).items():
            if key not in ('seconds', 'config'):
                found[f'{os.path.basename(path)} {key}'] = value
    for i, row in enumerate(runlog.read(out_dir)):
        found[f'row {i}'] = row | {'seconds': '', 'tokens_per_s': ''}
    return found


def same(one, two):
    """Whether two nested values are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def main(argv):
    config = configurator.load(Config, argv)
    torch.set_num_threads(1)
    runlog.plot = lambda out_dir: False  # takes longer than the run
    base = tempfile.mkdtemp(prefix='kills-')
    make_data(os.path.join(base, 'data'))
    started = time.monotonic()
    finish(config, os.path.join(base, 'undisturbed'))
    seconds = time.monotonic() - started
    expected = result(os.path.join(base, 'undisturbed'))
    out_dir = os.path.join(base, 'killed')
    rng = random.Random(config.seed)
    n_kills = 0
    n_lives = 0
    n_ends = 0
    while n_kills < config.kills or os.path.exists(out_dir):
        if n_kills < config.kills:
            n_kills += kill(config, out_dir, rng, KINDS[n_lives % len(KINDS)], seconds)
        else:
            finish(config, out_dir)
        n_lives += 1
        found = result(out_dir)
        if found.get('ckpt.pt evaluated_at') == config.steps:
            for key in expected | found:
                if not same(expected.get(key), found.get(key)):
                    raise UserError(f'after {n_kills} kills {key} differs; see {base}')
            n_ends += 1
            shutil.rmtree(out_dir)
            print(f'{n_kills} kills, {n_ends} runs came to the same end', flush=True)
    print('unreadable checkpoints, lost steps, differing bits: 0')
    shutil.rmtree(base)


if __name__ == '__main__':
    configurator.run(main)
