"""What runs on CUDA and on a Mac, tested without either.

fake_cuda.py runs training, decoding and batching on tensors that claim to be on a GPU and have no
values. It finds wrong dtypes and devices, operators that CUDA lacks, and reads that would make the
host wait. The other tests replace what torch says about the machine. `make gpu` is for a real one.
"""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import conftest
import core.trainer
import model as models
from configurator import UserError
from core import processes
from core.processes import Processes
from model import LinearCrossEntropy

HERE = os.path.dirname(__file__)
TORCH = os.path.dirname(torch.__file__)


# ---- fake CUDA tensors ----

@pytest.fixture(scope='module')
def fake(tmp_path_factory):
    """A function: what tests/fake_cuda.py counted in a case."""
    compiler = shutil.which('c++') or shutil.which('g++')
    if sys.platform != 'linux' or torch.version.cuda or not compiler:
        pytest.skip("fake CUDA needs Linux, a C++ compiler and torch's CPU build")
    library = str(tmp_path_factory.mktemp('fake') / 'cuda.so')
    command = [compiler, '-std=c++20', '-shared', '-fPIC', f'-I{TORCH}/include',
               os.path.join(HERE, 'fake_cuda.cpp'), '-o', library,
               f'-L{TORCH}/lib', '-lc10', '-ltorch_cpu', f'-Wl,-rpath,{TORCH}/lib']
    subprocess.run(command, check=True)
    command = [sys.executable, os.path.join(HERE, 'fake_cuda.py'), library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    def counted(case):
        assert 'failed' not in found[case], found[case]['failed']
        return found[case]
    return counted


@pytest.mark.parametrize('case', ['train_step', 'write', 'write_together'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'auto', 'T4'])
def test_matrix_products_are_in_the_dtype_asked_for(fake, case, dtype):
    expected = {'auto': 'bfloat16', 'T4': 'float16'}.get(dtype, dtype)
    assert fake(f'{case} {dtype}')['dtypes'] == [expected]


@pytest.mark.parametrize('name, kernel, other', [
    ('float32', '_safe_softmax', '_varlen_attn'), ('T4', '_safe_softmax', '_varlen_attn'),
    ('bfloat16', '_varlen_attn', '_safe_softmax'), ('float16', '_varlen_attn', '_safe_softmax')])
def test_a_training_step_uses_the_right_kernels(fake, name, kernel, other):
    found = fake(f'train_step {name}')
    assert found[kernel] >= 4 and other not in found  # two layers, two micro-batches
    assert found['_fused_adamw_'] == 2  # matrices, and what has no weight decay
    assert ('_amp_foreach_non_finite_check_and_unscale_' in found) == (name in ('float16', 'T4'))


@pytest.mark.parametrize('case', ['train_step', 'write', 'write_together'])
def test_deeper_models_do_not_wait_more_often_for_the_gpu(fake, case):
    two, five = fake(f'{case} auto'), fake(f'{case} deep')
    assert two['reads'] == five['reads'] and two['copies'] == five['copies']


def test_a_step_reads_the_losses_and_the_norm(fake):
    assert fake('train_step auto')['reads'] == 3  # two losses at once, and the norm
    assert fake('write auto')['reads'] == 4 * 6  # four tokens of six answers
    assert fake('write_together auto')['finishes'] == ['length'] * 3


def test_decoding_avoids_cudnn_and_transposed_weights(fake):
    """cuDNN's attention would be planned anew for each length."""
    assert fake('write auto')['cudnn'] is False
    assert fake('write auto')['contiguous'] and fake('train_step auto')['contiguous']


# ---- choices that depend on the machine ----

@pytest.mark.parametrize('capability, dtype, width, expected', [
    ((8, 0), torch.bfloat16, 64, True), ((9, 0), torch.float16, 256, True),
    ((12, 0), torch.bfloat16, 8, True),
    ((7, 5), torch.float16, 64, False), ((7, 0), torch.bfloat16, 64, False),  # T4, V100
    ((8, 0), torch.float32, 64, False),
    ((8, 0), torch.bfloat16, 20, False), ((8, 0), torch.bfloat16, 264, False)])
def test_the_variable_length_kernel_is_used_where_it_works(
        monkeypatch, capability, dtype, width, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    qkv = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(10, 3 * 4 * width), device='cuda:0')
    assert models.can_use_varlen(qkv, n_head=4) is expected
    qkv.is_cuda = False
    assert not models.can_use_varlen(qkv, n_head=4)


def test_torchrun_on_a_mac_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    config = SimpleNamespace(device='auto', gradient_accumulation_steps=2, timeout_s=9)
    with pytest.raises(UserError, match='^torchrun needs CUDA or --device=cpu: .*$'):
        with processes.processes(config):
            pass


# ---- values ----

def test_a_bfloat16_run_goes_on_in_float16(data, tmp_path, monkeypatch, no_pictures):
    """As from an A100 to a T4: the saved state of the GradScaler is empty."""
    def scaler(device, enabled):
        return torch.amp.grad_scaler.GradScaler('cpu', init_scale=16.0, enabled=enabled)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    monkeypatch.setattr(core.trainer, 'pick_dtype', lambda name, device: getattr(torch, name))
    keys = {'lr_decay_iters': 6, 'max_iters': 2}
    assert not conftest.run(data, tmp_path, dtype='bfloat16', **keys).scaler
    assert conftest.resume(tmp_path, dtype='float16', max_iters=4).scaler['scale'] == 16
    last = conftest.resume(tmp_path, dtype='bfloat16', max_iters=6)
    assert last.step == 6 and not last.scaler


class Mac(str):
    """A device that says it is of another kind."""
    type = 'mps'


class OnMac(torch.Tensor):
    """A tensor on the CPU that says it is on a Mac's GPU."""
    device = property(lambda self: Mac('cpu'))


class Products(TorchDispatchMode):
    """Notes how many terms the sums of matrix products have."""

    def __init__(self):
        super().__init__()
        self.terms = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ('mm', 'addmm_'):
            self.terms.append(args[-1].shape[0])
        return func(*args, **(kwargs or {}))


def test_on_a_mac_no_matrix_product_sums_over_32767_terms_or_more():
    """From there on, torch 2.13 reads past the end on M1 and M2."""
    torch.manual_seed(0)
    weight = torch.randn(40_000, 8)
    x = torch.randn(5, 8)
    targets = torch.tensor([1, 2, 3, 39_000, 5])
    grads = []
    terms = []
    for kind in (torch.Tensor, OnMac):
        inputs = x.as_subclass(kind).requires_grad_(), weight.clone().requires_grad_()
        with Products() as products:
            LinearCrossEntropy.apply(*inputs, targets, 39_990).backward()
        grads.append([part.grad.as_subclass(torch.Tensor) for part in inputs])
        terms.append(max(products.terms))
    assert terms[0] == 40_000 and terms[1] < 32_767
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


# ---- a lost process ----

def test_a_step_waits_for_the_gradients_before_it_reads_a_value(
        data, tmp_path, monkeypatch, no_pictures):
    """Reading waits forever if a process is lost. Processes.wait gives up after timeout_s."""
    events = []

    def note(owner, name, event):
        plain = getattr(owner, name)

        def noting(*args):
            events.append(event)
            return plain(*args)
        monkeypatch.setattr(owner, name, noting)

    note(torch.Tensor, 'item', 'read')
    note(torch.Tensor, 'tolist', 'read')
    note(Processes, 'wait', 'wait')
    note(core.trainer.Trainer, 'train_step', 'step')
    conftest.run(data, tmp_path, max_iters=1)
    step = events[events.index('step'):]
    assert step[1] == 'wait' and 'read' in step


def test_wait_waits_for_every_sum_of_gradients(monkeypatch):
    class Work:
        """A sum that is lost when it is waited for, as with a process that ended."""
        def wait(self):
            raise dist.DistBackendError('timeout')

        def get_future(self):
            future = torch.futures.Future()
            future.set_result([torch.zeros(1)])
            return future
    monkeypatch.setattr(dist, 'all_reduce', lambda tensor, async_op: Work())
    procs = Processes(0, 2, 'cpu')
    procs.wait()  # nothing is under way
    bucket = SimpleNamespace(buffer=lambda: torch.zeros(1))
    processes.sum_gradients(procs.works, bucket)
    with pytest.raises(dist.DistBackendError):
        procs.wait()
