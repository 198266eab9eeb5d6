"""The model card of an export: what the run knows stands in it, and nothing that a file says breaks it."""
import json
import os

import pytest

pytest.importorskip('hypothesis', reason='hypothesis is not installed: pip install -r requirements-test.txt')
from hypothesis import given, settings, strategies as st

from formats import card
from core import checkpoint
import evaluate
from core import tokenfile
from core import tokenizer as tokenizers
import train
from configurator import UserError
from core.conversation import Turn, encode

huggingface_hub = pytest.importorskip('huggingface_hub')
OASST = {'name': 'oasst2', 'url': 'https://huggingface.co/datasets/OpenAssistant/oasst2/resolve/abc/2023-11-05_oasst2_ready.trees.jsonl.gz',
         'bytes': 5, 'sha256': 'f' * 64, 'licence': 'Apache-2.0'}


@pytest.fixture(scope='module')
def run(tmp_path_factory, vocabulary):
    """(data_dir, out_dir) of two steps on two data sets, one of them without a word on where it is from."""
    base, bpe = tmp_path_factory.mktemp('card'), tokenizers.load(vocabulary)
    ids, mask, _ = encode([Turn('user', 'What is the capital of Japan?'), Turn('assistant', 'Tokyo.')], bpe)
    for name, more in (('talks', {'source': OASST}), ('mine', {})):
        with tokenfile.Writer(str(base / 'data' / name), ('train', 'val')) as writer:
            for split in ('train', 'val'):
                writer.add(split, ids, mask, [len(ids)])
            writer.finish({'template': 'xml', 'tokenizer': bpe.state(), **more})
    train.main(flags(base / 'data', base / 'out', init_from='scratch'))
    return base / 'data', base / 'out'


def flags(data, out, **keys):
    keys = dict(dataset='talks,mine', data_dir=data, out_dir=out, n_layer=1, n_head=2, n_embd=16, block_size=64, batch_size=1,
                gradient_accumulation_steps=1, max_iters=2, eval_interval=1, log_interval=1, device='cpu', learning_rate=1e-2) | keys
    return [f'--{key}={value}' for key, value in keys.items()]


def text_of(folder, report='', title='my-model', **changes):
    """The card of the checkpoint in the folder, with changes to what the checkpoint holds."""
    opened = checkpoint.open_model(str(folder), which='best')
    return card.card(title, opened._replace(contents={**opened.contents, **changes}), str(folder), 'float32', str(report) if report else '')


def front_matter(text):
    """The YAML at the top, as the hub reads it."""
    return huggingface_hub.ModelCard(text).data.to_dict()


def test_train_py_keeps_where_the_data_is_from_and_a_resumed_run_does_too(run, tmp_path):
    origin = checkpoint.load(str(run[1] / 'ckpt.pt'))['origin']
    assert origin['init_from'] == 'scratch'
    assert [part['dataset'] for part in origin['data']] == ['talks', 'mine']
    assert [part['source'] for part in origin['data']] == [OASST, None]
    (tmp_path / 'out').mkdir()
    older = checkpoint.load(str(run[1] / 'ckpt.pt'))
    checkpoint.save(older, str(tmp_path / 'out' / 'ckpt.pt'))
    train.main([f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--max_iters=3', '--lr_decay_iters=2'])
    assert checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['origin'] == origin
    del older['origin']  # a checkpoint of before goes on, and now says what it can
    checkpoint.save(older, str(tmp_path / 'out' / 'ckpt.pt'))
    train.main([f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--max_iters=3', '--lr_decay_iters=2'])
    assert checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['origin'] == {**origin, 'init_from': 'resume'}


def test_the_card_says_what_the_run_knows(run):
    text, saved = text_of(run[1]), checkpoint.load(str(run[1] / 'best.pt'))
    front = front_matter(text)
    assert front['license'] == 'other' and front['datasets'] == ['OpenAssistant/oasst2'] and 'base_model' not in front
    assert front['pipeline_tag'] == 'text-generation' and front['library_name'] == 'transformers'
    for said in ('# my-model\n', 'trained from scratch', '<user>What is the capital of France?</user>', '`The capital of France is Paris.</assistant>`',
                 'oasst2', f'<{OASST["url"]}>', 'Apache-2.0', 'licence: not stated', 'f' * 64, '\n    learning_rate = 0.01\n',
                 f"| optimizer steps | {saved['step']} |", f"{saved['val_loss']:.4f}", 'step 2', '--init_from=my-model', '64 tokens in all'):
        assert said in text, (said, text)
    assert str(run[0]) not in text and 'out_dir' not in text


@pytest.mark.parametrize('licences, front', [
    (['Apache-2.0'], 'apache-2.0'), (['MIT', 'MIT'], 'mit'), (['MIT', 'Apache-2.0'], 'other'), (['CC-BY-NC-4.0', None], 'other'), (['mine'], 'other'),
    ([None], None), ([], None)])
def test_the_licence_at_the_top_is_that_of_all_the_data(run, licences, front):
    origin = {'init_from': 'scratch', 'data': [{'source': {'name': 'x', 'licence': licence}} for licence in licences]}
    assert front_matter(text_of(run[1], origin=origin)).get('license') == front


def test_a_run_that_learned_every_token_says_so(run):
    assert 'All of it was learned.' in text_of(run[1], config={'loss_on': 'all'})


@pytest.mark.parametrize('begun, said, base', [
    ('gpt2-medium', '[openai-community/gpt2-medium](https://huggingface.co/openai-community/gpt2-medium)', 'openai-community/gpt2-medium'),
    ('distilgpt2', 'distilbert/distilgpt2', 'distilbert/distilgpt2'), ('microsoft/DialoGPT-small', 'DialoGPT-small', 'microsoft/DialoGPT-small'),
    ('/home/me/secret/first', 'the weights of first.', None), ('resume', 'does not say which weights', None), (['x'], 'does not say which weights', None)])
def test_what_it_began_with(run, begun, said, base):
    text = text_of(run[1], origin={'init_from': begun, 'data': []})
    assert said in text and front_matter(text).get('base_model') == base and 'secret' not in text


def test_a_checkpoint_of_before_and_an_export_have_a_card_too(run):
    opened = checkpoint.open_model(str(run[1]))
    without = {key: value for key, value in opened.contents.items() if key != 'origin'}
    for contents in (without, {}):
        text = card.card('x', opened._replace(contents=contents), str(run[1] if contents else 'nowhere'), 'float32')
        assert 'does not say what it was trained on' in text and 'license' not in front_matter(text)
    assert 'does not say how it was trained' in text and 'None were given' in text


def test_scores_of_a_report_are_those_of_this_model(run, tmp_path, monkeypatch):
    evaluate.main([f'--models={run[1]}', '--dataset=talks', f'--data_dir={run[0]}', f'--out_dir={tmp_path}', '--device=cpu', '--max_new_tokens=4'])
    report = tmp_path / 'report.json'
    text = text_of(run[1], report)
    result = json.loads(report.read_text())['models'][0]
    assert f"| loss on responses | {result['loss']:.4f} |" in text and '| answers: stops by itself |' in text
    report.write_text(json.dumps({'models': [{**result, 'description': 'out/best.pt (step 7, val_loss 1.0000)'}]}))
    with pytest.raises(UserError, match=r'is about out/best.pt \(step 7, val_loss 1.0000\), not about'):
        text_of(run[1], report)
    report.write_text(json.dumps({'models': [{**result, 'model': 'gpt2'}]}))
    with pytest.raises(UserError, match='python evaluate.py --models='):
        text_of(run[1], report)


@pytest.mark.parametrize('wrong', ['', '[]', '{}', '{"models": 3}', '{"models": [3]}', '{"models": [{}]}', '{"models": [{"model": 3}]}', '[' * 100_000])
def test_a_broken_report_is_a_line(run, tmp_path, wrong):
    (tmp_path / 'report.json').write_text(wrong.replace('{}', json.dumps({'model': str(run[1])}) if 'models' in wrong else '{}'))
    with pytest.raises(UserError, match='is not a report.json') as caught:
        text_of(run[1], tmp_path / 'report.json')
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='is not a report.json'):
        text_of(run[1], tmp_path / 'nowhere.json')


ODD = st.one_of(st.none(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.none(), max_size=1),
                st.text(max_size=20), st.sampled_from(['---\nlicense: mit\n---', '\n# Forged\n', '<script>alert(1)</script>', '![x](http://x/y.png)',
                                                       '| a |', '`', '```', 'javascript:alert(1)', 'https://x/)](y', '\ud800', '\x85\u2028\x7f', '@: - {[', '"\\']))


def test_nothing_that_a_file_says_breaks_the_card(run):
    known = {line for line in text_of(run[1]).split('\n') if line.startswith(('#', '---', '|-', '- '))}

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.dictionaries(st.sampled_from(['name', 'url', 'licence', 'sha256', 'bytes']), ODD), ODD, ODD, st.dictionaries(st.one_of(ODD.filter(
        lambda key: isinstance(key, str)), st.just('learning_rate')), ODD, max_size=3), st.floats(), ODD, ODD)
    def check(source, dataset, tokens, config, val_loss, odd, init_from):
        for data in ([{'dataset': dataset, 'source': source, 'tokens': tokens}, {'source': odd}, odd], odd):
            title = odd if isinstance(odd, str) else 'my-model'
            text = text_of(run[1], title=title, origin={'init_from': init_from, 'data': data}, config=config, val_loss=val_loss)
            text.encode()
            front = front_matter(text)
            assert set(front) <= {'library_name', 'pipeline_tag', 'license', 'base_model', 'datasets', 'tags'}
            assert front.get('license') in (None, 'other', *card.LICENCES)
            lines = text.split('\n')
            assert lines.count('---') == 2
            for line in lines:  # every heading, rule and list item is one of ours
                if line.startswith('#'):
                    assert line in known or line.startswith('# ')
                assert '<script' not in line.replace('\\<', '') or line.startswith('    ')
                assert '![' not in line.replace('\\[', '') or line.startswith('    ')
            assert sum(line.startswith('# ') for line in lines) == 1
    check()


def test_markdown_reads_odd_names_as_text(run):
    markdown_it = pytest.importorskip('markdown_it')
    source = {'name': '<b>x</b> *y* [z](javascript:1) | `c`', 'licence': '<img src=x>', 'url': 'javascript:alert(1)'}
    html = markdown_it.MarkdownIt('commonmark', {'html': True}).enable('table').render(
        text_of(run[1], title='<i>t</i>', origin={'init_from': 'scratch', 'data': [{'source': source}]}).split('---\n', 2)[2])
    assert '&lt;b&gt;x&lt;/b&gt; *y* [z](javascript:1) | `c`' in html and '&lt;img src=x&gt;' in html and '&lt;i&gt;t&lt;/i&gt;' in html
    assert '<b>' not in html and '<img' not in html and 'href="javascript' not in html
