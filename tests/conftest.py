"""What the tests share. They need no network; what a machine lacks is skipped with a reason."""
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), 'shared')  # real data beside the repository, if any
sys.path.insert(0, ROOT)
# The models here are tiny: a second thread gains nothing.
os.environ.setdefault('OMP_NUM_THREADS', '1')
if os.path.isdir(os.path.join(SHARED, 'tiktoken')):
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(SHARED, 'tiktoken'))

import tokenizers
import torch
from torch.utils import _pytree

import export
import train
from configurator import UserError
from core import checkpoint, conversation, readback, runlog, tokenfile, tokenizer
from core.conversation import Turn
from core.processes import Processes
from core.trainer import Trainer
from formats.convert import read_vocabulary
from model import GPT, GPTConfig

# An id is a byte, so that ids can be read.
BYTES = tokenizer.Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
JAPAN = [Turn('user', 'What is the capital of Japan?'), Turn('assistant', 'Tokyo.')]
TEXTS = ['The capital of France is Paris, and that of Japan is Tokyo.',
         'What is the capital of Japan?',
         "It's one of 12 words; they're done.\n\n    print('hello')\n",
         'Grüße! Привет. こんにちは 🙂 <user>']
WORDS = ['red', 'green', 'blue', 'one', 'two', 'three', 'sun', 'moon', 'star', 'what', 'is', 'the',
         'of', 'and', 'a', 'river', 'mountain', 'sea']


class Payload(str):
    """Makes a folder of this name when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


# ---- vocabularies and data ----

@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's own vocabulary with the tags, if tiktoken has it in its cache."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', f'{tempfile.gettempdir()}/data-gym-cache')
    name = hashlib.sha1(tokenizer.GPT2_MERGES.encode()).hexdigest()
    if not os.path.exists(os.path.join(cache, name)):
        pytest.skip(f"GPT-2's vocab.bpe is not in tiktoken's cache, {cache}")
    return tokenizer.load('gpt2')


@pytest.fixture(scope='session')
def learn(tmp_path_factory):
    """A function that learns a vocabulary from texts and returns a folder for --tokenizer."""
    def run(texts, vocab_size):
        folder = tmp_path_factory.mktemp('vocabulary')
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False)
        (folder / 'tokenizer.json').write_text(bpe.to_str())
        state = read_vocabulary('small', json.loads(bpe.to_str())).state()
        (folder / 'vocabulary.json').write_text(json.dumps(state))
        return str(folder)
    return run


@pytest.fixture(scope='session')
def vocabulary(learn):
    """The folder of a small vocabulary, learned from a few texts."""
    return learn(TEXTS * 3, 320)


@pytest.fixture(scope='session')
def small(vocabulary):
    """The small vocabulary, with the tags."""
    return tokenizer.load(vocabulary)


@pytest.fixture
def small_as_gpt2(small, monkeypatch):
    """The small vocabulary stands for GPT-2's, which not every machine has."""
    monkeypatch.setattr(tokenizer, 'load', lambda name, tags=True: small.with_tags(tags))


@pytest.fixture(scope='session')
def real_trees():
    """The path of 100 real OpenAssistant trees."""
    path = pathlib.Path(SHARED, 'data', 'oasst', 'en_100_tree.jsonl')
    if not path.exists():
        pytest.skip(f'{path} is not there')
    return path


def read_back(folder, name='train'):
    """The conversations of a split of a prepared folder, lists of turns."""
    meta = tokenfile.read_meta(str(folder))
    split = tokenfile.Split([str(folder)], name)
    bpe = tokenizer.from_state(meta['tokenizer'])
    return [readback.decode(*split[i], bpe, meta['template']) for i in range(len(split))]


def write_data(folder, bpe, splits, template='xml'):
    """A prepared folder of {split: [conversations, lists of turns]}."""
    encoded = {}
    for split, conversations in splits.items():
        encoded[split] = [conversation.encode(turns, bpe, template)[:2] for turns in conversations]
    tokenfile.write(str(folder), encoded, {'template': template, 'tokenizer': bpe.state()})


@pytest.fixture(scope='session')
def data(tmp_path_factory, learn):
    """A folder of small data sets: colours, unvalidated, and alien with another vocabulary."""
    splits = {'train': [], 'val': []}  # 61 and 8 conversations
    for i in range(69):
        words = [WORDS[(i * k + k) % len(WORDS)] for k in range(3, 6 + i % 9)]
        turns = [Turn('user', ' '.join(words)), Turn('assistant', ' '.join(reversed(words)))]
        splits['val' if i % 8 == 7 else 'train'].append(turns)
    texts = [' '.join(WORDS)] * 20
    bpe = tokenizer.load(learn(texts, 300))
    base = tmp_path_factory.mktemp('data')
    write_data(base / 'colours', bpe, splits)
    write_data(base / 'unvalidated', bpe, {'train': splits['train'][:20], 'val': []})
    write_data(base / 'alien', tokenizer.load(learn(texts, 290)), splits)
    return str(base)


# ---- models ----

VOCAB_SIZE = 211


def tiny(**changes):
    """A small random model, with biases and norms away from 0 and 1, so that each counts."""
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
    name = 'train'

    def __init__(self, lengths):
        rng = np.random.default_rng(0)
        self.lengths = np.array(lengths)
        self.n_supervised = self.lengths // 2  # nearly
        self.found = []
        for n in lengths:
            ids = rng.integers(0, VOCAB_SIZE, n).astype(np.uint16)
            mask = (rng.random(n) < 0.6).astype(np.uint8)
            mask[-1] = 1
            self.found.append((ids, mask))

    def __getitem__(self, i):
        return self.found[i]


def checkpoint_of(model, bpe, template='xml', step=0, **changes):
    """A Checkpoint of the model, without what only resuming needs."""
    return checkpoint.Checkpoint(
        model=model.state_dict(), model_args=dataclasses.asdict(model.config), template=template,
        tokenizer=bpe.state(), config={'max_iters': step}, step=step, val_loss=1.25, **changes)


@pytest.fixture(scope='session')
def save_model():
    """A function that saves a tiny model, trained on JAPAN for `steps`, and returns its folder."""
    def run(folder, bpe, template='xml', steps=0, **shape):
        torch.manual_seed(0)
        shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 64} | shape
        model = GPT(GPTConfig(vocab_size=bpe.vocab_size, **shape))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids, mask, _ = conversation.encode(JAPAN, bpe, template)
        ids = torch.tensor(ids.astype(int))
        learned = torch.tensor(mask[1:] == 1)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model(ids[None, :-1])[0]
            torch.nn.functional.cross_entropy(logits[learned], ids[1:][learned]).backward()
            optimizer.step()
        os.makedirs(folder)
        saved = checkpoint_of(model, bpe, template, steps)
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
    train.main(flags(data, out_dir, **changes))
    return checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))


def resume(out_dir, **changes):
    """Go on with the run in out_dir in this process; returns the last Checkpoint."""
    flags = [f'--{key}={value}' for key, value in changes.items()]
    torch.manual_seed(99)  # a new process draws other numbers
    train.main(['--init_from=resume', f'--out_dir={out_dir}', *flags])
    return checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))


@pytest.fixture
def stop_after(monkeypatch):
    """A function: from now on runs stop after step n, as if another process had got a signal."""
    step = Trainer.train_step

    def stop(n):
        def stopping(trainer, request):
            asked = trainer.state.step + 1 == n
            with monkeypatch.context() as patch:
                patch.setattr(Processes, 'sum', lambda procs, *sums: [*sums[:2], asked])
                return step(trainer, request)
        monkeypatch.setattr(Trainer, 'train_step', stopping)
    return stop


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no loss.png, which takes longer than they do."""
    monkeypatch.setattr(runlog, 'plot', lambda out_dir: False)


@pytest.fixture(scope='session')
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run of SMALL."""
    folder = tmp_path_factory.mktemp('whole') / 'out'
    run(data, folder, **SMALL)
    return folder


def log_of(out_dir):
    """log.csv without its column of time."""
    rows = runlog.read(out_dir)
    for row in rows:
        del row['tokens_per_s']
    return rows


def assert_same_bits(one, two):
    """Two nested values have equal keys, lengths, numbers and tensors."""
    leaves, form = _pytree.tree_flatten(one)
    others, other_form = _pytree.tree_flatten(two)
    assert form == other_form
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(one, two):
    """Two folders hold the same run, bit for bit, but for its keys and the time it took."""
    for name in ('ckpt.pt', 'best.pt'):
        a = checkpoint.load(os.path.join(one, name))
        b = checkpoint.load(os.path.join(two, name))
        assert_same_bits(vars(a), vars(b) | {'config': a.config})
    assert log_of(one) == log_of(two)


def assert_near(one, two):
    """Two folders have log.csv with the same rows, and losses that differ by rounding only."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for column in ('step', 'loss', 'val_loss'):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), abs=1e-4), (a, b)


def exported(source, out, **keys):
    """The folder that export.py writes in this process."""
    keys = {'init_from': source, 'out': out} | keys
    export.main([f'--{key}={value}' for key, value in keys.items()])
    return pathlib.Path(out)


def one_line(said):
    """A context that expects a UserError of one line in which this pattern is found."""
    return pytest.raises(UserError, match=rf'\A.*{said}.*\Z')


@pytest.fixture
def script(tmp_path):
    """Run a script as a person would, from another folder: script('train.py', '--help')."""
    def run(name, *arguments, **options):
        command = [sys.executable, os.path.join(ROOT, name), *arguments]
        options = {'cwd': tmp_path, 'timeout': 60, 'capture_output': True, 'text': True} | options
        return subprocess.run(command, **options)
    return run
