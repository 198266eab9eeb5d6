"""Nothing is lost: stops at any point, kills between any two files, full disks, several processes and machines."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from core import checkpoint
from core import runlog
from core import tokenfile
from core import tokenizer
import train
from core.claim import claimed
from configurator import UserError
from conftest import ROOT
from core.conversation import Turn, encode
from test_train import assert_same_bits, data, flags, log_of, run  # noqa: F401  (data is a fixture)

SMALL = dict(max_iters=12, lr_decay_iters=12, eval_interval=3)  # 27 rows in steps of 4: the first epoch ends in step 7


class Killed(BaseException):
    """Stands for a kill where a real one would take a process of its own."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(runlog, 'plot', lambda out_dir: None)


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run of SMALL."""
    folder = tmp_path_factory.mktemp('whole') / 'out'
    run(data, folder, **SMALL)
    return folder


def resume(out_dir, **changes):
    train.main(['--init_from=resume', f'--out_dir={out_dir}', *(f'--{key}={value}' for key, value in changes.items())])
    return checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))


def assert_same_run(whole, other):
    for name in ('ckpt.pt', 'best.pt'):
        one, two = ({**checkpoint.load(os.path.join(folder, name)), 'config': None} for folder in (whole, other))
        assert_same_bits(one, two)
    assert log_of(whole) == log_of(other)


def start(*argv, **options):
    """train.py as a process, its two outputs in one."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *argv], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, **{'env': {**os.environ, 'OMP_NUM_THREADS': '1'}, **options})


# ---- stopped and resumed ----

def test_stopped_after_every_single_step_it_ends_with_the_same_bits(data, whole, tmp_path, monkeypatch):
    step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, 'train_step', lambda self, _: step(self, SimpleNamespace(asked=True)))
    run(data, tmp_path, **SMALL)
    for n in range(1, 12):
        assert checkpoint.load(tmp_path / 'ckpt.pt')['step'] == n
        resume(tmp_path)
    resume(tmp_path)  # the last evaluation
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize('split, nth, step', [('train', 8, 4), ('val', 5, 6), ('val', 1, 0)])
def test_a_signal_in_the_middle(data, whole, tmp_path, monkeypatch, capfd, split, nth, step):
    """Between two micro-batches the step is finished; an evaluation is left, and done again on resuming."""
    make_batch, n = tokenfile.make_batch, 0

    def signalling(of, conversations):
        nonlocal n
        n += of.name == split
        if of.name == split and n == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(of, conversations)
    monkeypatch.setattr(tokenfile, 'make_batch', signalling)
    stopped = run(data, tmp_path, **SMALL)
    assert stopped['step'] == step and 'once more to stop at once' in capfd.readouterr().err
    assert [row['step'] for row in log_of(tmp_path) if row['val_loss']] == [str(s) for s in range(0, step, 3)]
    monkeypatch.undo()
    resume(tmp_path)
    assert_same_run(whole, tmp_path)


def broken_states(contents):
    """(what is named, the checkpoint with it) for states that do not fit the run."""
    state = contents['optimizer']['state']
    moment = next(iter(state))
    for named, changes in (('best', {'best': 'x'}), ('TypeError', {'interval': (1.0, None)}), ('TypeError', {'interval': 3}),
                           ('evaluated_at', {'evaluated_at': [1]}),
                           ('optimizer', {'optimizer': {'state': {**state, moment: {**state[moment], 'exp_avg': torch.zeros(3)}}}}),
                           ('optimizer', {'optimizer': {'state': {**state, moment: {'step': 3}}}}),
                           ('optimizer', {'optimizer': {'state': {k: v for k, v in state.items() if k != moment}}}),
                           ('Error', {'optimizer': 7}), ('scaler', {'scaler': 'x'})):
        yield named, {**contents, **changes}


def test_a_state_that_does_not_fit_is_refused_in_one_line(whole, tmp_path):
    contents, refused = checkpoint.load(whole / 'ckpt.pt'), []
    for named, broken in broken_states(contents):
        checkpoint.save(broken, tmp_path / 'ckpt.pt')
        with pytest.raises(UserError) as error:
            resume(tmp_path)
        assert named in str(error.value) and '\n' not in str(error.value), error.value
        refused.append(named)
    assert len(refused) == 9, refused


def test_settings_of_the_optimizer_come_from_the_configuration(data, whole, tmp_path):
    """Those in the file are not looked at: a stranger's could be anything."""
    contents = checkpoint.load(whole / 'ckpt.pt')
    for group in contents['optimizer']['param_groups']:
        group['betas'] = ('x', 'y')
    shutil.copytree(whole, tmp_path / 'out')
    checkpoint.save(contents, tmp_path / 'out' / 'ckpt.pt')
    assert resume(tmp_path / 'out', max_iters=13)['step'] == 13


def test_a_second_signal_stops_at_once(data, tmp_path):
    """In a step of minutes."""
    process = start(*flags(data, tmp_path, gradient_accumulation_steps=20_000, eval_interval=1000))
    for line in process.stdout:
        if '| val_loss' in line:
            break
    process.send_signal(signal.SIGTERM)
    assert 'stopping after this step' in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(120) == -signal.SIGTERM and 'Traceback' not in rest
    assert not checkpoint.files(str(tmp_path))


def test_the_line_that_resumes_can_be_run_as_it_stands(data, whole, tmp_path):
    """An out_dir with a space, quotes and umlauts, relative to another folder."""
    process = start(*flags(data, "größe 'x' [1]/$HOME", **{**SMALL, 'eval_interval': 100_000, 'max_iters': 100_000, 'log_interval': 1}),
                    cwd=tmp_path)
    for line in process.stdout:
        if '| loss' in line:
            process.send_signal(signal.SIGINT)
            break
    lines = process.stdout.read().splitlines()
    assert process.wait(120) == 0, lines
    line = next(line for line in lines if line.startswith('stopped after step'))
    command = line.partition('go on with: python train.py ')[2]
    done = subprocess.run(f'{sys.executable} {os.path.join(ROOT, "train.py")} {command} --max_iters=1', shell=True, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and 'finished' in done.stdout, done.stderr
    assert 'not bit for bit' not in done.stdout


# ---- killed ----

@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('nth', [2, 3, 8, 9])
def test_killed_around_any_renaming_nothing_is_lost(data, whole, tmp_path, monkeypatch, when, nth):
    """The first moves log.csv into place; then come best.pt and ckpt.pt of the first evaluation; 8 and 9 are the last's."""
    replace, n = os.replace, 0

    def killing(*paths):
        nonlocal n
        n += 1
        if when == 'before' and n == nth:
            raise Killed
        replace(*paths)
        if when == 'after' and n == nth:
            raise Killed
    monkeypatch.setattr(os, 'replace', killing)
    with pytest.raises(Killed):
        run(data, tmp_path, **SMALL)
    monkeypatch.setattr(os, 'replace', replace)
    if os.path.exists(tmp_path / 'ckpt.pt'):
        resume(tmp_path)
    else:
        run(data, tmp_path, overwrite=True, **SMALL)
    assert_same_run(whole, tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(('.tmp', '.lock'))]


@pytest.mark.parametrize('processes, kills', [(1, 6), (2, 4)])
def test_real_kills(processes, kills):
    """The short form of the proof: kills.py's 200 take minutes."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'reliability', 'kills.py'), f'--kills={kills}', '--steps=16',
                           f'--processes={processes}'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and 'lost steps, differing bits: 0' in done.stdout, done.stdout + done.stderr


def test_a_torn_row_of_the_log_is_dropped(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'out')
    with open(tmp_path / 'out' / 'log.csv', 'a') as file:
        file.write('1,0.1,2')
    resume(tmp_path / 'out')
    assert log_of(tmp_path / 'out') == log_of(whole)


def test_a_second_train_py_leaves_the_first_alone(data, tmp_path):
    code = ('import sys; from claim import claimed\n'
            'with claimed(sys.argv[1]):\n'
            '    open(sys.argv[1] + "/ckpt.pt.1.tmp", "w").close(); print("held", flush=True); sys.stdin.read()')
    first = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stdin=subprocess.PIPE)
    assert first.stdout.readline() == 'held\n'
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match='is being written to by another process'):
        run(data, tmp_path, **SMALL)
    assert sorted(os.listdir(tmp_path)) == before
    first.kill()
    first.wait()
    run(data, tmp_path, max_iters=0)
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')]


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(data, whole, tmp_path):
    """A real one: a file system in memory that holds one ckpt.pt and not two."""
    sizes = {name: os.path.getsize(whole / name) // 1024 for name in ('ckpt.pt', 'best.pt')}
    kilobytes = sizes['ckpt.pt'] + 2 * sizes['best.pt'] + 60
    disk, saved = tmp_path / 'disk', tmp_path / 'saved'
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={kilobytes}k none {disk}'
    if not shutil.which('unshare') or subprocess.run(['unshare', '--mount', 'sh', '-c', mount], capture_output=True).returncode:
        pytest.skip('mounting a small file system needs root')
    argv = ' '.join(flags(data, disk, **SMALL))
    done = subprocess.run(['unshare', '--mount', 'sh', '-c', f'{mount}; {sys.executable} {ROOT}/train.py {argv}; code=$?; '
                           f'cp -r {disk} {saved}; exit $code'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert 'could not save' in done.stderr and 'ckpt.pt' in done.stderr and 'No space left' in done.stderr, done.stderr
    assert checkpoint.load(saved / 'ckpt.pt')['step'] == 3
    assert not [name for name in os.listdir(saved) if name.endswith('.tmp')]
    resume(saved)
    assert_same_run(whole, saved)


def test_a_log_that_cannot_be_written_is_a_line(data, tmp_path, monkeypatch):
    written = runlog._flush

    def full(file):
        if file.mode == 'a':
            raise OSError(28, 'No space left on device')
        written(file)
    monkeypatch.setattr(runlog, '_flush', full)
    with pytest.raises(UserError, match='could not write .*log.csv: No space left on device'):
        run(data, tmp_path, **SMALL)


@pytest.mark.parametrize('out_dir', ['/proc/out', 'file/out'])
def test_a_folder_that_cannot_be_written_to_is_a_line(data, tmp_path, monkeypatch, out_dir):
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f'cannot write to {out_dir}: .*--out_dir=FOLDER') as error:
        run(data, out_dir, **SMALL)
    assert '\n' not in str(error.value)


# ---- older checkpoints ----

def test_keep_holds_the_last_older_ones(data, whole, tmp_path):
    run(data, tmp_path, keep=2, **SMALL)
    kept = {name: checkpoint.load(tmp_path / name)['step'] for name in os.listdir(tmp_path) if name.endswith('.pt')}
    assert kept == {'ckpt.pt': 12, 'ckpt-000009.pt': 9, 'ckpt-000006.pt': 6, 'best.pt': 12}
    assert_same_run(whole, tmp_path)
    shutil.copy(tmp_path / 'ckpt-000006.pt', tmp_path / 'ckpt.pt')  # back to an older one
    resume(tmp_path, keep=1)
    assert_same_run(whole, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt-000009.pt', 'ckpt.pt', 'config.json', 'log.csv']


def test_keep_counts_steps_and_not_letters(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    (tmp_path / 'ckpt-final.pt').touch()  # somebody's own
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        (tmp_path / 'ckpt.pt').touch()
        checkpoint.keep_older(path, step, 2)
    assert sorted(os.listdir(tmp_path)) == ['ckpt-1000000.pt', 'ckpt-1000001.pt', 'ckpt-final.pt', 'ckpt.pt']


def test_overwriting_removes_the_run_before_at_once(data, whole, tmp_path, monkeypatch):
    """Or a kill before the first checkpoint would leave the log of this run beside the weights of that one."""
    shutil.copytree(whole, tmp_path / 'out')
    (tmp_path / 'out' / 'ckpt-000007.pt').touch()
    def killed(*_):
        raise Killed
    monkeypatch.setattr(train, 'loop', killed)
    with pytest.raises(UserError, match='ckpt.pt is there already'):
        run(data, tmp_path / 'out', **SMALL)
    with pytest.raises(UserError, match='cannot be replaced by a run that begins with it'):
        run(data, tmp_path / 'out', init_from=tmp_path / 'out', overwrite=True, **SMALL)
    assert_same_run(whole, tmp_path / 'out')
    with pytest.raises(Killed):
        run(data, tmp_path / 'out', overwrite=True, **SMALL)
    assert checkpoint.files(str(tmp_path / 'out')) == []


# ---- what may change, and what may not ----

@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / 'copy')


@pytest.mark.parametrize('changes, said', [
    (dict(n_layer=3), 'n_layer was 2 and cannot become 3'), (dict(n_embd=64), 'n_embd was 32'), (dict(bias=False), 'bias was True'),
    (dict(weight_decay=0.0), 'weight_decay was 0.1'), (dict(beta2=0.99), 'beta2 was 0.95'), (dict(seed=1), 'seed was 1337'),
    (dict(dropout=0.0), 'dropout was 0.1'), (dict(dataset='other'), 'is not the data that'),
    (dict(dataset='alien'), 'the vocabulary'), (dict(block_size=128), 'block_size was 64')])
def test_what_would_be_another_run_is_refused(data, copy, changes, said):
    for name, vocabulary in (('other', 300), ('alien', 290)):
        folder = os.path.join(data, name)
        if changes.get('dataset') == name and not os.path.exists(folder):
            os.mkdir(folder)
            tokenizer.learn(['red green blue one two three sun moon star what is the of and a river mountain sea'] * 20
                            if name == 'alien' else [' '.join(['of the and'] * 9)], vocabulary, os.path.join(folder, 'tokenizer.json'))
            bpe = tokenizer.load(os.path.join(folder if name == 'alien' else os.path.join(data, 'colours'), 'tokenizer.json'))
            with tokenfile.Writer(folder, ('train', 'val')) as writer:
                for split in ('train', 'val'):
                    ids, mask, _ = encode([Turn('user', 'red'), Turn('assistant', 'green')], bpe)
                    writer.add(split, ids, mask, [len(ids)])
                writer.finish({'template': 'xml', 'tokenizer': bpe.state()})
    before = {name: (copy / name).read_bytes() for name in os.listdir(copy)}
    with pytest.raises(UserError, match=said) as error:
        resume(copy, max_iters=13, **changes)
    assert '\n' not in str(error.value)
    assert {name: (copy / name).read_bytes() for name in os.listdir(copy)} == before


def test_what_may_change_does_so_in_silence(data, copy, capsys):
    assert resume(copy, max_iters=14, eval_interval=2, log_interval=1, patience=9, eval_iters=1, keep=1)['step'] == 14
    assert 'not bit for bit' not in capsys.readouterr().out


@pytest.mark.parametrize('changes, said', [
    (dict(learning_rate=1e-3), 'learning_rate was 0.01, is 0.001'), (dict(min_lr=1e-3), 'min_lr was 0.0, is 0.001'),
    (dict(grad_clip=0.5), 'grad_clip was 1.0, is 0.5'),
    (dict(lr_decay_iters=0), 'lr_decay_iters was 12, is 13'), (dict(dtype='bfloat16'), 'dtype was float32, is bfloat16')])
def test_what_ends_the_promise_is_announced(copy, capsys, changes, said):
    assert resume(copy, max_iters=13, **changes)['step'] == 13
    assert f'not bit for bit the run that was saved: {said}\n' in capsys.readouterr().out


def test_another_number_of_epochs_may_follow(data, tmp_path):
    assert run(data, tmp_path, **{**SMALL, 'max_iters': 1000}, epochs=0.5)['step'] == 4  # 14 of 27 rows in steps of 4
    assert resume(tmp_path, epochs=1.0)['step'] == 7


@pytest.mark.parametrize('spoil, said', [
    (lambda c: c.update(format_version=0), 'format 0, older than this code'),
    (lambda c: c.update(format_version=2), 'format 2, newer than this code'),
    (lambda c: c.pop('optimizer'), 'holds no optimizer')])
def test_a_checkpoint_that_cannot_be_gone_on_from(copy, spoil, said):
    contents = checkpoint.load(copy / 'ckpt.pt')
    spoil(contents)
    checkpoint.save(contents, str(copy / 'ckpt.pt'))
    with pytest.raises(UserError, match=said) as error:
        resume(copy, max_iters=13)
    assert '\n' not in str(error.value)


def test_a_checkpoint_of_the_first_version_is_read(data, whole, tmp_path):
    """It has no `conditions`, and its config none of the keys that came later."""
    stopped = run(data, tmp_path, **{**SMALL, 'max_iters': 7})
    for key in ('keep', 'timeout_s'):
        del stopped['config'][key]
    checkpoint.save({key: value for key, value in stopped.items() if key != 'conditions'}, str(tmp_path / 'ckpt.pt'))
    assert resume(tmp_path, max_iters=12)['step'] == 12


# ---- many processes, many machines ----

def test_two_nodes_go_on_after_the_death_of_a_worker(data, tmp_path):
    """The README's command for two machines, twice on this one; killed once, torchrun starts both again."""
    keys = dict(max_iters=60, lr_decay_iters=60, eval_interval=5, log_interval=1, dropout=0.0, batch_size=1)
    run(data, tmp_path / 'one', **keys)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    nodes = [subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max_restarts=3',
                               '--rdzv_backend=c10d', '--rdzv_id=7', f'--rdzv_endpoint=127.0.0.1:{port}',
                               os.path.join(ROOT, 'train.py'), *flags(data, tmp_path / 'two', **keys)],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}) for _ in range(2)]
    while not os.path.exists(tmp_path / 'two' / 'ckpt.pt') and not any(node.poll() for node in nodes):
        time.sleep(0.005)
    writer = int((tmp_path / 'two' / '.lock').read_text().split()[0])
    os.kill(writer, signal.SIGKILL)
    said = ''.join(node.communicate()[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert said.count('ckpt.pt (step ') >= 1, said  # it went on; a second time where torchrun brought the two together twice
    one, two = (checkpoint.load(tmp_path / name / 'ckpt.pt') for name in ('one', 'two'))
    assert two['step'] == 60 and two['conditions']['processes'] == 2
    for a, b in zip(log_of(tmp_path / 'one'), log_of(tmp_path / 'two'), strict=True):
        for column in ('loss', 'val_loss'):
            assert a[column] == b[column] == '' or abs(float(a[column]) - float(b[column])) < 1e-3, (a, b)
