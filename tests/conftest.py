"""What the tests share. They need no network; what a bare machine lacks is skipped, with the reason."""
import hashlib
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
def vocabulary(tmp_path_factory):
    """The path of a small tokenizer.json, learned from a few texts."""
    path = str(tmp_path_factory.mktemp('vocabulary') / 'tokenizer.json')
    tokenizer.learn(TEXTS * 3, 320, path)
    return path


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


@pytest.fixture
def script(tmp_path):
    """Run a script of the repository as a person would, from another folder: script('train.py', '--help')."""
    def run(name, *arguments, **options):
        return subprocess.run([sys.executable, os.path.join(ROOT, name), *arguments], cwd=tmp_path, timeout=60,
                              capture_output=True, **{'text': True, **options})
    return run
