"""Checkpoints and model folders: safe to open, and refused in one line if they are damaged."""
import json
import os
import pickle
import shutil

import pytest
import torch

from conftest import BYTES, Payload, assert_same_bits, checkpoint_of, one_line, tiny
from core import checkpoint, tokenfile, tokenizer


def make():
    """A Checkpoint of a tiny model."""
    model = tiny(n_layer=1, n_embd=16, block_size=32, vocab_size=BYTES.vocab_size)
    return checkpoint_of(model, BYTES, step=7, data=['x'])


def test_a_checkpoint_reads_back(tmp_path):
    checkpoint.save(make(), tmp_path / 'ckpt.pt')
    opened = checkpoint.open_model('resume', str(tmp_path), which='best')
    assert opened.template == 'xml' and opened.tokenizer.tokens == BYTES.tokens
    assert opened.description == f'{tmp_path}/ckpt.pt (step 7, val_loss 1.2500)'
    assert_same_bits(vars(opened.checkpoint), vars(make()))
    assert_same_bits(dict(opened.model.state_dict()), dict(make().model))
    checkpoint.save(make(), tmp_path / 'best.pt')
    assert 'best.pt' in checkpoint.open_model('resume', str(tmp_path), 'best').description
    assert 'ckpt.pt' in checkpoint.open_model(str(tmp_path), which='last').description


def test_the_run_saved_last_is_found_in_the_folder_or_below(tmp_path):
    folders = [tmp_path / 'b', tmp_path, tmp_path / 'c [1]', tmp_path / 'a']
    for age, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        (folder / 'ckpt.pt').touch()
        os.utime(folder / 'ckpt.pt', (1000 - age, 1000 - age))
    for folder in folders:
        assert checkpoint.find(str(tmp_path)) == str(folder / 'ckpt.pt')
        (folder / 'ckpt.pt').unlink()
    with one_line('ckpt.pt not found.*--out_dir=FOLDER'):
        checkpoint.open_model('resume', str(tmp_path))


# 0 and -inf: one of the two extremes is finite.
NOT_FINITE = make().model | {'transformer.wpe.weight': torch.eye(32, 16).log()}


@pytest.mark.parametrize('key, to, said', [
    ('format_version', 99, 'has format 99; this code reads 1'),
    ('tokenizer', 3, "tokenizer is '3', not .*dict"), ('step', '2', "step is '2', not .*int"),
    ('template', 'ximl', "template 'ximl'; known are"),
    ('model_args', {'n_embd': 8}, 'do not fit together'),
    ('model', {}, 'Missing key.* do not fit together'),
    ('model', NOT_FINITE, 'transformer.wpe.weight holds numbers that are not finite')])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, key, to, said):
    contents = vars(make()) | {key: to}
    torch.save(contents, tmp_path / 'ckpt.pt')
    with one_line(said):
        checkpoint.open_model(str(tmp_path))
    del contents[key]
    torch.save(contents, tmp_path / 'ckpt.pt')
    with one_line(f'{key}.* Expected a checkpoint'):
        checkpoint.open_model(str(tmp_path))


@pytest.mark.parametrize('name, read', [
    ('train.bin', lambda folder: tokenfile.Split([folder], 'train')),
    ('meta.json', tokenfile.read_meta), ('vocabulary.json', tokenizer.load),
    ('config.json', checkpoint.open_model), ('model.safetensors', checkpoint.open_model),
    ('pytorch_model.bin', checkpoint.open_model), ('ckpt.pt', checkpoint.open_model)])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, name, read):
    proof = tmp_path / 'ran'
    payload = Payload(str(proof))
    torch.save(vars(make()) | {'step': payload}, tmp_path / 'torch')
    tokenfile.write(str(tmp_path), {'train': [([1, 2, 3, 4], [0, 1, 1, 0])]},
                    {'template': 'xml', 'tokenizer': BYTES.state()})
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "n_embd": 16}')
    for planted in (pickle.dumps(payload), (tmp_path / 'torch').read_bytes()):
        (tmp_path / name).write_bytes(planted)
        with one_line(''):
            read(str(tmp_path))
        assert not proof.exists()
    pickle.loads(pickle.dumps(payload))  # it does run if somebody lets it
    assert proof.exists()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small model in transformers' form, whose vocabulary is GPT-2's."""
    transformers = pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('model')
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_inner=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('changes, said', [
    ({'model_type': 'llama'}, "model_type='llama'; this code computes GPT-2s"),
    ({'n_inner': 33}, 'n_inner=33'), ({'activation_function': 'relu'}, "function='relu'"),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06'),
    ({'n_head': 5}, 'cannot be read: AssertionError'), ({'n_embd': None}, 'cannot be read'),
    ({'n_layer': 2}, "KeyError 'transformer.h.1"),
    ({'n_positions': 512}, 'size mismatch for transformer.wpe.weight'),
    ({'vocab_size': 10}, 'has 10 tokens, its vocabulary 3..'),
    ({'conversation_template': 'ximl'}, "has the template 'ximl'; known are")])
def test_a_folder_whose_parts_do_not_fit_is_refused(
        small_as_gpt2, folder, tmp_path, changes, said):
    folder = shutil.copytree(folder, tmp_path / 'model')
    config = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps(config))
    with one_line(said):
        checkpoint.open_model(str(folder))
