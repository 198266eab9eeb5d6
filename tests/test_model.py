"""The model: parity with transformers, isolation of packed conversations, the fused loss."""
import math
from shutil import which

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as models
from conftest import VOCAB_SIZE, Conversations, tiny
from core.device import autocast
from core.pretrained import from_transformers, read_config, read_weights
from core.rows import make_batch
from model import GPT, DocumentAttention, GPTConfig, LinearCrossEntropy

# ---- transformers ----

SHAPES = {'gpt2': {'n_layer': 3, 'n_head': 12, 'n_embd': 192},
          'distilgpt2': {'n_layer': 2, 'n_head': 12, 'n_embd': 192},
          'DialoGPT': {'n_layer': 3, 'n_head': 16, 'n_embd': 128},
          'exact GELU': {'n_layer': 1, 'n_head': 2, 'n_embd': 64, 'activation_function': 'gelu'}}


def random_gpt2(**shape):
    """transformers' GPT-2, with biases and norms away from 0 and 1, so that each one counts."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return theirs


@pytest.mark.parametrize('name', SHAPES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name, tmp_path):
    theirs = random_gpt2(**SHAPES[name])
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict()
    if name == 'gpt2':  # its published file has h.0.ln_1.weight for transformer.h.0.ln_1.weight
        state = {key.removeprefix('transformer.'): p for key, p in state.items()}
    if name == 'DialoGPT':  # its published file has the tied head and masks, too
        for layer in range(3):
            state[f'transformer.h.{layer}.attn.bias'] = torch.ones(1, 1, 1024, 1024).tril().bool()
            state[f'transformer.h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
    if name in ('gpt2', 'DialoGPT'):
        (tmp_path / 'model.safetensors').unlink()
        torch.save(state, tmp_path / 'pytorch_model.bin')
    ours = from_transformers(read_config(tmp_path), read_weights(tmp_path)).eval()
    idx = torch.randint(50257, (2, 40))
    assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-4)


# ---- the loss of packed conversations ----

def test_the_first_loss_is_about_ln_V():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=1000))
    batch = make_batch(Conversations([60, 50, 33], 1000), range(3))
    loss = model.loss(batch).item() / len(batch.targets)
    assert abs(loss - math.log(1000)) < 0.1, loss


def test_the_packed_loss_equals_the_losses_one_by_one():
    model = tiny()
    split = Conversations([30, 5, 5, 5, 48, 17, 2, 17])
    expected = 0
    for ids, mask in split.found:
        ids = torch.from_numpy(ids.astype(np.int64))
        logits = model(ids[None, :-1])[0]
        losses = F.cross_entropy(logits, ids[1:], reduction='none')
        expected += (losses * torch.from_numpy(mask[1:])).sum()
    assert torch.allclose(model.loss(make_batch(split, range(8))), expected, rtol=1e-5)


@torch.no_grad()
def test_no_conversation_sees_another():
    """Changing one changes no other's hidden states: restarting positions alone would."""
    model = tiny()
    batch = make_batch(Conversations([20, 20, 20, 9]), range(4))
    assert batch.runs == [(1, 8), (3, 19)]
    second = slice(8 + 19, 8 + 38)  # of the three with 19 positions
    changed = batch.idx.copy()
    changed[second] = 7
    attend = DocumentAttention(batch.runs, model.config.n_head)
    positions = torch.from_numpy(batch.positions)
    x = model.body(torch.from_numpy(batch.idx), positions, attend)
    y = model.body(torch.from_numpy(changed), positions, attend)
    differs = (x != y).any(1)
    assert differs[second].all() and differs.sum() == 19


def test_gradients_of_two_micro_batches_equal_those_of_one():
    split = Conversations([30, 12, 44, 7])
    gradients = []
    for parts in ([[0, 1, 2, 3]], [[0, 3], [1, 2]]):
        model = tiny()
        batches = [make_batch(split, part) for part in parts]
        n = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            (model.loss(batch) / n).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients):
        assert torch.allclose(one, two, atol=1e-6)


def losses_of(model, split, n, lr=1e-3):
    """The losses of n steps of AdamW on all conversations of the split."""
    batch = make_batch(split, range(len(split.found)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = []
    for _ in range(n):
        loss = model.loss(batch) / len(batch.targets)
        optimizer.zero_grad()
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


@torch.no_grad()
def test_the_loss_in_bfloat16_is_near_float32():
    """On a CPU: products in bfloat16; attention, norms, softmax and sums in float32."""
    model = tiny()
    batch = make_batch(Conversations([30, 5, 5, 48, 17]), range(5))
    exact = model.loss(batch).item()
    with autocast('cpu', torch.bfloat16):
        fast = model.loss(batch).item()
    assert fast == pytest.approx(exact, rel=5e-3) and fast != exact


def test_dropout_is_for_training_only():
    model = tiny()
    batch = make_batch(Conversations([30]), [0])
    plain = model.loss(batch)
    model.set_dropout(0.2)
    assert torch.equal(model.loss(batch), plain)
    assert not torch.equal(model.train().loss(batch), plain)


# ---- LinearCrossEntropy ----

def fused(x, weight, targets, n_classes):
    return LinearCrossEntropy.apply(x, weight, targets, n_classes)


def plain(x, weight, targets, n_classes):
    logits = F.linear(x, weight)[:, :n_classes].float()
    return F.cross_entropy(logits, targets, reduction='sum')


def loss_and_gradients(way, x, weight, targets, n_classes, dtype=torch.float32):
    """[loss, gradient of x, gradient of weight], as tensors."""
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    with autocast('cpu', dtype):
        loss = way(x, weight, targets, n_classes)
    (loss / 7).backward()
    return [loss.detach(), x.grad, weight.grad]


@pytest.mark.parametrize('at_once, chunks', [
    (1, 17 * [1]), (256 * 5, [5, 5, 5, 2]), (1 << 25, [17])])
def test_the_fused_loss_equals_the_plain_one(monkeypatch, at_once, chunks):
    """And logits exist for a chunk at a time."""
    torch.manual_seed(0)
    case = torch.randn(17, 32), torch.randn(256, 32), torch.randint(211, (17,)), 211
    expected = loss_and_gradients(plain, *case)
    found_chunks = []
    log_softmax = torch.Tensor.log_softmax

    def spy(logits, *arguments, **options):
        found_chunks.append(len(logits))
        return log_softmax(logits, *arguments, **options)
    monkeypatch.setitem(models.LOGITS_AT_ONCE, 'cpu', at_once)
    monkeypatch.setattr(torch.Tensor, 'log_softmax', spy)
    found = loss_and_gradients(fused, *case)
    assert found_chunks == chunks
    for ours, theirs in zip(found, expected):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not found[2][211:].any()  # padding rows learn nothing


def test_in_bfloat16_the_fused_loss_is_as_close_to_float32_as_the_plain_one():
    torch.manual_seed(0)
    case = torch.randn(64, 128), torch.randn(512, 128) * 0.1, torch.randint(500, (64,)), 500
    exact = loss_and_gradients(plain, *case)
    ours = loss_and_gradients(fused, *case, torch.bfloat16)
    theirs = loss_and_gradients(plain, *case, torch.bfloat16)
    for i in range(3):
        error = (ours[i] - exact[i]).norm()
        allowed = 1.1 * (theirs[i] - exact[i]).norm() + 1e-4 * exact[0]
        assert error <= allowed, (i, error, allowed)


def test_the_fused_loss_makes_no_gradient_that_nobody_wants():
    """Evaluation must not pay for a gradient as large as the embedding."""
    weight = torch.randn(9, 8, requires_grad=True)
    case = torch.randn(5, 8), weight, torch.tensor([0, 1, 2, 3, 8]), 9
    with torch.no_grad():
        loss = fused(*case)
    assert loss.grad_fn is None
    assert torch.allclose(loss, plain(*case))


# ---- the vocabulary ----

@torch.no_grad()
def test_new_tokens_start_as_the_mean_of_their_pieces_and_old_logits_stay():
    """Random rows would wreck a small GPT-2, so that it says only the new tokens."""
    model = tiny(vocab_size=120)
    idx = torch.randint(120, (1, 10))
    old = model(idx)
    model.add_tokens({120: [3, 5, 5], 121: [7]})
    new = model(idx)
    assert new.shape[-1] == 122 and torch.equal(new[..., :120], old)
    assert torch.allclose(new[..., 120], (old[..., 3] + 2 * old[..., 5]) / 3, atol=1e-5)
    assert torch.allclose(new[..., 121], old[..., 7], atol=1e-6)
    model.add_tokens({i: [i - 120] for i in range(122, 130)})  # past the padding up to 128
    assert model.transformer.wte.weight.shape[0] == 256 and model(idx).shape[-1] == 130
    assert model.transformer.wte.weight.requires_grad


def test_padding_rows_are_never_logits():
    model = tiny()
    assert model.transformer.wte.weight.shape[0] == 256
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape[-1] == VOCAB_SIZE
