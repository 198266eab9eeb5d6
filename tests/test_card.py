"""The model card of an export says what the run knows."""
import dataclasses
import json

import pytest

hub = pytest.importorskip('huggingface_hub')

import conftest
import evaluate
from conftest import JAPAN, one_line, write_data
from core import checkpoint
from formats import card

OASST = {'name': 'oasst2', 'licence': 'Apache-2.0', 'sha256': 'f' * 64, 'bytes': 5,
         'url': 'https://huggingface.co/datasets/OpenAssistant/oasst2/resolve/abc/x.jsonl.gz'}


@pytest.fixture(scope='module')
def run(tmp_path_factory, small):
    """The folder of a run of a step on two data sets; one says nothing about its source."""
    base = tmp_path_factory.mktemp('card')
    for name in ('talks', 'mine'):
        write_data(base / 'data' / name, small, {'train': [JAPAN], 'val': [JAPAN]})
    meta = base / 'data' / 'talks' / 'meta.json'
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {'source': OASST}))
    conftest.run(base / 'data', base / 'out', dataset='talks,mine', max_iters=1, eval_interval=1)
    return base / 'out'


@pytest.fixture(scope='module')
def text_of(run):
    """text_of(key=value, …): the card, with changes to what the checkpoint holds."""
    opened = checkpoint.open_model(str(run), which='best')

    def text_of(report='', title='my-model', **changes):
        saved = dataclasses.replace(opened.checkpoint, **changes)
        return card.card(title, opened._replace(checkpoint=saved), 'float32', str(report))
    return text_of


def test_the_card_says_what_the_run_knows(run, text_of):
    text = text_of()
    saved = checkpoint.load(str(run / 'best.pt'))
    front = hub.ModelCard(text).data.to_dict()  # the YAML at the top
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


@pytest.mark.parametrize('licences, front', [
    (['MIT', 'MIT'], 'mit'), (['MIT', 'Apache-2.0'], 'other'), (['CC-BY-NC-4.0', None], 'other'),
    (['mine'], 'other'), ([None], None)])
def test_the_licence_at_the_top_is_that_of_all_the_data(text_of, licences, front):
    data = [{'source': {'name': 'x', 'licence': licence}} for licence in licences]
    assert hub.ModelCard(text_of(origin={'data': data})).data.license == front


@pytest.mark.parametrize('begun, said, base', [
    ('gpt2-medium', '[gpt2-medium](https://huggingface.co/gpt2-medium)', 'gpt2-medium'),
    ('microsoft/DialoGPT-small', 'DialoGPT-small', 'microsoft/DialoGPT-small'),
    ('/home/me/secret/my_first', 'the weights of my\\_first.', None),
    (None, 'not known which weights', None)])
def test_what_it_began_with(text_of, begun, said, base):
    data = [{'dataset': 'my_*data*', 'source': {'name': '<b>[x](y)|`'}}]
    text = text_of(title='a_b', origin={'init_from': begun, 'data': data})
    assert said in text and 'secret' not in text
    assert hub.ModelCard(text).data.base_model == base
    # Markdown in a name is shown as it is.
    assert '\n# a\\_b\n' in text and '- \\<b\\>\\[x\\](y)\\|\\`; licence' in text


def test_scores_of_a_report_are_those_of_this_model(run, text_of, tmp_path):
    evaluate.main([f'--models={run}', '--dataset=talks', f'--data_dir={run.parent / "data"}',
                   f'--out_dir={tmp_path}', '--device=cpu', '--max_new_tokens=4'])
    report = tmp_path / 'report.json'
    text = text_of(report)
    result = json.loads(report.read_text())['models'][0]
    assert f"| loss on responses | {result['loss']:.4f} |" in text
    assert '| answers: stops by itself |' in text
    report.write_text(json.dumps({'models': [result | {'description': 'gpt2'}]}))
    with one_line('is about gpt2, not about .* Run: python evaluate.py'):
        text_of(report)


def test_what_nobody_knows_is_said(run):
    text = card.card('x', checkpoint.open_model(str(run))._replace(checkpoint=None), 'float32')
    for said in ('what the model was trained on', 'how the model was trained', 'None were given'):
        assert said in text
    assert hub.ModelCard(text).data.license is None
