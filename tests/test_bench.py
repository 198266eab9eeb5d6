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
from core import checkpoint, tokenfile

BENCH = os.path.join(REPOSITORY, 'bench')


def load(name):
    """A module of bench/."""
    if BENCH not in sys.path:
        sys.path.insert(0, BENCH)
    return importlib.import_module(name)


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench(name, *arguments) -> what bench/NAME.py prints."""
    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [os.path.join(BENCH, f'{name}.py')])
        load(name).main(list(arguments))
        return capsys.readouterr().out
    return run


def test_rounds_go_back_and_forth_and_medians_are_compared():
    contest = load('contest')
    assert contest.in_turn(['a', 'b'], 0) == ['a', 'b']
    assert contest.in_turn(['a', 'b'], 1) == ['b', 'a']
    table = contest.compare({'one': [8.0, 4.0, 0.08], 'two': [2.0, 2.0, 2.0]}, 'tokens/s', digits=1)
    assert '| one | 4.0 | 0.1 … 8.0 |  | 2.00 |' in table
    assert '| two | 2.0 | 2.0 … 2.0 | 0.50 |  |' in table


@pytest.fixture
def prepared(small, tmp_path):
    """A prepared folder of four conversations."""
    two = [(range(20), [0, 1] * 10)] * 2
    tokenfile.write(str(tmp_path), {'train': two, 'val': two},
                    {'template': 'xml', 'tokenizer': small.state()})
    return str(tmp_path)


def test_training_by_another_checkout(bench, prepared):
    out = bench('training', f'--data={prepared}', '--shape=tiny', '--block_size=32', '--rounds=1',
                '--players=other-ours', f'--other={REPOSITORY}')
    assert '| other-ours |' in out


def test_training_until_a_loss_is_reached(bench, prepared):
    out = bench('learning', f'--data={prepared}', '--shape=tiny', '--block_size=32',
                '--players=ours', '--until=5.5', '--every=2', '--learning_rate=1e-2')
    reached = re.search(r'ours: val_loss (.*) after \d+ steps\n', out)
    assert 4 < float(reached[1]) <= 5.5


@pytest.mark.parametrize('player, package', [
    ('ours-float32', 'torch'), ('ct2-int8', 'ctranslate2'), ('ct2-float32', 'ctranslate2')])
def test_decoding(bench, gpt2, player, package):
    pytest.importorskip(package, reason='pip install -r requirements-bench.txt')
    out = bench('decoding', '--shape=tiny', f'--players={player}', '--rounds=1',
                '--new_tokens=3', '--prompt=4')
    assert f'| {player} |' in out


def test_preparing(bench, gpt2, tmp_path):
    answer = {'text': 'Hi', 'role': 'assistant', 'lang': 'en', 'replies': []}
    question = {'text': 'Hello', 'role': 'prompter', 'lang': 'en', 'replies': [answer]}
    path = tmp_path / 'trees.jsonl'
    path.write_text(json.dumps({'message_tree_id': 'a', 'prompt': question}) + '\n')
    out = bench('preparing', f'--input={path}', '--copies=3', '--players=ours', '--rounds=1')
    assert out.startswith('3 conversations') and '| ours |' in out


def test_the_folder_to_start_from_is_one_that_sample_py_opens(gpt2, tmp_path):
    load('starting').make_folder('tiny', str(tmp_path))
    assert checkpoint.open_model(str(tmp_path)).tokenizer.sha256 == gpt2.sha256


def test_packing(bench):
    assert '| 1,000 |' in bench('scaling', '--conversations=1000')


@pytest.mark.parametrize('name', ['training', 'learning', 'decoding', 'serving', 'preparing',
                                  'starting'])
def test_an_unknown_player_is_refused(name):
    with pytest.raises(UserError, match="^players='nobody': expected "):
        configurator.load(load(name).Config, ['--players=nobody'])
    if name == 'decoding':
        with pytest.raises(UserError, match='--other=FOLDER'):
            configurator.load(load(name).Config, ['--players=other-hf-float32'])


def test_the_checks_of_a_gpu_find_nothing_on_a_cpu(bench):
    out = bench('gpu', '--device=cpu', '--shape=tiny', '--parts=attention,gradients,steps,answers')
    assert out.endswith('nothing failed\n')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_that_is_said_in_one_line():
    with pytest.raises(UserError, match='^bench/gpu.py needs CUDA, and torch finds none here.'):
        load('gpu').main([])
