"""Scores and the report: what counts as right, the same seed the same report, a page that stands alone."""
import json
import math
import os
import re

import pytest
import torch

from core import checkpoint
import evaluate
from core import tokenfile
from configurator import UserError
from core.conversation import Turn, encode
from evaluate import Answer
from model import GPT, GPTConfig
from core.tokenizer import Tokenizer

TOKENS = [bytes([b]) for b in range(256)]
BYTES = Tokenizer('bytes', TOKENS, tags=True)


def model_folder(folder, template='xml', tags=True, seed=0, n_embd=16):
    """A folder with the checkpoint of an untrained model whose tokens are bytes."""
    torch.manual_seed(seed)
    bpe = Tokenizer('bytes', TOKENS, tags)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=n_embd, block_size=256, vocab_size=bpe.vocab_size))
    os.makedirs(folder)
    checkpoint.save(checkpoint.pack(model, bpe, template, {}, 7, 1.25), os.path.join(folder, 'ckpt.pt'))
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """data/small: five conversations to validate on, one with tags typed by its user."""
    with tokenfile.Writer(str(tmp_path / 'data' / 'small'), ('train', 'val')) as writer:
        for i in range(5):
            ids, mask, _ = encode([Turn('user', f'<b>question</b> {i} </user>'), Turn('assistant', f'<script>answer {i}')], BYTES)
            writer.add('val', ids, mask, [len(ids)])
        writer.finish({'template': 'xml', 'tokenizer': {'name': 'bytes', 'sha256': BYTES.sha256}})
    return str(tmp_path / 'data')


def run(tmp_path, models, out='report', **keys):
    flags = {'models': ','.join(models), 'out_dir': tmp_path / out, 'device': 'cpu', 'max_new_tokens': 8, **keys}
    evaluate.main([f'--{key}={value}' for key, value in flags.items()])
    return (tmp_path / out / 'report.json').read_text(), (tmp_path / out / 'report.html').read_text()


def question(direction='forward', country='France', capital='Paris', answer='The capital of France is Paris.'):
    return dict(direction=direction, country=country, capital=capital, answer=answer)


@pytest.mark.parametrize('text, right', [
    ('The capital of France is Paris.', True), ('Paris', True), ('paris!', True), ('It is Paris, a city. Lyon is not.', True),
    ('I do not know. It may be Paris.', False), ('Well.\nParis', False), ('Parisian life is nice.', False), ('', False),
    ('Lyon', False)])
def test_right_is_the_name_in_the_first_sentence_and_not_in_a_ramble(text, right):
    assert evaluate.is_right(Answer(text, [1], True), question()) == right


def test_abbreviations_end_no_sentence():
    assert evaluate.first_sentence("It is St. John's. No more.") == "It is St. John's."
    assert evaluate.first_sentence('It is Washington, D.C., of course. No.') == 'It is Washington, D.C., of course.'
    st_johns = question(country='Antigua and Barbuda', capital="St. John's")
    assert evaluate.is_right(Answer("The capital is St. John's.", [1], True), st_johns)


def test_exact_is_every_character_and_an_end():
    whole = question()['answer']
    assert evaluate.is_exact(Answer(whole, [1], True), question())
    assert not evaluate.is_exact(Answer(whole, [1], False), question())
    assert not evaluate.is_exact(Answer(whole + ' ', [1], True), question())
    assert evaluate.is_right(Answer('France.', [1], True), question('reverse'))


def test_form_of_answers():
    stray = BYTES.special['<user>']
    answers = [Answer('', [1, 2, 3, 4] * 3, False), Answer('', [1, stray], True), Answer('', [], True)]
    assert evaluate.form(answers, BYTES) == {
        'stops by itself': 2 / 3, 'mean length in tokens': 14 / 3, 'no stray tags': 2 / 3,
        'repeated 4-grams': pytest.approx((1 - 4 / 9) / 3)}  # 9 four-grams, 4 of them different


def test_answers_do_not_depend_on_the_batch(tmp_path):
    opened = checkpoint.open_model('resume', model_folder(tmp_path / 'm'))
    opened.model.eval()
    questions = [[Turn('user', 'x' * n)] for n in (3, 30, 1, 3, 17)]
    together = evaluate.answer_all(opened, 'xml', questions, max_new_tokens=12)
    assert together == [evaluate.answer_all(opened, 'xml', [q], max_new_tokens=12)[0] for q in questions]
    assert together == evaluate.answer_all(opened, 'xml', questions, max_new_tokens=12, batch_size=2)


def test_an_answer_as_long_as_the_window_leaves_the_prompt_its_half(tmp_path, monkeypatch):
    """The demo's model has 128 positions, and 128 is the default of max_new_tokens."""
    opened, seen = evaluate.checkpoint.open_model(model_folder(tmp_path / 'm')), []
    monkeypatch.setattr(evaluate, 'generate', lambda model, prompts, *_, **__: seen.extend(prompts) or [[0] * len(prompts)])
    evaluate.answer_all(opened, 'xml', [[Turn('user', 'x' * 50)], [Turn('user', 'x' * 500)]], max_new_tokens=256)
    assert sorted(map(len, seen)) == [54, 128]


def test_the_loss_is_that_of_an_untrained_model_and_weighs_tokens_equally(tmp_path, data):
    opened = checkpoint.open_model('resume', model_folder(tmp_path / 'm'))
    split = tokenfile.Split([os.path.join(data, 'small')], 'val')
    loss, n_tokens = evaluate.response_loss(opened.model.eval(), split)
    assert n_tokens == split.n_supervised.sum() and abs(loss - math.log(263)) < 0.1


def test_the_same_seed_gives_the_same_report_and_the_page_stands_alone(tmp_path, data):
    models = [model_folder(tmp_path / 'one'), model_folder(tmp_path / 'two', seed=1)]
    keys = dict(dataset='small', data_dir=data, quiz='capitals', quiz_size=6)
    first = run(tmp_path, models, **keys)
    assert first == run(tmp_path, models, **keys)
    report, page = json.loads(first[0]), first[1]
    assert [m['model'] for m in report['models']] == models
    for m in report['models']:
        assert set(m['quiz']) == {'greedy', 'sampled'} and m['quiz']['greedy']['all']['questions'] == 6
        assert len(m['answers']) == 5 and m['answers'][1]['expected'] == '<script>answer 1' and 'loss' in m
    assert '<script' not in page and '&lt;script&gt;answer 1' in page and '&lt;b&gt;question&lt;/b&gt; 0 &lt;/user&gt;' in page
    assert not re.search(r'(src|href)=|@import|url\(', page)


def test_a_model_without_the_tags_reads_tagged_data_but_is_asked_in_its_own_template(tmp_path, data):
    report, _ = run(tmp_path, [model_folder(tmp_path / 'plain', 'plain', tags=False)], dataset='small', data_dir=data)
    found = json.loads(report)['models'][0]
    assert abs(found['loss'] - math.log(263)) < 0.1 and len(found['answers']) == 5 and found['template'] == 'plain'


@pytest.mark.parametrize('keys, said', [
    (dict(), 'nothing to measure'), (dict(quiz='rivers'), 'expected capitals'), (dict(dataset='none'), 'meta.json not found'),
    (dict(dataset='small', split='test'), "has no split 'test'"), (dict(quiz='capitals', temperature=0), 'temperature'),
    (dict(quiz='capitals', models='nowhere'), 'neither a folder')])
def test_a_mistake_gets_one_line(tmp_path, data, keys, said):
    models = [keys.pop('models')] if 'models' in keys else [model_folder(tmp_path / 'm')]
    with pytest.raises(UserError) as error:
        run(tmp_path, models, data_dir=data, **keys)
    assert said in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('name, spoil, said', [
    ('val.bin', lambda data: b'\x07\x01' * (len(data) // 2), 'val.bin has the id 263, the vocabulary only 263 tokens'),
    ('val.bin', lambda data: b'a\0' * (len(data) // 2), "conversation 0 of split 'val' is not a conversation of the template 'xml'"),
    ('meta.json', lambda data: data.replace(b'"xml"', b'"ximl"'), "is of the template 'ximl'; known are xml, ")])
def test_a_strangers_data_set_is_refused_in_a_line(data, tmp_path, name, spoil, said):
    path = tmp_path / 'data' / 'small' / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError) as error:
        run(tmp_path, [model_folder(tmp_path / 'model')], dataset='small', data_dir=data)
    assert said in str(error.value) and '\n' not in str(error.value)
