"""The model card of an export: it says what the run knows, and nothing a file says can break it."""
import dataclasses
import json

import pytest

pytest.importorskip('hypothesis', reason='pip install -r requirements-test.txt')
huggingface_hub = pytest.importorskip('huggingface_hub')
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import train
from configurator import UserError
from core import checkpoint, tokenfile
from core.conversation import Turn, encode
from formats import card

OASST = {'name': 'oasst2', 'licence': 'Apache-2.0', 'sha256': 'f' * 64, 'bytes': 5,
         'url': 'https://huggingface.co/datasets/OpenAssistant/oasst2/resolve/abc/x.jsonl.gz'}


@pytest.fixture(scope='module')
def run(tmp_path_factory, small):
    """The folder of a run of two steps on two data sets; one says nothing about its source."""
    base = tmp_path_factory.mktemp('card')
    ids, mask, _ = encode([Turn('user', 'Hi'), Turn('assistant', 'Hello.')], small)
    for name, more in (('talks', {'source': OASST}), ('mine', {})):
        tokenfile.write(str(base / 'data' / name), {'train': [(ids, mask)], 'val': [(ids, mask)]},
                        {'template': 'xml', 'tokenizer': small.state(), **more})
    keys = {'init_from': 'scratch', 'dataset': 'talks,mine', 'data_dir': base / 'data',
            'out_dir': base / 'out', 'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 64,
            'batch_size': 1, 'gradient_accumulation_steps': 1, 'max_iters': 2, 'device': 'cpu',
            'eval_interval': 1, 'learning_rate': 1e-2}
    train.main([f'--{key}={value}' for key, value in keys.items()])
    return base / 'out'


@pytest.fixture(scope='module')
def text_of(run):
    """A function that returns the card, with changes to what the checkpoint holds."""
    opened = checkpoint.open_model(str(run), which='best')

    def write(report='', title='my-model', **changes):
        saved = dataclasses.replace(opened.checkpoint, **changes)
        return card.card(title, opened._replace(checkpoint=saved), 'float32', str(report))
    return write


def front_matter(text):
    """The YAML at the top, as the hub reads it."""
    return huggingface_hub.ModelCard(text).data.to_dict()


def test_the_card_says_what_the_run_knows(run, text_of):
    text = text_of()
    saved = checkpoint.load(str(run / 'best.pt'))
    front = front_matter(text)
    assert front['license'] == 'other' and front['datasets'] == ['OpenAssistant/oasst2']
    assert front['pipeline_tag'] == 'text-generation' and 'base_model' not in front
    for said in ('# my-model\n', 'trained from scratch', '<user>What is the capital of France?',
                 '`The capital of France is Paris.</assistant>`', f'- oasst2, <{OASST["url"]}>',
                 'licence: Apache-2.0', '- mine; ', 'licence: not stated', 'f' * 64,
                 '\n    learning_rate = 0.01\n', f'| optimizer steps | {saved.step} |',
                 f'{saved.val_loss:.4f}', '--init_from=my-model', '64 tokens in all'):
        assert said in text, (said, text)
    assert str(run.parent) not in text and 'out_dir' not in text
    assert 'learned to write all of it' in text_of(config={'loss_on': 'all'})


def test_a_resumed_run_keeps_its_origin(run, tmp_path):
    before = checkpoint.load(str(run / 'ckpt.pt'))
    checkpoint.save(before, str(tmp_path / 'ckpt.pt'))
    train.main([f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=3'])
    after = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert after.step == 3 and after.origin == before.origin
    assert [part['dataset'] for part in after.origin['data']] == ['talks', 'mine']


@pytest.mark.parametrize('licences, front', [
    (['Apache-2.0'], 'apache-2.0'), (['MIT', 'MIT'], 'mit'), (['MIT', 'Apache-2.0'], 'other'),
    (['CC-BY-NC-4.0', None], 'other'), (['mine'], 'other'), ([None], None), ([], None)])
def test_the_licence_at_the_top_is_that_of_all_the_data(text_of, licences, front):
    data = [{'source': {'name': 'x', 'licence': licence}} for licence in licences]
    assert front_matter(text_of(origin={'data': data})).get('license') == front


@pytest.mark.parametrize('begun, said, base', [
    ('gpt2-medium', '](https://huggingface.co/openai-community/gpt2-medium)',
     'openai-community/gpt2-medium'),
    ('distilgpt2', 'distilbert/distilgpt2', 'distilbert/distilgpt2'),
    ('microsoft/DialoGPT-small', 'DialoGPT-small', 'microsoft/DialoGPT-small'),
    ('/home/me/secret/first', 'the weights of first.', None),
    ('resume', 'not known which weights', None), (None, 'not known which weights', None)])
def test_what_it_began_with(text_of, begun, said, base):
    text = text_of(origin={'init_from': begun, 'data': []})
    assert said in text and 'secret' not in text
    assert front_matter(text).get('base_model') == base


def test_an_export_of_an_export_has_a_card_too(run):
    opened = checkpoint.open_model(str(run))._replace(checkpoint=None)
    text = card.card('x', opened, 'float32')
    assert 'license' not in front_matter(text)
    assert 'not known what the model was trained on' in text
    assert 'not known how the model was trained' in text and 'None were given' in text


def test_scores_of_a_report_are_those_of_this_model(run, text_of, tmp_path):
    evaluate.main([f'--models={run}', '--dataset=talks', f'--data_dir={run.parent / "data"}',
                   f'--out_dir={tmp_path}', '--device=cpu', '--max_new_tokens=4'])
    report = tmp_path / 'report.json'
    text = text_of(report)
    result = json.loads(report.read_text())['models'][0]
    assert f"| loss on responses | {result['loss']:.4f} |" in text
    assert '| answers: stops by itself |' in text
    for other in ({'description': 'out/best.pt (step 7, val_loss 1.0000)'}, {'folder': 'gpt2'}):
        report.write_text(json.dumps({'models': [result | other]}))
        with pytest.raises(UserError, match='is about .*, not about .* Run: python evaluate.py'):
            text_of(report)


@pytest.mark.parametrize('wrong', [
    '', '[]', '{}', '{"models": 3}', '{"models": [3]}', '{"models": [{}]}',
    '{"models": [{"folder": 3}]}', '[' * 100_000])
def test_a_broken_report_is_a_line(text_of, tmp_path, wrong):
    (tmp_path / 'report.json').write_text(wrong)
    with pytest.raises(UserError, match='Expected the report.json of evaluate.py') as error:
        text_of(tmp_path / 'report.json')
    assert '\n' not in str(error.value)


HOSTILE = ['---\nlicense: mit\n---', '\n# Forged\n', '<script>alert(1)</script>', '![x](http://x/y)',
           '| a |', '`', '```', 'javascript:alert(1)', 'https://x/)](y', '\ud800', '\x85\u2028\x7f',
           '@: - {[', '"\\', 'microsoft/x](javascript:1)', '{{ 1 }}']
TEXTS = st.text(max_size=20) | st.sampled_from(HOSTILE)
NUMBERS = st.none() | st.integers() | st.floats()
SOURCES = st.dictionaries(st.sampled_from(['name', 'url', 'licence', 'sha256']), TEXTS)
CONFIGS = st.dictionaries(TEXTS | st.just('learning_rate'), TEXTS | NUMBERS, max_size=3)


def test_no_text_in_a_file_breaks_the_card(text_of):
    known = {line for line in text_of().split('\n') if line.startswith('#')}

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(SOURCES, TEXTS, NUMBERS, CONFIGS, st.floats(), TEXTS, TEXTS)
    def check(source, dataset, tokens, config, val_loss, title, init_from):
        data = [{'dataset': dataset, 'source': source, 'tokens': tokens}]
        origin = {'init_from': init_from, 'data': data}
        text = text_of(title=title, origin=origin, config=config, val_loss=val_loss)
        text.encode()
        front = front_matter(text)
        assert set(front) <= {'library_name', 'pipeline_tag', 'license', 'base_model', 'datasets',
                              'tags'}
        assert front.get('license') in (None, 'other', *card.LICENCES)
        lines = [line for line in text.split('\n') if not line.startswith('    ')]
        assert lines.count('---') == 2
        assert sum(line.startswith('# ') for line in lines) == 1
        for line in lines:  # every heading is one of ours, and nothing is markup
            assert line in known or not line.startswith('#') or line.startswith('# ')
            assert '<script' not in line.replace('\\<', '') and '![' not in line.replace('\\[', '')
            assert '](javascript' not in line.replace('\\]', '')
    check()


@pytest.mark.parametrize('origin', [
    {'data': 3}, {'data': [3]}, {'data': [{'source': 3}]}, {'data': [{'source': {'url': 3}}]},
    {'data': [{'source': {'licence': [1]}}]}, {'data': [{'tokens': 'x'}]}, {'init_from': ['x']}])
def test_values_of_the_wrong_type_are_a_line(text_of, origin):
    with pytest.raises(UserError, match='What it says about its origin is damaged') as error:
        text_of(origin=origin)
    assert '\n' not in str(error.value)
