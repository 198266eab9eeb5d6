"""The numbers of log.csv go to TensorBoard and Weights & Biases too: the same, at the same steps, each once."""
import csv
import glob
import json
import os
import struct
import sys
import types

import pytest

import configurator
from core import runlog
import train
from configurator import UserError
from test_train import data, flags, run  # noqa: F401  (data is a fixture)

SMALL = dict(max_iters=8, lr_decay_iters=8, eval_interval=4)


@pytest.fixture(autouse=True)
def no_pictures_no_network(monkeypatch):
    monkeypatch.setattr(runlog, 'plot', lambda out_dir: None)
    monkeypatch.setenv('WANDB_MODE', 'offline')


def numbers_of(out_dir):
    """{column: [(step, number)]} of log.csv; epoch and seconds as the lines of training have them."""
    found = {}
    with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
        for row in csv.DictReader(file):
            for name in ('val_loss',) if row['val_loss'] else [name for name in row if name not in ('step', 'val_loss')]:
                found.setdefault(name, []).append((int(row['step']), float(row[name])))
    return found


def stopped_and_resumed(data, out_dir, monkeypatch, log):
    """A run stopped after step 5, whose log then goes further than its checkpoint, as a kill leaves it; resumed."""
    step = train.Trainer.train_step

    def stopping(self, request):
        request.asked = self.step + 1 == 5
        step(self, request)
    monkeypatch.setattr(train.Trainer, 'train_step', stopping)
    run(data, out_dir, **SMALL, log=log)
    with open(os.path.join(out_dir, 'log.csv'), 'a') as file:
        file.write('6,0.5,99.0,0.1,1.0,,1.0,1.0\n5,0.5,,,,98.0,,1.0\n')
    monkeypatch.setattr(train.Trainer, 'train_step', step)
    train.main(['--init_from=resume', f'--out_dir={out_dir}'])


def test_tensorboard_reads_the_numbers_of_log_csv(data, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    stopped_and_resumed(data, tmp_path, monkeypatch, 'tensorboard')
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()['scalars']}
    expected = numbers_of(tmp_path)
    assert found.keys() == expected.keys() and [step for step, _ in found['loss']] == [2, 4, 6, 8]
    for name in expected:  # it keeps float32
        assert found[name] == [(step, pytest.approx(number, rel=1e-6)) for step, number in expected[name]], name
    assert len(os.listdir(tmp_path / 'tensorboard')) == 1


def records(path):
    """The records of a .wandb file: LevelDB's log format behind seven bytes."""
    data, at, whole = open(path, 'rb').read(), 7, b''
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack('<IHB', data[at:at + 7])
        whole, at = whole + data[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b''


def test_wandb_keeps_the_numbers_of_log_csv_offline(data, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    from wandb.proto.wandb_internal_pb2 import Record
    stopped_and_resumed(data, tmp_path, monkeypatch, 'wandb')
    files, found = sorted(glob.glob(str(tmp_path / 'wandb' / 'offline-run-*' / '*.wandb')), key=os.path.getmtime), {}
    assert len({os.path.basename(path) for path in files}) == 1  # both parts are one run
    for record in map(Record.FromString, records(files[-1])):
        if record.WhichOneof('record_type') == 'history':
            for item in record.history.item:
                name = item.key or item.nested_key[0]
                if not name.startswith('_'):
                    found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    assert found == numbers_of(tmp_path)


def test_a_wandb_run_goes_on_behind_what_is_there(data, tmp_path, monkeypatch):
    """A stand-in for the service, which keeps what it is sent: it has seen steps up to 6, the checkpoint is of step 5."""
    kept, asked = {}, []

    class Run:
        id = 'the-run'

        def __init__(self, starting_step):
            self.starting_step = starting_step

        def log(self, numbers, step):
            assert step >= self.starting_step
            for name, number in numbers.items():
                assert (step, name) not in kept
                kept[step, name] = number

        def finish(self):
            asked.append('finished')

    def init(**keys):
        asked.append(keys)
        return Run(max((step for step, _ in kept), default=-1) + 1)
    module = types.ModuleType('wandb')
    module.init, module.__spec__ = init, types.SimpleNamespace(origin='here')
    monkeypatch.setitem(sys.modules, 'wandb', module)
    keys = dict(wandb_log=True, wandb_project='owt', wandb_run_name='gpt2', out_dir=str(tmp_path), max_iters=8)
    log = runlog.RunLog(train.Config(**keys), 0, None, silent=False)
    for step in (2, 4):
        log.training(step, 0.1, 1.5, 0.1, 1.0, 10.0, 1.0, 1.0)
    log.write(step=4, epoch='0.1', val_loss='2.5', seconds='1.0')
    log.finish()
    log = runlog.RunLog(train.Config(**keys), 4, 4, silent=False)
    log.training(6, 0.1, 1.5, 0.1, 1.0, 10.0, 1.0, 1.0)
    log.finish()
    assert {(step, number) for (step, name), number in kept.items() if name == 'loss'} == {(2, 1.5), (4, 1.5), (6, 1.5)}
    assert kept[4, 'val_loss'] == 2.5 and asked[1] == asked[3] == 'finished'
    assert [asked[0][key] for key in ('project', 'name', 'id', 'dir')] == ['owt', 'gpt2', None, str(tmp_path)]
    assert asked[2]['id'] == 'the-run' and asked[2]['resume'] == 'allow' and asked[2]['config']['max_iters'] == 8


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    monkeypatch.setitem(runlog.TRACKERS, 'wandb', lambda *_: pytest.fail('a tracker of another process'))
    log = runlog.RunLog(train.Config(log='wandb', out_dir=str(tmp_path)), 0, None, silent=True)
    log.training(2, 0.1, 1.5, 0.1, 1.0, 10.0, 1.0, 1.0)
    log.finish()
    assert not os.listdir(tmp_path)


def test_what_is_not_installed_or_unknown_is_a_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runlog.util, 'find_spec', lambda name: types.SimpleNamespace(origin=None))  # a folder of that name
    for keys, said in ((dict(log='tensorboard'), 'log=tensorboard needs a package that is not installed: pip install tensorboard'),
                       (dict(wandb_log=True), 'log=wandb needs a package'), (dict(log='csv'), "log='csv': expected tensorboard, wandb or both")):
        with pytest.raises(UserError, match=said) as error:
            train.main(flags(data, tmp_path / 'out', **keys))
        assert '\n' not in str(error.value) and not os.path.exists(tmp_path / 'out')


def test_a_service_that_does_not_start_is_a_line(tmp_path, monkeypatch):
    module = types.ModuleType('wandb')

    def init(**_):
        raise RuntimeError('No API key\nconfigured.')
    module.init, module.__spec__ = init, types.SimpleNamespace(origin='here')
    monkeypatch.setitem(sys.modules, 'wandb', module)
    config = configurator.load(train.Config, ['--log=wandb', f'--out_dir={tmp_path}'])
    with pytest.raises(UserError, match='log=wandb could not start: RuntimeError No API key configured. With WANDB_MODE=offline'):
        runlog.RunLog(config, 0, None, silent=False)
