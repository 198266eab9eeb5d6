"""What runs on CUDA and on a Mac, tested without either.

fake_cuda.py runs the code on tensors that claim to be on a GPU and have no values. The other tests
replace what torch says about the machine. `make gpu` is for a real one.
"""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import conftest
import core.trainer
import model as models
from conftest import ROOT
from core.rows import make_batch
from model import GPT

TORCH = os.path.dirname(torch.__file__)


# ---- fake CUDA tensors ----

@pytest.fixture(scope='module')
def fake(tmp_path_factory):
    """{case: what tests/fake_cuda.py counted in it}"""
    compiler = shutil.which('c++') or shutil.which('g++')
    if sys.platform != 'linux' or torch.version.cuda or not compiler:
        pytest.skip("fake CUDA needs Linux, a C++ compiler and torch's CPU build")
    library = str(tmp_path_factory.mktemp('fake') / 'cuda.so')
    subprocess.run([compiler, '-std=c++20', '-shared', '-fPIC', f'-I{TORCH}/include',
                    f'{ROOT}/tests/fake_cuda.cpp', '-o', library, f'-L{TORCH}/lib', '-lc10',
                    '-ltorch_cpu', f'-Wl,-rpath,{TORCH}/lib'], check=True)
    done = subprocess.run([sys.executable, f'{ROOT}/tests/fake_cuda.py', library],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('case', ['train_step', 'write', 'write_together'])
def test_dtypes_and_how_often_the_gpu_is_waited_for(fake, case):
    for name in ('float32', 'bfloat16', 'float16'):
        assert fake[f'{case} {name}']['dtypes'] == [name]
    assert fake[f'{case} auto']['dtypes'] == ['bfloat16']
    assert fake[f'{case} T4']['dtypes'] == ['float16']
    # A deeper model does not make it more often. Weights are not transposed views.
    two = fake[f'{case} auto']
    five = fake[f'{case} deep']
    assert two['reads'] == five['reads'] and two['copies'] == five['copies']
    assert two['contiguous'] and five['contiguous']


@pytest.mark.parametrize('name, kernel, other', [
    ('float32', '_safe_softmax', '_varlen_attn'), ('T4', '_safe_softmax', '_varlen_attn'),
    ('bfloat16', '_varlen_attn', '_safe_softmax'), ('float16', '_varlen_attn', '_safe_softmax')])
def test_a_training_step_uses_the_right_kernels(fake, name, kernel, other):
    found = fake[f'train_step {name}']
    assert found[kernel] >= 4 and other not in found  # two layers, two micro-batches
    assert found['_fused_adamw_'] == 2  # matrices, and what has no weight decay
    assert ('_amp_foreach_non_finite_check_and_unscale_' in found) == (name in ('float16', 'T4'))


def test_what_goes_between_cpu_and_gpu(fake):
    step = fake['train_step auto']
    assert step['reads'] == 3  # two losses at once, and the norm
    assert step['copies'] == 2  # one for each micro-batch
    written = fake['write auto']
    assert written['reads'] == 4 * 6  # four tokens of six answers
    assert written['cudnn'] is False  # it would be planned anew for each length
    assert fake['write_together auto']['finishes'] == ['length'] * 3


# ---- choices that depend on the machine ----

@pytest.mark.parametrize('capability, dtype, width, expected', [
    ((8, 0), torch.bfloat16, 64, True), ((9, 0), torch.float16, 256, True),
    ((7, 5), torch.float16, 64, False), ((7, 0), torch.bfloat16, 64, False),  # T4, V100
    ((8, 0), torch.bfloat16, 20, False), ((8, 0), torch.bfloat16, 264, False)])
def test_the_variable_length_kernel_is_used_where_it_works(
        monkeypatch, capability, dtype, width, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    qkv = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(10, 3 * 4 * width), device='cuda:0')
    assert models.can_use_varlen(qkv, n_head=4) is expected
    qkv.is_cuda = False
    assert not models.can_use_varlen(qkv, n_head=4)


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


class Products(TorchDispatchMode):
    """Notes over how many terms a matrix product sums at most."""
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == 'mm':
            self.most = max(self.most, args[1].shape[0])
        return func(*args, **(kwargs or {}))


def test_on_a_mac_no_matrix_product_sums_over_32767_terms_or_more(monkeypatch):
    """From there on, torch 2.13 reads past the end on M1 and M2."""
    class Mac(str):
        type = 'mps'

    batch = make_batch(conftest.Conversations([9, 20]), [0, 1])
    model = conftest.tiny()
    model.set_embedding(torch.ones(40_000, 1) * model.transformer.wte.weight[:1])
    most = []
    gradients = []
    for device in (model.device, Mac('cpu')):
        monkeypatch.setattr(GPT, 'device', device)
        with Products() as products:
            gradients.append(torch.autograd.grad(model.loss(batch), model.transformer.wpe.weight))
        most.append(products.most)
    assert most[1] < 32_767 < 40_000 < most[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
