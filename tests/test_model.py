"""The model: parity with transformers, isolation of packed conversations, cached decoding."""
import math

import numpy as np
import pytest
import torch

from core import tokenfile
from configurator import UserError
from core.generate import choose, generate
from model import GPT, GPTConfig, DocumentAttention, from_transformers, to_transformers

TINY = dict(n_layer=2, n_head=4, n_embd=64, block_size=48, vocab_size=211)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a forgotten one shows
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.transformer.wte.weight[model.config.vocab_size:] = 0
    return model.eval()


class Conversations:
    """A stand-in for tokenfile.Split: random conversations of the given lengths."""

    def __init__(self, lengths, vocab_size=TINY['vocab_size'], seed=0):
        rng = np.random.default_rng(seed)
        self.found = [(rng.integers(0, vocab_size, n).astype(np.uint16), (rng.random(n) < 0.6).astype(np.uint8))
                      for n in lengths]
        for _, mask in self.found:
            mask[-1] = 1
        self.lengths = np.array(lengths)

    def __getitem__(self, i):
        return self.found[i]


SHAPES = {'gpt2': dict(n_layer=3, n_head=12, n_embd=192, n_positions=1024, vocab_size=50257),
          'distilgpt2': dict(n_layer=2, n_head=12, n_embd=192, n_positions=1024, vocab_size=50257),
          'DialoGPT': dict(n_layer=3, n_head=16, n_embd=128, n_positions=1024, vocab_size=50257)}


def transformers_model(shape):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return theirs


@pytest.mark.parametrize('name', SHAPES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    from core import checkpoint
    theirs = transformers_model(SHAPES[name])
    theirs.save_pretrained(tmp_path)
    if name == 'DialoGPT':  # its published file: pytorch_model.bin, the tied head and the masks saved too
        (tmp_path / 'model.safetensors').unlink()
        state = dict(theirs.state_dict())
        for layer in range(theirs.config.n_layer):
            state[f'transformer.h.{layer}.attn.bias'] = torch.ones(1, 1, 1024, 1024).tril().bool()
            state[f'transformer.h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
        torch.save(state, tmp_path / 'pytorch_model.bin')
    import json
    config = json.loads((tmp_path / 'config.json').read_text())
    ours = from_transformers(config, checkpoint._read_weights(str(tmp_path))).eval()
    idx = torch.randint(50257, (2, 40))
    with torch.no_grad():
        difference = (ours(idx) - theirs(idx).logits).abs().max().item()
    assert difference < 1e-4, difference


def test_names_without_the_transformer_prefix_are_read():
    """gpt2's own file on the hub has h.0.ln_1.weight where others have transformer.h.0.ln_1.weight."""
    theirs = transformers_model({**SHAPES['gpt2'], 'vocab_size': 100, 'n_layer': 1})
    config = theirs.config.to_dict()
    bare = {name.removeprefix('transformer.'): p for name, p in theirs.state_dict().items() if name != 'lm_head.weight'}
    ours = from_transformers(config, bare).eval()
    idx = torch.randint(100, (1, 9))
    with torch.no_grad():
        assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-4)


def test_weights_go_out_to_transformers_and_come_back():
    transformers = pytest.importorskip('transformers')
    ours = tiny()
    config, weights = to_transformers(ours)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}
    idx = torch.randint(TINY['vocab_size'], (2, 17))
    with torch.no_grad():
        assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-4)
        assert torch.equal(from_transformers(config, weights).eval()(idx), ours(idx))


@pytest.mark.parametrize('change, said', [
    ({'activation_function': 'relu'}, 'activation_function'), ({'model_type': 'llama'}, 'model_type'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'), ({'n_inner': 7}, 'n_inner'),
    ({'n_head': 5}, 'not a GPT-2'), ({'n_embd': 32}, 'is (')])
def test_a_model_of_another_kind_is_refused_in_one_line(change, said):
    config, weights = to_transformers(tiny())
    with pytest.raises(UserError, match=said.replace('(', r'\(')) as error:
        from_transformers({**config, **change}, weights)
    assert '\n' not in str(error.value)


def test_first_loss_is_about_ln_V():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=1000))
    batch = tokenfile.make_batch(Conversations([60, 50, 33], 1000), range(3))
    loss = model.loss(batch).item() / len(batch.targets)
    assert abs(loss - math.log(1000)) < 0.1, loss


def test_packed_loss_equals_the_losses_one_by_one():
    model, split = tiny(), Conversations([30, 5, 5, 5, 48, 17, 2, 17])
    together = model.loss(tokenfile.make_batch(split, range(8)))
    alone = []
    for ids, mask in split.found:
        logits = model(torch.from_numpy(ids.astype(np.int64))[None, :-1])[0].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)), reduction='none')
        alone.append((losses * torch.from_numpy(mask[1:])).sum())
    assert torch.allclose(together, torch.stack(alone).sum(), rtol=1e-5)


def test_no_conversation_sees_another_nor_the_padding():
    """Changing one conversation changes no other's hidden states: restarting positions alone would."""
    model, split = tiny(), Conversations([20, 20, 20, 9])
    before = tokenfile.make_batch(split, range(4))
    changed = before.idx.copy()
    changed[8 + 19:8 + 38] = 7  # the second of those with 19 positions; the shortest comes first
    attend = DocumentAttention(before.runs, TINY['n_head'])
    assert before.runs == [(1, 8), (3, 19)]
    with torch.no_grad():
        x, y = (model.body(torch.from_numpy(idx), torch.from_numpy(before.positions), attend) for idx in (before.idx, changed))
        same = (x == y).all(1)
        assert same[:27].all() and same[46:].all() and not same[27:46].all()
        padded = model.body(torch.cat([torch.from_numpy(before.idx), torch.full((5,), 3)]),
                            torch.cat([torch.from_numpy(before.positions), torch.zeros(5, dtype=torch.int64)]), attend)
        assert torch.allclose(padded[:-5], x, atol=1e-6)


def test_gradients_of_two_micro_batches_equal_those_of_one():
    split, n = Conversations([30, 12, 44, 7]), None

    def gradients(parts):
        model = tiny()
        batches = [tokenfile.make_batch(split, part) for part in parts]
        n = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            (model.loss(batch) / n).backward()
        return [p.grad for p in model.parameters()]

    for one, two in zip(gradients([[0, 1, 2, 3]]), gradients([[0, 3], [1, 2]])):
        assert torch.allclose(one, two, atol=1e-6)


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model, batch = tiny(), tokenfile.make_batch(Conversations([20, 30, 9]), range(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model.loss(batch) / len(batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, loss.item()


def test_new_tokens_start_as_the_mean_of_their_pieces_and_old_logits_stay():
    """Rows drawn at random wreck a small GPT-2: only the new tokens come out."""
    model, idx = tiny(vocab_size=120), torch.randint(120, (1, 10))
    with torch.no_grad():
        old = model(idx)
        model.add_tokens({120: [3, 5, 5], 121: [7]})
        new = model(idx)
    assert new.shape[-1] == 122 and torch.equal(new[..., :120], old)
    assert torch.allclose(new[..., 120], (old[..., 3] + 2 * old[..., 5]) / 3, atol=1e-5)
    assert torch.allclose(new[..., 121], old[..., 7], atol=1e-6)
    model.add_tokens({i: [i - 120] for i in range(122, 130)})  # past the padding of 128
    assert model.transformer.wte.weight.shape[0] == 256 and model(idx).shape[-1] == 130
    assert model.transformer.wte.weight.requires_grad


def test_padding_of_the_vocabulary_is_never_a_logit():
    model = tiny()
    assert model.transformer.wte.weight.shape[0] == 256
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape[-1] == TINY['vocab_size']
    assert to_transformers(model)[1]['transformer.wte.weight'].shape[0] == TINY['vocab_size']


def test_dropout_is_used_in_training_and_nowhere_else():
    model, batch = tiny(), tokenfile.make_batch(Conversations([30]), [0])
    plain = model.loss(batch)
    model.set_dropout(0.2)
    assert torch.equal(model.loss(batch), plain)  # eval
    model.train()
    assert not torch.equal(model.loss(batch), plain)


# ---- decoding ----

def greedy_without_cache(model, prompt, n):
    """The next n tokens after a list of ids, each by a forward pass over all before it."""
    idx = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            idx = torch.cat([idx, model(idx)[:, -1].argmax(-1, keepdim=True)], 1)
    return idx[0, len(prompt):].tolist()


def prompts_of(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, TINY['vocab_size'], n).tolist() for n in lengths]


def whole(steps):
    """The answers that generate's steps spell, without the None after their ends."""
    return [[token for token in answer if token is not None] for answer in zip(*steps)]


@pytest.mark.parametrize('lengths', [(1, 1), (7,), (47,), (48, 48), (3, 48, 3, 20), (46, 1)])
def test_cached_greedy_decoding_equals_uncached_to_the_end_of_the_window(lengths):
    """Prompts of different lengths too, in one batch: each answer is what it would be alone."""
    model, prompts = tiny(), prompts_of(*lengths)
    found = whole(generate(model, prompts, 1000, temperature=0))
    for prompt, answer in zip(prompts, found):
        room = TINY['block_size'] - len(prompt) + 1  # the token predicted at the last position included
        assert answer == greedy_without_cache(model, prompt, room)


def test_an_answer_ends_with_its_stop_and_the_others_go_on():
    model, prompts = tiny(), prompts_of(5, 9, 2)
    alone = [greedy_without_cache(model, prompt, 20) for prompt in prompts]
    stops = {alone[0][3], alone[1][11]}
    for answer, expected in zip(whole(generate(model, prompts, 20, temperature=0, stops=stops)), alone):
        ends = [i for i, token in enumerate(expected) if token in stops]
        assert answer == expected[:ends[0] + 1 if ends else 20]


def test_samples_share_one_prefill_and_the_seed_decides():
    model, prompts = tiny(), prompts_of(6, 3)
    draw = lambda seed: whole(generate(model, prompts, 9, 4, 1.0, seed=seed))
    first = draw(1)
    assert [len(answer) for answer in first] == [9] * 8 and first == draw(1) != draw(2)
    assert len({tuple(answer) for answer in first}) == 8
    greedy = whole(generate(model, prompts, 9, 4, 0.0))
    assert greedy == [answer for prompt in prompts for answer in [greedy_without_cache(model, prompt, 9)] * 4]


def test_sampling_moves_no_global_random_state():
    model, before = tiny(), torch.get_rng_state()
    list(generate(model, [[1, 2]], 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    draw = lambda **how: choose(logits, **{**dict(temperature=1.0, top_k=0, top_p=1.0,
                                           generator=torch.Generator().manual_seed(0)), **how}).bincount(minlength=4) / 4000
    assert draw(temperature=0).tolist() == [1, 0, 0, 0]  # no division by zero
    assert torch.allclose(draw(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    assert torch.allclose(draw(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(draw(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert draw(top_p=0.01).tolist() == [1, 0, 0, 0]  # the likeliest always stays
    assert torch.allclose(draw(top_k=100), draw())
    sharp = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert torch.allclose(draw(temperature=0.5), sharp / sharp.sum(), atol=0.03)
