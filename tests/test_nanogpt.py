"""nanoGPT's ckpt.pt, converted: its logits, its vocabulary, and a line for one that cannot be."""
import os

import numpy as np
import pytest
import torch

import sample
from configurator import UserError
from conftest import Payload
from core import checkpoint, tokenfile
from core.tokenizer import Tokenizer
from formats import nanogpt

transformers = pytest.importorskip('transformers')


@pytest.fixture
def of_its_size(monkeypatch):
    """A vocabulary of as many tokens as GPT-2's: pairs of bytes, which is on every machine."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([i // 256, i % 256]) for i in range(50_000)]
    load = nanogpt.tokenizers.load

    def load_stand_in(name, tags=True):
        return Tokenizer('gpt2', tokens, tags) if name == 'gpt2' else load(name, tags)
    monkeypatch.setattr(nanogpt.tokenizers, 'load', load_stand_in)


def ckpt(path, vocab_size=50304, bias=True, prefix='', **changes):
    """Write what nanoGPT's train.py saves of a small random model; returns it as transformers'."""
    torch.manual_seed(1)
    shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **shape, n_positions=16, vocab_size=vocab_size, activation_function='gelu')).eval()
    saved = {}
    for name, p in model.state_dict().items():
        torch.nn.init.normal_(p)
        if name.endswith('.bias') and not bias:
            p.zero_()
        else:
            # nanoGPT's layers are Linear, those of transformers the transposed Conv1D.
            saved[prefix + name] = p.T if p.dim() == 2 and '.h.' in name else p
    saved[f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)  # of older versions
    model_args = {**shape, 'block_size': 16, 'bias': bias}
    torch.save({'model': saved, 'model_args': model_args, 'iter_num': 7} | changes,
               path / 'ckpt.pt')
    return model


@torch.no_grad()
@pytest.mark.parametrize('vocab_size, bias, prefix, tags', [
    (50304, True, '', True), (50304, False, '_orig_mod.', False), (50257, False, '', True)])
def test_the_logits_are_nanogpts(tmp_path, of_its_size, vocab_size, bias, prefix, tags):
    theirs = ckpt(tmp_path, vocab_size, bias, prefix)
    nanogpt.main([f'--input={tmp_path}/ckpt.pt', f'--out={tmp_path}/my', f'--tags={tags}'])
    opened = checkpoint.open_model(str(tmp_path / 'my'))
    n = opened.tokenizer.vocab_size
    assert n == (50263 if vocab_size == 50304 and tags else 50257)
    assert opened.tokenizer.tags == (n == 50263)
    assert opened.template is None and opened.model.config.gelu == 'none'
    idx = torch.cat([torch.tensor([[n - 1]]), torch.randint(0, n, (1, 14))], 1)
    expected = theirs(idx).logits[..., :n]
    assert (opened.model(idx) - expected).abs().max() < 1e-4
    for block in opened.model.transformer.h:
        block.gelu = 'tanh'  # the test can tell one GELU from the other
    assert (opened.model(idx) - expected).abs().max() > 1e-4


def test_the_command_of_the_error_leads_to_text(tmp_path, gpt2, script, capsys):
    ckpt(tmp_path)
    with pytest.raises(UserError, match='python formats/nanogpt.py --input=.*ckpt.pt --out=FOLDER'):
        sample.main([f'--init_from={tmp_path}', '--start=Hi'])
    found = script('formats/nanogpt.py', '--input=ckpt.pt', '--out=my')
    assert found.returncode == 0 and 'sample.py --init_from=my' in found.stdout, found.stderr
    capsys.readouterr()
    sample.main([f'--init_from={tmp_path}/my', '--start=Hi', '--max_new_tokens=4', '--device=cpu'])
    assert capsys.readouterr().out.startswith('Hi')
    with pytest.raises(UserError, match='my: File exists. Use --out=FOLDER'):
        nanogpt.main([f'--input={tmp_path}/ckpt.pt', f'--out={tmp_path}/my'])


@pytest.mark.parametrize('changes, said', [
    ({'vocab_size': 65}, "65 tokens instead of GPT-2's 50257 or 50304"),
    ({'model': {}}, 'lm_head.weight'),
    ({'config': Payload('ran')}, 'nanoGPT')])
def test_one_that_cannot_be_converted_is_a_line(tmp_path, of_its_size, changes, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        nanogpt.main(['--input=ckpt.pt', '--out=my'])
    assert said in str(error.value) and '\n' not in str(error.value)
    assert os.listdir(tmp_path) == ['ckpt.pt']  # nothing was written, and no code in it was run


def test_a_data_folder_is_torn_into_windows(tmp_path, gpt2):
    for name, n in (('train', 10), ('val', 4)):
        np.arange(n, dtype=np.uint16).tofile(tmp_path / f'{name}.bin')
    out = str(tmp_path / 'out')
    nanogpt.main([f'--input={tmp_path}', f'--out={out}', '--window=4'])
    split = tokenfile.Split([out], 'train')
    assert [split[i][0].tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert split.n_supervised.tolist() == [3, 3, 1] and tokenfile.read_meta(out)
    (tmp_path / 'meta.pkl').touch()
    with pytest.raises(UserError, match='train.bin cannot be read: ValueError another vocabulary'):
        nanogpt.main([f'--input={tmp_path}', f'--out={out}'])
