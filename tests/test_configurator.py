"""configurator.py: which values count, which source wins, and that mistakes are named."""
import glob
import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest

import configurator as c
import train
from configurator import REPOSITORY, UserError
from conftest import one_line

CODE = "__import__('os').system('touch hacked')"


@dataclass(frozen=True)
class Keys:
    batch_size: c.Count = 4
    n_head: c.Count = 12
    n_embd: int = 768
    learning_rate: c.NonNegative = 3e-5
    dropout: c.Fraction = 0.0
    out_dir: str = 'out'
    loss_on: Literal['', 'all'] = ''
    compile: bool = False

    def problems(self):
        if self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}.'


def load(*argv, **options):
    return c.load(Keys, argv, **options)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """config_file(text): the name of a config file with this text in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text, name='run.py'):
        (tmp_path / name).write_bytes(text.encode())
        return name
    return write


def test_later_wins(config_file):
    a = config_file('batch_size = 8\nout_dir = "a"\n', 'a.py')
    b = config_file('out_dir = "b"\n', 'b.py')
    assert load() == Keys()
    assert load(a, b) == Keys(batch_size=8, out_dir='b')
    assert load(b, a).out_dir == 'a'
    assert load(a, '--batch_size=2', '--batch_size=3').batch_size == 3
    assert load('--batch_size=2', a).batch_size == 8
    saved = {'batch_size': 1, 'n_head': 6, 'a key of an older version': 5}
    assert load(a, defaults=saved) == Keys(batch_size=8, n_head=6, out_dir='a')


@pytest.mark.parametrize('flag, value', [
    ('--batch_size=0x10', 16), ('--n_embd=(3 + 1) * -6', -24), ('--batch-size=2', 2),
    ('--learning_rate=6e-4', 6e-4), ('--learning_rate=1', 1.0), ('--dropout= 1 / 4 - 0.125', 0.125),
    ('--compile', True), ('--compile=true', True), ('--loss_on=all', 'all'), ('--loss_on=', ''),
    ('--out-dir=a=b=c', 'a=b=c'), ('--out_dir="1"+1', '"1"+1'), (f'--out_dir={CODE}', CODE)])
def test_a_flag_is_a_literal_or_arithmetic_or_text(flag, value):
    found = getattr(load(flag), flag[2:].partition('=')[0].replace('-', '_'))
    assert found == value and type(found) is type(value)


def test_config_files_of_ours_and_of_nanogpt_are_read(config_file):
    ours = config_file('\ufeff"""What it is for."""\nn_head = 8  # eight\nn_embd = (\n    8 * 64)\n'
                       'learning_rate = 2\nout_dir = "out/" + "é"\ncompile = True\n')
    assert load(ours) == Keys(
        n_head=8, n_embd=512, learning_rate=2.0, out_dir='out/é', compile=True)
    config = c.load(train.Config, [config_file(
        'import time\nwandb_log = False\nwandb_project = "x"\nalways_save_checkpoint = False\n'
        'wandb_run_name = "ft-" + str(time.time())\ngradient_accumulation_steps = 5 * 8\n'
        'decay_lr = False\neval_iters = 40\n')])
    assert config.wandb_run_name == 'ft-' and config.gradient_accumulation_steps == 40


INT = 'expected a value like 4'
LITERAL = 'arithmetic on literals'


@pytest.mark.parametrize('flag, found', [
    ('--batch_size=2.0', f'found 2.0, {INT}'), ('--batch_size', INT),
    ('--batch_size=two words', 'invalid syntax'), ('--batch_size=abc', LITERAL),
    ('--batch_size=9**9**9', LITERAL), ('--batch_size=1/0', 'by zero'),
    ('--compile=1', 'found 1, expected a value like False'),
    ('--batch_size=0', 'batch_size in --batch_size=0: found 0, expected 1 to inf'),
    ('--dropout=1', 'expected 0 to 0.9999'), ('--dropout=1e999 - 1e999', 'found nan'),
    ('--loss_on=al', "'al', expected one of all"), ('-batch_size=4', 'Expected --key=value'),
    ('--batch_sise=4', "unknown key 'batch_sise' in --batch_sise=4. Did you mean 'batch_size'?"),
    ('config/none.py', 'config/none.py cannot be read: [Errno 2] No such file')])
def test_a_wrong_flag_is_named(flag, found):
    with one_line(re.escape(found)):
        load(flag)


@pytest.mark.parametrize('text, found', [
    (CODE, 'in run.py, expected key = value'), ('batch_size: int = 4', 'expected key = value'),
    ('batch_size = n_head = 4', 'key = value'), ('c.x = 1', 'key = value'),
    ('batch_sise = 4', "unknown key 'batch_sise' in run.py. Did you mean 'batch_size'?"),
    ('batch_size = "4"', f"batch_size in run.py: found '4', {INT}"),
    ('out_dir = 5', "found 5, expected a value like 'out'"), ('out_dir = word', LITERAL),
    (f'out_dir = {CODE}', LITERAL), ('out_dir = f"{open(\'hacked\', \'w\')}"', LITERAL),
    ('n_head = (lambda: open("hacked", "w"))()', LITERAL),
    ('\nbatch_size = = 4', 'run.py cannot be read: invalid syntax (<unknown>, line 2)'),
    ('PK\0', 'run.py cannot be read')])
def test_a_wrong_line_of_a_file_is_named_and_nothing_is_executed(config_file, text, found):
    with one_line(re.escape(found)):
        load(config_file(text))
    assert os.listdir() == ['run.py']


def test_all_mistakes_are_reported_together_and_then_combinations_that_cannot_work(config_file):
    name = config_file('n_haed = 4\nlearning_rate = "fast"\nbatch_size = 3\n')
    with pytest.raises(UserError, match='.*n_haed.*\n.*rate.*\n.*max_iter.*\n.*batch_size.*$'):
        load(name, '--max_iter=3', '--batch_size', '--n_head=5')
    with one_line('n_embd=768 is not a multiple of n_head=5.'):
        load('--n_head=5')
    assert load('--n_head=5', check=False).n_head == 5


SCRIPTS = [path for path in glob.glob('**/*.py', root_dir=REPOSITORY, recursive=True)
           if '\n    configurator.run(main)' in pathlib.Path(REPOSITORY, path).read_text()]


@pytest.mark.parametrize('path', SCRIPTS)
def test_the_help_of_a_script_explains_every_key(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(os.path.join(REPOSITORY, os.path.dirname(path)))
    module = importlib.import_module(path[:-3].replace('/', '.'))
    with pytest.raises(SystemExit, match='^0$'):
        module.main(['--help'])
    text = capsys.readouterr().out
    assert inspect.getdoc(module) in text
    explained = re.findall(r'^    (\w+): .* = .*  # \S', text, re.MULTILINE)
    assert explained == [field.name for field in fields(module.Config)]


def test_a_mistake_of_a_script_is_a_line_each_and_exit_code_2(script):
    done = script('train.py', '--max_iter=3', '--n_embd=abc', '--dropout=2', f'--seed={CODE}')
    starts = [line.split()[0] for line in done.stderr.splitlines()]
    assert starts == ['unknown', 'n_embd', 'dropout', 'seed']
    assert done.returncode == 2 and done.stdout == ''


def test_a_reader_that_has_seen_enough_ends_a_script_in_silence():
    code = 'import configurator as c; c.run(lambda argv: [print("x" * 9999) for _ in range(99)])'
    done = subprocess.run(f"{sys.executable} -c '{code}' | head -c 1", shell=True, cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('x', '')


@pytest.mark.parametrize('path', glob.glob('config/*.py', root_dir=REPOSITORY))
def test_every_config_file_loads_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert c.load(train.Config, [path]) != train.Config()
