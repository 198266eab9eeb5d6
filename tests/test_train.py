"""Training: exact steps, exact resuming, several processes, the mistakes a person makes."""
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from core import checkpoint
import configurator
from core import tokenfile
from core import tokenizer
import train
from configurator import UserError
from core.conversation import Turn, encode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORDS = 'red green blue one two three sun moon star what is the of and a river mountain sea'.split()


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """data/colours: 61 conversations to learn and 8 to validate on, with a vocabulary of its own."""
    base = tmp_path_factory.mktemp('data')
    folder = base / 'colours'
    folder.mkdir()
    tokenizer.learn([' '.join(WORDS)] * 20, 300, str(folder / 'tokenizer.json'))
    bpe = tokenizer.load(str(folder / 'tokenizer.json'))
    with tokenfile.Writer(str(folder), ('train', 'val')) as writer:
        for i in range(69):
            words = [WORDS[(i * k + k) % len(WORDS)] for k in range(3, 6 + i % 9)]
            turns = [Turn('user', ' '.join(words)), Turn('assistant', ' '.join(reversed(words)))]
            ids, mask, _ = encode(turns, bpe)
            writer.add('val' if i % 8 == 7 else 'train', ids, mask, [len(ids)])
        writer.finish({'template': 'xml', 'tokenizer': bpe.state()})
    return str(base)


def flags(data, out_dir, **changes):
    """A tiny run from scratch in float32, so that one process can be compared with two."""
    keys = dict(init_from='scratch', dataset='colours', data_dir=data, out_dir=str(out_dir), block_size=64, n_layer=2,
                n_head=2, n_embd=32, batch_size=2, gradient_accumulation_steps=2, max_iters=10, warmup_iters=2,
                lr_decay_iters=10, eval_interval=5, log_interval=2, learning_rate=1e-2, device='cpu', dtype='float32',
                dropout=0.1)
    return [f'--{key}={value}' for key, value in {**keys, **changes}.items()]


def run(data, out_dir, **changes):
    """Train in this process; the last checkpoint."""
    train.main(flags(data, out_dir, **changes))
    return checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))


def script(*argv, torchrun=0, **kwargs):
    """Run train.py as a person would."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}'] if torchrun else []
    return subprocess.run([sys.executable, *launcher, os.path.join(ROOT, 'train.py'), *argv], capture_output=True,
                          text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=240, **kwargs)


def tensors_of(value, path=''):
    """{path: tensor or number} of everything in a checkpoint."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in tensors_of(value[key], f'{path}/{key}').items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in tensors_of(item, f'{path}/{i}').items()}
    return {path: value}


def assert_same_bits(one, two):
    one, two = ({k: v for k, v in tensors_of(c).items() if not k.startswith(('/config', '/seconds'))} for c in (one, two))
    assert one.keys() == two.keys()
    for key in one:
        same = torch.equal(one[key], two[key]) if torch.is_tensor(one[key]) else one[key] == two[key]
        assert same, (key, one[key], two[key])


def log_of(out_dir):
    """log.csv without its two columns of time."""
    with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
        return [{k: v for k, v in row.items() if k not in ('tokens_per_s', 'seconds')} for row in csv.DictReader(file)]


def test_the_loss_falls_from_ln_V_and_the_folder_holds_what_it_should(data, tmp_path):
    contents = run(data, tmp_path, max_iters=60, lr_decay_iters=60, eval_interval=20)
    rows = log_of(tmp_path)
    first, last = (float(rows[i]['val_loss']) for i in (0, -1))
    assert abs(first - math.log(307)) < 0.15 and last < 0.7 * first, (first, last)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt', 'config.json', 'log.csv', 'loss.png']
    assert contents['step'] == 60 and contents['template'] == 'xml'
    assert not [name for name in contents['model'] if not name.startswith('transformer.')]
    assert json.load(open(tmp_path / 'config.json'))['max_iters'] == 60
    assert 'optimizer' not in checkpoint.load(tmp_path / 'best.pt')
    assert [int(row['step']) for row in rows if row['val_loss']] == [0, 20, 40, 60]


def test_a_step_is_the_mean_over_all_its_supervised_tokens(data, tmp_path):
    """Two micro-batches equal one of both: averaging the means of micro-batches would not."""
    run(data, tmp_path / '1', batch_size=4, gradient_accumulation_steps=1, dropout=0.0, log_interval=1)
    run(data, tmp_path / '2', batch_size=1, gradient_accumulation_steps=4, dropout=0.0, log_interval=1)
    for a, b in zip(log_of(tmp_path / '1'), log_of(tmp_path / '2')):
        assert a['loss'] == b['loss'] == '' or abs(float(a['loss']) - float(b['loss'])) < 1e-4


@pytest.mark.parametrize('stop_at', [5, 7])
def test_a_stopped_run_resumed_ends_with_the_same_bits(data, tmp_path, stop_at, monkeypatch):
    """Stopped at an evaluation and between, mid-epoch, with dropout; 30 steps are several epochs."""
    keys = dict(max_iters=30, lr_decay_iters=30)
    whole = run(data, tmp_path / 'whole', **keys)
    step = train.Trainer.train_step

    def stopping(self, request):
        request.asked = self.step + 1 == stop_at
        step(self, request)
    monkeypatch.setattr(train.Trainer, 'train_step', stopping)
    stopped = run(data, tmp_path / 'parts', **keys)
    assert stopped['step'] == stop_at
    monkeypatch.undo()
    train.main(['--init_from=resume', f'--out_dir={tmp_path / "parts"}'])  # the run's own keys are the defaults
    assert_same_bits(whole, checkpoint.load(tmp_path / 'parts' / 'ckpt.pt'))
    assert log_of(tmp_path / 'whole') == log_of(tmp_path / 'parts')


def test_evaluation_moves_no_random_state(data, tmp_path):
    often, never = run(data, tmp_path / '1', eval_interval=1), run(data, tmp_path / '2', eval_interval=1000)
    for name in often['model']:
        assert torch.equal(often['model'][name], never['model'][name]), name


def test_two_processes_give_the_losses_of_one(data, tmp_path):
    """Under torchrun with gloo; three rows left for the last step, so one process has none."""
    keys = dict(dropout=0.0, batch_size=1, gradient_accumulation_steps=2, epochs=1.0, max_iters=1000, eval_interval=4, log_interval=1)
    one = run(data, tmp_path / '1', **keys)
    done = script(*flags(data, tmp_path / '2', **keys), torchrun=2)
    assert done.returncode == 0, done.stderr
    two = checkpoint.load(tmp_path / '2' / 'ckpt.pt')
    assert one['step'] == two['step']
    for a, b in zip(log_of(tmp_path / '1'), log_of(tmp_path / '2'), strict=True):
        for column in ('loss', 'val_loss'):
            assert a[column] == b[column] == '' or abs(float(a[column]) - float(b[column])) < 1e-4, (a, b)
    for name in one['model']:
        assert torch.allclose(one['model'][name], two['model'][name], atol=1e-4), name
    assert done.stdout.count('val_loss') == len([row for row in log_of(tmp_path / '2') if row['val_loss']])


def test_one_epoch_sees_every_conversation_once(data, tmp_path, monkeypatch):
    seen = []
    make_batch = tokenfile.make_batch

    def spy(split, conversations):
        if split.name == 'train':
            seen.extend(conversations)
        return make_batch(split, conversations)
    monkeypatch.setattr(tokenfile, 'make_batch', spy)
    assert run(data, tmp_path, epochs=1.0, batch_size=3, max_iters=1000)['step'] == 5  # 27 rows in steps of 6
    assert run(data, tmp_path / '2', epochs=1.0, batch_size=3, max_iters=2)['step'] == 2  # whichever ends first
    seen = seen[:len(set(seen))]
    assert sorted(seen) == list(range(len(tokenfile.Split([os.path.join(data, 'colours')], 'train'))))


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(data, tmp_path):
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *flags(data, tmp_path, max_iters=100_000,
                                log_interval=1, eval_interval=100_000)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step') and '| loss' in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 0 and '--init_from=resume' in rest.splitlines()[-2], rest
    assert checkpoint.load(tmp_path / 'ckpt.pt')['step'] > 0


def test_compiled_and_plain_training_give_the_same_losses(data, tmp_path):
    keys = dict(max_iters=3, lr_decay_iters=3, log_interval=1, eval_interval=100, dropout=0.0)
    run(data, tmp_path / '1', **keys)
    try:
        run(data, tmp_path / '2', compile=True, **keys)
    except Exception as error:
        if 'compiler' in str(error).lower():
            pytest.skip('torch.compile needs a C++ compiler')
        raise
    for a, b in zip(log_of(tmp_path / '1'), log_of(tmp_path / '2'), strict=True):
        assert a['loss'] == b['loss'] == '' or abs(float(a['loss']) - float(b['loss'])) < 1e-4


def test_early_stopping(data, tmp_path):
    contents = run(data, tmp_path, max_iters=50, eval_interval=1, patience=2, learning_rate=0.0, warmup_iters=0)
    assert contents['step'] == 2  # nothing changes, so nothing improves on the loss before the first step


def test_without_validation_data_it_trains_and_saves(data, tmp_path):
    folder = tmp_path / 'data' / 'colours'
    split = tokenfile.Split([os.path.join(data, 'colours')], 'train')
    os.makedirs(folder)
    with tokenfile.Writer(str(folder), ('train', 'val')) as writer:
        for ids, mask in (split[i] for i in range(20)):
            writer.add('train', ids, mask, [len(ids)])
        writer.finish({key: tokenfile.read_meta(os.path.join(data, 'colours'))[key] for key in ('template', 'tokenizer')})
    contents = run(str(tmp_path / 'data'), tmp_path / 'out', patience=1)
    assert contents['step'] == 10 and not os.path.exists(tmp_path / 'out' / 'best.pt')


def test_learning_rate_schedule():
    config = train.Config(learning_rate=1.0, warmup_iters=4, lr_decay_iters=14, min_lr=0.1)
    rates = [train.learning_rate(config, step) for step in range(20)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert abs(rates[9] - 0.55) < 1e-9 and rates[14:] == [0.1] * 6
    assert train.learning_rate(train.Config(decay_lr=False, learning_rate=2.0), 500) == 2.0


def test_a_pretrained_folder_gets_the_tags_and_trains(data, tmp_path):
    """A folder in transformers' form with the data set's own vocabulary, its tags not yet in it."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    n = 300
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=n + 1)
                                 ).save_pretrained(tmp_path / 'model')
    contents = run(data, tmp_path / 'out', init_from=str(tmp_path / 'model'))
    assert contents['model_args']['vocab_size'] == n + 7


def test_a_tuned_model_can_be_tuned_further(data, tmp_path):
    """init_from names the folder of a checkpoint: its weights, and none of its run."""
    first = run(data, tmp_path / '1')
    second = run(data, tmp_path / '2', init_from=tmp_path / '1', max_iters=0)
    assert second['step'] == 0 and all(torch.equal(p, second['model'][name]) for name, p in first['model'].items())


MISTAKES = {
    'unknown dataset': (dict(dataset='nothing'), 'nothing/meta.json not found'),
    'block too long': (dict(init_from='MODEL', block_size=65), 'block_size=65 exceeds the 64 positions'),
    'no such model': (dict(init_from='gpt5'), 'neither a folder nor a model'),
    'wrong vocabulary': (dict(init_from='OTHER'), 'has 99 tokens, the vocabulary'),
    'nothing to resume': (dict(init_from='resume'), 'ckpt.pt not found'),
    'rows too short': (dict(block_size=4), 'nothing to learn from'),
    'no such device': (dict(device='cuda:7' if not torch.cuda.is_available() else 'mps'), 'is not on this machine'),
    'float16 on a CPU': (dict(dtype='float16'), 'needs a CUDA device'),
    'bad combination': (dict(n_embd=33), 'n_embd=33 is not a multiple of n_head=2'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_gets_one_line(data, tmp_path, name):
    changes, said = MISTAKES[name]
    if changes.get('init_from') in ('MODEL', 'OTHER'):
        transformers = pytest.importorskip('transformers')
        size = 301 if changes['init_from'] == 'MODEL' else 99
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=size)
                                     ).save_pretrained(tmp_path / 'model')
        changes = {**changes, 'init_from': str(tmp_path / 'model')}
    with pytest.raises(UserError) as error:
        run(data, tmp_path / 'out', **changes)
    assert said in str(error.value) and '\n' not in str(error.value)
    assert not os.path.exists(tmp_path / 'out')  # nothing half-written


def test_what_resuming_refuses(data, tmp_path):
    run(data, tmp_path, max_iters=2)
    with pytest.raises(UserError, match='ckpt.pt is there already'):
        run(data, tmp_path, max_iters=2)
    with pytest.raises(UserError, match="batch_size was 2 and cannot become 1"):
        run(data, tmp_path, init_from='resume', batch_size=1)
    assert run(data, tmp_path, max_iters=2, overwrite=True)['step'] == 2


def test_ids_that_the_vocabulary_has_not_are_a_line(data, tmp_path):
    shutil.copytree(data, tmp_path / 'data')
    for path in (tmp_path / 'data').glob('**/train.bin'):
        path.write_bytes(b'\xff' * path.stat().st_size)
    with pytest.raises(UserError, match='train.bin has the id 65535, the vocabulary only'):
        run(tmp_path / 'data', tmp_path / 'out')


def test_a_mistake_on_the_command_line_exits_2_without_a_traceback(tmp_path):
    done = script('--max_iter=5', '--lerning_rate=1', '--batch_size=none', cwd=tmp_path)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert len(done.stderr.strip().split('\n')) == 3 and "Did you mean 'max_iters'?" in done.stderr


def test_every_config_loads():
    folder = os.path.join(ROOT, 'config')
    for name in sorted(os.listdir(folder)):
        if name.endswith('.py'):
            configurator.load(train.Config, [os.path.join(folder, name)])
