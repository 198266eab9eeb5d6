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


def conversation_of(length, seed=0):
    """Random (ids, mask), of which the last token is supervised."""
    rng = np.random.default_rng([length, seed])
    mask = (rng.random(length) < 0.5).astype(np.uint8)
    mask[0] = 0
    mask[-1] = 1
    return rng.integers(0, 65536, length).astype(np.uint16), mask


def write(folder, lengths=(5, 9, 2), val=(3,), **meta):
    """Write a prepared folder of random conversations; returns those of train."""
    written = [conversation_of(length, i) for i, length in enumerate(lengths)]
    with Writer(str(folder), ('train', 'val')) as writer:
        for ids, mask in written:
            writer.add('train', ids, mask, [len(ids)])
        for length in val:
            writer.add('val', *conversation_of(length), [length])
        writer.finish({**META, **meta})
    return written


def check(folder, written, split='train'):
    """The split holds exactly these conversations."""
    folders = folder if isinstance(folder, list) else [folder]
    found = Split([str(folder) for folder in folders], split)
    assert len(found) == len(written)
    assert found.lengths.tolist() == [len(ids) for ids, _ in written]
    assert found.n_supervised.tolist() == [int(mask.sum()) for _, mask in written]
    for i, (ids, mask) in enumerate(written):
        assert found[i][0].tolist() == ids.tolist() and found[i][1].tolist() == mask.tolist()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != '.lock'}


def refused(folder, *said, split='train'):
    """Reading the folder is a UserError of one line that says this."""
    with pytest.raises(UserError) as caught:
        Split([str(folder)], split)
    line = str(caught.value)
    assert '\n' not in line and str(folder) in line
    for words in said:
        assert words in line, line


# ---- writing ----

def test_what_is_written_reads_back(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    written = write(folder)
    assert sorted(contents(folder)) == sorted([*FILES, 'meta.json'])
    check(folder, written)
    meta = tokenfile.read_meta(str(folder))
    assert meta['format_version'] == 1 and meta['template'] == 'xml'
    counts = meta['splits']['train']
    n_supervised = sum(int(mask.sum()) for _, mask in written)
    assert [counts[key] for key in tokenfile.COUNTS] == [3, 16, n_supervised]


def test_the_files_are_the_published_format(tmp_path):
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', np.array([1, 2, 50262, 65535, 0]), np.array([0, 1, 0, 0, 1]), [2, 3])
        writer.add('train', [7], [0], [1])
        writer.finish(META)
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [1, 2, 50262, 65535, 0, 7]
    assert np.fromfile(tmp_path / 'train.mask.bin', 'u1').tolist() == [0, 1, 0, 0, 1, 0]
    assert np.fromfile(tmp_path / 'train.idx.bin', '<i8').tolist() == [0, 2, 5, 6]


def test_many_at_once_are_the_same_as_one_after_another(tmp_path):
    ids, mask = zip(*write(tmp_path / 'a'))
    with Writer(str(tmp_path / 'b'), ('train', 'val')) as writer:
        writer.add('train', np.concatenate(ids), np.concatenate(mask), np.array([5, 9, 2]))
        writer.add('val', *conversation_of(3), [3])
        writer.add('val', [], [], [])
        writer.finish(META)
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_until_it_is_finished_a_reader_sees_what_was_there_before(tmp_path):
    written = write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), Writer(str(tmp_path), ('train', 'val')) as writer:
        writer.add('train', [1, 2, 3], [0, 0, 1], [3])
        check(tmp_path, written)
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
    assert done.returncode == -signal.SIGKILL
    assert os.path.exists(tmp_path / '.partial')
    check(tmp_path, written)
    written = write(tmp_path, (4,))  # the next run removes what the killed one left
    check(tmp_path, written)
    assert not os.path.exists(tmp_path / '.partial')


@pytest.mark.parametrize('existed', [False, True])
@pytest.mark.parametrize('n_moved', range(7))
def test_stopped_while_the_files_are_moved_none_is_taken_for_whole(
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
        write(tmp_path, (5, 9, 2), (3,))
    refused(tmp_path, 'meta.json not found')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason="/dev/full is Linux's")
@pytest.mark.parametrize('n', [10, 1_000_000])  # noticed when closing, and while writing
def test_a_full_disk_is_a_line_and_leaves_what_was_there(tmp_path, n):
    written = write(tmp_path)
    with (pytest.raises(UserError, match='cannot write to .*: No space left on device. Make room'),
          Writer(str(tmp_path), ('train', 'val')) as writer, open('/dev/full', 'wb') as full):
        writer.files['train', '.bin'] = full
        writer.add('train', np.zeros(n), np.ones(n), [n])
        writer.finish(META)
    check(tmp_path, written)
    assert sorted(contents(tmp_path)) == sorted([*FILES, 'meta.json'])


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write to .*Use --out_dir=FOLDER'):
        write(tmp_path / 'file')


def test_meta_json_holds_any_file_name(tmp_path):
    write(tmp_path, source={'name': 'é\udcff.jsonl'})
    assert tokenfile.read_meta(str(tmp_path))['source']['name'].startswith('é')


# ---- reading what does not agree ----

@pytest.mark.parametrize('name', FILES[:3])
@pytest.mark.parametrize('change', [
    None, lambda data: data + data[-8:], lambda data: data[:-1], lambda data: data[:-2],
    lambda data: data[:-8], lambda data: b''], ids=['gone', 'grown', '1', '2', '8', 'empty'])
def test_files_that_disagree_are_refused_in_a_line(tmp_path, name, change):
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    os.remove(tmp_path / name)
    if change:
        (tmp_path / name).write_bytes(change(data))
    refused(tmp_path, 'train', 'Prepare the folder again')
    check(tmp_path, [conversation_of(3)], 'val')  # the other split is whole


@pytest.mark.parametrize('ending, at, value', [
    ('.idx.bin', 0, 1), ('.idx.bin', 1, 0), ('.idx.bin', 1, 14), ('.idx.bin', 1, -3),
    ('.idx.bin', 3, 15), ('.mask.bin', 4, 0), ('.mask.bin', 4, 2), ('.mask.bin', 4, 255)])
def test_wrong_values_are_refused_in_a_line(tmp_path, ending, at, value):
    write(tmp_path)
    values = np.fromfile(tmp_path / f'train{ending}', tokenfile.DTYPES[ending])
    assert values[at] != value
    values[at] = value
    values.tofile(tmp_path / f'train{ending}')
    refused(tmp_path, 'disagree')


def test_an_id_that_the_vocabulary_has_not_is_refused_in_a_line(tmp_path):
    """Found by the fuzzer: it ended in a traceback, or on a GPU in something much worse."""
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', [0, 1, 2], [0, 1, 1], [3])
        writer.finish(META)
    assert len(Split([str(tmp_path)], 'train', vocab_size=3)) == 1
    with pytest.raises(UserError, match='train.bin has the id 2, the vocabulary only 2 tokens'):
        Split([str(tmp_path)], 'train', vocab_size=2)


@pytest.mark.parametrize('data', [
    b'', b'{"format', b'[]', b'null', b'[' * 9999, b'\xff\xfe{}', b'{}', b'{"format_version": 1}'])
def test_a_meta_json_of_any_bytes_is_refused_in_a_line(tmp_path, data):
    write(tmp_path)
    (tmp_path / 'meta.json').write_bytes(data)
    refused(tmp_path, 'meta.json cannot be read', 'Prepare the data first')


@pytest.mark.parametrize('keys, value, said', [
    (['format_version'], 2, 'format 2, this code reads 1'), (['format_version'], '1', "format '1'"),
    (['template'], None, 'template None'), (['template'], 'xlm', 'known are xml'),
    (['template'], [], 'cannot be read'), (['splits'], [], 'cannot be read'),
    (['splits', 'train'], 5, 'cannot be read'), (['splits', 'val'], {'tokens': 5}, 'conversations'),
    (['splits', 'train', 'tokens'], '16', 'cannot be read'),
    (['splits', 'train', 'tokens'], 15, 'disagree'),
    (['splits', 'train', 'conversations'], 4, 'disagree'),
    (['splits', 'train', 'supervised_tokens'], 1, 'disagree'),
    (['splits'], {}, "has no split 'train'")])
def test_a_wrong_value_in_meta_json_is_refused_in_a_line(tmp_path, keys, value, said):
    write(tmp_path)
    meta = json.loads((tmp_path / 'meta.json').read_text())
    inner = meta
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    refused(tmp_path, said)


def test_a_split_that_there_is_not_is_named(tmp_path):
    write(tmp_path)
    refused(tmp_path, "has no split 'test', only train, val", split='test')


# ---- splits ----

def test_several_folders_are_one_split(tmp_path):
    folders = []
    written = []
    for name, lengths in (('a', (5, 9, 2)), ('b', (4,)), ('c', ()), ('d', (6, 3))):
        written += write(tmp_path / name, lengths)
        folders.append(tmp_path / name)
    check(folders, written)


def test_data_sets_are_found_here_or_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    expected = ['data/mine', os.path.join(ROOT, 'data', 'oasst'), 'data/none']
    assert tokenfile.find_folders('mine, oasst,none', 'data') == expected


def test_loss_on_all_supervises_every_token_but_the_first(tmp_path):
    write(tmp_path)
    split = Split([str(tmp_path)], 'train', loss_on='all')
    assert split.n_supervised.tolist() == [4, 8, 1]
    assert split[0][1].tolist() == [1] * 5


def test_a_first_token_is_not_counted_as_supervised(tmp_path):
    """Nothing stands before it: an empty question in the template plain."""
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', [1, 2, 3, 4], [1, 1, 0, 1], [3, 1])
        writer.finish(META)
    assert Split([str(tmp_path)], 'train').n_supervised.tolist() == [1, 0]


def test_an_empty_split_is_empty(tmp_path):
    write(tmp_path, val=())
    check(tmp_path, [], 'val')


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


# ---- nanoGPT's folders ----

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
