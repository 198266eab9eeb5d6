"""Each field of each file that the scripts open, replaced by each wrong kind of value.

Whatever the file says, a script works, or it ends with a UserError of one line.
"""
import copy
import csv
import itertools
import json
import math
import os
import shutil

import pytest
import torch

import evaluate
import export
import sample
import train
from configurator import UserError
from conftest import flags
from core import runlog
from core.trainer import Trainer
from model import GPT, GPTConfig

MISSING = object()
PLAIN = {
    'None': None, 'True': True, '-5': -5, '10**12': 10 ** 12, '1.5': 1.5, 'NaN': math.nan,
    'inf': math.inf, "''": '', 'x': 'x', 'two lines, NUL': 'a\nb\0', '[]': [], '{}': {},
    'nested list': [[1, ['x']], None], 'missing': MISSING}
NOT_A_TENSOR = {'tensor': torch.ones(2, 3), '0-dimensional': torch.tensor(1.5)}
# Nothing reads what is in these; all entries of the others are treated alike.
WITHOUT_ENTRIES = ('param_groups', 'counts', 'options')
ALIKE = ('conditions',)


def tensors(like):
    """{kind: a wrong tensor} where the tensor `like` should be."""
    shape = like.shape
    wrong = {
        '0-dimensional': torch.tensor(1.5), 'empty': torch.empty(0), 'shape': torch.ones(*shape, 2),
        'NaN in it': torch.full(shape, math.nan), 'inf in it': torch.full(shape, math.inf),
        'sparse': torch.ones(shape).to_sparse(), 'meta': torch.ones(shape, device='meta'),
        'view of one element': torch.tensor(1.0).expand(shape),
        'view of 40 GB': torch.tensor(1.0).expand(10_000_000_000)}
    for dtype in (torch.int64, torch.bool, torch.float16, torch.float64, torch.complex64):
        wrong[str(dtype)] = torch.ones(shape, dtype=dtype)
    return wrong


def walk(value, path=()):
    """Yield the path of each field. Of a list or a long table: of its first and last entries."""
    entries = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, (list, tuple)):
        entries = list(enumerate(value))
    alike = path and path[-1] in ALIKE or entries and isinstance(entries[0][0], int)
    if len(entries) > 2 and (alike or len(entries) > 100):
        entries = [entries[0], entries[-1]]
    for key, entry in entries:
        yield *path, key
        if key not in WITHOUT_ENTRIES:
            yield from walk(entry, (*path, key))


def replaced(contents, path, new):
    """A copy of the contents in which the field at the path is new."""
    changed = dict(contents) if isinstance(contents, dict) else list(contents)
    key, *rest = path
    if rest:
        changed[key] = replaced(contents[key], rest, new)
    elif new is MISSING:
        del changed[key]
    else:
        changed[key] = new
    return tuple(changed) if isinstance(contents, tuple) else changed


def spoilt(contents, others):
    """Yield (path, kind, contents with one field replaced). others: kinds beside the plain ones."""
    for path in walk(contents):
        field = contents
        for key in path:
            field = field[key]
        kinds = PLAIN | (tensors(field) if torch.is_tensor(field) else others)
        for kind, new in kinds.items():
            yield path, kind, replaced(contents, path, new)


# ---- the scripts ----

@pytest.fixture(scope='module')
def original(data, tmp_path_factory):
    """A folder with a run, out; its export, model; and its data, data/colours."""
    folder = tmp_path_factory.mktemp('original')
    shape = {'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'bias': False, 'max_iters': 2}
    shutil.copytree(data, folder / 'data')
    train.main(flags(folder / 'data', folder / 'out', **shape, eval_interval=2))
    export.main([f'--init_from={folder}/out', f'--out={folder}/model'])
    return folder


@pytest.fixture
def files(original, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(original, tmp_path / 'files')


@pytest.fixture(autouse=True)
def one_step(monkeypatch):
    """Runs stop after one step, however many they were asked for. Nothing waits for the disk."""
    step = Trainer.train_step

    def stopping(trainer, request):
        request.asked = True
        step(trainer, request)
    monkeypatch.setattr(Trainer, 'train_step', stopping)
    monkeypatch.setattr(runlog, 'plot', lambda out_dir: None)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)


def go_on(folder):
    train.main(['--init_from=resume', f'--out_dir={folder}'])


def tune(folder):
    train.main(flags(f'{folder.parent}/data', f'{folder.parent}/new', init_from=folder,
                     eval_iters=1, overwrite=True))


def talk(folder):
    sample.main([f'--init_from={folder}', '--user=Hi', '--max_new_tokens=2'])


def measure(folder):
    evaluate.main([f'--models={folder}', '--dataset=colours', f'--data_dir={folder.parent}/data',
                   f'--out_dir={folder.parent}/report', '--answers=1', '--max_new_tokens=2'])


def export_again(folder):
    export.main([f'--init_from={folder}', f'--out={folder.parent}/again', '--overwrite'])


class Tally:
    """Counts what was tried, and keeps what ended neither well nor in one line."""

    def __init__(self, *scripts):
        self.scripts = itertools.cycle(scripts)  # each wrong value meets the next one
        self.fields = set()
        self.kinds = set()
        self.n_tried = 0
        self.n_refused = 0
        self.failed = []

    def attempt(self, path, kind, folder):
        """Try a script on the folder, in which the field at the path is of the kind."""
        script = next(self.scripts)
        self.fields.add(path)
        self.kinds.add(kind)
        self.n_tried += 1
        try:
            script(folder)
        except UserError as error:
            self.n_refused += 1
            if '\n' in str(error):
                self.failed.append((path, kind, script.__name__, str(error)))
        except Exception as error:
            self.failed.append((path, kind, script.__name__, repr(error)))

    def check(self, n_fields, n_kinds):
        """No traceback, and not by trying too little or by refusing everything."""
        print(f'{len(self.fields)} fields, {len(self.kinds)} kinds: {self.n_tried} tried, '
              f'{self.n_refused} refused, {len(self.failed)} wrong')
        assert not self.failed, (len(self.failed), self.failed[:10])
        assert len(self.fields) >= n_fields and len(self.kinds) >= n_kinds
        assert 0.2 * self.n_tried < self.n_refused < self.n_tried


# ---- the files ----

@pytest.mark.parametrize('name, scripts, n_fields', [
    ('ckpt.pt', [go_on], 100), ('best.pt', [talk, measure, export_again, tune], 40)])
def test_a_checkpoint(files, monkeypatch, name, scripts, n_fields):
    contents = torch.load(files / 'out' / name, weights_only=True)
    if name == 'best.pt':
        os.remove(files / 'out' / 'ckpt.pt')
        contents['config'] = dict(list(contents['config'].items())[:2])  # ckpt.pt tries them all
    tally = Tally(*scripts)
    for path, kind, wrong in spoilt(contents, NOT_A_TENSOR):
        # As torch would load it: writing and reading files takes four times as long.
        monkeypatch.setattr(torch, 'load', lambda path, wrong=wrong, **_: copy.deepcopy(wrong))
        tally.attempt(path, kind, files / 'out')
    tally.check(n_fields, 25)


@pytest.mark.parametrize('name, n_fields', [('config.json', 15), ('tokenizer.json', 12)])
def test_a_model_folder(files, name, n_fields):
    contents = json.loads((files / 'model' / name).read_text())
    if name == 'tokenizer.json':  # what is read of it
        added = [{'id': token['id'], 'content': token['content']}
                 for token in contents['added_tokens']]
        model = {key: contents['model'][key] for key in ('vocab', 'merges')}
        contents = {'model': model, 'added_tokens': added}
    tally = Tally(talk, measure, export_again, tune)
    for path, kind, wrong in spoilt(contents, {}):
        (files / 'model' / name).write_text(json.dumps(wrong))
        tally.attempt(path, kind, files / 'model')
    tally.check(n_fields, 14)


def test_the_weights_of_a_model_folder(files):
    from safetensors.torch import load_file
    contents = load_file(files / 'model' / 'model.safetensors')
    os.remove(files / 'model' / 'model.safetensors')
    tally = Tally(talk, measure, export_again, tune)
    for path, kind, wrong in spoilt(contents, {}):
        torch.save(wrong, files / 'model' / 'pytorch_model.bin')
        tally.attempt(path, kind, files / 'model')
    tally.check(16, 28)


def test_prepared_data(files):
    contents = json.loads((files / 'data/colours/meta.json').read_text())
    tally = Tally(tune, measure)
    for path, kind, wrong in spoilt(contents, {}):
        (files / 'data/colours/meta.json').write_text(json.dumps(wrong))
        tally.attempt(path, kind, files / 'out')
    tally.check(20, 14)


def test_the_log_of_a_run(files):
    path = files / 'out' / 'log.csv'
    with open(path, newline='') as file:
        rows = list(csv.reader(file))
    tally = Tally(go_on)
    for row, column in itertools.product((0, len(rows) - 1), range(len(rows[0]))):
        for text in ('', 'x', '-5', '1.5', 'NaN', '1e999', '9' * 5000, '²', '\0', '"', 'é\n', ',,'):
            changed = copy.deepcopy(rows)
            changed[row][column] = text
            lines = [','.join(cells) for cells in changed]
            path.write_bytes('\r\n'.join(lines).encode('latin-1'))
            tally.attempt((row, column), text, files / 'out')
    for content in (b'', b'\0', b'\xff\xfea\0', b'a,b\n1,2\n', b'"' * 200_000, os.urandom(5000)):
        path.write_bytes(content)
        tally.attempt('whole', content[:5], files / 'out')
    tally.check(2 * 8, 12)


# ---- what would need more memory, or more time, than there is ----

def test_views_of_one_element_are_refused_before_they_are_copied(files):
    path = files / 'out' / 'ckpt.pt'
    os.remove(files / 'out' / 'best.pt')
    contents = torch.load(path, weights_only=True)
    wide = contents['model_args'] | {'n_layer': 1, 'n_embd': 60_000}
    with torch.device('meta'):
        shapes = GPT(GPTConfig(**wide)).state_dict()
    views = {name: torch.tensor(0.5).expand(p.shape) for name, p in shapes.items()}
    assert sum(p.nbytes for p in views.values()) > 170e9
    torch.save(contents | {'model_args': wide, 'model': views}, path)
    assert os.path.getsize(path) < 100_000
    for script in (go_on, talk, export_again):
        with pytest.raises(UserError, match='need more memory than their storages hold'):
            script(files / 'out')


def test_pipes_and_devices_are_refused_at_once(tmp_path, load_script):
    pipe = str(tmp_path / 'a\033pipe')
    os.mkfifo(pipe)
    for path in ('/dev/zero', pipe):
        for name in ('alpaca', 'oasst'):
            prepare = load_script(f'data/{name}/prepare.py')
            with pytest.raises(UserError, match='(zero|a[?]pipe) is a pipe or a device') as error:
                prepare.main([f'--input={path}', f'--out_dir={tmp_path}/mine'])
            assert '\n' not in str(error.value)
        with pytest.raises(UserError, match='config file .* not found'):
            train.main([path])


@pytest.mark.parametrize('flag', [
    '--seed=20251121164400', '--beta1=1.5', '--beta2=-1', '--device=cpu:x', '--device=cpu:7',
    '--out_dir=a\0', '--init_from=\0', '--epochs=1e308', '--max_iters=1000000000000'])
def test_a_flag_that_cannot_work_is_refused_before_anything_is_loaded(monkeypatch, flag):
    monkeypatch.setattr(train, 'train', lambda config, procs: pytest.fail('it began'))
    with pytest.raises(UserError) as error:
        train.main([flag])
    assert flag[2:].partition('=')[0] in str(error.value) and '\n' not in str(error.value)
