"""What the tests share. They need no network; what a machine lacks is skipped with a reason."""
import csv
import dataclasses
import hashlib
import importlib.util
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), 'shared')  # real data beside the repository, if any
sys.path.insert(0, ROOT)
# The models here are tiny: a second thread gains nothing, and two of them wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
if os.path.isdir(os.path.join(SHARED, 'tiktoken')):
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(SHARED, 'tiktoken'))

from core import conversation, readback, tokenfile, tokenizer
from core.conversation import Turn

JAPAN = [Turn('user', 'What is the capital of Japan?'), Turn('assistant', 'Tokyo.')]
TEXTS = ['The capital of France is Paris, and that of Japan is Tokyo.',
         'What is the capital of Japan?',
         "It's one of 12 words; they're done.\n\n    print('hello')\n",
         'Grüße! Привет. こんにちは 🙂 <user>']
WORDS = ['red', 'green', 'blue', 'one', 'two', 'three', 'sun', 'moon', 'star', 'what', 'is', 'the',
         'of', 'and', 'a', 'river', 'mountain', 'sea']


class Payload:
    """Makes the folder `proof` when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (self.proof,)


# ---- vocabularies and data ----

@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's own vocabulary with the tags, if tiktoken has it in its cache."""
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or default
    name = hashlib.sha1(tokenizer.GPT2_MERGES.encode()).hexdigest()
    if not os.path.exists(os.path.join(cache, name)):
        pytest.skip(f"GPT-2's vocab.bpe is not in tiktoken's cache, {cache}")
    return tokenizer.load('gpt2')


@pytest.fixture(scope='session')
def learn(tmp_path_factory):
    """A function that learns a vocabulary from texts and returns the path of its tokenizer.json."""
    import tokenizers

    def run(texts, vocab_size, special=()):
        path = str(tmp_path_factory.mktemp('vocabulary') / 'tokenizer.json')
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=byte_level.alphabet(),
            special_tokens=list(special))
        bpe.train_from_iterator(texts, trainer)
        bpe.save(path)
        return path
    return run


@pytest.fixture(scope='session')
def vocabulary(learn):
    """The path of a small tokenizer.json, learned from a few texts."""
    return learn(TEXTS * 3, 320)


@pytest.fixture(scope='session')
def small(vocabulary):
    """The small vocabulary, with the tags."""
    return tokenizer.load(vocabulary)


@pytest.fixture(scope='session')
def real_trees():
    """The path of 100 real OpenAssistant trees."""
    path = pathlib.Path(SHARED, 'data', 'oasst', 'en_100_tree.jsonl')
    if not path.exists():
        pytest.skip(f'{path.name}, 100 real trees, is not in {path.parent}')
    return path


def write_data(folder, bpe, splits, template='xml'):
    """A prepared folder of {split: [conversations, lists of turns]}."""
    encoded = {}
    for split, conversations in splits.items():
        encoded[split] = [conversation.encode(turns, bpe, template)[:2] for turns in conversations]
    tokenfile.write(str(folder), encoded, {'template': template, 'tokenizer': bpe.state()})


def read_back(folder, name='train'):
    """The conversations of a split of a prepared folder, lists of turns."""
    meta = tokenfile.read_meta(str(folder))
    split = tokenfile.Split([str(folder)], name)
    bpe = tokenizer.from_state(meta['tokenizer'])
    return [readback.decode(*split[i], bpe, meta['template']) for i in range(len(split))]


@pytest.fixture(scope='session')
def data(tmp_path_factory, learn):
    """A folder of small data sets: colours, unvalidated, and alien with another vocabulary."""
    splits = {'train': [], 'val': []}  # 61 and 8 conversations
    for i in range(69):
        words = [WORDS[(i * k + k) % len(WORDS)] for k in range(3, 6 + i % 9)]
        turns = [Turn('user', ' '.join(words)), Turn('assistant', ' '.join(reversed(words)))]
        splits['val' if i % 8 == 7 else 'train'].append(turns)
    bpe = tokenizer.load(learn([' '.join(WORDS)] * 20, 300))
    another = tokenizer.load(learn([' '.join(WORDS)] * 20, 290))
    base = tmp_path_factory.mktemp('data')
    write_data(base / 'colours', bpe, splits)
    write_data(base / 'unvalidated', bpe, {'train': splits['train'][:20], 'val': []})
    write_data(base / 'alien', another, splits)
    return str(base)


# ---- models ----

VOCAB_SIZE = 211


def tiny(**changes):
    """A small random model, with biases and norms away from 0 and 1, so that each counts."""
    import torch

    from model import GPT, GPTConfig
    shape = {'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'block_size': 48, 'vocab_size': VOCAB_SIZE}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.transformer.wte.weight[model.config.vocab_size:] = 0
    return model.eval()


class Conversations:
    """A stand-in for tokenfile.Split: random conversations of these lengths."""

    def __init__(self, lengths, vocab_size=VOCAB_SIZE):
        rng = np.random.default_rng(0)
        self.lengths = np.array(lengths)
        self.found = []
        for n in lengths:
            ids = rng.integers(0, vocab_size, n).astype(np.uint16)
            mask = (rng.random(n) < 0.6).astype(np.uint8)
            mask[-1] = 1
            self.found.append((ids, mask))

    def __getitem__(self, i):
        return self.found[i]


@pytest.fixture(scope='session')
def save_model():
    """A function that saves a checkpoint of a tiny random model, and returns its folder.

    steps: how many to train it first, on the answer to what Japan's capital is.
    """
    import torch

    from core import checkpoint
    from model import GPT, GPTConfig

    def run(folder, bpe, template='xml', steps=0, **shape):
        torch.manual_seed(0)
        shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 64} | shape
        model = GPT(GPTConfig(vocab_size=bpe.vocab_size, **shape))
        if steps:  # torch imports a lot for it
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            ids, mask, _ = conversation.encode(JAPAN, bpe, template)
            ids = torch.tensor(ids.astype(int))
            learned = torch.tensor(mask[1:] == 1)
            logits = model(ids[None, :-1])[0]
            torch.nn.functional.cross_entropy(logits[learned], ids[1:][learned]).backward()
            optimizer.step()
            optimizer.zero_grad()
        os.makedirs(folder)
        saved = checkpoint.Checkpoint(
            model=model.state_dict(), model_args=dataclasses.asdict(model.config),
            template=template, tokenizer=bpe.state(), config={'max_iters': steps}, step=steps,
            val_loss=1.25)
        checkpoint.save(saved, os.path.join(folder, 'ckpt.pt'))
        return str(folder)
    return run


# ---- runs of train.py ----

# 27 rows in steps of 4: the first epoch ends in step 7.
SMALL = {'max_iters': 12, 'lr_decay_iters': 12, 'eval_interval': 3}


def flags(data, out_dir, **changes):
    """A tiny run from scratch in float32, so that one process can be compared with two."""
    keys = {
        'init_from': 'scratch', 'dataset': 'colours', 'data_dir': data, 'out_dir': out_dir,
        'block_size': 64, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'batch_size': 2,
        'gradient_accumulation_steps': 2, 'max_iters': 10, 'warmup_iters': 2, 'lr_decay_iters': 10,
        'eval_interval': 5, 'log_interval': 2, 'learning_rate': 1e-2, 'device': 'cpu',
        'dtype': 'float32', 'dropout': 0.1}
    return [f'--{key}={value}' for key, value in (keys | changes).items()]


def run(data, out_dir, **changes):
    """Train in this process; returns the last Checkpoint."""
    import train
    from core import checkpoint
    train.main(flags(data, out_dir, **changes))
    return checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))


def resume(out_dir, **changes):
    """Go on with the run in out_dir in this process; returns the last Checkpoint."""
    import train
    from core import checkpoint
    changed = [f'--{key}={value}' for key, value in changes.items()]
    train.main(['--init_from=resume', f'--out_dir={out_dir}', *changed])
    return checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))


@pytest.fixture
def stop_after(monkeypatch):
    """A function: all runs from now on stop after step n, as if by a signal; 0 lets them go on."""
    from core.trainer import Trainer
    step = Trainer.train_step

    def stop(n):
        def stopping(trainer, request):
            request.asked = trainer.state.step + 1 == n
            step(trainer, request)
        monkeypatch.setattr(Trainer, 'train_step', stopping)
    return stop


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no loss.png, which takes longer than they do."""
    from core import runlog
    monkeypatch.setattr(runlog, 'plot', lambda out_dir: False)


@pytest.fixture(scope='session')
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run of SMALL."""
    folder = tmp_path_factory.mktemp('whole') / 'out'
    run(data, folder, **SMALL)
    return folder


def log_of(out_dir):
    """log.csv without its two columns of time."""
    with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row['tokens_per_s'], row['seconds']
    return rows


def assert_same_bits(one, two, path=''):
    """Two nested values have equal keys, lengths, numbers and tensors."""
    import torch
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same_bits(one[key], two[key], f'{path}/{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i in range(len(one)):
            assert_same_bits(one[i], two[i], f'{path}/{i}')
    else:
        same = torch.equal(one, two) if torch.is_tensor(one) else one == two
        assert same, (path, one, two)


def assert_same_run(one, two):
    """Two folders hold the same run, bit for bit, but for its keys and the time it took."""
    from core import checkpoint
    for name in ('ckpt.pt', 'best.pt'):
        contents = []
        for folder in (one, two):
            saved = checkpoint.load(os.path.join(folder, name))
            contents.append(vars(saved) | {'config': None, 'seconds': None})
        assert_same_bits(*contents)
    assert log_of(one) == log_of(two)


def assert_near(one, two):
    """Two folders have log.csv with the same rows, and losses that differ by rounding only."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for column in ('step', 'loss', 'val_loss'):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), abs=1e-4), (a, b)


# ---- processes ----

@pytest.fixture
def script(tmp_path):
    """Run a script as a person would, from another folder: script('train.py', '--help')."""
    def run(name, *arguments, **options):
        command = [sys.executable, os.path.join(ROOT, name), *arguments]
        options = {'cwd': tmp_path, 'timeout': 60, 'capture_output': True, 'text': True} | options
        return subprocess.run(command, **options)
    return run


@pytest.fixture
def load_script(monkeypatch):
    """A function that executes a script of the repository anew and returns its module."""
    def run(path):
        whole = os.path.join(ROOT, path)
        monkeypatch.syspath_prepend(os.path.dirname(whole))
        name = path.removesuffix('.py').replace('/', '_')
        spec = importlib.util.spec_from_file_location(name, whole)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return run


def train_here(argv, output, cwd, environment):
    """In a new process: run train.py, with all that it prints at the end of the file `output`."""
    import configurator
    import train
    from core import runlog
    runlog.plot = lambda out_dir: None
    os.environ.update(environment)
    os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ['train.py', *argv]
    configurator.run(train.main)


@pytest.fixture
def start():
    """A function that starts n processes of train.py that train together, as torchrun would.

    Returns multiprocessing's Processes. They are forks of one that has imported torch already,
    and what torch's optimizers import: seconds faster than `python train.py`.
    """
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['train', 'torch._dynamo'])
    started = []

    def run(argv, output, n=1, cwd='.'):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(n):
            environment = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(n),
                           'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            arguments = (argv, str(output), cwd, environment)
            processes.append(server.Process(target=train_here, args=arguments))
            processes[-1].start()
        started.extend(processes)
        return processes
    yield run
    for process in started:
        process.kill()
        process.join()


def wait_for(text, output, processes):
    """Wait until the file `output` contains the text, while the processes live."""
    deadline = time.monotonic() + 60
    found = ''
    while text not in found:
        alive = any(process.is_alive() for process in processes)
        assert alive and time.monotonic() < deadline, (text, found)
        time.sleep(0.01)
        if os.path.exists(output):
            found = pathlib.Path(output).read_text()


def exit_codes(processes):
    """The exit codes of the processes, when all have ended."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]
