"""Ordinary damage to a file that the scripts open ends in one line that says which file it is."""
import os
import shutil

import pytest

import evaluate
import export
import sample
import train
from configurator import UserError
from conftest import flags


@pytest.fixture(scope='module')
def original(data, tmp_path_factory):
    """A folder with a run, out; its export, model; and its data, data/colours."""
    folder = tmp_path_factory.mktemp('original')
    shape = {'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'max_iters': 2, 'eval_interval': 2}
    shutil.copytree(data, folder / 'data')
    train.main(flags(folder / 'data', folder / 'out', **shape))
    export.main([f'--init_from={folder}/out', f'--out={folder}/model'])
    os.remove(folder / 'out' / 'best.pt')
    return folder


@pytest.fixture
def files(original, tmp_path, monkeypatch):
    """A copy of it, to spoil; the current folder."""
    shutil.copytree(original, tmp_path / 'files')
    monkeypatch.chdir(tmp_path / 'files')


def go_on():
    train.main(['--init_from=resume', '--out_dir=out', '--data_dir=data', '--max_iters=3'])


def begin():
    train.main(flags('data', 'new', max_iters=1))


def tune():
    train.main(flags('data', 'tuned', init_from='model', max_iters=1))


def talk():
    sample.main(['--init_from=model', '--user=Hi', '--max_new_tokens=2'])


def measure():
    evaluate.main(['--models=model', '--dataset=colours', '--data_dir=data', '--out_dir=report',
                   '--answers=1', '--max_new_tokens=2'])


def export_again():
    export.main(['--init_from=out', '--which=last', '--out=again'])


def test_undamaged_files_are_not_refused(files):
    for script in (go_on, begin, tune, talk, measure, export_again):
        script()


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'wrong file', 'not found'])
@pytest.mark.parametrize('path, scripts', [
    ('out/ckpt.pt', [go_on, export_again]), ('model/config.json', [talk, tune]),
    ('model/model.safetensors', [talk, measure]), ('model/tokenizer.json', [talk, measure]),
    ('data/colours/meta.json', [begin, go_on, measure]), ('data/colours/train.bin', [begin, go_on]),
    ('data/colours/train.mask.bin', [begin, tune]), ('data/colours/val.idx.bin', [measure])])
def test_a_damaged_file_is_a_line(files, path, scripts, damage):
    with open(path, 'rb') as file:
        content = file.read()
    os.remove(path)
    wrong = {'truncated': content[:len(content) // 2], 'empty': b'', 'wrong file': b'# Read me\n'}
    if damage in wrong:
        with open(path, 'wb') as file:
            file.write(wrong[damage])
    for script in scripts:
        # Without tokenizer.json, the vocabulary is taken for GPT-2's.
        with pytest.raises(UserError, match=f"{os.path.dirname(path)}|GPT-2's vocabulary") as error:
            script()
        assert '\n' not in str(error.value)
