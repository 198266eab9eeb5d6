"""Decoding: the cache of keys and values, where answers end, how tokens are drawn."""
import pytest
import torch

from conftest import VOCAB_SIZE, tiny
from core.generate import Sampling, choose, generate
from core.pretrained import from_transformers

GREEDY = Sampling(temperature=0)


@torch.no_grad()
def greedy_without_cache(model, prompt, n):
    """The next n tokens after a list of ids, each by a forward pass over all before it."""
    idx = torch.tensor([prompt])
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[:, -1].argmax(-1, keepdim=True)], 1)
    return idx[0, len(prompt):].tolist()


def prompts_of(*lengths):
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def whole(steps):
    """The answers that generate's steps spell, without the None after their ends."""
    return [[token for token in answer if token is not None] for answer in zip(*steps)]


@pytest.mark.parametrize('lengths', [(1, 1), (7,), (47,), (48, 48), (3, 48, 3, 20), (46, 1)])
def test_cached_decoding_equals_uncached_to_the_end_of_the_window(lengths):
    """Each answer is what it would be alone, with prompts of different lengths in one batch."""
    model = tiny()
    prompts = prompts_of(*lengths)
    found = whole(generate(model, prompts, 1000, GREEDY))
    for prompt, answer in zip(prompts, found, strict=True):
        room = 48 - len(prompt) + 1  # with the token that is predicted at the last position
        assert answer == greedy_without_cache(model, prompt, room)


def test_an_answer_ends_with_its_stop_and_the_others_go_on():
    model = tiny()
    prompts = prompts_of(5, 9, 12)
    alone = [greedy_without_cache(model, prompt, 20) for prompt in prompts]
    stop = alone[0][9]
    found = whole(generate(model, prompts, 20, GREEDY, stops={stop}))
    for answer, expected in zip(found, alone, strict=True):
        n = [*expected, stop].index(stop)
        assert answer == expected[:n + 1]
    assert len(set(map(len, found))) > 1


def test_samples_share_their_prompt_and_the_seed_decides():
    model = tiny()
    prompts = prompts_of(6, 3)
    before = torch.get_rng_state()
    first, again, other = (
        whole(generate(model, prompts, 9, Sampling(), 4, seed)) for seed in (1, 1, 2))
    assert [len(answer) for answer in first] == [9] * 8
    assert first == again and first != other
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(map(tuple, first))) == 8
    found = whole(generate(model, prompts, 9, GREEDY, 4))
    one, two = (greedy_without_cache(model, prompt, 9) for prompt in prompts)
    assert found == 4 * [one] + 4 * [two]


@pytest.mark.parametrize('keys, expected', [
    ({}, [0.5, 0.3, 0.15, 0.05]),
    ({'top_k': 2}, [0.625, 0.375, 0, 0]),
    ({'top_p': 0.7}, [0.625, 0.375, 0, 0]),
    ({'top_p': 0.01}, [1, 0, 0, 0]),  # the likeliest one always stays
    ({'min_p': 0.2}, [0.526, 0.316, 0.158, 0]),
    ({'temperature': 0.0}, [1, 0, 0, 0]),
    ({'temperature': 1e-40}, [1, 0, 0, 0]),
    ({'temperature': 0.5}, [0.685, 0.247, 0.062, 0.007])])
def test_tokens_are_drawn_with_these_shares(keys, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    drawn = choose(logits, Sampling(**keys), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor(expected, dtype=torch.float), atol=0.03)
    assert ((shares > 0) == (torch.tensor(expected) > 0)).all()


@pytest.fixture(scope='module')
def pair():
    """(transformers' model, ours) of the same random weights, which repeat themselves."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=VOCAB_SIZE, bos_token_id=0,
        eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return theirs, from_transformers(config.to_dict(), theirs.state_dict()).eval()


@pytest.mark.parametrize('keys', [
    {}, {'repetition_penalty': 1.3}, {'repetition_penalty': 0.7}, {'no_repeat_ngram_size': 1},
    {'no_repeat_ngram_size': 3}, {'repetition_penalty': 1.2, 'no_repeat_ngram_size': 2}])
def test_penalties_give_the_greedy_tokens_of_transformers(pair, keys):
    """In one batch: each text has its own penalties."""
    theirs, ours = pair
    prompts = prompts_of(*range(2, 12))
    found = whole(generate(ours, prompts, 40, Sampling(temperature=0, **keys)))
    for prompt, answer in zip(prompts, found, strict=True):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
                                 pad_token_id=0, eos_token_id=None, **keys)
        assert prompt + answer == wanted[0].tolist()
