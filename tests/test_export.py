"""An exported folder: transformers reads in it what we have, id for id, and we read it back."""
import json
import os
from unittest import mock

import pytest
import torch

pytest.importorskip('hypothesis', reason='pip install -r requirements-test.txt')
transformers = pytest.importorskip('transformers')
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

import export
import sample
from conftest import TEXTS, assert_same_bits, exported, one_line
from core import checkpoint, conversation, readback
from core import tokenizer as tokenizers
from core.conversation import TEMPLATES
from core.tokenizer import END_OF_TEXT, TAGS
from formats import chat_template

JAPAN = 'What is the capital of Japan?'
ASKED = {'role': 'user', 'content': JAPAN}
ANSWERED = {'role': 'assistant', 'content': ' Grüße 🙂 <|endoftext|>'}
PIECES = [*TAGS, END_OF_TEXT, '<', '<user', '</', '|>', '### Response:', '### Instruction:', '\n',
          '\n\n', ' ', '  ', '\t', '\xa0', '\x85', 'Answer:', "'s", '12', 'a', 'the', '.',
          '{{ x }}', '{%', "'", '\\n', '\0', 'e\u0301', '🙂', '\ufeff', '\ufdd2']
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=7).map(''.join)
TEXT = TEXT.filter(lambda text: not {chat_template.BREAK, chat_template.JOINT} & set(text))


@pytest.fixture(scope='session')
def models(tmp_path_factory, learn, save_model):
    """{template: (checkpoint's folder, exported folder)} of models that say Tokyo, and stop.

    The vocabulary has runs of white space, as GPT-2's has, so that texts side by side can fuse.
    """
    runs = [white * n for white in (' ', '\n', '\t', ' \n', '\n ', '\n\n') for n in (1, 2, 3)]
    runs += [run + letter for run in runs for letter in 'a.']
    vocabulary = learn(TEXTS + runs, 400)
    base = tmp_path_factory.mktemp('models')
    found = {}
    for name in TEMPLATES:
        bpe = tokenizers.load(vocabulary, tags=name in ('xml', 'plain', 'alpaca'))
        source = save_model(base / f'out-{name}', bpe, name, 40, block_size=192)
        found[name] = source, exported(source, base / name)
    return found


@pytest.mark.parametrize('template', TEMPLATES)
def test_any_conversation_has_the_ids_and_the_mask_of_conversation_py(models, template):
    source, path = models[template]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    bpe = checkpoint.open_model(source).tokenizer

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(texts=st.lists(TEXT, min_size=1, max_size=5), system=st.none() | TEXT)
    def check(texts, system):
        messages = []
        if system is not None:
            messages.append({'role': 'system', 'content': system})
        for i, text in enumerate(texts):
            messages.append({'role': readback.ROLES[i % 2], 'content': text})
        turns = readback.from_messages(messages)
        try:
            ids, mask, _ = conversation.encode(turns, bpe, template)
        except ValueError:  # a forged heading
            for asked in (True, False):
                with pytest.raises(TemplateError, match='contains the heading'):
                    theirs.apply_chat_template(messages, add_generation_prompt=asked)
            return
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)['input_ids']
        assert prompt == conversation.prompt(turns, bpe, template)
        found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert found['input_ids'] == ids.tolist()
        assert found['assistant_masks'] == mask.tolist()
        rendered = theirs.apply_chat_template(messages, tokenize=False)
        assert theirs(rendered)['input_ids'] == ids.tolist()  # in two steps, as vLLM and TRL do it
    check()


@pytest.mark.parametrize('template', TEMPLATES)
def test_what_is_no_conversation_is_refused(models, template):
    theirs = transformers.AutoTokenizer.from_pretrained(models[template][1])
    system = {'role': 'system', 'content': 'Be brief.'}
    for messages, said in (
            ([ANSWERED], 'user and assistant in turn'), ([ASKED, system], 'assistant in turn'),
            ([ASKED] * 2, 'assistant in turn'), ([system], 'there is no message of a user'),
            ([ASKED | {'content': [{'text': 'Hi'}]}], 'must be a text'),
            ([ASKED | {'content': 'a\ufdd0b'}], 'stand for no character')):
        with pytest.raises(TemplateError, match=said):
            theirs.apply_chat_template(messages)


def test_the_template_works_with_gpt2s_vocabulary(tmp_path, gpt2, save_model):
    path = exported(save_model(tmp_path / 'out', gpt2, n_embd=8, n_layer=1), tmp_path / 'my')
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ids = conversation.encode(readback.from_messages([ASKED, ANSWERED]), gpt2)[0].tolist()
    assert theirs.apply_chat_template([ASKED, ANSWERED])['input_ids'] == ids
    assert theirs.decode(ids) == gpt2.decode(ids) and len(theirs) == gpt2.vocab_size


@pytest.mark.parametrize('changes, dtype, tolerance', [
    ({'bias': False}, 'float32', 1e-4), ({'gelu': 'none'}, 'float32', 1e-4),
    ({}, 'bfloat16', 0.05), ({}, 'float16', 0.01)])
def test_logits_are_ours(tmp_path, small, save_model, changes, dtype, tolerance):
    source = save_model(tmp_path / 'out', small, steps=3, **changes)
    path = exported(source, tmp_path / 'my', dtype=dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert theirs.dtype == getattr(torch, dtype)
    # No padded row is exported.
    idx = torch.arange(small.vocab_size)[None, :60]
    with torch.no_grad():
        expected = checkpoint.open_model(source).model(idx)
        torch.testing.assert_close(theirs.float()(idx).logits, expected, atol=tolerance, rtol=0)


@pytest.fixture
def as_gpt2(models, monkeypatch):
    """The vocabulary of these models stands for GPT-2's, which not every machine has."""
    bpe = checkpoint.open_model(models['xml'][0]).tokenizer
    monkeypatch.setattr(tokenizers, 'load', lambda name, tags=True: bpe.with_tags(tags))


@pytest.mark.parametrize('template', TEMPLATES)
def test_transformers_writes_and_stops_as_sample_py_does(models, as_gpt2, template, capsys):
    source, path = models[template]
    ask = transformers.pipeline('text-generation', str(path))
    stops = conversation.stop_ids(checkpoint.open_model(source).tokenizer, template)
    assert set(ask.model.generation_config.eos_token_id) == stops
    # transformers leaves the space there that `plain` and `question` put before an answer.
    assert ask([ASKED])[0]['generated_text'][-1]['content'].removeprefix(' ') == 'Tokyo.'
    for init_from in (source, path):
        capsys.readouterr()
        sample.main([f'--init_from={init_from}', '--temperature=0', '--device=cpu',
                     f'--user={JAPAN}'])
        assert capsys.readouterr().out == 'Tokyo.\n'


@pytest.mark.parametrize('template', TEMPLATES)
def test_what_we_export_and_transformers_saves_opens_as_it_was(
        models, as_gpt2, template, tmp_path):
    source, path = models[template]
    saved = tmp_path / 'saved'
    for part in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        part.from_pretrained(path).save_pretrained(saved)
    was = checkpoint.open_model(source)
    for folder in (path, saved):
        opened = checkpoint.open_model(str(folder))
        assert opened.template == template and opened.model.config == was.model.config
        assert opened.tokenizer.tokens == was.tokenizer.tokens
        assert opened.tokenizer.special == was.tokenizer.special
        assert_same_bits(dict(opened.model.state_dict()), dict(was.model.state_dict()))
    again = exported(path, tmp_path / 'again')
    for name in export.FILES - {'README.md', 'model.gguf'}:
        assert (again / name).read_bytes() == (path / name).read_bytes(), name


def test_an_export_replaces_an_export_and_nothing_else(models, tmp_path, monkeypatch):
    source = models['xml'][0]
    out = tmp_path / 'my'

    def check_left(dtype):
        assert json.loads((out / 'config.json').read_text())['dtype'] == dtype
        assert set(os.listdir(out)) == export.FILES - {'model.gguf'}
        assert os.listdir(tmp_path) == ['my']
    exported(source, out)
    with one_line('is replaced, with --overwrite=True'):
        exported(source, out)
    exported(source, out, overwrite=True, dtype='bfloat16')
    check_left('bfloat16')
    full = mock.Mock(side_effect=OSError(28, 'No space left on device'))
    with monkeypatch.context() as patch, one_line('No space left on device. Make room'):
        patch.setattr(os, 'fsync', full)
        exported(source, out, overwrite=True)
    check_left('bfloat16')
    # One that was killed is made again.
    os.makedirs(tmp_path / 'my.partial' / 'half')
    exported(source, out, overwrite=True)
    check_left('float32')

    (out / 'notes.txt').write_text('mine')
    with one_line('holds notes.txt. Only an export is replaced'):
        exported(source, out, overwrite=True)
    with one_line(f'cannot write {out}/notes.txt: .*--out=FOLDER'):
        exported(source, out / 'notes.txt', overwrite=True)
    assert (out / 'notes.txt').read_text() == 'mine'


def test_a_model_that_was_never_tuned_has_no_template_to_export(models, tmp_path, monkeypatch):
    untuned = checkpoint.open_model(models['xml'][0])._replace(template=None)
    monkeypatch.setattr(checkpoint, 'open_model', lambda *keys: untuned)
    with one_line('was never tuned here'):
        exported('gpt2', tmp_path / 'new')
