"""A loss, a gradient or weights that are not finite are never applied and never saved."""
import itertools
import math
import os

import pytest
import torch

from conftest import SMALL, log_of, one_line, run
from core import checkpoint
from core.processes import LossModule, Processes
from core.trainer import Trainer

pytestmark = pytest.mark.usefixtures('no_pictures')


def spoil(monkeypatch, kind, name, numbers):
    """From now on these results of the method `name`, counted from 1, hold a NaN."""
    whole = getattr(kind, name)
    count = itertools.count(1)

    def spoiled(self, *arguments):
        found = whole(self, *arguments)
        if next(count) not in numbers:
            return found
        return [found[0], math.nan, found[2]] if isinstance(found, list) else found * math.nan
    monkeypatch.setattr(kind, name, spoiled)


# The first micro-batch of step 3; the gradient of another process, in the sums of step 3. The
# first sum is that of an evaluation.
@pytest.mark.parametrize('kind, name, number', [(LossModule, 'forward', 5), (Processes, 'sum', 4)])
def test_a_step_with_a_planted_nan_is_skipped_and_named(
        data, tmp_path, monkeypatch, capfd, kind, name, number):
    spoil(monkeypatch, kind, name, {number})
    saved = run(data, tmp_path, **SMALL, log_interval=1)
    assert 'step 3 is skipped: loss ' in capfd.readouterr().err
    assert all(p.isfinite().all() for p in saved.model.values()) and saved.step == 12
    spoiled = [row['step'] for row in log_of(tmp_path) if 'nan' in (row['loss'], row['grad_norm'])]
    assert spoiled == (['3'] if name == 'forward' else [])
    moments = next(iter(saved.optimizer['state'].values()))
    assert moments['step'] == 11


def test_after_ten_in_a_row_the_run_stops_and_the_checkpoint_stays(data, tmp_path, monkeypatch):
    spoil(monkeypatch, LossModule, 'forward', range(9, 100))  # from step 5 on
    with one_line('10 steps in a row.*learning_rate'):
        run(data, tmp_path, **SMALL | {'max_iters': 20})
    saved = checkpoint.load(tmp_path / 'ckpt.pt')
    assert saved.step == 12  # its weights are those of step 4
    assert all(p.isfinite().all() for p in saved.model.values())


def test_a_learning_rate_that_is_far_too_high_saves_nothing(data, tmp_path):
    with one_line('Nothing was saved'):
        run(data, tmp_path, **SMALL, learning_rate=1e30, warmup_iters=0)
    assert not os.path.exists(tmp_path / 'ckpt.pt')


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    def spoil(trainer, request):
        """In place of an evaluation."""
        if trainer.state.step == 6:
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[0, 0] = math.inf
        return 1.0
    monkeypatch.setattr(Trainer, 'evaluate', spoil)
    with one_line('weights are no longer finite'):
        run(data, tmp_path, **SMALL)
    assert checkpoint.load(tmp_path / 'ckpt.pt').step == 3
