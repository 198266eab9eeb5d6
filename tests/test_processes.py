"""Where a run computes: devices, precision, memory, and several processes under torchrun."""
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import train
from configurator import REPOSITORY, UserError
from conftest import SMALL, assert_near, assert_same_run, exit_codes, flags, resume, run, wait_for
from core import checkpoint, processes
from core.device import pick_device, pick_dtype

# ---- devices ----


@pytest.fixture
def two_gpus(monkeypatch):
    """This machine seems to have two; returns the list of those that were chosen, numbers."""
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append, raising=False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    precision = torch.get_float32_matmul_precision()
    yield chosen
    torch.set_float32_matmul_precision(precision)


def test_a_device_is_picked_or_refused_with_those_that_there_are(two_gpus):
    assert pick_device('cpu') == 'cpu' and two_gpus == []
    assert pick_device('auto') == pick_device('cuda') == 'cuda'
    assert pick_device('cuda:1') == 'cuda:1' and two_gpus == [1]
    assert torch.get_float32_matmul_precision() == 'high'  # TF32
    for name in ('mps', 'cuda:2', 'cuda:x', 'gpu'):
        with pytest.raises(UserError, match=f"device='{name}' is not on.*it has cuda, cpu"):
            pick_device(name)


def test_float16_needs_cuda():
    assert pick_dtype('bfloat16', 'cpu') == torch.bfloat16
    assert pick_dtype('float16', 'cuda:1') == torch.float16
    with pytest.raises(UserError, match='dtype=float16 needs a CUDA device, found cpu'):
        pick_dtype('float16', 'cpu')


@pytest.fixture
def torchrun(monkeypatch):
    """A function: processes() as if torchrun had started it, here; returns what init got."""
    init = {}

    def leave(status):
        raise SystemExit(status)
    monkeypatch.setattr(dist, 'init_process_group',
                        lambda backend, **options: init.update(options, backend=backend))
    monkeypatch.setattr(dist, 'barrier', lambda: None)
    monkeypatch.setattr(os, '_exit', leave)
    monkeypatch.setenv('TORCH_NCCL_BLOCKING_WAIT', '0')

    def run(rank, world, device):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', str(world))
        config = train.Config(device=device, gradient_accumulation_steps=4, timeout_s=60)
        return processes.processes(config), init
    return run


@pytest.mark.parametrize('device', ['auto', 'cuda', 'cuda:1'])
@pytest.mark.parametrize('rank', [0, 1])
def test_under_torchrun_each_process_has_a_gpu_of_its_own(torchrun, two_gpus, rank, device):
    entered, init = torchrun(rank, 2, device)
    with pytest.raises(SystemExit):
        with entered as procs:
            assert (procs.rank, procs.world, procs.device) == (rank, 2, f'cuda:{rank}')
    assert two_gpus[-1] == rank
    assert init['backend'] == 'nccl' and init['device_id'] == torch.device(f'cuda:{rank}')
    assert os.environ['TORCH_NCCL_BLOCKING_WAIT'] == '1'  # else a lost process goes unnoticed


@pytest.mark.parametrize('rank, said', [(0, 'a mistake\n'), (1, '')])
def test_a_mistake_is_printed_by_one_process_and_ends_all_with_2(torchrun, capsys, rank, said):
    entered, init = torchrun(rank, 2, 'cpu')
    with pytest.raises(SystemExit) as left:
        with entered:
            raise UserError('a mistake')
    assert left.value.code == 2 and capsys.readouterr().err == said
    assert init['backend'] == 'gloo' and init['timeout'].total_seconds() == 60


def test_micro_batches_that_cannot_be_shared_are_a_line(torchrun):
    entered, _ = torchrun(0, 3, 'cpu')
    with pytest.raises(UserError, match='=4 cannot be shared equally by 3 processes.*of 3'):
        with entered:
            pass


# ---- memory ----

FAULTS = """
import resource
import torch
from core.device import keep_freed_memory

def faults():
    for _ in range(10):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason="glibc's malloc is Linux's")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Counted in page faults: 10 tensors of 64 MiB are 163,840 pages of 4 KiB."""
    found = subprocess.check_output([sys.executable, '-c', FAULTS], cwd=REPOSITORY)
    without, kept = map(int, found.split())
    if without < 80_000:
        pytest.skip(f'this malloc keeps memory by itself: {without:,} page faults')
    assert kept < 40_000, (without, kept)


# ---- several processes ----

def test_two_processes_give_the_losses_of_one(data, tmp_path):
    """By torchrun. An epoch is 27 rows in steps of 2: in the last one a process has no row."""
    keys = {'dropout': 0.0, 'batch_size': 1, 'epochs': 1.0, 'max_iters': 0, 'eval_interval': 7,
            'log_interval': 1}
    one = run(data, tmp_path / '1', **keys)
    assert one.step == 14
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               f'{REPOSITORY}/train.py', *flags(data, tmp_path / '2', **keys)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('| val_loss') == 3 and done.stdout.count('finished') == 1
    assert_near(tmp_path / '1', tmp_path / '2')
    two = checkpoint.load(tmp_path / '2' / 'ckpt.pt')
    for name, p in one.model.items():
        assert torch.allclose(p, two.model[name], atol=1e-4), name


def test_a_signal_to_one_of_two_stops_both_and_they_go_on_to_the_same_bits(data, tmp_path, start):
    output = tmp_path / 'output'
    keys = SMALL | {'max_iters': 40, 'log_interval': 1}
    assert exit_codes(start(flags(data, tmp_path / 'whole', **keys), output, 2)) == [0, 0]
    both = start(flags(data, tmp_path / 'parts', **keys), tmp_path / 'stopped', 2)
    wait_for('step 2/40', tmp_path / 'stopped', both)
    os.kill(both[1].pid, signal.SIGTERM)
    assert exit_codes(both) == [0, 0]
    assert 'stopped after step' in (tmp_path / 'stopped').read_text()
    argv = ['--init_from=resume', f'--out_dir={tmp_path / "parts"}']
    assert exit_codes(start(argv, tmp_path / 'resumed', 2)) == [0, 0]
    assert 'not bit for bit' not in (tmp_path / 'resumed').read_text()
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('lost', [0, 1])
def test_if_one_of_two_is_killed_the_other_says_so_and_nothing_is_lost(data, tmp_path, start, lost):
    output = tmp_path / 'output'
    out_dir = tmp_path / 'out'
    both = start(flags(data, out_dir, **SMALL | {'max_iters': 10 ** 6}), output, 2)
    wait_for('step 6/', output, both)
    both[lost].kill()
    assert exit_codes(both)[1 - lost] == 2
    line = output.read_text().splitlines()[-1]
    assert 'another process ended or did not answer' in line
    assert 'Traceback' not in output.read_text()
    reached = checkpoint.load(out_dir / 'ckpt.pt').step
    assert resume(out_dir, max_iters=reached + 1).step == reached + 1  # by one process, too
