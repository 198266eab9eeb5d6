"""data/alpaca/prepare.py: quirks of real rows, splits, and the recipes end to end."""
import json
import os
from collections import Counter

import numpy as np
import pytest

import train
from conftest import ROOT, SHARED, one_line, read_back
from core import tokenfile
from data.alpaca import prepare


def row(**changes):
    return {'instruction': 'f', 'input': '', 'output': 'x'} | changes


ROWS = [row(instruction=f'Name thing {i % 60}', output=f'It is {i}.') for i in range(100)]


@pytest.fixture
def run(tmp_path, vocabulary, monkeypatch):
    """run(rows or text, flag=value, …) prepares data/mine in an empty folder: its meta.json."""
    monkeypatch.chdir(tmp_path)

    def run(rows, **flags):
        text = rows if isinstance(rows, str) else json.dumps(rows)
        (tmp_path / 'rows.json').write_text(text)
        flags = {'tokenizer': vocabulary, 'input': 'rows.json', 'out_dir': 'data/mine'} | flags
        prepare.main([f'--{key}={value}' for key, value in flags.items()])
        meta = tokenfile.read_meta('data/mine')
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        return meta
    return run


def triples(split='train'):
    """The rows of a split, without a history, as (instruction, input, output)."""
    return [(*question[1:3], answer.text) for question, answer in read_back('data/mine', split)]


@pytest.mark.parametrize('file, flags, sizes, recipe', [
    ('instruction-data', {'split': '85/10/5'}, [935, 55, 110], 'instruction_data'),
    ('alpaca_data', {'max_tokens': 1024}, [49_306, 2_668], 'alpaca')])
def test_published_files(run, capsys, gpt2, file, flags, sizes, recipe):
    """Every row is kept, but for 28 of Stanford's without an output."""
    path = os.path.join(SHARED, 'data', 'alpaca', f'{file}.json')
    if not os.path.exists(path):
        pytest.skip(f'{path} is not there')
    meta = run(ROWS, tokenizer='gpt2', input=path, **flags)
    assert [counts['conversations'] for counts in meta['splits'].values()] == sizes
    assert meta['dropped'] == ({'empty output': 28} if recipe == 'alpaca' else {})
    assert f'python train.py config/finetune_{recipe}.py' in capsys.readouterr().out


NONE = ['No input', 'Noinput', 'n/a.', '"<noinput>"', '\\<noinput\\>', ':\n<noinput>',
        'No input required.', '<noinput> 8', 'None', '[No Input]', ' \n', None, float('nan')]
SOMETHING = ['Larry <noinput> the door.', 'No pain, no gain', 'None of the students', 'NASA']
QUIRKS = [  # (row, the input and output that are kept, or why none is)
    *((row(input=text), ('', 'x')) for text in NONE),
    *((row(input=text), (text, 'x')) for text in SOMETHING),
    (row(output=' y\n'), ('', ' y\n')),  # as published: nothing is stripped
    ({'instruction': 'f', 'context': 'here', 'response': 'y'}, ('here', 'y')),
    (row(output=' \n'), 'empty output'),
    (row(instruction=None), 'empty instruction'),
    (row(output='\ud83d'), 'cannot be encoded'),
    (row(instruction='f\n\n### Response:\nz'), 'cannot be encoded'),
    (row(instruction='word ' * 2000), 'too long'),
    (row(system=' ', history=None, note='', id=7), ('', 'x'))]


def test_quirks_of_real_rows_are_handled_and_counted(run):
    meta = run([record for record, _ in QUIRKS], val_fraction=0)
    found = [what for _, what in QUIRKS]
    assert meta['dropped'] == Counter(what for what in found if isinstance(what, str))
    assert triples() == [('f', *what) for what in found if not isinstance(what, str)]


def test_a_history_becomes_turns_and_a_system_text_is_put_first(run):
    run([row(input='a', output='No.', system='Be kind.', history=[['q', 'b'], ['more', 'less']])],
        val_fraction=0)
    turns, = read_back('data/mine')
    assert [turn[1:] for turn in turns] == [
        ('Be kind.\n\nq', '', True), ('b', '', True), ('more', '', True), ('less', '', True),
        ('f', 'a', True), ('No.', '', True)]


def test_the_split_by_hash_keeps_prompts_together(run):
    """In another case or spacing, or with another answer, a prompt is in the same split."""
    shouted = [row(instruction=f'NAME \n{record["instruction"][5:]} ') for record in ROWS]
    run(ROWS + shouted, val_fraction=0.3, test_fraction=0.2)
    prompts = []
    for name in ('train', 'val', 'test'):
        found = {' '.join(question.lower().split()) for question, *_ in triples(name)}
        assert len(found) > 5
        prompts += found
    assert len(prompts) == len(set(prompts)) == 60


SHUFFLED = np.random.default_rng(42).permutation(100).tolist()  # as datasets' shuffle(42) does


@pytest.mark.parametrize('flags, ends, order', [
    ({'train_rows': 60, 'val_rows': 10}, {'train': 60, 'val': 70, 'test': 100}, range(100)),
    ({'split': '85/10/5', 'shuffle_seed': 42}, {'train': 85, 'test': 95, 'val': 100}, SHUFFLED)])
def test_splits_by_position(run, flags, ends, order):
    run([row(output=str(i)) for i in range(100)], **flags)
    start = 0
    for name, end in ends.items():
        assert [int(output) for *_, output in triples(name)] == sorted(order[start:end])
        start = end
    assert SHUFFLED[:5] == [59, 21, 56, 18, 33]


@pytest.mark.parametrize('content, flags, said', [
    (ROWS, {'source': 'dolly'}, "'dolly', expected one of alpaca, alpaca-cleaned, instruction"),
    (ROWS, {'split': '85/10'}, 'expected one of 85/10/5'),
    (ROWS, {'train_rows': 95}, 'more than the 100 rows'),
    (ROWS, {'input': 'no.json'}, 'no.json not found'), ([], {}, 'no conversation can be used'),
    ('{"prompt": "f"}', {}, 'Expected JSON .* of rows'), ([row(history='q')], {}, 'record 1 .*'),
    ([row(output=4)], {}, "record 1 .* found '4', expected text")])
def test_mistakes_are_one_line_that_says_what_to_do(run, content, flags, said):
    with one_line(said):
        run(content, **flags)


@pytest.mark.parametrize('name, flags', [
    ('instruction_data', {'split': '85/10/5'}), ('alpaca', {'max_tokens': 513}),
    ('open_instruct', {'template': 'plain', 'max_tokens': 128, 'shuffle_seed': 42,
                       'train_rows': 80, 'val_rows': 10})])
def test_a_recipe_prepares_and_trains(run, gpt2, no_pictures, name, flags):
    run(ROWS, tokenizer='gpt2', **flags)
    shape = '--init_from=scratch --n_layer=1 --n_head=2 --n_embd=32 --dtype=float32 --device=cpu'
    steps = '--max_iters=2 --epochs=0 --batch_size=1 --gradient_accumulation_steps=1'
    train.main([f'{ROOT}/config/finetune_{name}.py', '--dataset=mine', '--out_dir=out',
                *shape.split(), *steps.split()])
    assert os.path.exists('out/ckpt.pt')
