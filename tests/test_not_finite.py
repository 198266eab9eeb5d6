"""A loss, a gradient or weights that are not finite are never applied and never saved."""
import math
import os

import pytest
import torch

from configurator import UserError
from conftest import SMALL, log_of, run
from core import checkpoint
from core.processes import Processes
from core.trainer import Trainer
from model import GPT

pytestmark = pytest.mark.usefixtures('no_pictures')


@pytest.fixture
def spoil(monkeypatch):
    """A function: from now on the loss of these micro-batches, counted from 1, is NaN."""
    loss = GPT.loss
    n = 0

    def start(numbers):
        def spoiled(model, batch):
            nonlocal n
            found = loss(model, batch)
            if model.training:
                n += 1
            return found * math.nan if model.training and n in numbers else found
        monkeypatch.setattr(GPT, 'loss', spoiled)
    return start


def test_a_step_with_a_planted_nan_is_skipped_and_named(data, tmp_path, spoil, capfd):
    spoil({5})  # the first micro-batch of step 3
    saved = run(data, tmp_path, **SMALL, log_interval=1)
    assert 'step 3 is skipped: loss nan' in capfd.readouterr().err
    assert all(p.isfinite().all() for p in saved.model.values()) and saved.step == 12
    losses = [row['step'] for row in log_of(tmp_path) if row['loss']]
    assert losses == [str(step) for step in range(1, 13) if step != 3]
    moments = next(iter(saved.optimizer['state'].values()))
    assert moments['step'] == 11


def test_after_five_in_a_row_the_run_stops_and_the_checkpoint_stays(data, tmp_path, spoil):
    spoil(set(range(9, 100)))  # from step 5 on
    with pytest.raises(UserError, match='5 steps in a row.*learning_rate'):
        run(data, tmp_path, **SMALL)
    saved = checkpoint.load(tmp_path / 'ckpt.pt')
    assert saved.step == 6 or saved.step == 3
    assert all(p.isfinite().all() for p in saved.model.values())


def test_a_learning_rate_that_is_far_too_high_saves_nothing(data, tmp_path):
    with pytest.raises(UserError, match='Nothing was saved'):
        run(data, tmp_path, **SMALL, learning_rate=1e30, warmup_iters=0)
    assert not os.path.exists(tmp_path / 'ckpt.pt')


def test_weights_that_are_not_finite_are_not_saved(data, whole, tmp_path, monkeypatch):
    evaluate = Trainer.evaluate

    def spoil(trainer, request):
        found = evaluate(trainer, request)
        if trainer.state.step == 6:
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[0, 0] = math.inf
        return found
    monkeypatch.setattr(Trainer, 'evaluate', spoil)
    with pytest.raises(UserError, match='weights are no longer finite'):
        run(data, tmp_path, **SMALL)
    assert checkpoint.load(tmp_path / 'ckpt.pt').step == 3


def test_a_step_is_skipped_by_all_processes_if_it_is_not_finite_in_one(
        data, tmp_path, monkeypatch, capfd):
    add = Processes.sum
    step = Trainer.train_step

    def with_another(procs, *numbers):
        """The sum with a process whose gradient has a NaN in step 3."""
        sums = add(procs, *numbers)
        return [sums[0], math.nan, *sums[2:]] if spoilt else sums

    def train_step(trainer, request):
        nonlocal spoilt
        spoilt = trainer.state.step == 2
        step(trainer, request)
        spoilt = False
    spoilt = False
    monkeypatch.setattr(Processes, 'sum', with_another)
    monkeypatch.setattr(Trainer, 'train_step', train_step)
    saved = run(data, tmp_path, **SMALL)
    assert 'step 3 is skipped' in capfd.readouterr().err
    assert next(iter(saved.optimizer['state'].values()))['step'] == 11
