"""The benchmarks play their rounds. No peer is needed, and no time is looked at."""
import importlib
import json
import os
import re
import sys

import pytest
import torch

import configurator
from configurator import REPOSITORY, UserError
from conftest import JAPAN, write_data
from core import checkpoint

BENCH = os.path.join(REPOSITORY, 'bench')


def load(name):
    """A module of bench/."""
    if BENCH not in sys.path:
        sys.path.insert(0, BENCH)
    return importlib.import_module(name)


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """The current folder, with a prepared folder data and a tree of one answer."""
    monkeypatch.chdir(tmp_path)
    write_data('data', small, {'train': [JAPAN] * 2, 'val': [JAPAN] * 2})
    answer = {'text': 'Hi', 'role': 'assistant', 'lang': 'en', 'replies': []}
    question = {'text': 'Hello', 'role': 'prompter', 'lang': 'en', 'replies': [answer]}
    with open('trees.jsonl', 'w') as file:
        json.dump({'message_tree_id': 'a', 'prompt': question}, file)


def test_rounds_go_back_and_forth_and_medians_are_compared():
    contest = load('contest')
    assert contest.in_turn(['a', 'b'], 0) == ['a', 'b']
    assert contest.in_turn(['a', 'b'], 1) == ['b', 'a']
    table = contest.compare({'one': [8.0, 4.0, 0.08], 'two': [2.0, 2.0, 2.0]}, 'tokens/s', digits=1)
    assert '| one | 4.0 | 0.1 … 8.0 |  | 2.00 |' in table
    assert '| two | 2.0 | 2.0 … 2.0 | 0.50 |  |' in table


DECODING = '--shape=tiny --rounds=1 --new_tokens=3 --prompt=4 --players='


@pytest.mark.parametrize('name, arguments, printed, package', [
    ('training', '--data=data --shape=tiny --block_size=64 --rounds=1 --players=other-ours '
     f'--other={REPOSITORY}', '| other-ours |', 'torch'),
    ('learning', '--data=data --shape=tiny --block_size=64 --players=ours --until=5.5 --every=2 '
     '--learning_rate=1e-2', r'ours: val_loss [0-5]\..* after \d+ steps', 'torch'),
    ('decoding', DECODING + 'ours-float32', '| ours-float32 |', 'torch'),
    ('decoding', DECODING + 'ct2-int8', '| ct2-int8 |', 'ctranslate2'),
    ('preparing', '--input=trees.jsonl --copies=3 --players=ours --rounds=1', '| ours |', 'torch'),
    ('scaling', '--conversations=1000', '| 1,000 |', 'torch'),
    ('gpu', '--device=cpu --shape=tiny --parts=attention,gradients,steps,answers',
     'nothing failed\n$', 'torch')])
def test_a_benchmark_plays_a_round(
        folder, gpt2, monkeypatch, capsys, name, arguments, printed, package):
    pytest.importorskip(package, reason='pip install -r requirements-bench.txt')
    monkeypatch.setattr(sys, 'argv', [os.path.join(BENCH, f'{name}.py')])
    load(name).main(arguments.split())
    assert re.search(printed.replace('|', r'\|'), capsys.readouterr().out)


def test_the_folder_to_start_from_is_one_that_sample_py_opens(gpt2, tmp_path):
    folder = load('starting').make_folder('tiny', str(tmp_path))
    assert checkpoint.open_model(folder).tokenizer.sha256 == gpt2.sha256


@pytest.mark.parametrize('name', ['training', 'learning', 'decoding', 'serving', 'preparing',
                                  'starting'])
def test_an_unknown_player_is_refused(name):
    with pytest.raises(UserError, match="^players='nobody': expected "):
        configurator.load(load(name).Config, ['--players=nobody'])


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_that_is_said_in_one_line():
    with pytest.raises(UserError, match='^bench/gpu.py needs CUDA, and torch finds none here.'):
        load('gpu').main([])
