"""configurator.py: which values count, which source wins, and that mistakes are named."""
import dataclasses
import glob
import inspect
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

import configurator as c
import train
from configurator import REPOSITORY, UserError


@dataclass(frozen=True)
class Keys:
    # sizes
    batch_size: c.Count = 4       # rows in a micro-batch
    n_head: c.Count = 12          # attention heads
    n_embd: int = 768             # width
    learning_rate: float = 3e-5   # the highest
    # names
    out_dir: str = 'out'          # where to
    user: str = ''                # a question
    loss_on: Literal['', 'all'] = ''  # which tokens
    compile: bool = False         # whether to compile

    def problems(self):
        if self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}.'


def load(*argv, **options):
    return c.load(Keys, argv, **options)


def mistakes(*argv, **options):
    """The lines of the error that these arguments cause."""
    with pytest.raises(UserError) as caught:
        load(*argv, **options)
    return str(caught.value).split('\n')


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """config_file(text): the name of a config file with this text in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text, name='run.py'):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name
    return write


# ---- which source wins, and what a value is ----

def test_later_wins(config_file):
    a = config_file('batch_size = 8\nout_dir = "a"\n', 'a.py')
    b = config_file('out_dir = "b"\n', 'b.py')
    assert load() == Keys()
    assert load(a, b) == Keys(batch_size=8, out_dir='b')
    assert load(b, a).out_dir == 'a'
    assert load(a, '--batch_size=2', '--batch_size=3').batch_size == 3
    assert load('--batch_size=2', a).batch_size == 8
    saved = {'batch_size': 1, 'n_head': 6, 'a key of an older version': 5}
    config = load(a, defaults=saved)
    assert config == Keys(batch_size=8, n_head=6, out_dir='a')
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 3


CODE = "__import__('os').system('touch hacked')"


@pytest.mark.parametrize('flag, value', [
    ('--batch_size=0x10', 16), ('--batch_size= 5 * 8', 40), ('--n_embd=(7 // 2 + 1) * 6', 24),
    ('--n_embd=-12', -12), ('--learning_rate=6e-4', 6e-4), ('--learning_rate=1', 1.0),
    ('--learning_rate=1 / 4 - 1', -0.75), ('--compile', True), ('--compile=True', True),
    ('--compile=false', False), ('--loss_on=all', 'all'), ('--loss_on=', ''),
    # A text key takes the text as it is.
    ('--out_dir=', ''), ('--user=a=b=c', 'a=b=c'), ('--user=1+1', '1+1'), ('--user=None', 'None'),
    ('--user="quoted"', '"quoted"'), ("--user=What's\n", "What's\n"), (f'--user={CODE}', CODE),
    ('--user=' + '(' * 10_000, '(' * 10_000), ('--user=batch_size', 'batch_size')])
def test_a_flag_is_a_literal_or_arithmetic_or_text(flag, value):
    found = getattr(load(flag), flag[2:].partition('=')[0])
    assert found == value and type(found) is type(value)


def test_a_config_file_is_read(config_file):
    name = config_file(
        '\ufeff"""What it is for."""\nimport time\nn_head = 8  # eight\nn_embd = (\n    8 * 64)\n'
        'learning_rate = 2\nout_dir = "out/" + "é"\ncompile = True\nuser = """two\nlines"""\n')
    config = load(name)
    assert config == Keys(n_head=8, n_embd=512, learning_rate=2.0, out_dir='out/é', compile=True,
                          user='two\nlines')
    assert type(config.learning_rate) is float


# ---- mistakes ----

@pytest.mark.parametrize('kind, wrong, allowed, said', [
    (c.Count, 0, 1, 'at least 1'), (c.Natural, -1, 0, 'at least 0'),
    (c.Seed, 2 ** 32, 2 ** 32 - 1, 'at least 0, at most 4,294,967,295'),
    (c.Positive, 0.0, 1e-8, 'at least 1e-09'), (c.NonNegative, -0.1, 0.0, 'at least 0'),
    (c.Fraction, 1.0, 0.999, 'at least 0, below 1'), (c.Share, 1.1, 1.0, 'at least 0, at most 1'),
    (Annotated[int, c.Range(2, 4)], 1, 2, 'at least 2, at most 4'),
    (Literal['', 'all'], 'al', 'all', "one of '', all")])
def test_a_value_beyond_the_bounds_of_its_type_is_refused(kind, wrong, allowed, said):
    assert c.accept(allowed, kind) == allowed
    with pytest.raises(ValueError, match=f'found {wrong!r}, expected {said}$'):
        c.accept(wrong, kind)


def test_where_a_wrong_value_is_from_is_named(config_file):
    said = ': found 0, expected at least 1'
    assert mistakes('--batch_size=0') == [f'batch_size on the command line{said}']
    name = config_file('\nbatch_size = 0')
    assert mistakes(name) == [f'batch_size in run.py line 2{said}']
    assert mistakes(defaults={'batch_size': 0}) == [f'batch_size in the saved configuration{said}']
    for value in (None, '8', 8.0, [8], {}):  # a checkpoint's may be a stranger's
        assert WHOLE in mistakes(defaults={'batch_size': value})[0]


WHOLE = 'expected a whole number'
LITERAL = 'arithmetic on literals'


@pytest.mark.parametrize('flag, found', [
    ('--batch_size=2.0', f"found '2.0', {WHOLE}"), ('--batch_size=True', WHOLE),
    ('--batch_size=two words', WHOLE), ('--batch_size=', WHOLE), ('--batch_size="4"', WHOLE),
    ('--batch_size=abc', LITERAL), ('--batch_size=None', LITERAL), ('--batch_size=[4]', LITERAL),
    ('--batch_size=9**9**9', LITERAL), ('--batch_size="a" * 10**9', LITERAL),
    ('--batch_size=' + '9' * 5000, WHOLE), ('--batch_size=' + '(' * 10_000, 'batch_size'),
    ('--batch_size=' + '-' * 10_000 + '1', 'batch_size'), ('--batch_size=\udcff\0', 'batch_size'),
    ('--batch_size=1//0', 'by zero'), ('--compile=1', 'expected True or False'),
    ('--learning_rate=True', 'expected a number'), ('--learning_rate=fast', LITERAL),
    ('--learning_rate=' + '9' * 400, 'too large'), ('--learning_rate=1e400', 'expected a number'),
    ('--learning_rate=1e400-1e400', 'expected a number'), ('--user=nul\0', 'expected text'),
    ('--batch_size', 'needs a value: --batch_size=VALUE'), ('--xyz', '--help lists them all'),
    ('--batch_sise=4', "unknown key 'batch_sise' on the command line. Did you mean 'batch_size'?"),
    ('--batch-size=4', "Did you mean 'batch_size'?"), ('-batch_size=4', 'written --key=value'),
    ('config/none.py', 'config file config/none.py not found')])
def test_a_wrong_flag_is_named(flag, found):
    started = time.perf_counter()
    line, = mistakes(flag)
    assert found in line and len(line) < 300
    assert time.perf_counter() - started < 5  # 9**9**9 would take for ever


NO_LINE = 'expected key = value. A config file is read, never executed.'
FORM = 'Expected lines of the form key = value.'


@pytest.mark.parametrize('text, found', [
    ('import os', f"run.py line 1: found 'import os', {NO_LINE}"), ('import time, os', NO_LINE),
    ('from time import *', NO_LINE), ('batch_size: int = 4', NO_LINE), ('c.x = 1', NO_LINE),
    ('batch_size = n_head = 4', NO_LINE), ('batch_size, n_head = 1, 2', NO_LINE),
    ('\n\nbatch_sise = 4', "unknown key 'batch_sise' in run.py line 3. Did you mean 'batch_size'?"),
    ('batch_size = "4"', f"batch_size in run.py line 1: found '4', {WHOLE}"),
    ('out_dir = 5', 'expected text'), ('out_dir = word', "found 'word', expected a literal"),
    ('user = "a" + 1', LITERAL), ('user = f"{out_dir}"', LITERAL),
    ('user = str(time.time)', LITERAL),
    ('batch_size = = 4', f'run.py line 1: SyntaxError. {FORM}'), ('batch_size = 4\0', FORM),
    ('batch_size = ' + '(' * 10_000, FORM), (b'out_dir = "\xff"', 'UnicodeDecodeError')])
def test_a_wrong_line_of_a_file_is_named(config_file, text, found):
    line, = mistakes(config_file(text))
    assert found in line and len(line) < 300


@pytest.mark.parametrize('n', [300, 1500, 2500, 5000, 50_000])
def test_arithmetic_without_end_is_no_traceback(config_file, n):
    """Python's parser, its syntax tree and our walk over it give up at different depths."""
    terms = '1+' * (n - 1) + '1'
    for argument in (f'--batch_size={terms}', config_file(f'batch_size = {terms}', 'a.py')):
        try:
            assert load(argument).batch_size == n == 300
        except UserError as error:
            assert len(str(error)) < 300 and n > 300
    assert len(mistakes(config_file(f'print({terms})', 'b.py'))[0]) < 300


def test_all_mistakes_are_reported_together(config_file):
    name = config_file('n_haed = 4\nlearning_rate = "fast"\nbatch_size = 3\n')
    lines = mistakes(name, '--max_iter=3', '--compile=maybe', '--batch_size', '--n_head=5')
    found = [re.search('n_haed|learning_rate|max_iter|compile|batch', line)[0] for line in lines]
    assert found == ['n_haed', 'learning_rate', 'max_iter', 'compile', 'batch']


def test_combinations_are_checked_once_all_values_are_read():
    assert mistakes('--n_head=5') == ['n_embd=768 is not a multiple of n_head=5.']
    assert load('--n_head=5', check=False).n_head == 5
    line, = mistakes('--n_head=5', '--n_embd=wide')
    assert line.startswith('n_embd on the command line')


@pytest.mark.parametrize('code', [
    CODE, "open('hacked', 'w')", "exec('import os')", "[open('hacked', 'w') for _ in 'x']",
    "(lambda: open('hacked', 'w'))()", 'f\'{open("hacked", "w")}\'', "str(open('hacked', 'w'))"])
def test_nothing_is_executed(config_file, code):
    for argument in (config_file(code, 'a.py'), config_file(f'batch_size = {code}', 'b.py'),
                     config_file(f'out_dir = {code}', 'c.py'), f'--learning_rate={code}'):
        line, = mistakes(argument)
        assert 'never executed' in line or LITERAL in line
    assert sorted(os.listdir()) == ['a.py', 'b.py', 'c.py']


# ---- help and the scripts ----

def test_help_lists_every_key_with_default_meaning_and_bounds(capsys):
    with pytest.raises(SystemExit) as caught:
        load('--help')
    text = capsys.readouterr().out
    assert caught.value.code == 0 and __doc__ in text
    for line in (r'--batch_size=4 .* rows in a micro-batch \(at least 1\)', '\n  sizes\n',
                 "--user='' .* a question", '--learning_rate=3e-05 .* the highest',
                 r"which tokens \(one of '', all\)", '--compile=False .* whether to compile'):
        assert re.search(line, text), line


def find_scripts():
    """The paths of all scripts that have keys."""
    found = []
    for path in sorted(glob.glob('**/*.py', root_dir=REPOSITORY, recursive=True)):
        with open(os.path.join(REPOSITORY, path), encoding='utf-8') as file:
            if '\n    configurator.run(main)' in file.read():
                found.append(path)
    return found


@pytest.mark.parametrize('path', find_scripts())
def test_the_help_of_a_script_explains_every_key(path, load_script, capsys):
    """Each script's --help: exit code 0, its docstring, a line for every key with its default."""
    module = load_script(path)
    with pytest.raises(SystemExit) as caught:
        module.main(['--help'])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and inspect.getdoc(module) in text
    for field in dataclasses.fields(module.Config):
        assert re.search(rf'^  --{field.name}=\S* .*\w', text, re.MULTILINE), field.name


def test_a_mistake_of_a_script_is_a_line_each_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ['train.py', '--max_iter=3', '--n_embd=abc', '--dropout=2', f'--seed={CODE}']
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as caught:
        c.run(train.main)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ''
    starts = [line.split()[0] for line in printed.err.splitlines()]
    assert starts == ['unknown', 'n_embd', 'dropout', 'seed']
    assert os.listdir() == []


def test_a_reader_that_has_seen_enough_ends_a_script_in_silence():
    code = 'import configurator as c; c.run(lambda argv: [print("x" * 9999) for _ in range(99)])'
    done = subprocess.run(f"{sys.executable} -c '{code}' | head -c 1", shell=True, cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('x', '')


NANOGPT = {  # the keys and values of github.com/karpathy/nanoGPT, config/
    'train_gpt2.py': '''
        wandb_log = True; wandb_project = 'owt'; wandb_run_name = 'gpt2-124M'
        batch_size = 12; block_size = 1024; gradient_accumulation_steps = 5 * 8
        max_iters = 600000; lr_decay_iters = 600000
        eval_interval = 1000; eval_iters = 200; log_interval = 10; weight_decay = 1e-1''',
    'train_shakespeare_char.py': '''
        out_dir = 'out-shakespeare-char'; eval_interval = 250; eval_iters = 200; log_interval = 10
        always_save_checkpoint = False; wandb_log = False; wandb_project = 'shakespeare-char'
        wandb_run_name = 'mini-gpt'; dataset = 'shakespeare_char'; gradient_accumulation_steps = 1
        batch_size = 64; block_size = 256; n_layer = 6; n_head = 6; n_embd = 384; dropout = 0.2
        learning_rate = 1e-3; max_iters = 5000; lr_decay_iters = 5000; min_lr = 1e-4; beta2 = 0.99
        warmup_iters = 100''',
    'finetune_shakespeare.py': '''
        import time
        out_dir = 'out-shakespeare'; eval_interval = 5; eval_iters = 40; wandb_log = False
        wandb_project = 'shakespeare'; wandb_run_name = 'ft-' + str(time.time())
        dataset = 'shakespeare'; init_from = 'gpt2-xl'; always_save_checkpoint = False
        batch_size = 1; gradient_accumulation_steps = 32; max_iters = 20
        learning_rate = 3e-5; decay_lr = False''',
    'eval_gpt2.py': '''
        batch_size = 8; eval_iters = 500; eval_only = True; wandb_log = False
        init_from = 'gpt2\''''}


@pytest.mark.parametrize('name', NANOGPT)
def test_nanogpts_config_files_load_as_they_are(config_file, name):
    text = inspect.cleandoc(NANOGPT[name])
    config = c.load(train.Config, [config_file(text, name)])
    expected = {}
    exec(text, expected)  # here, of all places: the text is written above
    for key in re.findall(r'(\w+) = ', text):
        if key == 'wandb_run_name':  # the time may be missing at its end
            assert expected[key].startswith(config.wandb_run_name) and config.wandb_run_name
        else:
            assert getattr(config, key) == expected[key], key


@pytest.mark.parametrize('path', glob.glob(os.path.join(REPOSITORY, 'config', '*.py')),
                         ids=os.path.basename)
def test_every_config_file_loads_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = c.load(train.Config, [path])
    assert config == c.load(train.Config, ['config/' + os.path.basename(path)])
    assert config != train.Config()
