"""tokenfile.py: written whole or not at all, read only where all agrees, packed without loss."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from core import tokenfile
from configurator import UserError
from core.tokenfile import Rows, Split, Writer, make_batch, pack
from conftest import ROOT

META = {'template': 'xml', 'tokenizer': {'name': 'gpt2', 'sha256': 'abc'}}
FILES = [f'{split}{ending}' for split in ('train', 'val') for ending in ('.bin', '.idx.bin', '.mask.bin')]


def conversation_of(length, seed=0):
    """Random (ids, mask) with at least one supervised token behind the first."""
    rng = np.random.default_rng([length, seed])
    mask = (rng.random(length) < 0.5).astype(np.uint8)
    mask[0], mask[-1] = 0, 1
    return rng.integers(0, 65536, length).astype(np.uint16), mask


def write(folder, lengths=(5, 9, 2), val=(3,), **meta):
    """A prepared folder of random conversations; returns those of train."""
    written = []
    with Writer(str(folder), ('train', 'val')) as writer:
        for split, several in (('train', lengths), ('val', val)):
            for k, length in enumerate(several):
                ids, mask = conversation_of(length, k)
                writer.add(split, ids, mask, [length])
                if split == 'train':
                    written.append((ids, mask))
        writer.finish({**META, **meta})
    return written


def of_lengths(folder, lengths, supervised=1, split='train'):
    """A split of conversations of these lengths, of which the last `supervised` tokens are supervised."""
    with Writer(str(folder), (split,)) as writer:
        for i, length in enumerate(lengths):
            mask = np.zeros(length, np.uint8)
            mask[length - supervised:] = supervised > 0
            writer.add(split, np.full(length, i % 65536, np.uint16), mask, [length])
        writer.finish(META)
    return Split([str(folder)], split)


def same(split, written):
    assert len(split) == len(written)
    for i, (ids, mask) in enumerate(written):
        assert split[i][0].tolist() == ids.tolist() and split[i][1].tolist() == mask.tolist()


# ---- writing ----

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='/dev/full is Linux\'s')
@pytest.mark.parametrize('n', [10, 10_000_000])  # noticed on closing, and while writing
def test_a_full_disk_is_a_line_and_leaves_what_was_there(tmp_path, n):
    written = write(tmp_path)
    with pytest.raises(UserError, match='could not write to .*: No space left on device'):
        with Writer(str(tmp_path), ('train', 'val')) as writer:
            writer.files['train']['.bin'] = writer.stack.enter_context(open('/dev/full', 'wb'))
            writer.add('train', np.zeros(n, np.uint16), np.ones(n, np.uint8), [n])
            writer.finish(META)
    same(Split([str(tmp_path)], 'train'), written)
    assert not [name for name in os.listdir(tmp_path) if name.startswith('.')]


def test_what_is_written_reads_back(tmp_path):
    written = write(tmp_path / 'new' / 'folder')
    assert sorted(os.listdir(tmp_path / 'new' / 'folder')) == sorted([*FILES, 'meta.json'])
    split = Split([str(tmp_path / 'new' / 'folder')], 'train')
    same(split, written)
    assert split.lengths.tolist() == [5, 9, 2]
    assert split.n_supervised.tolist() == [int(mask.sum()) for _, mask in written]
    meta = tokenfile.read_meta(str(tmp_path / 'new' / 'folder'))
    assert meta['format_version'] == 1 and meta['template'] == 'xml'
    counts = meta['splits']['train']
    assert (counts['conversations'], counts['tokens']) == (3, 16) and counts['supervised_tokens'] == split.n_supervised.sum()


def test_the_files_are_the_published_format(tmp_path):
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', np.array([1, 2, 50262, 65535, 0], np.uint16), np.array([0, 1, 0, 0, 1], np.uint8), [2, 3])
        writer.add('train', [7], [0], [1])
        writer.finish(META)
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [1, 2, 50262, 65535, 0, 7]
    assert np.fromfile(tmp_path / 'train.mask.bin', 'u1').tolist() == [0, 1, 0, 0, 1, 0]
    assert np.fromfile(tmp_path / 'train.idx.bin', '<i8').tolist() == [0, 2, 5, 6]


def test_many_at_once_are_the_same_as_one_after_another(tmp_path):
    written = write(tmp_path / 'a')
    with Writer(str(tmp_path / 'b'), ('train', 'val')) as writer:
        writer.add('train', *(np.concatenate(parts) for parts in zip(*written)), np.array([5, 9, 2]))
        writer.add('val', *conversation_of(3), [3])
        writer.add('val', [], [], [])
        writer.finish(META)
    for name in [*FILES, 'meta.json']:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), name


def test_an_exception_leaves_the_old_files_as_they_were(tmp_path):
    written = write(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(RuntimeError), Writer(str(tmp_path), ('train', 'val')) as writer:
        writer.add('train', [1, 2, 3], [0, 0, 1], [3])
        same(Split([str(tmp_path)], 'train'), written)  # while it writes, too
        raise RuntimeError
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_there_is_no_meta_json_before_finish(tmp_path):
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', [1, 2, 3], [0, 0, 1], [3])
        assert all(name.startswith(('.partial-', '.lock')) for name in os.listdir(tmp_path))
        with pytest.raises(UserError, match='meta.json not found'):
            Split([str(tmp_path)], 'train')
    assert os.listdir(tmp_path) == []  # left without finish: nothing at all


def test_killed_in_the_middle_the_old_files_stay_readable(tmp_path):
    written = write(tmp_path)
    code = ('import os, signal, tokenfile\n'
            f'with tokenfile.Writer({str(tmp_path)!r}, ("train",)) as writer:\n'
            '    writer.add("train", [1] * 9999, [1] * 9999, [9999])\n'
            '    os.kill(os.getpid(), signal.SIGKILL)')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == -signal.SIGKILL
    same(Split([str(tmp_path)], 'train'), written)


@pytest.mark.parametrize('n_moved', range(7))
def test_stopped_while_the_files_are_moved_none_is_taken_for_whole(tmp_path, monkeypatch, n_moved):
    write(tmp_path)
    moves = []

    def replace(source, target):
        if len(moves) == n_moved:
            raise KeyboardInterrupt
        moves.append(os.rename(source, target))
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, (5, 9, 2), (3,))
    with pytest.raises(UserError, match='meta.json not found'):
        Split([str(tmp_path)], 'train')


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write to .*Use --out_dir=FOLDER'):
        with Writer(str(tmp_path / 'file'), ('train',)):
            pass


def test_meta_json_holds_any_file_name(tmp_path):
    write(tmp_path, source={'name': 'é\udcff.jsonl'})
    assert tokenfile.read_meta(str(tmp_path))['source']['name'] == 'é\udcff.jsonl'


# ---- reading what does not agree ----

def damage(path, how):
    data = path.read_bytes()
    if how == 'gone':
        path.unlink()
    elif how == 'grown':
        path.write_bytes(data + data[-8:])
    else:  # cut by so many bytes
        path.write_bytes(data[:-how])


@pytest.mark.parametrize('name', [name for name in FILES if 'train' in name])
@pytest.mark.parametrize('how', ['gone', 'grown', 1, 2, 8, 10 ** 9])
def test_files_that_disagree_are_refused_in_a_line(tmp_path, name, how):
    write(tmp_path)
    damage(tmp_path / name, how)
    with pytest.raises(UserError) as caught:
        Split([str(tmp_path)], 'train')
    line = str(caught.value)
    assert '\n' not in line and 'train' in line and 'Prepare the folder again' in line
    assert len(Split([str(tmp_path)], 'val')) == 1  # the other is whole


@pytest.mark.parametrize('name, at, value', [
    ('train.idx.bin', 0, 1), ('train.idx.bin', 1, 0), ('train.idx.bin', 1, 14), ('train.idx.bin', 1, -3), ('train.idx.bin', 3, 15),
    ('train.mask.bin', 4, 0), ('train.mask.bin', 4, 2), ('train.mask.bin', 4, 255)])
def test_wrong_values_are_refused_in_a_line(tmp_path, name, at, value):
    write(tmp_path)
    values = np.fromfile(tmp_path / name, tokenfile.DTYPES[name.removeprefix('train')])
    assert values[at] != value
    values[at] = value
    values.tofile(tmp_path / name)
    with pytest.raises(UserError, match='disagree'):
        Split([str(tmp_path)], 'train')


def test_an_id_that_the_vocabulary_has_not_is_refused_in_a_line(tmp_path):
    """Found by the fuzzer: the model would have looked it up, and ended in a traceback, or on a GPU in much worse."""
    split = of_lengths(tmp_path, [5, 5, 5])  # ids 0, 1 and 2
    same(Split([str(tmp_path)], 'train', vocab_size=3), [split[i] for i in range(3)])
    with pytest.raises(UserError, match='train.bin has the id 2, the vocabulary only 2 tokens. Prepare'):
        Split([str(tmp_path)], 'train', vocab_size=2)


@pytest.mark.parametrize('change, found', [
    (lambda meta: '', 'cannot be read'), (lambda meta: '{"format', 'cannot be read'), (lambda meta: '[]', 'cannot be read'),
    (lambda meta: 'null', 'cannot be read'), (lambda meta: '[' * 100_000, 'cannot be read'), (lambda meta: b'\xff\xfe{}', 'cannot be read'),
    (lambda meta: '{}', 'cannot be read'), (lambda meta: '{"format_version": 2}', 'is of format 2; this code reads 1'),
    (lambda meta: {**meta, 'format_version': '1'}, "is of format '1'"), (lambda meta: {**meta, 'template': None}, 'wrong types'),
    (lambda meta: {**meta, 'splits': []}, 'wrong types'), (lambda meta: {**meta, 'splits': {'train': 5}}, 'cannot be read'),
    (lambda meta: {**meta, 'splits': {'train': {'tokens': 5}}}, 'cannot be read'), (lambda meta: {**meta, 'tokenizer': 'gpt2'}, 'cannot be read'),
    (lambda meta: {**meta, 'tokenizer': {'name': 'gpt2', 'sha256': 5}}, 'wrong types'),
    (lambda meta: {**meta, 'splits': {'train': {**meta['splits']['train'], 'tokens': 16.0}}}, 'wrong types'),
    (lambda meta: {key: value for key, value in meta.items() if key != 'template'}, "'template'"),
    (lambda meta: {**meta, 'splits': {'train': {**meta['splits']['train'], 'tokens': 15}}}, 'disagree'),
    (lambda meta: {**meta, 'splits': {'train': {**meta['splits']['train'], 'conversations': 4}}}, 'disagree'),
    (lambda meta: {**meta, 'splits': {'train': {**meta['splits']['train'], 'supervised_tokens': 1}}}, 'disagree')])
def test_a_meta_json_that_is_not_ours_is_refused_in_a_line(tmp_path, change, found):
    write(tmp_path)
    changed = change(json.loads((tmp_path / 'meta.json').read_text()))
    (tmp_path / 'meta.json').write_bytes(changed if isinstance(changed, bytes) else
                                         (changed if isinstance(changed, str) else json.dumps(changed)).encode())
    with pytest.raises(UserError) as caught:
        Split([str(tmp_path)], 'train')
    assert found in str(caught.value) and '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_that_was_never_prepared_says_how_to(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='meta.json not found. Expected a folder that'):
        Split([str(tmp_path)], 'train')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'prepare.py').write_text('')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='data/meta.json not found. Run: python data/prepare.py'):
        Split(['data'], 'train')


def test_a_split_that_there_is_not_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="has no split 'test', only train, val"):
        Split([str(tmp_path)], 'test')


# ---- splits ----

def test_several_folders_are_one_split(tmp_path):
    written = write(tmp_path / 'a') + write(tmp_path / 'b', (4,)) + write(tmp_path / 'c', ()) + write(tmp_path / 'd', (6, 3))
    split = Split([str(tmp_path / name) for name in 'abcd'], 'train')
    same(split, written)
    assert split.lengths.tolist() == [5, 9, 2, 4, 6, 3]
    assert split.n_supervised.tolist() == [int(mask.sum()) for _, mask in written]


def test_loss_on_all_supervises_every_token_but_the_first(tmp_path):
    written = write(tmp_path)
    split = Split([str(tmp_path)], 'train', loss_on='all')
    assert split.n_supervised.tolist() == [4, 8, 1]
    batch = make_batch(split, [0, 1, 2])
    assert sorted(batch.targets.tolist()) == sorted(int(i) for ids, _ in written for i in ids[1:])
    assert len(batch.at) == 13 == len(batch.idx)


def test_an_empty_split_is_empty(tmp_path):
    write(tmp_path, val=())
    split = Split([str(tmp_path)], 'val')
    assert len(split) == 0 and split.lengths.tolist() == split.n_supervised.tolist() == []
    with pytest.raises(UserError, match='nothing to learn from in val'):
        Rows(split, 16)


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


# ---- packing ----

def lengths_like_oassts(n, seed=0):
    """(n,) lengths: the logarithm near normal, the median 170, a few above any row."""
    return np.random.default_rng(seed).lognormal(5.1, 0.9, n).astype(np.int64).clip(2)


@pytest.mark.parametrize('lengths', [[10] * 7, [1] * 25, [9, 1, 8, 2, 5, 5], [10], [], [6, 6, 6, 4, 4], [3] * 10, *(
    np.random.default_rng(k).integers(1, 11, k * 3).tolist() for k in range(1, 30))], ids=str)
def test_every_conversation_stands_in_one_row_and_no_row_is_too_long(lengths):
    lengths = np.array(lengths, np.int64)
    rows = pack(lengths, 10, np.arange(len(lengths)))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[row]) <= 10 for row in rows)
    fill = sorted(sum(lengths[row]) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > 10  # two that fit together would be one


def test_rows_are_nearly_full():
    for capacity in (512, 1024):
        lengths = lengths_like_oassts(20_000)
        lengths = lengths[lengths <= capacity]
        rows = pack(lengths, capacity, np.arange(len(lengths)))
        needed = -(-int(lengths.sum()) // capacity)
        assert needed <= len(rows) <= needed * 1.005 + 1, (len(rows), needed)


def test_a_hundred_thousand_are_packed_quickly_enough_to_test():
    lengths = lengths_like_oassts(100_000).clip(max=1024)
    rows = pack(lengths, 1024, np.random.default_rng(1).permutation(100_000))
    assert sum(map(len, rows)) == 100_000 and max(int(lengths[row].sum()) for row in rows) <= 1024


def test_a_conversation_goes_into_the_fullest_row_that_has_room():
    assert pack(np.array([7, 6, 3]), 10, np.arange(3)) == [[0, 2], [1]]
    assert pack(np.array([5, 2, 8, 1]), 10, np.arange(4)) == [[2, 1], [0, 3]]


def test_of_equal_lengths_the_first_in_order_goes_first():
    lengths = np.array([4, 4, 4, 4, 2])
    assert pack(lengths, 8, np.array([3, 1, 4, 0, 2])) == [[3, 1], [0, 2], [4]]
    assert pack(lengths, 8, np.array([0, 1, 2, 3])) == [[0, 1], [2, 3]]  # and what is not in order stays out


# ---- rows ----

def test_every_epoch_has_every_conversation_once_in_another_order(tmp_path):
    split = of_lengths(tmp_path, lengths_like_oassts(300).clip(max=200))
    rows = Rows(split, 256, seed=1)
    epochs = [rows.epoch(e) for e in range(4)]
    for epoch in epochs:
        assert sorted(i for row in epoch for i in row) == list(range(300))
        assert len(epoch) == rows.n_rows
        assert all(sum(split.lengths[row] - 1) <= 256 for row in epoch)
    assert all(a != b and sorted(map(sorted, a)) != sorted(map(sorted, b)) for a, b in zip(epochs, epochs[1:]))
    flat = [row for epoch in epochs for row in epoch]
    assert rows.slice(0, len(flat)) == flat and rows.slice(rows.n_rows - 1, rows.n_rows + 2) == flat[rows.n_rows - 1:rows.n_rows + 2]


def test_the_order_is_a_function_of_seed_and_epoch_alone(tmp_path):
    split = of_lengths(tmp_path, lengths_like_oassts(200).clip(max=200))
    a, b = Rows(split, 256, seed=1), Rows(split, 256, seed=1)
    a.epoch(0), a.epoch(1), a.epoch(2)
    assert b.epoch(2) == a.epoch(2)  # without those before it
    assert Rows(split, 256, seed=2).epoch(2) != a.epoch(2)
    assert Rows(split, 256).epoch(0) == Rows(split, 256).epoch(5)  # without a seed: not shuffled


def test_the_order_stays_what_it_was(tmp_path):
    """A run that is resumed with a later version must see the rows it would have seen."""
    rows = Rows(of_lengths(tmp_path, [3, 9, 4, 4, 7, 2, 5, 5]), 10, seed=1337)
    assert [rows.epoch(0), rows.epoch(1)] == [
        [[7, 3, 2], [4, 6], [5], [1, 0]], [[4, 7], [6, 2, 3], [1, 0], [5]]]


def test_what_is_too_long_is_left_out_and_counted(tmp_path):
    """A conversation that no row can hold must not stop those behind it."""
    split = of_lengths(tmp_path, [5, 12, 11, 500, 3, 11])
    rows = Rows(split, 10, seed=0)
    assert rows.n_too_long == 2  # 11 tokens are 10 positions: the last is predicted and predicts nothing
    for epoch in range(5):
        assert sorted(i for row in rows.epoch(epoch) for i in row) == [0, 2, 4, 5]


def test_what_has_nothing_supervised_is_left_out(tmp_path):
    for k, n in ((1, 1), (2, 0)):
        of_lengths(tmp_path / str(k), [5, 6], supervised=n)
    rows = Rows(Split([str(tmp_path / '1'), str(tmp_path / '2')], 'train'), 10)
    assert rows.epoch(0) == [[1, 0]] and rows.n_supervised(rows.epoch(0)) == 2


@pytest.mark.parametrize('lengths, supervised, said', [([50, 60], 1, '2 are longer than block_size=16'), ([5, 6], 0, 'no supervised token')])
def test_nothing_to_learn_from_is_a_line(tmp_path, lengths, supervised, said):
    with pytest.raises(UserError) as caught:
        Rows(of_lengths(tmp_path, lengths, supervised), 16)
    assert said in str(caught.value) and '\n' not in str(caught.value)


# ---- batches ----

def test_a_batch_is_the_conversations_side_by_side(tmp_path):
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', [10, 11, 12, 20, 21, 22, 23, 30, 31, 32], [0, 0, 1, 0, 1, 0, 1, 0, 1, 1], [3, 4, 3])
        writer.finish(META)
    batch = make_batch(Split([str(tmp_path)], 'train'), [1, 0, 2])
    assert batch.idx.tolist() == [10, 11, 30, 31, 20, 21, 22]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert batch.runs == [(2, 2), (1, 3)]
    assert batch.at.tolist() == [1, 2, 3, 4, 6] and batch.targets.tolist() == [12, 31, 32, 21, 23]
    assert {array.dtype for array in (batch.idx, batch.positions, batch.at, batch.targets)} == {np.dtype(np.int64)}


def test_targets_are_exactly_the_supervised_tokens(tmp_path):
    written = write(tmp_path, np.random.default_rng(0).integers(2, 60, 100).tolist())
    split = Split([str(tmp_path)], 'train')
    rows = Rows(split, 64, seed=3)
    seen = []
    for row in rows.epoch(0):
        batch = make_batch(split, row)
        assert rows.n_supervised([row]) == len(batch.targets) == len(batch.at)
        assert sum(n * length for n, length in batch.runs) == len(batch.idx) == len(batch.positions) <= 64
        starts = np.flatnonzero(batch.positions == 0)
        lengths = np.diff([*starts, len(batch.idx)])
        assert lengths.tolist() == [length for n, length in batch.runs for _ in range(n)]
        for start, length in zip(starts, lengths):
            assert batch.positions[start:start + length].tolist() == list(range(length))
            i = next(i for i in row if len(written[i][0]) == length + 1 and written[i][0][:-1].tolist() == batch.idx[start:start + length].tolist())
            inside = (batch.at >= start) & (batch.at < start + length)
            ids, mask = written[i]
            assert batch.targets[inside].tolist() == ids[1:][mask[1:] == 1].tolist()
            assert (batch.at[inside] - start).tolist() == np.flatnonzero(mask[1:]).tolist()
            seen.append(i)
    assert sorted(seen) == list(range(100))


def test_a_first_token_is_not_counted_as_supervised(tmp_path):
    """Nothing stands before it that could predict it: an empty question in the template plain."""
    with Writer(str(tmp_path), ('train',)) as writer:
        writer.add('train', [1, 2, 3, 4], [1, 1, 0, 1], [3, 1])
        writer.finish(META)
    split = Split([str(tmp_path)], 'train')
    assert split.n_supervised.tolist() == [1, 0]
    assert Rows(split, 8).epoch(0) == [[0]] and len(make_batch(split, [0]).targets) == 1


def test_batches_are_the_rows_of_the_first_epoch_shared_out(tmp_path):
    split = of_lengths(tmp_path, lengths_like_oassts(100).clip(max=100))
    rows = Rows(split, 128)
    n = sum(len(batch.idx) for batch in rows.batches(3))
    assert n == int((split.lengths - 1).sum())
    shared = [len(batch.idx) for first in range(3) for batch in rows.batches(3, first, 3)]
    assert sum(shared) == n and len(shared) == -(-rows.n_rows // 3)
    assert len(list(rows.batches(3, limit=2))) == 2
