"""What runlog.py draws, and sends to TensorBoard and Weights & Biases: the numbers of log.csv."""
import csv
import os
import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from configurator import UserError
from conftest import resume, run
from core import runlog
from core.trainer import Trainer

SMALL = {'max_iters': 8, 'lr_decay_iters': 8, 'eval_interval': 4}


def numbers_of(out_dir):
    """{column: [(step, number), …]} of log.csv."""
    found = {}
    with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
        for row in csv.DictReader(file):
            step = int(row.pop('step'))
            for name, text in row.items():
                if text:
                    found.setdefault(name, []).append((step, float(text)))
    return found


def test_tensorboard_has_the_numbers_of_log_csv(data, tmp_path, monkeypatch, no_pictures):
    """Each once, though the run was killed in step 8 and went on from the checkpoint of step 4."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    step = Trainer.train_step

    def killed(trainer, request):
        if trainer.state.step == 7:
            raise KeyboardInterrupt
        step(trainer, request)
    monkeypatch.setattr(Trainer, 'train_step', killed)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, **SMALL, tensorboard=True)
    monkeypatch.setattr(Trainer, 'train_step', step)
    resume(tmp_path)
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    expected = numbers_of(tmp_path)
    assert set(events.Tags()['scalars']) == set(expected)
    assert [step for step, _ in expected['loss']] == [2, 4, 6, 8]
    for name, pairs in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(number, rel=1e-6)) for step, number in pairs], name


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: .asked, the keys of each init; .sent, what was logged."""
    module = types.ModuleType('wandb')
    module.__spec__ = ModuleSpec('wandb', None)
    module.asked = []
    module.sent = []

    def log(numbers, step):
        for name, number in numbers.items():
            module.sent.append((step, name, number))

    def init(**keys):
        module.asked.append(keys)
        return types.SimpleNamespace(log=log)
    module.init = init
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return module


def test_wandb_gets_the_numbers_of_log_csv_and_nanogpts_keys(data, tmp_path, wandb, no_pictures):
    saved = run(data, tmp_path, **SMALL, wandb_log=True, wandb_project='owt', wandb_run_name='mine')
    expected = []
    for name, pairs in numbers_of(tmp_path).items():
        for step, number in pairs:
            expected.append((step, name, number))
    assert sorted(wandb.sent) == sorted(expected)
    keys, = wandb.asked
    assert (keys['project'], keys['name'], keys['dir']) == ('owt', 'mine', str(tmp_path))
    assert keys['config'] == saved.config and keys['resume'] == 'auto'


@pytest.mark.parametrize('key, package', [('tensorboard', 'tensorboard'), ('wandb_log', 'wandb')])
def test_a_package_that_is_not_installed_is_a_line(data, tmp_path, monkeypatch, key, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'^{package} is not installed. Run: pip install'):
        run(data, tmp_path, **{key: True})


def test_the_curve_is_drawn_again_from_log_csv(whole):
    os.remove(whole / 'loss.png')
    runlog.plot(whole)
    assert (whole / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_a_curve_that_cannot_be_drawn_does_not_end_the_run(data, tmp_path, capsys):
    os.makedirs(tmp_path / 'loss.png')
    assert run(data, tmp_path, **SMALL).step == 8
    assert 'loss.png could not be drawn' in capsys.readouterr().out


def test_a_folder_may_have_dollar_signs_in_its_name(data, tmp_path, capsys):
    folder = tmp_path / r'$\frac$'  # mathematics to matplotlib, with a mistake in it
    assert run(data, folder, max_iters=2).step == 2
    assert os.path.exists(folder / 'loss.png') and 'drawn' not in capsys.readouterr().out
