"""Nothing is lost: stopped at any step, killed between any two files, on a full disk."""
import dataclasses
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch

import train
from conftest import ROOT, SMALL, assert_same_run, log_of, one_line, resume, run
from core import checkpoint, rows, runlog
from core.trainer import Trainer

pytestmark = pytest.mark.usefixtures('no_pictures')


class Killed(BaseException):
    """Stands for a kill that would take a process of its own."""


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the undisturbed run."""
    return shutil.copytree(whole, tmp_path / 'copy')


# ---- stopped and resumed ----

def test_stopped_after_every_step_it_ends_with_the_same_bits(data, whole, tmp_path, stop_after):
    """Within an epoch and at its end, at evaluations and between them, with dropout."""
    stop_after(1)
    run(data, tmp_path, **SMALL)
    for n in range(1, 12):
        assert checkpoint.load(tmp_path / 'ckpt.pt').step == n
        stop_after(n + 1)
        resume(tmp_path)
    resume(tmp_path)  # the last evaluation
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize('split, nth, step', [('train', 8, 4), ('val', 5, 6), ('val', 1, 0)])
def test_a_signal_in_the_middle(data, whole, tmp_path, monkeypatch, capfd, split, nth, step):
    """Between two micro-batches: the step is finished. In an evaluation: it is done again later."""
    make_batch = rows.make_batch
    numbers = itertools.count(1)

    def signalling(of, conversations):
        if of.name == split and next(numbers) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(of, conversations)
    with monkeypatch.context() as patch:
        patch.setattr(rows, 'make_batch', signalling)
        assert run(data, tmp_path, **SMALL).step == step
    assert 'once more to stop at once' in capfd.readouterr().err
    evaluated = [int(row['step']) for row in log_of(tmp_path) if row['val_loss']]
    assert evaluated == list(range(0, step, 3))
    resume(tmp_path)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(data, tmp_path, monkeypatch, number):
    def signalling(*_):
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL  # the next one ends the process
        raise Killed
    monkeypatch.setattr(rows, 'make_batch', signalling)
    with pytest.raises(Killed):
        run(data, tmp_path, **SMALL)
    assert not list(tmp_path.glob('*.pt'))


def test_the_line_that_resumes_can_be_run(data, tmp_path, stop_after, monkeypatch, capsys):
    """As it stands, with a space, quotes and umlauts in out_dir, relative to another folder."""
    monkeypatch.chdir(tmp_path)
    stop_after(2)
    run(data, "größe 'x' [1]/$HOME", **SMALL)
    _, _, rest = capsys.readouterr().out.partition('Go on: python ')
    command = f'{sys.executable} {ROOT}/{rest.splitlines()[0]} --max_iters=3'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and 'finished' in done.stdout, done.stderr
    assert 'not bit for bit' not in done.stdout
    assert done.stderr == '' and '\r' not in done.stdout  # no progress bar in a pipe


# ---- killed ----

@pytest.mark.parametrize('nth', [2, 3, 4, 8, 9])
def test_killed_around_any_renaming_nothing_is_lost(data, whole, tmp_path, monkeypatch, nth):
    """log.csv comes first, then best.pt and ckpt.pt at each of four evaluations."""
    replacing = mock.Mock(wraps=os.replace, side_effect=[mock.DEFAULT] * (nth - 1) + [Killed])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, 'replace', replacing)
        run(data, tmp_path, **SMALL)
    with open(tmp_path / 'log.csv', 'a') as file:
        file.write('1,0.1,2')  # a torn row
    if os.path.exists(tmp_path / 'ckpt.pt'):
        resume(tmp_path)
    else:
        run(data, tmp_path, overwrite=True, **SMALL)
    assert_same_run(whole, tmp_path)
    assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('processes, kills', [(1, 4), (2, 2)])
def test_real_kills(script, processes, kills):
    """The short form of a proof that takes minutes."""
    done = script('tests/stress/kills.py', f'--kills={kills}', '--steps=16',
                  f'--processes={processes}', timeout=300)
    assert done.returncode == 0 and 'lost steps, differing bits: 0' in done.stdout, done.stderr


def test_overwriting_removes_the_run_before_at_once(data, whole, copy, monkeypatch):
    """Else, killed before its first checkpoint, a run's log would stand beside old weights."""
    with one_line('ckpt.pt is there already'):
        run(data, copy, **SMALL)
    assert_same_run(whole, copy)
    monkeypatch.setattr(Trainer, 'train_step', mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
        run(data, copy, overwrite=True, **SMALL)
    assert not list(copy.glob('*.pt'))


# ---- what cannot be written ----

def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(copy, whole):
    """The system refuses to write more than best.pt takes, which is less than ckpt.pt takes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = os.path.getsize(copy / 'ckpt.pt') // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
    try:
        with one_line('cannot write .*ckpt.pt: .*File too large'):
            resume(copy, max_iters=13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (copy / 'ckpt.pt').read_bytes() == (whole / 'ckpt.pt').read_bytes()
    assert not list(copy.glob('*.tmp'))


def test_a_log_or_folder_that_cannot_be_written_to_is_a_line(data, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    with one_line('cannot write to .*file/out: .*--out_dir=FOLDER'):
        run(data, tmp_path / 'file' / 'out', **SMALL)
    full = mock.Mock(side_effect=OSError(28, 'No space left on device'))
    monkeypatch.setattr(runlog.csv.DictWriter, 'writerow', full)
    with one_line('cannot write .*log.csv: .*No space left on device'):
        run(data, tmp_path, **SMALL)


# ---- what may change, and what may not ----

@pytest.mark.parametrize('key, now, said', [
    ('n_layer', 3, 'n_layer was 2, now 3'), ('bias', False, 'bias was True, now False'),
    ('batch_size', 1, 'batch_size was 2, now 1'), ('beta2', 0.9, 'beta2 was 0.95, now 0.9'),
    ('seed', 1, 'seed was 1337, now 1'), ('dropout', 0.0, 'dropout was 0.1, now 0.0'),
    ('block_size', 32, 'block_size was 64, now 32'),
    ('block_size', 128, 'block_size=128 exceeds the 64 positions'),
    ('dataset', 'unvalidated', 'is not the data that'), ('dataset', 'alien', 'the data another')])
def test_what_would_be_another_run_is_refused(copy, whole, key, now, said):
    with one_line(said):
        resume(copy, max_iters=13, **{key: now})
    assert_same_run(whole, copy)


@pytest.mark.parametrize('changes, said', [
    ({'eval_interval': 2, 'log_interval': 1, 'patience': 9, 'eval_iters': 1}, []),
    ({'learning_rate': 1e-3, 'min_lr': 1e-4},
     ['learning_rate was 0.01, is 0.001', 'min_lr was 0.0, is 0.0001']),
    ({'grad_clip': 0.5, 'lr_decay_iters': 0, 'dtype': 'bfloat16'},
     ['grad_clip was 1.0, is 0.5', 'lr_decay_iters was 12, is 13',
      'dtype was float32, is bfloat16'])])
def test_what_ends_the_promise_is_announced_and_the_rest_done_in_silence(
        copy, capsys, changes, said):
    assert resume(copy, max_iters=13, **changes).step == 13
    printed = capsys.readouterr().out
    assert re.findall('from here on not bit for bit the saved run: (.*)', printed) == said


def test_another_number_of_epochs_may_follow_in_the_run_that_was_saved_last(data, tmp_path):
    keys = SMALL | {'max_iters': 1000}
    assert run(data, tmp_path / 'out', **keys, epochs=0.5).step == 4  # 14 of 27 rows, 4 in a step
    train.main(['--init_from=resume', f'--out_dir={tmp_path}', '--epochs=1'])
    assert checkpoint.load(tmp_path / 'out' / 'ckpt.pt').step == 7


# ---- other checkpoints ----

def test_a_state_that_does_not_fit_is_refused_in_one_line(whole, copy):
    saved = checkpoint.load(whole / 'ckpt.pt')
    for state, said in ((None, 'no optimizer state'), ({'state': {}}, 'param_groups')):
        checkpoint.save(dataclasses.replace(saved, optimizer=state), copy / 'ckpt.pt')
        with one_line(said):
            resume(copy, max_iters=13)


def test_a_checkpoint_of_the_first_version_goes_on(data, whole, tmp_path, stop_after):
    """It has no `conditions`, lacks keys that came later and has some that are gone."""
    stop_after(7)
    saved = run(data, tmp_path, **SMALL)
    stop_after(0)
    del saved.config['patience'], saved.conditions
    saved.config |= {'keep': 0, 'timeout_s': 60}
    torch.save(vars(saved), tmp_path / 'old.pt')
    os.replace(tmp_path / 'old.pt', tmp_path / 'ckpt.pt')
    resume(tmp_path)
    assert_same_run(whole, tmp_path)
