"""The penalties as transformers and OpenAI define them."""
import pytest
import torch

from core.generate import Sampling, choose, generate
from core.pretrained import from_transformers


@pytest.fixture(scope='module')
def pair():
    """(transformers' model, ours) of the same random weights, which repeat themselves."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=200,
                                     n_positions=128, bos_token_id=199, eos_token_id=199)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return theirs, from_transformers(config.to_dict(), theirs.state_dict()).eval()


@pytest.mark.parametrize('keys', [
    {}, {'repetition_penalty': 1.3}, {'repetition_penalty': 0.7}, {'no_repeat_ngram_size': 1},
    {'no_repeat_ngram_size': 3}, {'repetition_penalty': 1.2, 'no_repeat_ngram_size': 2}])
def test_penalties_give_the_greedy_tokens_of_transformers(pair, keys):
    theirs, ours = pair
    torch.manual_seed(2)
    for n in range(10):
        prompt = torch.randint(1, 199, (1, 5 + n))
        wanted = theirs.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0,
                                 eos_token_id=None, **keys)[0, 5 + n:].tolist()
        steps = generate(ours, [prompt[0].tolist()], 40, Sampling(temperature=0, **keys))
        assert [token for token, in steps] == wanted, (n, keys)


def test_each_text_of_a_batch_has_its_own_penalties(pair):
    _, ours = pair
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13]]
    sampling = Sampling(temperature=0, repetition_penalty=1.5, no_repeat_ngram_size=2)
    together = list(zip(*generate(ours, prompts, 20, sampling)))
    for prompt, answer in zip(prompts, together):
        alone = [token for token, in generate(ours, [prompt], 20, sampling)]
        assert list(answer) == alone


def test_frequency_and_presence_count_the_answer_only():
    logits = torch.zeros(1, 4)
    logits[0, 2] = 1.0
    texts = [([2, 2, 2], [])]
    penalties = Sampling(temperature=0, frequency_penalty=0.4, presence_penalty=0.3)
    assert choose(logits, penalties, None, texts).item() == 2  # the prompt does not count
    assert choose(logits, penalties, None, [([], [2])]).item() == 2  # 1 - 0.4 - 0.3 > 0
    assert choose(logits, penalties, None, [([], [2, 2])]).item() != 2  # 1 - 0.8 - 0.3 < 0
    assert logits[0, 2] == 1  # not changed in place
