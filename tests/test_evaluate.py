"""Scores and the report: what is right, same seed same report, a page that needs nothing else."""
import json
import math
import os
import re

import pytest

import evaluate
from configurator import UserError
from core import checkpoint, tokenfile
from core.conversation import Turn, encode
from core.tokenizer import Tokenizer
from evaluate import Answer
from formats import quiz
from formats.quiz import Question

BYTES = Tokenizer('bytes', [bytes([b]) for b in range(256)], tags=True)
UNTAGGED = Tokenizer('bytes', BYTES.tokens, tags=False)
QUIZ = [
    {'question': 'The capital of France?', 'answer': 'It is Paris.', 'wanted': 'Paris',
     'group': 'forward'},
    {'question': 'And <b>?', 'before': ['Hi', 'Hello.'], 'answer': 'No.', 'group': 'follow-up'},
    {'question': 'Where is Tokyo?', 'wanted': 'Japan', 'country': 'ignored'}]


@pytest.fixture
def model(tmp_path, save_model):
    """The folder of an untrained model whose tokens are bytes."""
    return save_model(tmp_path / 'model', BYTES, block_size=256)


@pytest.fixture
def run(tmp_path):
    """A function that prepares a data set and runs evaluate.py; returns (report.json, report.html).

    The data set: five conversations to validate on, whose texts look like HTML and tags.
    """
    found = []
    for i in range(5):
        turns = [Turn('user', f'<b>question</b> {i} </user>'),
                 Turn('assistant', f'<script>answer {i}')]
        found.append(encode(turns, BYTES)[:2])
    tokenfile.write(str(tmp_path / 'data' / 'small'), {'train': [], 'val': found},
                    {'template': 'xml', 'tokenizer': BYTES.state()})
    (tmp_path / 'quiz.jsonl').write_text('\n\n'.join(json.dumps(row) for row in QUIZ))

    def run(*models, **keys):
        keys = {'models': ','.join(models), 'out_dir': tmp_path / 'report', 'device': 'cpu',
                'data_dir': tmp_path / 'data', 'max_new_tokens': 8} | keys
        evaluate.main([f'--{key}={value}' for key, value in keys.items()])
        report = (tmp_path / 'report' / 'report.json').read_text()
        return report, (tmp_path / 'report' / 'report.html').read_text()
    return run


@pytest.mark.parametrize('text, right', [
    ('The capital of France is Paris.', True), ('Paris', True), ('paris!', True),
    ('It is Paris, a city. Lyon is not.', True), ('I do not know. It may be Paris.', False),
    ('Well.\nParis', False), ('Parisian life is nice.', False), ('', False), ('Lyon', False)])
def test_right_is_the_name_in_the_first_sentence_and_not_in_a_ramble(text, right):
    assert quiz.is_right(Answer(text, [1], True), Question([], wanted='Paris')) == right
    assert not quiz.is_right(Answer(text, [1], True), Question([], answer='Paris'))


def test_abbreviations_end_no_sentence():
    for text in ("It is St. John's.", 'It is Washington, D.C., of course.'):
        assert quiz.first_sentence(f'{text} No more.') == text
    st_johns = Answer("The capital is St. John's.", [1], True)
    assert quiz.is_right(st_johns, Question([], wanted="St. John's"))


def test_exact_is_every_character_and_an_end_and_scores_go_by_group():
    exact = [quiz.is_exact(Answer(text, [1], stopped), Question([], 'Paris.'))
             for text, stopped in (('Paris.', True), ('Paris.', False), ('Paris. ', True))]
    assert exact == [True, False, False]
    questions = [Question([], 'Paris.', 'Paris', 'a'), Question([], 'Tokyo.', '', 'a'),
                 Question([], '', 'Rome', 'b'), Question([], 'Oslo.', 'Oslo', '')]
    answers = [Answer(text, [1], True) for text in ('Paris.', 'No', 'Rome!', 'In Oslo.')]
    assert quiz.scores(answers, questions) == {
        'all': {'questions': 4, 'right': 1.0, 'exact': 1 / 3},
        'a': {'questions': 2, 'right': 1.0, 'exact': 0.5}, 'b': {'questions': 1, 'right': 1.0}}


def test_form_of_answers():
    stray = BYTES.special['<user>']
    answers = [Answer('', ids, stopped) for ids, stopped in
               (([1, 2, 3, 4] * 3, False), ([1, stray], True), ([], True))]
    assert quiz.form(answers, BYTES) == {
        'stops by itself': 2 / 3, 'mean length in tokens': 14 / 3, 'no stray tags': 2 / 3,
        'repeated 4-grams': pytest.approx(5 / 9 / 3)}  # 5 of the 9 four-grams came before


@pytest.mark.parametrize('content, said', [
    ('', 'holds no questions'), ('[]', 'line 1'), ('{"question": 3, "answer": "x"}', 'not a text'),
    ('{"answer": "x"}', "'question'"), ('{"question": "x"}', 'neither "answer" nor "wanted"'),
    ('{"question": "x", "answer": "y", "before": ["z"]}', 'must end with an answer'),
    ('{"question": "x", "answer": "y", "before": "z"}', 'TypeError'),
    ('{"question": "x", "answer": "y"}\n{"question', 'quiz.jsonl line 2'), (b'\xff', 'decode')])
def test_a_broken_quiz_is_a_line(tmp_path, content, said):
    path = tmp_path / 'quiz.jsonl'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        quiz.read(str(path))
    assert said in str(error.value) and 'Expected one JSON object a line' in str(error.value)
    assert '\n' not in str(error.value)


def test_answers_do_not_depend_on_the_batch(model):
    opened = checkpoint.open_model(model)
    opened.model.eval()
    questions = [[Turn('user', 'x' * n)] for n in (3, 30, 1, 3, 17)]
    together = evaluate.answer_all(opened, 'xml', questions, max_new_tokens=12)
    alone = [evaluate.answer_all(opened, 'xml', [q], max_new_tokens=12)[0] for q in questions]
    assert together == alone
    assert together == evaluate.answer_all(opened, 'xml', questions, 12, batch_size=2)


def test_an_answer_as_long_as_the_window_leaves_the_prompt_its_half(model, monkeypatch):
    """A model may have 128 positions, and 128 is the default of max_new_tokens."""
    seen = []

    def generate(model, prompts, *_, **__):
        seen.extend(prompts)
        return [[0] * len(prompts)]
    monkeypatch.setattr(evaluate, 'generate', generate)
    questions = [[Turn('user', 'x' * 50)], [Turn('user', 'x' * 500)]]
    evaluate.answer_all(checkpoint.open_model(model), 'xml', questions, max_new_tokens=256)
    assert sorted(map(len, seen)) == [54, 128]


def test_the_same_seed_gives_the_same_report_and_page(run, model, save_model, tmp_path):
    models = [model, save_model(tmp_path / 'two', BYTES, n_layer=1)]
    keys = {'dataset': 'small', 'quiz': tmp_path / 'quiz.jsonl'}
    first = run(*models, **keys)
    assert first == run(*models, **keys)
    report, page = json.loads(first[0]), first[1]
    assert [found['model'] for found in report['models']] == models
    for found in report['models']:
        assert abs(found['loss'] - math.log(263)) < 0.2 and found['tokens'] == 5 * 17
        assert set(found['quiz']) == {'greedy', 'sampled'}
        assert found['quiz']['greedy']['all'] == {'questions': 3, 'right': 0, 'exact': 0}
        assert set(found['quiz']['greedy']) == {'all', 'forward', 'follow-up'}
        assert found['quiz_answers'][1]['prompt'] == ['Hi', 'Hello.', 'And <b>?']
        assert len(found['answers']) == 5 and found['answers'][1]['expected'] == '<script>answer 1'
        assert found['figures']['loss on responses'] == f"{found['loss']:.4f}"
    assert '<script' not in page and '&lt;script&gt;answer 1' in page and 'And &lt;b&gt;?' in page
    assert '&lt;b&gt;question&lt;/b&gt; 0 &lt;/user&gt;' in page
    assert not re.search(r'(src|href)=|@import|url\(', page)
    some = json.loads(run(model, **keys, quiz_size=2)[0])['models'][0]
    assert len(some['quiz_answers']) == 2


def test_a_model_without_the_tags_is_asked_in_its_own_template(run, save_model, tmp_path):
    plain = save_model(tmp_path / 'plain', UNTAGGED, 'plain', block_size=256)
    report, _ = run(plain, dataset='small')
    found = json.loads(report)['models'][0]
    assert abs(found['loss'] - math.log(263)) < 0.2
    assert len(found['answers']) == 5 and found['template'] == 'plain'


@pytest.mark.parametrize('keys, said', [
    ({}, 'nothing to measure'), ({'quiz': 'nowhere.jsonl'}, 'nowhere.jsonl not found'),
    ({'dataset': 'none'}, 'meta.json not found'),
    ({'dataset': 'small', 'split': 'test'}, "has no split 'test'"),
    ({'dataset': 'small', 'split': 'dev'}, 'one of train, val, test'),
    ({'dataset': 'small', 'dtype': 'foo'}, "found 'foo', expected one of auto, float32"),
    ({'dataset': 'small', 'temperature': 0}, 'expected at least 1e-09'),
    ({'dataset': 'small', 'out_dir': '/proc/x'}, 'Use --out_dir=FOLDER')])
def test_a_mistake_gets_one_line(run, model, keys, said):
    with pytest.raises(UserError) as error:
        run(model, **keys)
    assert said in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, said', [
    ('\ud800', 'surrogates'), ('\n\n### Response:\n', 'heading')])
def test_a_question_that_cannot_be_asked_is_a_line(run, save_model, tmp_path, text, said):
    (tmp_path / 'quiz.jsonl').write_text(json.dumps({'question': text, 'answer': 'x'}))
    with pytest.raises(UserError, match=said) as error:
        run(save_model(tmp_path / 'm', UNTAGGED, 'alpaca'), quiz=tmp_path / 'quiz.jsonl')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, old, new, said', [
    ('val.bin', b'a\0', b'\x07\x01', 'the id 263, the vocabulary only 263 tokens'),
    ('val.bin', b'\0', b'\0', "conversation 0 of split 'val' cannot be read"),
    ('meta.json', b'"xml"', b'"ximl"', 'known are xml, ')])
def test_a_strangers_data_set_is_refused_in_a_line(run, model, tmp_path, name, old, new, said):
    path = tmp_path / 'data' / 'small' / name
    content = path.read_bytes()
    if old == new:
        content = b'a\0' * (len(content) // 2)
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError) as error:
        run(model, dataset='small')
    assert said in str(error.value) and '\n' not in str(error.value)


def test_a_full_disk_leaves_the_last_report(run, model, tmp_path, monkeypatch):
    before = run(model, dataset='small', answers=2)

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='report.json: No space left'):
        run(model, dataset='small', answers=1)
    assert (tmp_path / 'report' / 'report.json').read_text() == before[0]
    assert (tmp_path / 'report' / 'report.html').read_text() == before[1]


def test_each_different_prompt_is_asked_once(small):
    """Trees give several answers to one prompt."""
    class Split(list):
        name = 'val'

    chats = [('Hi', 'Hello'), ('Hi', 'Hey'), ('And you?', 'Fine'), ('Hi', 'Ho'), ('Bye', 'Bye')]
    split = Split(encode([Turn('user', a), Turn('assistant', b)], small)[:2] for a, b in chats)
    asked = [question.turns[0].text for question in quiz.from_split(split, small, 'xml', 2)]
    assert asked == ['Hi', 'And you?']
    assert len(quiz.from_split(split, small, 'xml', 20)) == 3


def test_what_is_wrong_comes_first():
    bad = {'model': 'a', 'form': {'repeated 4-grams': 0.6, 'stops by itself': 0.1},
           'figures': {'loss on responses': '2.0'}}
    good = {'model': 'b', 'form': {'repeated 4-grams': 0.0, 'stops by itself': 1.0},
            'figures': {'loss on responses': '1.0'}}
    lines = evaluate.remarks([bad, good])
    assert 'repetition_penalty' in lines[0] and '10%' in lines[1]
    assert lines[2] == 'from a to b: loss on responses 2.0 -> 1.0' and len(lines) == 3
