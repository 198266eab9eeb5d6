"""Weights laid out for decoding, each against the plain product."""
import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from conftest import tiny
from core.decoding_weights import Int8Linear, PackedLinear, prepare
from core.generate import Sampling, generate
from model import GPT, GPTConfig


@pytest.mark.parametrize('rows', [1, 2, 16, 64])
def test_packed_and_int8_weights_multiply_as_the_plain_ones(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 64)
    weight = torch.randn(64, 200).t()  # a view, as from transformers' files
    bias = torch.randn(200)
    exact = F.linear(x, weight, bias)
    short = F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = F.linear(x.bfloat16().float(), (weight / scale).round() * scale, bias)
    assert (rounded - exact).abs().max() < 0.5  # 64 errors of at most 1/254 of a weight, times |x|
    for linear, expected, within in (
            (PackedLinear(weight, bias, torch.float32), exact, 1e-4),
            (PackedLinear(weight, None, torch.float32), exact - bias, 1e-4),
            (PackedLinear(weight, bias, torch.bfloat16), short, 0.3),
            (Int8Linear(weight, bias), rounded, 0.3),
            (Int8Linear(weight, None), rounded - bias, 0.3)):
        found = linear(x)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < within, linear


@pytest.mark.parametrize('onednn', [True, False])
def test_float32_weights_write_the_same_tokens(monkeypatch, onednn):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: onednn)
    model = tiny()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    expected = list(generate(model, prompts, 30, Sampling(temperature=0)))
    assert prepare(model, 'cpu') == 'float32'
    assert isinstance(model.unembed, PackedLinear) == onednn
    assert list(generate(model, prompts, 30, Sampling(temperature=0))) == expected


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
@torch.inference_mode()
def test_rounded_weights_agree_with_float32_on_nearly_every_token(dtype):
    """With random weights, where no logit stands out, on 95 of 100."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=6, n_head=8, n_embd=256, vocab_size=5000, block_size=256)).eval()
    idx = torch.randint(5000, (2, 256))
    exact = model(idx).argmax(-1)
    assert prepare(model, 'cpu', dtype) == dtype
    rounded = model(idx).argmax(-1)
    agree = (exact == rounded).float().mean().item()
    assert 0.95 <= agree < 1, agree


def test_int8_is_for_the_cpu():
    with pytest.raises(UserError, match='dtype=int8 is for the CPU, found mps'):
        prepare(tiny(), 'mps', 'int8')
