"""nanoGPT's ckpt.pt opens here: its logits, its vocabulary with our tags or without, and the lines where it cannot."""
import os

import pytest
import torch
import torch.nn.functional as F

from core import checkpoint
import train
from configurator import UserError
from core.conversation import Turn, encode
from model import from_transformers, to_transformers
from test_checkpoint import Payload
from test_train import flags
from core.tokenfile import Writer
from core.tokenizer import Tokenizer


@pytest.fixture
def of_its_size(monkeypatch):
    """In the place of GPT-2's vocabulary one of as many tokens, which is on every machine."""
    tokens = [bytes([b]) for b in range(256)] + [b'%05d' % i for i in range(256, 50256)]
    monkeypatch.setattr(checkpoint.tokenizers, 'load', lambda name, tags=True: Tokenizer('stand-in', tokens, tags))


def ckpt(path, vocab_size=50304, bias=True, prefix='', **changes):
    """Write what nanoGPT's train.py saves, of a small random model; its state_dict."""
    torch.manual_seed(1)
    C, args = 8, dict(n_layer=2, n_head=2, n_embd=8, block_size=16, bias=bias, vocab_size=vocab_size, dropout=0.0)
    shapes = {'transformer.wte': (vocab_size, C), 'transformer.wpe': (16, C), 'transformer.ln_f': (C,)}
    for h in ('transformer.h.0', 'transformer.h.1'):
        shapes |= {f'{h}.ln_1': (C,), f'{h}.attn.c_attn': (3 * C, C), f'{h}.attn.c_proj': (C, C),
                   f'{h}.ln_2': (C,), f'{h}.mlp.c_fc': (4 * C, C), f'{h}.mlp.c_proj': (C, 4 * C)}
    state = {f'{name}.weight': torch.randn(shape) for name, shape in shapes.items()}
    state |= {f'{name}.bias': torch.randn(shape[0]) for name, shape in shapes.items() if bias and name[-3:] not in ('wte', 'wpe')}
    state['lm_head.weight'] = state['transformer.wte.weight']
    os.makedirs(path, exist_ok=True)
    torch.save({'model': {prefix + name: p for name, p in state.items()}, 'optimizer': {'state': {}}, 'model_args': args,
                'iter_num': 7, 'best_val_loss': torch.tensor(3.25), 'config': {'dataset': 'oasst'}, **changes}, path / 'ckpt.pt')
    return state


def logits(state, idx, n_head=2, n_layer=2):
    """What nanoGPT's model.py computes, from the names of its weights."""
    get = lambda name: (state[f'transformer.{name}.weight'], state.get(f'transformer.{name}.bias'))  # noqa: E731
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], *get(name), 1e-5)  # noqa: E731
    x = F.embedding(idx, get('wte')[0]) + get('wpe')[0][:idx.shape[1]]
    for i in range(n_layer):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in F.linear(norm(f'h.{i}.ln_1', x), *get(f'h.{i}.attn.c_attn')).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, *get(f'h.{i}.attn.c_proj'))
        x = x + F.linear(F.gelu(F.linear(norm(f'h.{i}.ln_2', x), *get(f'h.{i}.mlp.c_fc'))), *get(f'h.{i}.mlp.c_proj'))
    return F.linear(norm('ln_f', x), state['lm_head.weight'])


@pytest.mark.parametrize('vocab_size, bias, prefix', [(50304, True, ''), (50304, False, '_orig_mod.'), (50257, False, '')])
def test_the_logits_are_nanogpts(tmp_path, of_its_size, vocab_size, bias, prefix):
    state = ckpt(tmp_path / 'nano', vocab_size, bias, prefix)
    opened = checkpoint.open_model(str(tmp_path / 'nano'))
    n = opened.tokenizer.vocab_size
    assert (n, opened.tokenizer.tags) == ((50263, True) if vocab_size == 50304 else (50257, False))
    assert opened.template is None and opened.model.config.bias == bias and 'step 7' in opened.description
    idx = torch.cat([torch.tensor([[n - 1]]), torch.randint(0, n, (1, 14))], 1)
    with torch.no_grad():
        assert (opened.model(idx) - logits(state, idx)[..., :n]).abs().max() < 1e-4
        opened.model.transformer.h[0].gelu = 'tanh'  # so the test can tell one GELU from the other
        assert (opened.model(idx) - logits(state, idx)[..., :n]).abs().max() > 1e-4


def test_the_gelu_goes_with_the_model(tmp_path, of_its_size):
    """Into our checkpoint and back, and into transformers' form and back."""
    ckpt(tmp_path / 'nano')
    opened, idx = checkpoint.open_model(str(tmp_path / 'nano')), torch.arange(12)[None]
    checkpoint.save(checkpoint.pack(opened.model, opened.tokenizer, 'xml', {}, 1, None), str(tmp_path / 'ckpt.pt'))
    config, weights = to_transformers(opened.model)
    with torch.no_grad():
        for other in (checkpoint.open_model('resume', str(tmp_path)).model, from_transformers(config, weights)):
            assert other.config.gelu == 'none' and torch.allclose(other(idx), opened.model(idx), atol=1e-5)
        transformers = pytest.importorskip('transformers')
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
        theirs.load_state_dict(weights, strict=False)
        assert torch.allclose(theirs(idx).logits, opened.model(idx), atol=1e-4)


def test_a_checkpoint_from_before_there_was_a_choice_has_gpt2s(tmp_path, of_its_size):
    ckpt(tmp_path / 'nano')
    opened = checkpoint.open_model(str(tmp_path / 'nano'))
    contents = checkpoint.pack(opened.model, opened.tokenizer, 'xml', {}, 1, None)
    del contents['model_args']['gelu']
    assert checkpoint.from_contents(contents).model.transformer.h[0].gelu == 'tanh'
    for wrong in ('relu', 1, None):
        contents['model_args']['gelu'] = wrong
        with pytest.raises(UserError, match='does not fit together'):
            checkpoint.from_contents(contents)


def test_it_is_asked_and_trained_further_but_not_resumed(tmp_path, gpt2, script):
    ckpt(tmp_path / 'nano')
    for flag in ('--init_from=nano', '--out_dir=nano'):
        found = script('sample.py', flag, '--start=Hi', '--max_new_tokens=4', '--device=cpu')
        assert found.returncode == 0 and found.stdout.startswith('Hi') and "nanoGPT's, step 7" in found.stderr, found.stderr
    found = script('sample.py', '--init_from=nano', '--user=Hi', '--device=cpu')
    assert found.returncode == 2 and '--start, or choose one: --template=xml' in found.stderr
    ids, mask, _ = encode([Turn('user', 'Hi'), Turn('assistant', 'Hello')], gpt2)
    with Writer(str(tmp_path / 'data' / 'colours'), ('train', 'val')) as writer:
        for split in ('train', 'val'):
            writer.add(split, ids, mask, [len(ids)])
        writer.finish({'template': 'xml', 'tokenizer': gpt2.state()})
    train.main(flags(tmp_path / 'data', tmp_path / 'out', init_from=tmp_path / 'nano', max_iters=2, block_size=16))
    assert checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['model_args']['gelu'] == 'none'
    with pytest.raises(UserError, match="nanoGPT's: no run of this code can go on from it.*--init_from=") as error:
        train.main(['--init_from=resume', f'--out_dir={tmp_path / "nano"}'])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes, said', [
    (dict(vocab_size=65), "a vocabulary of 65 tokens; expected GPT-2's, 50257 or 50304"),
    (dict(model={}), 'does not fit together'), (dict(model={1: 2}), 'does not fit together'), (dict(iter_num='7'), 'missing format_version'),
    (dict(model_args={'vocab_size': 50257, 'n_layer': 2, 'system': 'rm'}), 'does not fit together'),
    (dict(model_args={'vocab_size': 50257, 'n_layer': 10 ** 9}), 'does not fit')])
def test_one_that_cannot_be_opened_is_a_line(tmp_path, of_its_size, changes, said):
    ckpt(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        checkpoint.open_model(str(tmp_path))
    assert said in str(error.value) and '\n' not in str(error.value)


def test_a_head_of_its_own_is_refused(tmp_path, of_its_size):
    state = ckpt(tmp_path)
    ckpt(tmp_path, model={**state, 'lm_head.weight': state['lm_head.weight'] + 1})
    with pytest.raises(UserError, match='its head is not tied to the embedding'):
        checkpoint.open_model(str(tmp_path))


def test_code_in_it_is_not_run(tmp_path):
    ckpt(tmp_path, config=Payload(str(tmp_path / 'ran')))
    with pytest.raises(UserError, match='safely'):
        checkpoint.open_model(str(tmp_path))
    assert not os.path.exists(tmp_path / 'ran')
