"""tokenfile.py: written whole or not at all, and read only if everything agrees."""
import json
import os

import numpy as np
import pytest

from conftest import ROOT, one_line
from core import tokenfile
from core.tokenfile import Split

META = {'template': 'xml', 'tokenizer': {'name': 'gpt2', 'sha256': 'abc'}}
TRAIN = [([1, 2], [0, 1]), ([50262, 65535, 0], [0, 1, 1]), ([7], [0])]
VAL = [([3, 4], [0, 1])]


def write(folder, train=TRAIN, **meta):
    return tokenfile.write(str(folder), {'train': train, 'val': VAL}, META | meta)


def read(folder, split='train'):
    return [(ids.tolist(), mask.tolist()) for ids, mask in Split([str(folder)], split)]


def refused(folder, said):
    """Reading the folder is a UserError of one line that says this."""
    with one_line(f'{folder}.*{said}'):
        read(folder)


def test_several_folders_are_one_split_and_a_source_may_have_any_name(tmp_path):
    folders = [str(tmp_path / 'new' / name) for name in 'abc']
    for folder, train in zip(folders, (TRAIN, [], TRAIN[1:])):
        write(folder, train, source={'name': 'é\udcff.jsonl'})
        assert read(folder) == train and read(folder, 'val') == VAL
    split = Split(folders, 'train')
    found = [(ids.tolist(), mask.tolist()) for ids, mask in split]
    assert found == TRAIN + TRAIN[1:]
    assert split.lengths.tolist() == [2, 3, 1, 3, 1]
    assert split.n_supervised.tolist() == [1, 2, 0, 2, 0]
    assert tokenfile.read_meta(folders[0])['source']['name'] == 'é\udcff.jsonl'


def test_the_files_are_the_published_format(tmp_path):
    meta = write(tmp_path)
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [1, 2, 50262, 65535, 0, 7]
    assert np.fromfile(tmp_path / 'train.mask.bin', 'u1').tolist() == [0, 1, 0, 1, 1, 0]
    assert np.fromfile(tmp_path / 'train.idx.bin', '<i8').tolist() == [0, 2, 5, 6]
    assert tokenfile.read_meta(tmp_path) == meta and meta['format_version'] == 1
    assert [meta['splits']['train'][key] for key in tokenfile.COUNTS] == [3, 6, 3]


@pytest.mark.parametrize('n_written', range(7))
def test_stopped_while_files_are_written_none_is_taken_for_whole(tmp_path, monkeypatch, n_written):
    write(tmp_path)
    written = []

    def replace(source, target):
        if len(written) == n_written:
            raise KeyboardInterrupt
        written.append(os.rename(source, target))
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    refused(tmp_path, 'meta.json not found. Prepare the data first')
    assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('ending', tokenfile.DTYPES)
@pytest.mark.parametrize('change', [lambda data: data + bytes(8), lambda data: data[:-8]])
def test_files_that_disagree_are_refused_in_a_line(tmp_path, ending, change):
    """test_hostile_files.py has files that are damaged by accident."""
    write(tmp_path, TRAIN * 2)
    path = tmp_path / f'train{ending}'
    path.write_bytes(change(path.read_bytes()))
    refused(tmp_path, 'Prepare the folder again')
    assert read(tmp_path, 'val') == VAL  # the other split is whole


@pytest.mark.parametrize('change, said', [
    ({'format_version': 2}, 'format 2, this code reads 1'),
    ({'template': 'xlm'}, 'known are xml'),
    ({'splits': {'val': dict.fromkeys(tokenfile.COUNTS, 1)}}, "has no split 'train'"),
    ({'splits': {'train': dict(zip(tokenfile.COUNTS, (4, 6, 3)))}}, 'disagree'),
    ({'splits': {'train': dict(zip(tokenfile.COUNTS, (3, 6, 2)))}}, 'disagree')])
def test_a_meta_json_of_other_files_is_refused_in_a_line(tmp_path, change, said):
    meta = write(tmp_path)
    (tmp_path / 'meta.json').write_text(json.dumps(meta | change))
    refused(tmp_path, said)


def test_data_sets_are_found_here_or_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    expected = ['data/mine', os.path.join(ROOT, 'data', 'oasst'), 'data/none']
    assert tokenfile.find_folders('mine, oasst,none', 'data') == expected


def test_which_tokens_are_supervised(tmp_path):
    """Never a first one, which nothing stands before: an empty question in the template plain."""
    write(tmp_path, [([0, 1, 2], [1, 1, 0]), ([3], [1])])
    assert Split([str(tmp_path)], 'train').n_supervised.tolist() == [1, 0]
    split = Split([str(tmp_path)], 'train', loss_on='all', vocab_size=4)
    assert split.n_supervised.tolist() == [2, 0] and split[0][1].tolist() == [1, 1, 1]
    with one_line('train.bin has the id 3, the vocabulary only 3 tokens'):
        Split([str(tmp_path)], 'train', vocab_size=3)


def test_the_fingerprint_is_of_the_tokens_and_where_conversations_begin(tmp_path):
    found = []
    for lengths, token, seed in (((2, 3), 1, 0), ((2, 3), 1, 3), ((3, 2), 1, 0), ((2, 3), 2, 0)):
        train = [([token] * n, [1] * n) for n in lengths]
        found.append(tokenfile.fingerprint(write(tmp_path, train, seed=seed)))
    assert found[0] == found[1] and len(set(found)) == 3
