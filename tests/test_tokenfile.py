"""tokenfile.py: written whole or not at all, and read only if everything agrees."""
import json
import os

import numpy as np
import pytest

from configurator import UserError
from conftest import ROOT
from core import tokenfile
from core.tokenfile import Split

META = {'template': 'xml', 'tokenizer': {'name': 'gpt2', 'sha256': 'abc'}}
FILES = ['train.bin', 'train.idx.bin', 'train.mask.bin', 'val.bin', 'val.idx.bin', 'val.mask.bin']


def write(folder, lengths=(5, 9, 2), **meta):
    """Write a folder of random conversations; returns (ids, mask) of each, one of them for val."""
    written = []
    for i, length in enumerate([*lengths, 3]):
        rng = np.random.default_rng([length, i])
        mask = rng.random(length) < 0.5
        mask[0] = False
        mask[-1] = True
        written.append((rng.integers(0, 65536, length), mask))
    tokenfile.write(str(folder), {'train': written[:-1], 'val': written[-1:]}, {**META, **meta})
    return written


def check(folders, written, split='train'):
    """The split of these folders holds exactly these conversations."""
    found = Split([str(folder) for folder in folders], split)
    assert found.lengths.tolist() == [len(ids) for ids, _ in written]
    assert found.n_supervised.tolist() == [int(mask.sum()) for _, mask in written]
    for i, (ids, mask) in enumerate(written):
        assert found[i][0].tolist() == ids.tolist() and found[i][1].tolist() == mask.tolist()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != '.lock'}


def refused(folder, *said):
    """Reading the folder is a UserError of one line that says this."""
    with pytest.raises(UserError) as caught:
        Split([str(folder)], 'train')
    line = str(caught.value)
    assert '\n' not in line and str(folder) in line
    for words in said:
        assert words in line, line


def test_what_is_written_reads_back(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    *train, val = write(folder, source={'name': 'é\udcff.jsonl'})  # a file may have any name
    assert sorted(contents(folder)) == sorted([*FILES, 'meta.json'])
    check([folder], train)
    check([folder], [val], 'val')
    meta = tokenfile.read_meta(str(folder))
    assert meta['format_version'] == 1 and meta['source']['name'] == 'é\udcff.jsonl'
    n_supervised = sum(int(mask.sum()) for _, mask in train)
    assert [meta['splits']['train'][key] for key in tokenfile.COUNTS] == [3, 16, n_supervised]


def test_the_files_are_the_published_format(tmp_path):
    train = [([1, 2], [0, 1]), ([50262, 65535, 0], [0, 0, 1]), ([7], [0])]
    tokenfile.write(str(tmp_path), {'train': train, 'val': []}, META)
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [1, 2, 50262, 65535, 0, 7]
    assert np.fromfile(tmp_path / 'train.mask.bin', 'u1').tolist() == [0, 1, 0, 0, 1, 0]
    assert np.fromfile(tmp_path / 'train.idx.bin', '<i8').tolist() == [0, 2, 5, 6]
    assert np.fromfile(tmp_path / 'val.idx.bin', '<i8').tolist() == [0]
    check([tmp_path], [], 'val')


@pytest.mark.parametrize('n_moved', range(7))
@pytest.mark.parametrize('error, raised', [
    (KeyboardInterrupt, KeyboardInterrupt), (OSError(28, 'No space left on device'), UserError)])
def test_stopped_while_files_are_moved_none_is_taken_for_whole(
        tmp_path, monkeypatch, n_moved, error, raised):
    write(tmp_path)
    moved = []

    def replace(source, target):
        if len(moved) == n_moved:
            raise error
        moved.append(os.rename(source, target))
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(raised):
        write(tmp_path)
    refused(tmp_path, 'meta.json not found. Prepare the data first')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason="/dev/full is Linux's")
def test_a_full_disk_is_a_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    written = write(tmp_path)
    before = contents(tmp_path)

    def full(file):
        with open('/dev/full', 'wb') as device:
            device.write(b'x')
    monkeypatch.setattr(tokenfile, 'flush', full)
    with pytest.raises(UserError, match='cannot write to .*: No space left on device. Make room'):
        write(tmp_path, (3, 3))
    assert contents(tmp_path) == before
    check([tmp_path], written[:-1])


@pytest.mark.parametrize('ending', tokenfile.DTYPES)
@pytest.mark.parametrize('change', [
    None, lambda data: data + data[-8:], lambda data: b'', lambda data: data[:-1],
    lambda data: data[:-8]])
def test_files_that_disagree_are_refused_in_a_line(tmp_path, ending, change):
    written = write(tmp_path)
    path = tmp_path / f'train{ending}'
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    refused(tmp_path, 'train', 'Prepare the folder again')
    check([tmp_path], written[-1:], 'val')  # the other split is whole


@pytest.mark.parametrize('data, said', [
    ('', ''), ('{"format', ''), ('[]', ''), ('{}', "KeyError 'format_version'"),
    ('{"format_version": 2}', 'format 2, this code reads 1'),
    ('{"format_version": 1, "template": "xlm"}', 'known are xml')])
def test_a_damaged_meta_json_is_refused_in_a_line(tmp_path, data, said):
    write(tmp_path)
    (tmp_path / 'meta.json').write_text(data)
    refused(tmp_path, 'meta.json cannot be read', 'Prepare the data first', said)


@pytest.mark.parametrize('keys, value, said', [
    (['splits'], {'val': dict.fromkeys(tokenfile.COUNTS, 1)}, "has no split 'train', only val"),
    (['splits', 'train', 'tokens'], 15, 'disagree'),
    (['splits', 'train', 'conversations'], 4, 'disagree'),
    (['splits', 'train', 'supervised_tokens'], 1, 'disagree')])
def test_a_meta_json_of_other_files_is_refused_in_a_line(tmp_path, keys, value, said):
    write(tmp_path)
    meta = json.loads((tmp_path / 'meta.json').read_text())
    inner = meta
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    refused(tmp_path, said)


def test_several_folders_are_one_split(tmp_path):
    folders = [tmp_path / name for name in 'abcd']
    written = []
    for folder, lengths in zip(folders, [(5, 9, 2), (4,), (), (6, 3)]):
        written += write(folder, lengths)[:-1]
    check(folders, written)


def test_data_sets_are_found_here_or_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    expected = ['data/mine', os.path.join(ROOT, 'data', 'oasst'), 'data/none']
    assert tokenfile.find_folders('mine, oasst,none', 'data') == expected


def test_which_tokens_are_supervised(tmp_path):
    """Never a first one, which nothing stands before: an empty question in the template plain."""
    tokenfile.write(str(tmp_path), {'train': [([0, 1, 2], [1, 1, 0]), ([3], [1])]}, META)
    assert Split([str(tmp_path)], 'train').n_supervised.tolist() == [1, 0]
    split = Split([str(tmp_path)], 'train', loss_on='all', vocab_size=4)
    assert split.n_supervised.tolist() == [2, 0] and split[0][1].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match='train.bin has the id 3, the vocabulary only 3 tokens'):
        Split([str(tmp_path)], 'train', vocab_size=3)


def test_the_fingerprint_is_of_the_tokens_and_where_conversations_begin(tmp_path):
    write(tmp_path / 'a')
    write(tmp_path / 'b', options={'seed': 3})
    write(tmp_path / 'c', (5, 9, 3))
    for name, lengths in (('d', [2, 3]), ('e', [3, 2])):
        train = [([1] * n, [1] * n) for n in lengths]
        tokenfile.write(str(tmp_path / name), {'train': train}, META)
    a, b, c, d, e = (tokenfile.fingerprint(str(tmp_path / name)) for name in 'abcde')
    assert a == b and len({a, c, d, e}) == 4
