"""Where a run computes: devices, precision, and several processes under torchrun."""
import os
import subprocess
import sys
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from configurator import REPOSITORY, UserError
from conftest import assert_near, flags, one_line, run
from core import checkpoint, processes
from core.device import pick_device, pick_dtype

MINUTE = timedelta(minutes=1)

# ---- devices ----


@pytest.fixture
def two_gpus(monkeypatch):
    """This machine seems to have two; returns the list of those that were chosen, numbers."""
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append, raising=False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    yield chosen
    torch.set_float32_matmul_precision('highest')


def test_a_device_is_picked_or_refused_with_those_that_there_are(two_gpus):
    assert pick_device('cpu') == 'cpu' and two_gpus == []
    assert pick_device('auto') == pick_device('cuda') == 'cuda'
    assert pick_device('cuda:1') == 'cuda:1' and two_gpus == [1]
    assert torch.get_float32_matmul_precision() == 'high'  # TF32
    for name in ('mps', 'cuda:2', 'cuda:x', 'gpu'):
        with one_line(f"device='{name}' is not on.*it has cuda, cpu"):
            pick_device(name)
    assert pick_dtype('float16', 'cuda:1') == torch.float16  # on a CPU: see MISTAKES in test_train


@pytest.fixture
def torchrun(monkeypatch):
    """A function: processes() as if torchrun had started it, here, and the stand-in for init."""
    init = mock.Mock()
    monkeypatch.setattr(dist, 'init_process_group', init)
    monkeypatch.setattr(dist, 'barrier', lambda: None)
    monkeypatch.setattr(os, '_exit', sys.exit)

    def run(rank, world, device):
        environment = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world}
        for name, number in environment.items():
            monkeypatch.setenv(name, str(number))
        config = train.Config(device=device, gradient_accumulation_steps=4, timeout_s=60)
        return processes.processes(config), init
    return run


@pytest.mark.parametrize('rank, device', [(0, 'auto'), (1, 'auto'), (1, 'cuda'), (0, 'cuda:1')])
def test_under_torchrun_each_process_has_a_gpu_of_its_own(torchrun, two_gpus, rank, device):
    entered, init = torchrun(rank, 2, device)
    with pytest.raises(SystemExit), entered as procs:
        assert (procs.rank, procs.world, procs.device) == (rank, 2, f'cuda:{rank}')
    assert two_gpus[-1] == rank
    init.assert_called_once_with('nccl', timeout=MINUTE, device_id=torch.device(f'cuda:{rank}'))


@pytest.mark.parametrize('rank, said', [(0, 'a mistake\n'), (1, '')])
def test_a_mistake_is_printed_by_one_process_and_ends_all_with_2(torchrun, capsys, rank, said):
    entered, init = torchrun(rank, 2, 'cpu')
    with pytest.raises(SystemExit, match='^2$'), entered:
        raise UserError('a mistake')
    assert capsys.readouterr().err == said
    init.assert_called_once_with('gloo', timeout=MINUTE, device_id=None)
    entered, _ = torchrun(rank, 3, 'cpu')
    with one_line('=4 cannot be shared equally by 3 processes.*of 3'), entered:
        pass


# ---- several processes ----

def test_two_processes_give_the_losses_of_one(data, tmp_path):
    """By torchrun. An epoch is 27 rows in steps of 4: the last one begins the next epoch."""
    keys = {'dropout': 0.0, 'epochs': 1.0, 'max_iters': 0, 'eval_interval': 4, 'log_interval': 1}
    one = run(data, tmp_path / '1', **keys)
    assert one.step == 7
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               f'{REPOSITORY}/train.py', *flags(data, tmp_path / '2', **keys)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('| val_loss') == 3 and done.stdout.count('finished') == 1
    assert_near(tmp_path / '1', tmp_path / '2')
    two = checkpoint.load(tmp_path / '2' / 'ckpt.pt')
    torch.testing.assert_close(one.model, two.model, atol=1e-4, rtol=0)
