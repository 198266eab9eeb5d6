"""tokenfile.py: written whole or not at all, and read only if everything agrees."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from configurator import UserError
from conftest import ROOT
from core import tokenfile
from core.tokenfile import Split, Writer

META = {'template': 'xml', 'tokenizer': {'name': 'gpt2', 'sha256': 'abc'}}
FILES = ['train.bin', 'train.idx.bin', 'train.mask.bin', 'val.bin', 'val.idx.bin', 'val.mask.bin']


def write(folder, lengths=(5, 9, 2), **meta):
    """Write a folder of random conversations; returns (ids, mask) of each, one of them for val."""
    written = []
    with Writer(str(folder), ('train', 'val')) as writer:
        for i, length in enumerate([*lengths, 3]):
            rng = np.random.default_rng([length, i])
            ids = rng.integers(0, 65536, length)
            mask = rng.random(length) < 0.5
            mask[0] = False
            mask[-1] = True
            writer.add('val' if i == len(lengths) else 'train', ids, mask, [length])
            written.append((ids, mask))
        writer.finish({**META, **meta})
    return written


def check(folders, written, split='train'):
    """The split of these folders holds exactly these conversations."""
    found = Split([str(folder) for folder in folders], split)
    assert len(found) == len(written)
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


# ---- writing ----

def test_what_is_written_reads_back(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    *train, val = write(folder, source={'name': 'é\udcff.jsonl'})  # a file may have any name
    assert sorted(contents(folder)) == sorted([*FILES, 'meta.json'])
    check([folder], train)
    check([folder], [val], 'val')
    meta = tokenfile.read_meta(str(folder))
    assert meta['format_version'] == 1 and meta['source']['name'].startswith('é')
    n_supervised = sum(int(mask.sum()) for _, mask in train)
    counts = [meta['splits']['train'][key] for key in tokenfile.COUNTS]
    assert counts == [3, 16, n_supervised]


def test_the_files_are_the_published_format(tmp_path):
    with Writer(str(tmp_path), ('train',)) as writer:  # several at once, one, none
        writer.add('train', np.array([1, 2, 50262, 65535, 0]), np.array([0, 1, 0, 0, 1]), [2, 3])
        writer.add('train', [7], [0], [1])
        writer.add('train', [], [], [])
        writer.finish(META)
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [1, 2, 50262, 65535, 0, 7]
    assert np.fromfile(tmp_path / 'train.mask.bin', 'u1').tolist() == [0, 1, 0, 0, 1, 0]
    assert np.fromfile(tmp_path / 'train.idx.bin', '<i8').tolist() == [0, 2, 5, 6]


def test_until_it_is_finished_a_reader_sees_what_was_there_before(tmp_path):
    written = write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), Writer(str(tmp_path), ('train', 'val')) as writer:
        writer.add('train', [1, 2, 3], [0, 0, 1], [3])
        check([tmp_path], written[:-1])
        raise RuntimeError
    assert contents(tmp_path) == before
    with Writer(str(tmp_path / 'new'), ('train',)) as writer:
        writer.add('train', [1, 2, 3], [0, 0, 1], [3])
        refused(tmp_path / 'new', 'meta.json not found. Prepare the data first')
    assert contents(tmp_path / 'new') == {}  # finish was never called


def test_killed_in_the_middle_the_old_files_stay_readable(tmp_path):
    written = write(tmp_path)
    code = ('import os, signal; from core import tokenfile\n'
            f'with tokenfile.Writer({str(tmp_path)!r}, ("train",)) as writer:\n'
            '    writer.add("train", [1] * 9999, [1] * 9999, [9999])\n'
            '    os.kill(os.getpid(), signal.SIGKILL)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and os.path.exists(tmp_path / '.partial')
    check([tmp_path], written[:-1])
    write(tmp_path)  # removes what the killed one left
    assert not os.path.exists(tmp_path / '.partial')


@pytest.mark.parametrize('existed', [False, True])
@pytest.mark.parametrize('n_moved', range(7))
def test_stopped_while_files_are_moved_none_is_taken_for_whole(
        tmp_path, monkeypatch, n_moved, existed):
    if existed:
        write(tmp_path)
    moved = []

    def replace(source, target):
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(os.rename(source, target))
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    refused(tmp_path, 'meta.json not found')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason="/dev/full is Linux's")
@pytest.mark.parametrize('n', [10, 1_000_000])  # noticed when closing, and while writing
def test_a_full_disk_is_a_line_and_leaves_what_was_there(tmp_path, n):
    write(tmp_path)
    before = contents(tmp_path)
    with (pytest.raises(UserError, match='cannot write to .*: No space left on device. Make room'),
          Writer(str(tmp_path), ('train', 'val')) as writer):
        full = os.fdopen(os.open('/dev/full', os.O_WRONLY), 'wb')
        writer.files['train', '.bin'] = writer.stack.enter_context(full)
        writer.add('train', np.zeros(n), np.ones(n), [n])
        writer.finish(META)
    assert contents(tmp_path) == before


# ---- reading what does not agree ----

def set_value(ending, i, value):
    """A function that changes one number in the bytes of a file."""
    def change(data):
        values = np.frombuffer(data, tokenfile.DTYPES[ending]).copy()
        assert values[i] != value
        values[i] = value
        return values.tobytes()
    return change


CHANGES = [('.mask.bin', set_value('.mask.bin', 4, value)) for value in (0, 2, 255)]
for i, start in ((0, 1), (1, 0), (1, 14), (1, -3), (3, 15)):
    CHANGES.append(('.idx.bin', set_value('.idx.bin', i, start)))
for ending in tokenfile.DTYPES:
    CHANGES += [(ending, None), (ending, lambda data: data + data[-8:]), (ending, lambda data: b'')]
    CHANGES += [(ending, lambda data, n=n: data[:-n]) for n in (1, 2, 8)]


@pytest.mark.parametrize('ending, change', CHANGES)
def test_files_that_disagree_are_refused_in_a_line(tmp_path, ending, change):
    written = write(tmp_path)
    path = tmp_path / f'train{ending}'
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    refused(tmp_path, 'train', 'Prepare the folder again')
    check([tmp_path], written[-1:], 'val')  # the other split is whole


@pytest.mark.parametrize('data', [
    b'', b'{"format', b'[]', b'null', b'[' * 9999, b'\xff\xfe{}', b'{}', b'{"format_version": 1}'])
def test_a_meta_json_of_any_bytes_is_refused_in_a_line(tmp_path, data):
    write(tmp_path)
    (tmp_path / 'meta.json').write_bytes(data)
    refused(tmp_path, 'meta.json cannot be read', 'Prepare the data first')


@pytest.mark.parametrize('keys, value, said', [
    (['format_version'], 2, 'format 2, this code reads 1'), (['format_version'], '1', "format '1'"),
    (['template'], 'xlm', 'known are xml'), (['template'], [], 'cannot be read'),
    (['splits'], [], 'cannot be read'), (['splits', 'train'], 5, 'cannot be read'),
    (['splits', 'val'], {'tokens': 5}, "'conversations'"),
    (['splits'], {'val': dict.fromkeys(tokenfile.COUNTS, 1)}, "has no split 'train', only val"),
    (['splits', 'train', 'tokens'], '16', 'cannot be read'),
    (['splits', 'train', 'tokens'], 15, 'disagree'),
    (['splits', 'train', 'conversations'], 4, 'disagree'),
    (['splits', 'train', 'supervised_tokens'], 1, 'disagree')])
def test_a_wrong_value_in_meta_json_is_refused_in_a_line(tmp_path, keys, value, said):
    write(tmp_path)
    meta = json.loads((tmp_path / 'meta.json').read_text())
    inner = meta
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    refused(tmp_path, said)


# ---- splits ----

def test_several_folders_are_one_split(tmp_path):
    folders = [tmp_path / name for name in 'abcd']
    written = []
    for folder, lengths in zip(folders, [(5, 9, 2), (4,), (), (6, 3)]):
        written += write(folder, lengths)[:-1]
    check(folders, written)
    check([tmp_path / 'c'], [])  # an empty split


def test_data_sets_are_found_here_or_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    expected = ['data/mine', os.path.join(ROOT, 'data', 'oasst'), 'data/none']
    assert tokenfile.find_folders('mine, oasst,none', 'data') == expected


def test_which_tokens_are_supervised(tmp_path):
    """Never a first one, which nothing stands before: an empty question in the template plain."""
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', [0, 1, 2, 3], [1, 1, 0, 1], [3, 1])
        writer.finish(META)
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
        with Writer(str(tmp_path / name), ('train',)) as writer:
            writer.add('train', [1] * 5, [1] * 5, lengths)
            writer.finish(META)
    a, b, c, d, e = (tokenfile.fingerprint(str(tmp_path / name)) for name in 'abcde')
    assert a == b and len({a, c, d, e}) == 4


def test_the_folders_of_nanogpt_are_read_in_windows(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    meta = tokenfile.read_meta(str(tmp_path))
    assert meta['template'] == 'plain' and meta['tokenizer']['name'] == 'gpt2'
    split = Split([str(tmp_path)], 'train', window=4)
    assert [split[i][0].tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert split.n_supervised.tolist() == [3, 3, 1]
    assert len(Split([str(tmp_path)], 'val')) == 0
    with pytest.raises(UserError, match='has the id 9'):
        Split([str(tmp_path)], 'train', vocab_size=9)
    (tmp_path / 'train.bin').write_bytes(b'odd')
    refused(tmp_path, 'train.bin cannot be read')
    (tmp_path / 'meta.pkl').write_bytes(b'')
    refused(tmp_path, "Expected GPT-2's ids")
