"""Progress bars show themselves on a terminal, over what is slow, and nowhere else."""
import gzip
import io
import os
import sys

import pytest

import evaluate
from core import progress
from core import runlog
import train
from core.conversation import Turn
from data import pipeline
from test_evaluate import model_folder
from test_train import data, flags, run  # noqa: F401  (data is a fixture)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Standard error is a terminal from here on, and everything is slow."""
    monkeypatch.setitem(progress.OPTIONS, 'delay', 0)
    monkeypatch.setitem(progress.OPTIONS, 'mininterval', 0)
    monkeypatch.setattr(sys, 'stderr', Terminal())
    return sys.stderr


def test_a_bar_waits_two_seconds_and_needs_a_terminal(monkeypatch):
    shown = terminal(monkeypatch)
    assert list(progress.Bar(range(3), 'waiting')) == [0, 1, 2] and 'waiting: 100%' in shown.getvalue()
    monkeypatch.setitem(progress.OPTIONS, 'delay', 2)
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert list(progress.Bar(range(3), 'waiting')) == [0, 1, 2] and sys.stderr.getvalue().strip() == ''
    monkeypatch.setitem(progress.OPTIONS, 'delay', 0)
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    assert list(progress.Bar(range(3), 'waiting')) == [0, 1, 2] and sys.stderr.getvalue() == ''


@pytest.mark.parametrize('compress', [False, True])
def test_reading_a_source_is_shown_by_its_bytes(tmp_path, monkeypatch, compress):
    shown = terminal(monkeypatch)
    path, lines = str(tmp_path / 'source.jsonl'), b'{"a": 1}\n' * 400_000
    with open(path, 'wb') as file:
        file.write(gzip.compress(lines) if compress else lines)
    assert b''.join(block for _, block in pipeline.read_blocks(path)) == lines
    size = progress.Bar.format_sizeof(os.path.getsize(path))
    assert 'source.jsonl: 100%' in shown.getvalue() and f'/{size}' in shown.getvalue()
    shown.truncate(0)
    assert b''.join(block for _, block in pipeline.read_blocks(path, silent=True)) == lines and not shown.getvalue()


def test_training_and_its_evaluations_are_shown_and_lines_stand_above(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runlog, 'plot', lambda out_dir: None)
    shown = terminal(monkeypatch)
    run(data, tmp_path, max_iters=4, lr_decay_iters=4)
    shown, printed = shown.getvalue(), capsys.readouterr().out
    assert 'training:  50%' in shown and '4/4' in shown and 'evaluating: 100%' in shown and 'saving ckpt.pt: ' in shown
    assert 'step 4/4 | loss' in printed and 'training:' not in printed


def test_answers_are_shown_while_the_first_of_them_come(tmp_path, monkeypatch):
    shown = terminal(monkeypatch)
    opened = evaluate.checkpoint.open_model('resume', model_folder(tmp_path / 'm'))
    questions = [[Turn('user', 'x')]] * 2
    found = evaluate.answer_all(opened, 'xml', questions, max_new_tokens=40, what='asking')
    assert len(found) == 2 and 'asking, 2 answers:   5%' in shown.getvalue()
    shown.truncate(0)
    assert evaluate.answer_all(opened, 'xml', questions, max_new_tokens=40) == found and not shown.getvalue()


def test_in_a_pipe_there_is_none(data, tmp_path, script):
    found = script('train.py', *flags(data, tmp_path / 'out', max_iters=2))
    assert found.returncode == 0 and found.stderr == '' and '\r' not in found.stdout, found.stderr
