"""Ordinary damage to a file that the scripts open ends in one line that says which file it is."""
import os
import shutil

import pytest
import transformers

import evaluate
import export
import sample
import train
from conftest import flags, one_line


@pytest.fixture(scope='module')
def original(data, tmp_path_factory):
    """A folder with data/colours; out, a run; model, a tiny GPT-2 in transformers' form."""
    folder = tmp_path_factory.mktemp('original')
    shape = {'n_layer': 1, 'n_head': 1, 'n_embd': 8}
    shutil.copytree(data, folder / 'data')
    train.main(flags(folder / 'data', folder / 'out', max_iters=2, eval_interval=2, **shape))
    os.remove(folder / 'out' / 'best.pt')
    config = transformers.GPT2Config(**shape, vocab_size=400)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / 'model')
    return folder


@pytest.fixture
def files(original, small_as_gpt2, tmp_path, monkeypatch):
    """A copy of it, to spoil; the current folder."""
    shutil.copytree(original, tmp_path / 'files')
    monkeypatch.chdir(tmp_path / 'files')


SCRIPTS = {
    'resume': (train, '--init_from=resume --out_dir=out --data_dir=data --max_iters=3'),
    'train': (train, ' '.join(flags('data', 'new', max_iters=1))),
    'tune': (train, ' '.join(flags('data', 'tuned', init_from='out', max_iters=1))),
    'ask': (sample, '--init_from=model --start=Hi --max_new_tokens=2'),
    'evaluate': (evaluate, '--models=out --dataset=colours --data_dir=data --out_dir=report '
                           '--answers=1 --max_new_tokens=2'),
    'export': (export, '--init_from=out --which=last --out=again')}


def test_undamaged_files_are_not_refused(files):
    for script, arguments in SCRIPTS.values():
        script.main(arguments.split())


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'wrong file', 'not found'])
@pytest.mark.parametrize('path, names', [
    ('out/ckpt.pt', ['resume', 'tune', 'evaluate', 'export']),
    ('model/config.json', ['ask']), ('model/model.safetensors', ['ask']),
    ('data/colours/meta.json', ['train', 'resume', 'evaluate']),
    ('data/colours/train.bin', ['train', 'resume']),
    ('data/colours/train.mask.bin', ['train', 'tune']), ('data/colours/val.idx.bin', ['evaluate'])])
def test_a_damaged_file_is_a_line(files, path, names, damage):
    with open(path, 'rb') as file:
        content = file.read()
    os.remove(path)
    wrong = {'truncated': content[:len(content) // 2], 'empty': b'', 'wrong file': b'# Read me\n'}
    if damage in wrong:
        with open(path, 'wb') as file:
            file.write(wrong[damage])
    for name in names:
        script, arguments = SCRIPTS[name]
        with one_line(os.path.dirname(path)):
            script.main(arguments.split())
