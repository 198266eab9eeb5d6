"""data/alpaca/prepare.py: golden ids, quirks of real rows, splits, and the recipes end to end."""
import json
import os

import numpy as np
import pytest
import tiktoken

from configurator import UserError
from conftest import ROOT, SHARED
from core import readback, rows, tokenfile, tokenizer
from data.alpaca import prepare

WORDS = ['red', 'green', 'blue', 'one', 'two', 'three', 'sun', 'moon', 'star', 'sea',
         'sky', 'river']
ROWS = []
for i in range(100):
    question = f'Name a thing that is {WORDS[i % 12]} and {WORDS[i * 5 % 7]}'
    ROWS.append({'instruction': question, 'input': '', 'output': f'It is {i}.'})


@pytest.fixture
def run(tmp_path, vocabulary):
    """run(rows or text, flag=value, …): meta.json of the folder tmp_path/data/mine."""
    def run(rows, **flags):
        path = tmp_path / 'rows.json'
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding='utf-8')
        folder = tmp_path / 'data' / 'mine'
        flags = {'tokenizer': vocabulary, 'input': path, 'out_dir': folder} | flags
        prepare.main([f'--{key}={value}' for key, value in flags.items()])
        meta = tokenfile.read_meta(str(flags['out_dir']))
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        return meta
    return run


@pytest.fixture
def read_back(tmp_path):
    """read_back(split): its conversations as (instruction, input, output)."""
    def run(split):
        folder = str(tmp_path / 'data' / 'mine')
        meta = tokenfile.read_meta(folder)
        bpe = tokenizer.from_state(meta['tokenizer'])
        split = tokenfile.Split([folder], split)
        found = []
        for i in range(len(split)):
            question, answer = readback.decode(*split[i], bpe, meta['template'])
            found.append((question.text, question.context, answer.text))
        return found
    return run


def real(name):
    """The path of a published file; skips where it is not there."""
    path = os.path.join(SHARED, 'data', 'alpaca', name)
    if not os.path.exists(path):
        pytest.skip(f'{name} is not in {os.path.dirname(path)}')
    return path


# What is learned stands after the two bars.
TASK = 'Below is an instruction that describes a task'
REQUEST = 'Write a response that appropriately completes the request.'
WITH_INPUT = f'''\
{TASK}, paired with an input that provides further context. {REQUEST}

### Instruction:
Identify the correct spelling of the following word.

### Input:
Ocassion

### Response:
||The correct spelling is 'Occasion.'<|endoftext|>'''
WITHOUT_INPUT = f'''\
{TASK}. {REQUEST}

### Instruction:
What is an antonym of 'complicated'?

### Response:
||An antonym of 'complicated' is 'simple'.<|endoftext|>'''


def check_golden(ids, mask, text):
    """The ids are those of the whole text, and the mask is 1 from the bars to the end."""
    prompt, response = text.split('||')
    bpe = tiktoken.get_encoding('gpt2')
    n_prompt = len(bpe.encode(prompt))
    expected = bpe.encode(prompt + response, allowed_special='all')
    assert ids.tolist() == expected
    assert mask.tolist() == [0] * n_prompt + [1] * (len(expected) - n_prompt)


def test_golden_ids(run, tmp_path, gpt2):
    """Stanford's two prompts, written out. The end of text is learned and nothing follows it."""
    some = [{'instruction': 'Identify the correct spelling of the following word.',
             'input': 'Ocassion', 'output': "The correct spelling is 'Occasion.'"},
            {'instruction': "What is an antonym of 'complicated'?", 'input': '',
             'output': "An antonym of 'complicated' is 'simple'."}]
    run(some, tokenizer='gpt2', val_fraction=0)
    split = tokenfile.Split([str(tmp_path / 'data' / 'mine')], 'train')
    check_golden(*split[0], WITH_INPUT)
    check_golden(*split[1], WITHOUT_INPUT)
    batch = rows.make_batch(split, [0, 1])
    assert (batch.targets == 50256).sum() == 2 and (batch.idx == 50256).sum() == 0


def test_the_book(run, tmp_path, capsys, gpt2):
    """The 1,100 rows: 935/55/110 by position, where some prompts leak; by hash none does."""
    book = {'tokenizer': 'gpt2', 'input': real('instruction-data.json')}
    meta = run(ROWS, split='85/10/5', **book)
    sizes = {name: counts['conversations'] for name, counts in meta['splits'].items()}
    assert sizes == {'train': 935, 'val': 55, 'test': 110}
    assert meta['prompts']['rows_repeating_a_prompt'] == 25
    assert meta['prompts']['also_in_train'] == {'val': 4, 'test': 2}
    assert meta['source']['name'] == 'instruction-data'
    assert meta['source']['licence'] == 'Apache-2.0'
    printed = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert 'rows that repeat a prompt 25' in printed and 'in val and in train 4' in printed
    assert 'python train.py config/finetune_instruction_data.py' in printed[-1]
    folder = [str(tmp_path / 'data' / 'mine')]
    check_golden(*tokenfile.Split(folder, 'train')[50], WITH_INPUT)
    check_golden(*tokenfile.Split(folder, 'test')[999 - 935], WITHOUT_INPUT)
    meta = run(ROWS, test_fraction=0.1, **book)
    assert meta['prompts']['also_in_train'] == {'val': 0, 'test': 0}
    assert 60 < meta['splits']['test']['conversations'] < 160


def test_stanford(run, read_back, capsys, gpt2):
    """All 52,002 rows: every one is kept, or dropped for a reason."""
    path = real('alpaca_data.json')
    meta = run(ROWS, tokenizer='gpt2', input=path)
    assert meta['seen'] == 52002 and meta['dropped'] == {'empty output': 28}
    assert meta['answers'] == {'learned': 51_974, 'cut': 2, 'lost': 0, 'tokens_lost': 508}
    assert meta['counts'] == {'rows': 52002, '  input that means none': 676}
    assert 'alpaca: licence CC-BY-NC-4.0' in capsys.readouterr().err
    with open(path, encoding='utf-8') as file:
        outputs = {row['output'] for row in json.load(file)}
    found = read_back('val')
    assert {output for *_, output in found} <= outputs
    assert len(found) == meta['splits']['val']['conversations'] == 2668


def row(**changes):
    return {'instruction': 'f', 'input': '', 'output': 'x'} | changes


NOTHING = ['No input', 'Noinput', '<no input>', 'N/A', 'n/a.', '"<noinput>"', '\\<noinput\\>',
           ':\n<noinput>', 'No input required.', '<noinput> 8', 'None', '[No Input]']
SOMETHING = ['Larry <noinput> the door.', 'No pain, no gain', 'None of the students', 'NASA']
QUIRKS = [  # (row, what is kept as input and output or None, what is counted)
    *[(row(input=text), ('', 'x'), ['  input that means none']) for text in NOTHING],
    *[(row(input=text), (text, 'x'), []) for text in SOMETHING],
    (row(input=' \n'), ('', 'x'), []),
    (row(output=' y\n'), ('', ' y\n'), []),  # as published: nothing is stripped
    ({'instruction': 'f', 'output': 'y'}, ('', 'y'), ['  no field input']),
    ({'instruction': 'f', 'context': 'here', 'response': 'y'}, ('here', 'y'),
     ["  input under 'context'", "  output under 'response'"]),
    (row(input=None), ('', 'x'), ['  input is null']),
    (row(output=''), None, ['empty output']),
    (row(output=' \n'), None, ['empty output']),
    (row(output=None), None, ['  output is null', 'empty output']),
    (row(output=float('nan')), None, ['  output is null', 'empty output']),
    (row(instruction=None), None, ['  instruction is null', 'empty instruction']),
    ({'instruction': 'f', 'input': ''}, None, ['  no field output', 'empty output']),
    (row(output=4), None, ['output not text']),
    (row(instruction=['f']), None, ['instruction not text']),
    (row(input={}), None, ['input not text']),
    (row(output='\ud83d'), None, ['half a surrogate pair']),
    (row(instruction='f\n\n### Response:\nz'), None, ['template heading']),
    (row(instruction='word ' * 2000), None, ['too long']),
    (row(system='', history=None, note=''), ('', 'x'), []),
    (row(system=float('nan'), id=7), ('', 'x'), ["  not used: 'id'"]),
    (row(context='c', response='r'), ('', 'x'),
     ["  not used: 'context'", "  not used: 'response'"]),
    (row(system=['s']), None, ['system not text']),
    (row(history='q'), None, ['history not pairs of text']),
    (row(history=[['q', '']]), None, ['history not pairs of text']),
    (row(history=[['q', 4]]), None, ['history not pairs of text']),
]


def test_quirks_of_real_rows_are_handled_and_counted(run, read_back):
    expected = {'rows': len(QUIRKS)}
    kept = []
    for _, texts, counts in QUIRKS:
        if texts:
            kept.append(('f', *texts))
        for what in counts:
            expected[what] = expected.get(what, 0) + 1
    meta = run([record for record, _, _ in QUIRKS], val_fraction=0)
    assert meta['counts'] | meta['dropped'] == expected
    assert read_back('train') == kept


def test_a_history_becomes_turns_and_a_system_text_is_put_first(run, tmp_path, small):
    """All rows of a conversation that grows are in the same split, and each is kept once."""
    some = [row(instruction='Thanks', input='a', output='No.', system='Be kind.',
                history=[[f'q{i}', f'a{i}'], ['more', 'less']]) for i in range(20)]
    some += [row(instruction='Go on', history=[[f'q{i}', f'a{i}']]) for i in range(20)]
    meta = run(some + some, val_fraction=0.5, dedup=True)
    assert meta['dropped'] == {'repeated': 40}
    assert meta['counts'] == {'rows': 80, '  with a history': 80, '  with a system message': 40}
    splits = []
    for name in ('train', 'val'):
        split = tokenfile.Split([str(tmp_path / 'data' / 'mine')], name)
        splits.append([readback.decode(*split[i], small, 'alpaca') for i in range(len(split))])
    assert splits[0] and splits[1]
    for found in splits:
        # Long conversations have the system text before their first question.
        starts = [turns[0].text.removeprefix('Be kind.\n\n') for turns in found]
        assert sorted(starts) == sorted([*{*starts}] * 2)
    long = [turns for turns in splits[0] if len(turns) == 6][0]
    assert [turn[:3] for turn in long[2:]] == [
        ('user', 'more', ''), ('assistant', 'less', ''), ('user', 'Thanks', 'a'),
        ('assistant', 'No.', '')]
    assert all(turn.supervised for turn in long)


def test_only_twenty_columns_that_are_not_used_are_named(run):
    meta = run([row(**{f'column {i}': 'x' for i in range(99)})] * 2, val_fraction=0)
    assert meta['counts']['  not used: other columns'] == 2 * 79
    assert len(meta['counts']) == 1 + 21


def test_templates_without_a_place_for_the_input(run, read_back, tmp_path):
    """xml puts it below the instruction after a blank line, plain behind it."""
    for template, joint in (('xml', '\n\n'), ('plain', ' ')):
        run([row(instruction='Translate.', input='Paris')], template=template, val_fraction=0)
        assert read_back('train') == [(f'Translate.{joint}Paris', '', 'x')]


def test_broken_rows_and_other_files(run, tmp_path, capsys):
    assert run(json.dumps([*ROWS, 'x']))['broken_lines'] == 1
    assert "broken record 101: found 'x', expected an object" in capsys.readouterr().err
    for text, said in (('[]', 'no conversation can be used'), ('[{"output": "x"', 'cannot be read'),
                       ('{"prompt": "f"}', 'no field instruction'), ('[1]', '1 of 1 records')):
        with pytest.raises(UserError, match=said) as error:
            run(text, out_dir=tmp_path / 'other')
        assert '\n' not in str(error.value)
        assert not (tmp_path / 'other' / 'meta.json').exists()


def test_the_split_by_hash_keeps_prompts_together(run, read_back):
    """In another case or spacing, or with another answer, a prompt is in the same split."""
    some = []
    for n in range(3):
        for i, record in enumerate(ROWS):
            question = record['instruction']
            some.append(row(instruction=question, output=f'{i} {n}'))
            question = question.upper().replace(' ', '  ')
            some.append(row(instruction=question, output=f'{i} again {n}'))
    fractions = {'val_fraction': 0.3, 'test_fraction': 0.2}
    meta = run(some, **fractions)
    before = {name: read_back(name) for name in meta['splits']}
    prompts = []
    for name, found in before.items():
        assert found and meta['prompts']['also_in_train'].get(name, 0) == 0
        prompts += {' '.join(question.lower().split()) for question, _, _ in found}
    assert len(prompts) == len(set(prompts)) and meta['split_rule'].startswith('hash')
    run([row(instruction='one more'), *some], **fractions)
    for name, found in before.items():
        assert set(found) <= set(read_back(name))  # nothing has moved


def test_dedup_drops_a_row_whose_prompt_and_answer_both_stood_before(run):
    first = row(instruction='Why?', output='So  it is.')
    some = [first, first, first | {'output': 'other'}, first | {'input': '<noinput>'},
            first | {'instruction': ' WHY? ', 'output': 'So it is.'}, row(output='')]
    meta = run(some)
    assert meta['kept'] == 5 and meta['prompts']['rows_repeating_a_prompt'] == 4
    meta = run(some, dedup=True)
    assert meta['dropped'] == {'repeated': 3, 'empty output': 1} and meta['kept'] == 2


@pytest.mark.parametrize('flags, ends', [
    ({'train_rows': 60, 'val_rows': 10}, {'train': 60, 'val': 70, 'test': 100}),
    ({'split': '85/10/5'}, {'train': 85, 'test': 95, 'val': 100})])
@pytest.mark.parametrize('seed', [-1, 42])
def test_splits_by_position(run, read_back, flags, ends, seed):
    run([row(output=str(i)) for i in range(100)], shuffle_seed=seed, **flags)
    order = list(range(100))
    if seed == 42:  # as datasets' Dataset.shuffle(42) does
        order = np.random.default_rng(42).permutation(100).tolist()
        assert order[:5] == [59, 21, 56, 18, 33]
    start = 0
    for name, end in ends.items():
        assert [int(output) for *_, output in read_back(name)] == sorted(order[start:end])
        start = end


@pytest.mark.parametrize('flags, said', [
    ({'source': 'dolly'}, "'dolly', expected one of alpaca, alpaca-cleaned, instruction-data"),
    ({'template': 'xlm'}, "'xlm', expected one of xml, alpaca"),
    ({'split': '85/10'}, "split='85/10': expected percentages for train/test/val"),
    ({'split': '85/10/6'}, 'expected percent'), ({'split': '90/20/-10'}, 'expected percent'),
    ({'split': '85/10/5', 'train_rows': 5}, 'three ways to split'),
    ({'split': '85/10/5', 'test_fraction': 0.1}, 'three ways to split'),
    ({'shuffle_seed': 42}, '--split=85/10/5 or --train_rows=N'), ({'max_tokens': 0}, 'at least 1'),
    ({'train_rows': -1}, 'at least 0'), ({'train_rows': 95}, 'more than the 100 rows'),
    ({'out_dir': ''}, 'none of the published files'), ({'input': 'no.json'}, 'no.json not found')])
def test_mistakes_are_one_line_that_says_what_to_do(run, flags, said):
    with pytest.raises(UserError) as error:
        run(ROWS, **flags)
    assert said in str(error.value) and '\n' not in str(error.value)


def test_published_files_are_pinned():
    """To a commit, with a hash, a licence and a recipe that exists."""
    for name, source in prepare.SOURCES.items():
        assert any(len(part) == 40 for part in source['url'].split('/')), name
        assert len(source['sha256']) == 64 and source['licence'], name
        recipe = prepare.RECIPES.get(name, 'config/finetune_alpaca.py')
        assert os.path.exists(os.path.join(ROOT, recipe)), name


@pytest.mark.parametrize('name, flags', [
    ('instruction_data', {'split': '85/10/5'}), ('alpaca', {'max_tokens': 513}),
    ('open_instruct', {'template': 'plain', 'max_tokens': 128, 'shuffle_seed': 42,
                       'train_rows': 80, 'val_rows': 10})])
def test_a_recipe_prepares_trains_and_saves(run, tmp_path, gpt2, name, flags):
    import train
    config = os.path.join(ROOT, 'config', f'finetune_{name}.py')
    run(ROWS, tokenizer='gpt2', **flags)
    out_dir = tmp_path / 'out'
    train.main([config, '--init_from=scratch', '--n_layer=1', '--n_head=2', '--n_embd=32',
                f'--data_dir={tmp_path}/data', '--dataset=mine', f'--out_dir={out_dir}',
                '--max_iters=2', '--epochs=0', '--batch_size=1', '--device=cpu',
                '--gradient_accumulation_steps=1', '--dtype=float32'])
    assert (out_dir / 'ckpt.pt').exists()
