"""Checkpoints and model folders: safe to open, and refused in one line if they are damaged."""
import dataclasses
import io
import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import torch

from configurator import UserError
from conftest import Payload
from core import checkpoint, tokenfile, tokenizer
from core.pretrained import read_config
from core.tokenizer import Tokenizer
from model import GPT, GPTConfig

TOKENS = [bytes([b]) for b in range(256)] + [b'ab', b'abc']
BPE = Tokenizer('tiny', TOKENS, tags=True)


def make():
    """A Checkpoint of a tiny model."""
    torch.manual_seed(0)
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=BPE.vocab_size)
    model = GPT(shape)
    return checkpoint.Checkpoint(
        model=model.state_dict(), model_args=dataclasses.asdict(shape), template='xml',
        tokenizer=BPE.state(), config={'seed': 1}, step=7, val_loss=1.25, data=['x'])


@pytest.fixture
def saved(tmp_path):
    """The path of a ckpt.pt."""
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(make(), path)
    return path


# ---- checkpoints ----

def test_a_checkpoint_reads_back(tmp_path, saved):
    opened = checkpoint.open_model('resume', str(tmp_path))
    assert opened.template == 'xml' and opened.tokenizer.tokens == TOKENS
    assert opened.description == f'{saved} (step 7, val_loss 1.2500)'
    assert opened.checkpoint.data == ['x'] and opened.checkpoint.optimizer is None
    for name, p in make().model.items():
        assert torch.equal(p, opened.model.state_dict()[name]), name


def test_best_is_preferred_if_it_is_asked_for(tmp_path, saved):
    for which in ('best', 'last'):
        assert 'ckpt.pt' in checkpoint.open_model('resume', str(tmp_path), which).description
    checkpoint.save(make(), tmp_path / 'best.pt')
    assert 'best.pt' in checkpoint.open_model('resume', str(tmp_path), 'best').description
    assert 'ckpt.pt' in checkpoint.open_model(str(tmp_path), which='last').description


def test_the_run_saved_last_is_found_in_the_folder_or_below(tmp_path):
    for age, folder in enumerate(['b', '.', 'c [1]', 'a']):
        os.makedirs(tmp_path / folder, exist_ok=True)
        checkpoint.save(make(), tmp_path / folder / 'ckpt.pt')
        os.utime(tmp_path / folder / 'ckpt.pt', (1000 - age, 1000 - age))
    for folder in ('b', '.', 'c [1]', 'a'):
        path = tmp_path / folder / 'ckpt.pt'
        assert pathlib.Path(checkpoint.find(str(tmp_path))) == path
        assert pathlib.Path(checkpoint.find(str(path.parent))).name == 'ckpt.pt'
        path.unlink()
    with pytest.raises(UserError, match='ckpt.pt not found.*--out_dir=FOLDER'):
        checkpoint.open_model('resume', str(tmp_path))


def without(key):
    """A change that removes the key."""
    return lambda c: c.pop(key)


def change(*path, to):
    """A change of the value at the path of keys."""
    def apply(contents):
        for key in path[:-1]:
            contents = contents[key]
        contents[path[-1]] = to
    return apply


@pytest.mark.parametrize('spoil, said', [
    (without('model'), "missing .* 'model'"),
    (without('format_version'), 'format_version'),
    (change('format_version', to=99), 'has format 99; this code reads 1'),
    (change('tokenizer', to=3), "tokenizer: found '3', expected a table"),
    (change('val_loss', to=[]), 'val_loss: found'),
    (change('step', to='7'), "step: found '7', expected a whole number"),
    (change('template', to='ximl'), 'do not fit together'),
    (change('tokenizer', 'sha256', to='0' * 64), 'hash'),
    (change('tokenizer', 'tokens', to=['Ā', 'no byte: ☃']), 'do not fit together'),
    (change('tokenizer', 'tags', to=False), 'size of the vocabulary'),
    (change('model_args', 'n_embd', to=8), 'do not fit together'),
    (change('model_args', 'n_head', to=0), 'do not fit together'),
    (change('model_args', 'n_layer', to=10 ** 9), 'number of layers'),
    (change('model_args', 'block_size', to=True), 'block_size: found'),
    (change('model_args', 'dropout', to=float('nan')), 'dropout: found'),
    (change('model_args', 'dropout', to=1.5), 'dropout: found 1.5'),
    (change('model', 'transformer.wpe.weight', to=torch.zeros(3)), 'do not fit together'),
    (lambda c: c['model'].pop('transformer.wpe.weight'), 'do not fit together')])
def test_a_spoilt_checkpoint_is_refused_in_one_line(tmp_path, spoil, said):
    contents = vars(make())
    spoil(contents)
    torch.save(contents, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=said) as error:
        checkpoint.open_model('resume', str(tmp_path))
    assert '\n' not in str(error.value)


def test_what_is_no_checkpoint_is_refused_in_one_line(saved):
    half = saved.read_bytes()[:5000]
    for content in (b'', b'not a checkpoint', b'PK\x03\x04' + b'\0' * 100, half):
        saved.write_bytes(content)
        with pytest.raises(UserError, match='ckpt.pt cannot be read: .* a checkpoint') as error:
            checkpoint.load(saved)
        assert '\n' not in str(error.value)


def test_nanogpts_checkpoint_is_refused_with_the_line_that_converts_it(saved):
    torch.save({'model': {}, 'model_args': {}, 'iter_num': 3}, saved)
    with pytest.raises(UserError, match='python formats/nanogpt.py --input=.*ckpt.pt --out=FOLDER'):
        checkpoint.load(saved)


# ---- planted code ----

@pytest.mark.parametrize('save', [torch.save, lambda content, path: path.write_bytes(
    pickle.dumps(content))])
@pytest.mark.parametrize('name', ['ckpt.pt', 'pytorch_model.bin'])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save, name):
    proof = tmp_path / 'ran'
    save(vars(make()) | {'step': Payload(str(proof))}, tmp_path / name)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 16}')
    with pytest.raises(UserError, match=name) as error:
        checkpoint.open_model(str(tmp_path))
    assert 'cannot be read' in str(error.value) and '\n' not in str(error.value)
    assert not proof.exists()


def open_split(folder):
    tokenfile.Split([folder], 'train')


@pytest.mark.parametrize('name, read', [
    ('train.bin', open_split), ('train.mask.bin', open_split), ('train.idx.bin', open_split),
    ('meta.json', open_split), ('tokenizer.json', tokenizer.load), ('vocab.json', tokenizer.load),
    ('config.json', checkpoint.open_model), ('model.safetensors', checkpoint.open_model)])
def test_code_in_files_of_numbers_and_json_is_refused_and_not_run(tmp_path, name, read):
    proof = str(tmp_path / 'ran')
    payload = Payload(proof)
    npy = io.BytesIO()
    np.save(npy, np.array([payload]), allow_pickle=True)
    for planted in (pickle.dumps(payload), pickle.dumps(payload, protocol=0), npy.getvalue()):
        tokenfile.write(str(tmp_path), {'train': [([1, 2, 3, 4], [0, 1, 1, 0])]},
                        {'template': 'xml', 'tokenizer': BPE.state()})
        (tmp_path / 'merges.txt').write_text('')
        (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "n_embd": 16}')
        (tmp_path / name).write_bytes(planted)
        with pytest.raises(UserError) as error:
            read(str(tmp_path))
        assert '\n' not in str(error.value) and not os.path.exists(proof)


def test_the_planted_code_runs_if_somebody_lets_it(tmp_path):
    pickle.loads(pickle.dumps(Payload(str(tmp_path / 'ran'))))
    assert (tmp_path / 'ran').exists()


# ---- folders in transformers' form ----

@pytest.mark.parametrize('config, said', [
    (None, 'config.json not found'),
    ('{', 'config.json cannot be read: JSONDecodeError'),
    ('[]', 'config.json cannot be read'),
    ('{"n_inner": 7}', 'n_inner=7'),
    ('{"model_type": "llama", "hidden_size": 64}', "model_type='llama'; this code computes GPT-2s"),
    ('{"n_embd": 8, "n_inner": 33}', 'n_inner=33'),
    ('{"n_embd": 8, "activation_function": "relu"}', "activation_function='relu'"),
    ('{"n_embd": 8, "scale_attn_by_inverse_layer_idx": true}', 'by_inverse_layer_idx=True'),
    ('{"n_embd": 8, "layer_norm_epsilon": 1e-6}', 'layer_norm_epsilon=1e-06'),
    ('{"n_embd": 8}', 'model.safetensors not found')])
def test_a_folder_that_is_no_gpt2_is_refused_in_one_line(tmp_path, config, said):
    if config:
        (tmp_path / 'config.json').write_text(config)
    with pytest.raises(UserError, match=said) as error:
        checkpoint.open_model(str(tmp_path))
    assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def padded(vocabulary, tmp_path_factory):
    """A folder whose tokenizer has a [PAD], and whose model has rows that no token stands for."""
    transformers = pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('padded')
    with open(vocabulary, encoding='utf-8') as file:
        content = json.load(file)
    n = len(content['model']['vocab'])
    content['added_tokens'] = [{'id': n, 'content': '<|endoftext|>'},
                               {'id': n + 1, 'content': '[PAD]'}]
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=n + 30, n_inner=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return folder, model, n


@torch.no_grad()
def test_added_tokens_are_kept_and_rows_without_a_token_are_dropped(padded):
    folder, model, n = padded
    opened = checkpoint.open_model(str(folder))
    assert opened.tokenizer.special == {'<|endoftext|>': n, '[PAD]': n + 1}
    assert opened.model.config.vocab_size == opened.tokenizer.vocab_size == n + 2
    assert opened.template is None and opened.checkpoint is None
    idx = torch.tensor([opened.tokenizer.encode_with_tags('Hi[PAD]').tolist()])
    assert idx[0, -1] == n + 1
    assert torch.allclose(opened.model.eval()(idx), model(idx).logits[..., :n + 2], atol=1e-5)


def test_the_tags_follow_added_tokens(padded):
    folder, _, n = padded
    opened = checkpoint.open_model(str(folder), tags=True)
    assert opened.tokenizer.special['<conversation>'] == n + 2
    assert opened.model.config.vocab_size == opened.tokenizer.vocab_size == n + 8


REMOVE = 'remove'


@pytest.mark.parametrize('changes, said', [
    ({'n_head': 5}, 'cannot be read: AssertionError'),
    ({'n_embd': 32, 'n_inner': None}, r'wte.weight is \(384, 16\), expected \(384, 32\)'),
    ({'n_embd': REMOVE, 'n_inner': 4 * 768}, "cannot be read: KeyError 'n_embd'"),
    ({'n_layer': 10 ** 9}, 'n_layer=1000000000, the weights have another number'),
    ({'n_positions': 512}, r'wpe.weight is \(1024, 16\), expected \(512, 16\)'),
    ({'vocab_size': 10}, 'has 10 tokens, its vocabulary .* has 322'),
    ({'conversation_template': 'ximl'}, "conversation_template='ximl'; known are xml")])
def test_a_folder_whose_parts_do_not_fit_is_refused_in_one_line(padded, tmp_path, changes, said):
    folder, _, _ = padded
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = read_config(folder) | changes
    config = {key: value for key, value in config.items() if value != REMOVE}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as error:
        checkpoint.open_model(str(tmp_path))
    assert '\n' not in str(error.value)
