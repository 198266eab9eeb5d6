"""What runlog.py draws, and sends to TensorBoard and Weights & Biases: the numbers of log.csv."""
import os
import sys
from importlib.machinery import ModuleSpec
from unittest import mock

import pytest

from conftest import one_line, resume, run
from core import runlog
from core.trainer import Trainer

SMALL = {'max_iters': 8, 'lr_decay_iters': 8, 'eval_interval': 4}


def numbers_of(out_dir):
    """The numbers of log.csv, [(column, step, number), …]."""
    found = []
    for row in runlog.read(out_dir):
        step = int(row.pop('step'))
        found += [(name, step, float(text)) for name, text in row.items() if text]
    return sorted(found)


def test_tensorboard_has_the_numbers_of_log_csv(data, tmp_path, monkeypatch, no_pictures):
    """Each once, though the run was killed in step 8 and went on from the checkpoint of step 4."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    step = Trainer.train_step

    def killed(trainer, request):
        if trainer.state.step == 7:
            raise KeyboardInterrupt
        return step(trainer, request)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, 'train_step', killed)
        run(data, tmp_path, **SMALL, tensorboard=True)
    resume(tmp_path)
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    found = []
    for name in events.Tags()['scalars']:
        found += [(name, event.step, event.value) for event in events.Scalars(name)]
    expected = numbers_of(tmp_path)
    assert [step for name, step, _ in expected if name == 'loss'] == [*range(1, 9)]
    rounded = [(name, step, pytest.approx(number, rel=1e-6)) for name, step, number in expected]
    assert sorted(found) == rounded


def test_wandb_gets_the_numbers_of_log_csv_and_nanogpts_keys(
        data, tmp_path, monkeypatch, no_pictures):
    wandb = mock.Mock()  # a stand-in for the package
    wandb.__spec__ = ModuleSpec('wandb', None)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    saved = run(data, tmp_path, **SMALL, wandb_log=True, wandb_project='owt', wandb_run_name='mine')
    wandb.init.assert_called_once_with(project='owt', name='mine', dir=str(tmp_path),
                                       resume='auto', config=saved.config)
    sent = []
    for call in wandb.init.return_value.log.call_args_list:
        numbers, = call.args
        sent += [(name, call.kwargs['step'], number) for name, number in numbers.items()]
    assert sorted(sent) == numbers_of(tmp_path)


@pytest.mark.parametrize('key, package', [('tensorboard', 'tensorboard'), ('wandb_log', 'wandb')])
def test_a_package_that_is_not_installed_is_a_line(data, tmp_path, monkeypatch, key, package):
    monkeypatch.setitem(sys.modules, package, None)
    with one_line(f'{package} is not installed. Run: pip install'):
        run(data, tmp_path, **{key: True})


def test_a_curve_that_cannot_be_drawn_does_not_end_the_run(data, tmp_path, capsys):
    os.makedirs(tmp_path / 'loss.png')
    assert run(data, tmp_path, **SMALL).step == 8
    assert 'loss.png could not be drawn' in capsys.readouterr().out
