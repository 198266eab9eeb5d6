"""A loss, a gradient or weights that are not finite are never applied and never saved."""
import itertools
import math
import os

import pytest
import torch

from conftest import SMALL, log_of, one_line, run
from core import checkpoint
from core.processes import Processes
from core.trainer import Trainer
from model import GPT

pytestmark = pytest.mark.usefixtures('no_pictures')


@pytest.fixture
def spoil(monkeypatch):
    """A function: from now on these losses, or sums over all processes, counted from 1, are NaN."""
    def start(what, numbers):
        whole = Processes.sum if what == 'sum' else GPT.loss
        count = itertools.count(1)

        def spoiled(self, *arguments):
            found = whole(self, *arguments)
            if what == 'loss' and not self.training or next(count) not in numbers:
                return found
            return [found[0], math.nan, *found[2:]] if what == 'sum' else found * math.nan
        monkeypatch.setattr(Processes if what == 'sum' else GPT, what, spoiled)
    return start


# The first micro-batch of step 3; the gradient of another process, in the sums of step 3. The
# first sum is that of an evaluation.
@pytest.mark.parametrize('what, number', [('loss', 5), ('sum', 4)])
def test_a_step_with_a_planted_nan_is_skipped_and_named(
        data, tmp_path, spoil, capfd, what, number):
    spoil(what, {number})
    saved = run(data, tmp_path, **SMALL, log_interval=1)
    assert 'step 3 is skipped: loss ' in capfd.readouterr().err
    assert all(p.isfinite().all() for p in saved.model.values()) and saved.step == 12
    spoiled = [row['step'] for row in log_of(tmp_path) if 'nan' in (row['loss'], row['grad_norm'])]
    assert spoiled == (['3'] if what == 'loss' else [])
    moments = next(iter(saved.optimizer['state'].values()))
    assert moments['step'] == 11


def test_after_ten_in_a_row_the_run_stops_and_the_checkpoint_stays(data, tmp_path, spoil):
    spoil('loss', range(9, 100))  # from step 5 on
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
    evaluate = Trainer.evaluate

    def spoil(trainer, request):
        found = evaluate(trainer, request)
        if trainer.state.step == 6:
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[0, 0] = math.inf
        return found
    monkeypatch.setattr(Trainer, 'evaluate', spoil)
    with one_line('weights are no longer finite'):
        run(data, tmp_path, **SMALL)
    assert checkpoint.load(tmp_path / 'ckpt.pt').step == 3
