"""The fast ways of kernels.py and decoding.prepare, each against the plain one."""
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from core import generate as decoding
from core import kernels
from core import tokenfile
from configurator import REPOSITORY, UserError
from core.kernels import Int8Linear, LinearCrossEntropy, PackedLinear
from model import autocast
from test_model import Conversations, tiny


def loss_and_gradients(way, x, weight, targets, dtype=torch.float32):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with autocast('cpu', dtype):
        loss = way(x, weight, targets)
    (loss / 7).backward()
    return loss.item(), x.grad, weight.grad


def plain(n_classes):
    return lambda x, weight, targets: F.cross_entropy(F.linear(x, weight)[:, :n_classes].float(), targets, reduction='sum')


@pytest.mark.parametrize('at_once', [1, 211 * 5, 1 << 25])  # one row at a time, five with two left over, all
def test_fused_cross_entropy_equals_the_plain_one(monkeypatch, at_once):
    monkeypatch.setitem(kernels.LOGITS_AT_ONCE, 'cpu', at_once)
    torch.manual_seed(0)
    x, weight, targets = torch.randn(17, 32), torch.randn(256, 32), torch.randint(211, (17,))
    loss, grad_x, grad_w = loss_and_gradients(lambda *a: LinearCrossEntropy.apply(*a, 211), x, weight, targets)
    expected, expected_x, expected_w = loss_and_gradients(plain(211), x, weight, targets)
    assert abs(loss - expected) < 1e-5 * expected
    assert torch.allclose(grad_x, expected_x, atol=1e-5) and torch.allclose(grad_w, expected_w, atol=1e-5)
    assert not grad_w[211:].any()  # the padding learns nothing


def test_fused_cross_entropy_in_bfloat16_is_as_close_to_float32_as_the_plain_one():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(64, 128), torch.randn(512, 128) * 0.1, torch.randint(500, (64,))
    exact = loss_and_gradients(plain(500), x, weight, targets)
    ours = loss_and_gradients(lambda *a: LinearCrossEntropy.apply(*a, 500), x, weight, targets, torch.bfloat16)
    theirs = loss_and_gradients(plain(500), x, weight, targets, torch.bfloat16)
    error = lambda found: [abs(found[0] - exact[0]), *((f - e).norm().item() for f, e in zip(found[1:], exact[1:]))]
    for mine, other in zip(error(ours), error(theirs)):
        assert mine <= 1.1 * other + 1e-4 * exact[0], (mine, other)


def test_fused_cross_entropy_makes_no_gradient_that_nobody_wants():
    """Evaluation must not pay for a gradient as large as the embedding."""
    x, weight, targets = torch.randn(5, 8), torch.randn(9, 8, requires_grad=True), torch.tensor([0, 1, 2, 3, 8])
    with torch.no_grad():
        loss = LinearCrossEntropy.apply(x, weight, targets, 9)
    assert loss.grad_fn is None
    assert abs(loss.item() - plain(9)(x, weight, targets).item()) < 1e-5


def test_a_batch_of_any_size_has_finite_memory(monkeypatch):
    """Logits exist for a chunk at a time: no call of mm ever gives more than LOGITS_AT_ONCE."""
    monkeypatch.setitem(kernels.LOGITS_AT_ONCE, 'cpu', 1000)
    largest, plain_softmax = [0], torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, 'log_softmax', lambda self, *a, **k: (
        largest.append(self.numel()), plain_softmax(self, *a, **k))[1])
    LinearCrossEntropy.apply(torch.randn(90, 8), torch.randn(100, 8), torch.zeros(90, dtype=torch.int64), 100)
    assert max(largest) == 1000 and len(largest) == 1 + 9


def test_compiled_training_gives_the_same_losses_within_rounding():
    pytest.importorskip('torch._inductor')
    from shutil import which
    if not (which('g++') or which('clang++')):
        pytest.skip('torch.compile needs a C++ compiler here')
    split, losses = Conversations([30, 12, 44, 7]), []
    for compiled in (False, True):
        model = tiny().train()
        if compiled:
            model.compile()
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(4):
            loss = model.loss(tokenfile.make_batch(split, range(step % 2, 4)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), losses


def test_bfloat16_training_loss_is_near_float32():
    """The fast path on a CPU: products in bfloat16, attention, norms, softmax and sums in float32."""
    model, split = tiny(), Conversations([30, 5, 5, 48, 17])
    batch = tokenfile.make_batch(split, range(5))
    exact = model.loss(batch).item()
    with autocast('cpu', torch.bfloat16):
        fast = model.loss(batch).item()
    assert fast == pytest.approx(exact, rel=5e-3) and fast != exact


@pytest.mark.parametrize('rows', [1, 2, 10, 64])
def test_packed_and_int8_weights_multiply_as_the_plain_ones(rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 64), torch.randn(200, 64), torch.randn(200)
    exact = F.linear(x, weight, bias)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = F.linear(x.bfloat16().float(), (weight / scale).round() * scale, bias)
    for name, found, expected, within in (
            ('float32', PackedLinear(weight, bias, torch.float32)(x), exact, 1e-4),
            ('transposed', PackedLinear(weight.t().contiguous().t(), None, torch.float32)(x), exact - bias, 1e-4),
            ('bfloat16', PackedLinear(weight, bias, torch.bfloat16)(x),
             F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float(), 0.3),
            ('int8', Int8Linear(weight, bias)(x), rounded, 0.3), ('int8 of a view', Int8Linear(weight.t().contiguous().t(), bias)(x), rounded, 0.3)):
        assert found.dtype == torch.float32 and found.shape == exact.shape
        assert (found - expected).abs().max() < within, (name, (found - expected).abs().max())
    assert (rounded - exact).abs().max() < 0.5  # 64 errors of at most 1/254 of a weight, times |x|


def test_without_oneDNN_the_plain_product_does_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    linear = PackedLinear(weight, None, torch.float32)
    assert not linear.packed and torch.allclose(linear(x), F.linear(x, weight), atol=1e-6)


def prepared(model, *how):
    model = copy.deepcopy(model)
    decoding.prepare(model, 'cpu', *how)
    return model


def test_prepared_float32_weights_write_the_same_tokens():
    model = tiny()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    write = lambda model: list(decoding.generate(model, prompts, 30, temperature=0))
    assert write(prepared(model)) == write(model)
    assert decoding.prepare(model, 'cpu') == 'float32'


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_rounded_weights_agree_with_float32_on_nearly_every_greedy_token(dtype):
    """At gpt2's initial weights, where no logit stands out, the likeliest token is the same in 95 of 100."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=6, n_head=8, n_embd=256, vocab_size=5000, block_size=256)).eval()
    idx = torch.randint(5000, (4, 256))
    with torch.inference_mode():
        exact, rounded = (m(idx).argmax(-1) for m in (model, prepared(model, dtype)))
    agree = (exact == rounded).float().mean().item()
    assert agree >= 0.95, agree


def test_the_step_that_a_gpu_replays_computes_what_the_plain_one_does():
    """The same shapes at each step: the whole cache under a mask, ended texts kept. (On a GPU, from a graph.)"""
    model, prompts = tiny(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    plain, static = (decoding.KVCache(model, 3, 12) for _ in range(2))
    with torch.inference_mode():
        logits = plain.read(model, prompts)
        assert torch.equal(static.read(model, prompts), logits)
        step = decoding.GraphedStep(model, static)
        for _ in range(7):  # the longest is full then
            idx = logits.argmax(-1)
            logits = plain.step(model, idx[:, None])
            assert torch.allclose(step(idx), logits, atol=1e-5)
        before = static.k[:, 0, :, :10].clone()
        step(idx), step(idx)  # beyond the end of the third; the others must not notice
        assert torch.equal(static.k[:, 0, :, :10], before) and static.lengths == [12, 10, 14]


def test_a_gpu_gets_every_answer_as_a_cpu_does(monkeypatch):
    """generate with GraphedStep, forced on a CPU: texts that end at different times, and full windows."""
    model, prompts = tiny(), [[1, 2, 3], [4], list(range(40))]
    stops = set(range(0, 211, 9))
    plain = list(decoding.generate(model, prompts, 30, temperature=0, stops=stops))
    long = list(decoding.generate(model, prompts, 30, temperature=0))
    monkeypatch.setattr(decoding, 'wants_graph', lambda cache: True)
    assert list(decoding.generate(model, prompts, 30, temperature=0, stops=stops)) == plain
    assert list(decoding.generate(model, prompts, 30, temperature=0)) == long
    assert any(None in step for step in plain) and long[-1][2] is None


def test_int8_is_for_the_cpu():
    with pytest.raises(UserError, match='int8 is for the CPU, found mps'):
        decoding.prepare(tiny(), 'mps', 'int8')


@pytest.mark.skipif(sys.platform != 'linux', reason="glibc's malloc is Linux's")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Counted in page faults: 10 tensors of 64 MiB, one after the other, are 163,840 pages of 4 KiB."""
    script = ('import resource, torch, kernels; kernels.keep_freed_memory()\n'
              'for _ in range(10): torch.ones(1 << 24)\n'
              'before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
              'for _ in range(10): torch.ones(1 << 24)\n'
              'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)')
    faults = {}
    for name, text in (('kept', script), ('not', script.replace('kernels.keep_freed_memory()', 'pass'))):
        found = subprocess.run([sys.executable, '-c', text], cwd=REPOSITORY, capture_output=True, text=True)
        assert not found.returncode, found.stderr
        faults[name] = int(found.stdout)
    if faults['not'] < 80_000:
        pytest.skip(f'this malloc keeps memory by itself: {faults}')
    assert faults['kept'] < 40_000, faults
