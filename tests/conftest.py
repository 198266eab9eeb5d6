"""What the tests share. They need no network; what a bare machine lacks is skipped, with the reason."""
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), 'shared')  # real data beside the repository, where there is any
sys.path.insert(0, ROOT)
# The models here are tiny: a second thread gains nothing, and beside a busy program the two wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
if os.path.isdir(os.path.join(SHARED, 'tiktoken')):
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(SHARED, 'tiktoken'))

from core import tokenizer
from core.conversation import Turn

JAPAN = [Turn('user', 'What is the capital of Japan?'), Turn('assistant', 'Tokyo.')]
TEXTS = ['The capital of France is Paris, and that of Japan is Tokyo.', 'What is the capital of Japan?',
         "It's one of 12 words; they're done.\n\n    print('hello')\n", 'Grüße! Привет. こんにちは 🙂 <user>']


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's own vocabulary with the tags, where tiktoken has it in its cache."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    if not os.path.exists(os.path.join(cache, hashlib.sha1(tokenizer.GPT2_MERGES.encode()).hexdigest())):
        pytest.skip(f"GPT-2's vocab.bpe is not in tiktoken's cache, {cache}")
    return tokenizer.load('gpt2')


@pytest.fixture(scope='session')
def learn(tmp_path_factory):
    """A function that learns a vocabulary from texts; it returns the path of a tokenizer.json."""
    import tokenizers

    def run(texts, vocab_size):
        path = str(tmp_path_factory.mktemp('vocabulary') / 'tokenizer.json')
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=byte_level.alphabet())
        bpe.train_from_iterator(texts, trainer)
        bpe.save(path)
        return path
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


@pytest.fixture(scope='session')
def vocabulary(learn):
    """The path of a small tokenizer.json, learned from a few texts."""
    return learn(TEXTS * 3, 320)


@pytest.fixture(scope='session')
def small(vocabulary):
    """The small vocabulary, with the tags."""
    return tokenizer.load(vocabulary)


@pytest.fixture(scope='session')
def save_model():
    """A function that saves a checkpoint of a tiny random model, and returns its folder.

    steps: how many to train it first, on the answer to what Japan's capital is.
    """
    import torch

    from core import checkpoint, conversation
    from model import GPT, GPTConfig

    def run(folder, bpe, template='xml', steps=0, **shape):
        torch.manual_seed(0)
        shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 64} | shape
        model = GPT(GPTConfig(vocab_size=bpe.vocab_size, **shape))
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


@pytest.fixture(scope='session')
def real_trees():
    """The path of 100 real OpenAssistant trees."""
    path = pathlib.Path(SHARED, 'data', 'oasst', 'en_100_tree.jsonl')
    if not path.exists():
        pytest.skip(f'{path.name}, 100 real trees, is not in {path.parent}')
    return path


@pytest.fixture
def script(tmp_path):
    """Run a script of the repository as a person would, from another folder: script('train.py', '--help')."""
    def run(name, *arguments, **options):
        return subprocess.run([sys.executable, os.path.join(ROOT, name), *arguments], cwd=tmp_path, timeout=60,
                              capture_output=True, **{'text': True, **options})
    return run
