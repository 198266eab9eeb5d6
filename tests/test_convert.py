"""What formats/convert.py makes: other vocabularies, weights in parts, nanoGPT's files."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TEXTS, Payload, one_line, tiny
from core import checkpoint, pretrained, tokenfile, tokenizer
from core.tokenizer import END_OF_TEXT, TAGS, Tokenizer
from formats import convert
from formats.convert import read_vocabulary
from test_tokenizer import TRICKY, random_texts

transformers = pytest.importorskip('transformers')


@pytest.fixture
def of_its_size(monkeypatch):
    """A vocabulary of as many tokens as GPT-2's: pairs of bytes, which is on every machine."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([i // 256, i % 256]) for i in range(50_000)]
    load = convert.tokenizers.load

    def load_stand_in(name, tags=True):
        return Tokenizer(name, tokens, tags) if name == 'gpt2' else load(name, tags)
    monkeypatch.setattr(convert.tokenizers, 'load', load_stand_in)


def ckpt(path, vocab_size=50304, bias=True, prefix='', **changes):
    """Write what nanoGPT's train.py saves of a small random model, which is returned."""
    model_args = {'n_layer': 2, 'n_head': 2, 'n_embd': 8, 'block_size': 16, 'bias': bias,
                  'vocab_size': vocab_size}
    model = tiny(**model_args, gelu='none')
    saved = {prefix + name: p for name, p in model.state_dict().items()}
    wte = model.transformer.wte.weight.data[:vocab_size]
    saved[f'{prefix}transformer.wte.weight'] = saved[f'{prefix}lm_head.weight'] = wte
    saved[f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)  # of older versions
    torch.save({'model': saved, 'model_args': model_args, 'iter_num': 7} | changes,
               path / 'ckpt.pt')
    return model


@torch.no_grad()
@pytest.mark.parametrize('vocab_size, bias, prefix, tags', [
    (50304, True, '', True), (50304, False, '_orig_mod.', False), (50257, False, '', True)])
def test_the_logits_are_nanogpts(tmp_path, of_its_size, vocab_size, bias, prefix, tags):
    theirs = ckpt(tmp_path, vocab_size, bias, prefix)
    with one_line('python formats/convert.py --input=.*ckpt.pt'):
        checkpoint.open_model(str(tmp_path))
    convert.main([f'--input={tmp_path}/ckpt.pt', f'--out_dir={tmp_path}/my', f'--tags={tags}'])
    opened = checkpoint.open_model(str(tmp_path / 'my'))
    n = opened.tokenizer.vocab_size
    assert n == (50263 if vocab_size == 50304 and tags else 50257)
    assert opened.tokenizer.tags == (n == 50263)
    assert opened.template is None and opened.model.config.gelu == 'none'
    idx = torch.cat([torch.tensor([[n - 1]]), torch.randint(0, n, (1, 14))], 1)
    assert (opened.model(idx) - theirs(idx)[..., :n]).abs().max() < 1e-4


@pytest.mark.parametrize('changes, said', [
    ({'vocab_size': 65}, "65 tokens instead of GPT-2's 50257 or 50304"),
    ({'model': {}}, 'transformer.wte.weight'),
    ({'config': Payload('ran')}, 'nanoGPT')])
def test_one_that_cannot_be_converted_is_a_line(tmp_path, of_its_size, changes, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt(tmp_path, **changes)
    with one_line(said):
        convert.main(['--input=ckpt.pt', '--out_dir=my'])
    assert os.listdir(tmp_path) == ['ckpt.pt']  # nothing was written, and no code in it was run


def test_a_data_folder_is_torn_into_windows(tmp_path, gpt2):
    for name, n in (('train', 10), ('val', 4)):
        np.arange(n, dtype=np.uint16).tofile(tmp_path / f'{name}.bin')
    out = str(tmp_path / 'out')
    convert.main([f'--input={tmp_path}', f'--out_dir={out}', '--window=4'])
    split = tokenfile.Split([out], 'train')
    assert [split[i][0].tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert split.n_supervised.tolist() == [3, 3, 1] and tokenfile.read_meta(out)
    (tmp_path / 'meta.pkl').touch()
    with one_line('train.bin cannot be read: ValueError another vocabulary'):
        convert.main([f'--input={tmp_path}', f'--out_dir={out}'])


# ---- models in transformers' form ----

@pytest.fixture(scope='module')
def german(vocabulary, tmp_path_factory):
    """Another vocabulary, a [PAD], rows without a token, and weights in parts."""
    folder = tmp_path_factory.mktemp('german')
    content = json.loads(Path(vocabulary, 'tokenizer.json').read_text())
    n = len(content['model']['vocab'])
    content['added_tokens'] = [
        {'id': n + i, 'content': piece, 'special': True, 'single_word': False, 'lstrip': False,
         'rstrip': False, 'normalized': False} for i, piece in enumerate([END_OF_TEXT, '[PAD]'])]
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    (folder / 'tokenizer_config.json').write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64,
                                     vocab_size=n + 30)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder, max_shard_size='20KB')
    assert len(list(folder.glob('*.safetensors'))) > 1
    return folder, model, n


@torch.no_grad()
def test_another_vocabulary_is_named_converted_and_kept_with_its_special_tokens(
        german, of_its_size, tmp_path):
    folder, model, n = german
    with one_line(f'Convert it: python formats/convert.py --input={folder}'):
        checkpoint.open_model(str(folder))
    parts = shutil.copytree(folder, tmp_path / 'parts')
    (parts / 'tokenizer.json').unlink()
    with one_line(f'no model.safetensors .* Convert it: python formats/convert.py --input={parts}'):
        checkpoint.open_model(str(parts))
    out = str(tmp_path / 'out')
    convert.main([f'--input={folder}', f'--out_dir={out}'])
    opened = checkpoint.open_model(out)
    assert opened.tokenizer.special == {END_OF_TEXT: n, '[PAD]': n + 1}
    assert opened.model.config.vocab_size == opened.tokenizer.vocab_size == n + 2
    assert opened.template is None
    idx = torch.tensor([opened.tokenizer.encode_with_tags('Hi[PAD]').tolist()])
    assert idx[0, -1] == n + 1
    assert torch.allclose(opened.model.eval()(idx), model(idx).logits[..., :n + 2], atol=1e-5)
    tagged = checkpoint.open_model(out, tags=True)
    assert tagged.tokenizer.special['<conversation>'] == n + 2
    assert tagged.model.config.vocab_size == tagged.tokenizer.vocab_size == n + 8
    # What prepare.py --tokenizer=FOLDER reads.
    assert tokenizer.load(out, tags=False).special == opened.tokenizer.special


def test_a_model_of_another_kind_is_a_line(german, tmp_path):
    with one_line("relu'; this code computes GPT-2s"):
        pretrained.check_config({'activation_function': 'relu'}, 'x')
    with one_line("Expected a GPT-2 in transformers' form"):
        convert.main([f'--input={tmp_path}/none', f'--out_dir={tmp_path}/out'])
    assert os.listdir(tmp_path) == []


# ---- vocabularies ----

@pytest.mark.parametrize('special, n', [([], 256), (['<pad>', END_OF_TEXT, '<mask>'], 400)])
def test_ids_are_those_of_transformers(learn, special, n):
    """Special tokens may have any names, and stand before or behind the text tokens."""
    folder = learn([*TEXTS, *random_texts(50, seed=2)], n)
    model = json.loads(Path(folder, 'tokenizer.json').read_text())['model']
    vocab = {token: i for i, token in enumerate([*special, *model['vocab']])}
    merges = [tuple(merge) for merge in model['merges']]
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    theirs.add_tokens([*special, '<last>'], special_tokens=True)
    ours = read_vocabulary('x', json.loads(theirs.backend_tokenizer.to_str()))
    assert ours.special == {piece: theirs.convert_tokens_to_ids(piece)
                            for piece in {*special, END_OF_TEXT, '<last>'}}
    for text in (*TRICKY, *random_texts(300)):
        ids = ours.encode(text).tolist()
        assert ours.decode(ids) == text and not {*ids} & {*ours.special.values()}
        if END_OF_TEXT not in text:
            assert ids == theirs(text)['input_ids'], repr(text)
    tagged = ours.with_tags()
    first = ours.vocab_size
    assert [tagged.special[tag] for tag in TAGS] == [*range(first, first + 6)]
    assert tokenizer.from_state(json.loads(json.dumps(tagged.state()))).special == tagged.special


@pytest.mark.parametrize('change, said', [
    # As RoBERTa has them.
    (lambda vocab, merges: (vocab | {'an': vocab['is'], 'is': vocab['an']}, merges), 'the order'),
    (lambda vocab, merges: (vocab, merges[:-1]), 'not in the order of merging'),
    (lambda vocab, merges: ({t: i + (i > 300) for t, i in vocab.items()}, merges), 'without gaps'),
    (lambda vocab, merges: (vocab | {f'<{i}>': i for i in range(320, 65536)},
                            merges + [f'<{i} >' for i in range(320, 65536)]), '16 bits')])
def test_a_vocabulary_of_another_kind_is_refused(vocabulary, change, said):
    content = json.loads(Path(vocabulary, 'tokenizer.json').read_text())
    vocab, merges = change(content['model']['vocab'], content['model']['merges'])
    with pytest.raises(ValueError, match=said):
        read_vocabulary('x', content | {'model': {'vocab': vocab, 'merges': merges}})
