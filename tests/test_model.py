"""The model: parity with transformers, isolation of packed conversations, attention, the loss."""
from shutil import which

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import Conversations, tiny
from core.device import autocast
from core.pretrained import from_transformers, read_config, read_weights
from core.rows import make_batch
from model import CrossEntropy, attention_by_products

SHAPES = {'gpt2': {'n_layer': 3, 'n_head': 12, 'n_embd': 192},
          'DialoGPT': {'n_layer': 3, 'n_head': 16, 'n_embd': 128},
          'exact GELU': {'n_layer': 1, 'n_head': 2, 'n_embd': 64, 'activation_function': 'gelu'}}


@pytest.mark.parametrize('name', SHAPES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=500, **SHAPES[name])
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():  # biases and norms away from 0 and 1, so that each one counts
        p.add_(torch.randn_like(p) * 0.02)
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict()
    if name == 'gpt2':  # its published file has h.0.ln_1.weight for transformer.h.0.ln_1.weight
        state = {key.removeprefix('transformer.'): p for key, p in state.items()}
    if name == 'DialoGPT':  # its published file has the tied head and masks, too
        state['transformer.h.0.attn.bias'] = torch.ones(1, 1, 1024, 1024)
    if name != 'exact GELU':
        (tmp_path / 'model.safetensors').unlink()
        torch.save(state, tmp_path / 'pytorch_model.bin')
    ours = from_transformers(read_config(tmp_path), read_weights(tmp_path)).eval()
    idx = torch.randint(500, (2, 40))
    assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-4)


# ---- packed conversations ----



@pytest.mark.parametrize('dtype, rel', [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_the_packed_loss_equals_the_losses_one_by_one(dtype, rel):
    model = tiny()
    split = Conversations([30, 5, 5, 5, 48, 17, 2, 17])
    expected = 0
    for ids, mask in split.found:
        ids = torch.from_numpy(ids.astype(np.int64))
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction='none')
        expected += (losses * torch.from_numpy(mask[1:])).sum().item()
    with autocast('cpu', dtype):
        loss = model.loss(make_batch(split, range(8))).item()
    assert loss == pytest.approx(expected, rel=rel)
    assert (abs(loss / expected - 1) > 1e-6) == (dtype == torch.bfloat16)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_conversation_learns_from_another(dtype):
    """The loss of the last one has a gradient in its own positions only, not behind the loss."""
    model = tiny()
    batch = make_batch(Conversations([20, 20, 20, 9]), range(4))
    assert batch.runs == [(1, 8), (3, 19)]
    seen = []
    model.transformer.wte.register_forward_hook(lambda *call: seen.append(call[2]))
    at = np.array([8 + 38 + 10])  # in the last of the three with 19 positions
    with autocast('cpu', dtype):
        loss = model.loss(batch._replace(at=at, targets=np.array([3])))
    grad, = torch.autograd.grad(loss, seen)
    touched = grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == list(range(8 + 38, 8 + 38 + 11))


def losses_of(model, split, n, lr=1e-3):
    """The losses of n steps of AdamW on all conversations of the split."""
    batch = make_batch(split, range(len(split.found)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = model.loss(batch) / len(batch.targets)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_one_batch_is_learned_by_heart():
    assert losses_of(tiny(), Conversations([20, 30, 9]), 80, lr=3e-3)[-1] < 0.05


@pytest.mark.skipif(not (which('g++') or which('clang++')), reason='needs a C++ compiler')
def test_compiled_training_gives_the_same_losses_within_rounding():
    split = Conversations([30, 12, 44, 7])
    plain = losses_of(tiny().train(), split, 4)
    model = tiny().train()
    model.compile()
    assert losses_of(model, split, 4) == pytest.approx(plain, rel=1e-4)


def test_dropout_is_for_training_only():
    model = tiny()
    batch = make_batch(Conversations([30]), [0])
    plain = model.loss(batch)
    model.config.dropout = 0.2
    assert torch.equal(model.loss(batch), plain)
    assert not torch.equal(model.train().loss(batch), plain)


def test_attention_by_products_is_attention():
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 4, 50, 16, requires_grad=True)
    results = []
    for y in (attention_by_products(*qkv), attention_by_products(*qkv.bfloat16()).float(),
              F.scaled_dot_product_attention(*qkv, is_causal=True)):
        grad, = torch.autograd.grad(y.square().sum(), qkv)
        results.append(torch.cat([y.detach().flatten(), grad.flatten()]))
    exact, rounded, expected = results
    assert torch.allclose(exact, expected, atol=1e-4)
    assert (rounded - expected).norm() < 0.02 * expected.norm()


# ---- the loss ----

def plain(logits, targets, n_classes):
    return F.cross_entropy(logits[:, :n_classes].float(), targets, reduction='sum')


def loss_and_gradients(way, x, weight, *rest, dtype=torch.float32):
    """The loss, the gradient of x and that of weight in one tensor."""
    with autocast('cpu', dtype):
        loss = way(F.linear(x, weight), *rest)
    gradients = torch.autograd.grad(loss / 7, (x, weight))
    return torch.cat([loss.detach()[None], *map(torch.flatten, gradients)])


@pytest.mark.parametrize('scale', [1, 30])  # 30: the target's probability is 0 in float32
def test_the_loss_and_its_gradients_equal_the_plain_ones(scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(77, 32)).requires_grad_()
    weight = torch.randn(256, 32, requires_grad=True)
    case = x, weight, torch.randint(211, (77,)), 211
    expected = loss_and_gradients(plain, *case)
    ours = loss_and_gradients(CrossEntropy.apply, *case)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * scale)
    assert not ours[-45 * 32:].any()  # padding rows learn nothing
    error = (loss_and_gradients(CrossEntropy.apply, *case, dtype=torch.bfloat16) - expected).norm()
    theirs = (loss_and_gradients(plain, *case, dtype=torch.bfloat16) - expected).norm()
    assert error < 1.1 * theirs + 1e-4 * expected.norm()


# ---- the vocabulary ----

@torch.no_grad()
def test_new_tokens_start_as_the_mean_of_their_pieces_and_old_logits_stay():
    """Random rows would wreck a small GPT-2, so that it says only the new tokens."""
    model = tiny(vocab_size=120)
    idx = torch.randint(120, (1, 10))
    old = model(idx)
    model.add_tokens([[3, 5, 5], [7]])
    new = model(idx)
    assert new.shape[-1] == 122 and torch.equal(new[..., :120], old)
    assert torch.allclose(new[..., 120], (old[..., 3] + 2 * old[..., 5]) / 3, atol=1e-5)
    assert torch.allclose(new[..., 121], old[..., 7], atol=1e-6)
    model.add_tokens([[i] for i in range(2, 10)])  # past the padding up to 128
    assert model.transformer.wte.weight.shape[0] == 256 and model(idx).shape[-1] == 130
    assert model.transformer.wte.weight.requires_grad
