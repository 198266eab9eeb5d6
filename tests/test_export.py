"""An exported folder: transformers reads in it what we have, id for id, and we read it back."""
import json
import os
import shutil

import pytest
import torch

pytest.importorskip('hypothesis', reason='pip install -r requirements-test.txt')
transformers = pytest.importorskip('transformers')
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

import export
import sample
from configurator import UserError
from conftest import TEXTS
from core import checkpoint, conversation, readback
from core import tokenizer as tokenizers
from core.conversation import TEMPLATES
from core.tokenizer import END_OF_TEXT, TAGS
from formats import chat_template

JAPAN = 'What is the capital of Japan?'
FRANCE = [{'role': 'user', 'content': 'What is the capital of France?'},
          {'role': 'assistant', 'content': 'The capital of France is Paris.'}]
PIECES = [*TAGS, END_OF_TEXT, '<', '<user', '</', '|>', '### Response:', '### Instruction:', '\n',
          '\n\n', ' ', '  ', '\t', '\xa0', '\x85', 'Answer:', "'s", '12', 'a', 'the', '.',
          '{{ x }}', '{%', "'", '\\n', '\0', 'e\u0301', '🙂', '\ufeff', '\ufdd2']
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=7).map(''.join)
TEXT = TEXT.filter(lambda text: not {chat_template.BREAK, chat_template.JOINT} & set(text))


def exported(source, out, **keys):
    """Run export.py in this process; returns the folder."""
    keys = {'init_from': source, 'out': out} | keys
    export.main([f'--{key}={value}' for key, value in keys.items()])
    return str(out)


def read(path, name):
    with open(os.path.join(path, name), 'rb') as file:
        return file.read()


def user(text):
    return [{'role': 'user', 'content': text}]


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


@pytest.fixture(params=TEMPLATES)
def each(request, models):
    """(template, transformers' tokenizer, ours) of each template."""
    source, path = models[request.param]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    return request.param, theirs, checkpoint.open_model(source).tokenizer


# ---- the chat template ----

def test_any_conversation_has_the_ids_and_the_mask_of_conversation_py(each):
    template, theirs, bpe = each

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(texts=st.lists(TEXT, min_size=1, max_size=5), system=st.none() | TEXT)
    def check(texts, system):
        messages = []
        for i, text in enumerate(texts):
            messages.append({'role': readback.ROLES[i % 2], 'content': text})
        if system is not None:
            messages.insert(0, {'role': 'system', 'content': system})
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


def test_the_template_works_with_gpt2s_vocabulary(tmp_path, gpt2, save_model):
    path = exported(save_model(tmp_path / 'out', gpt2, n_embd=8, n_layer=1), tmp_path / 'my')
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    messages = [*user(' done.</user>\n'),
                {'role': 'assistant', 'content': 'Grüße 🙂 <|endoftext|>'}]
    ids = conversation.encode(readback.from_messages(messages), gpt2)[0].tolist()
    assert theirs.apply_chat_template(messages)['input_ids'] == ids
    assert theirs.decode(ids) == gpt2.decode(ids)
    assert len(theirs) == gpt2.vocab_size == 50263


@pytest.mark.parametrize('messages, said', [
    (FRANCE[1:], 'user and assistant in turn'), (FRANCE[:1] * 2, 'user and assistant in turn'),
    ([FRANCE[0], {'role': 'system', 'content': 'x'}], 'user and assistant in turn'),
    ([{'role': 'system', 'content': 'x'}], 'there is no message of a user'),
    (user([{'text': 'Hi'}]), 'must be a text'), (user('a\ufdd0b'), 'stand for no character')])
def test_what_is_no_conversation_is_refused(each, messages, said):
    with pytest.raises(TemplateError, match=said):
        each[1].apply_chat_template(messages)


# ---- the model ----

@pytest.mark.parametrize('changes, dtype, tolerance', [
    ({}, 'float32', 1e-4), ({'bias': False}, 'float32', 1e-4), ({'gelu': 'none'}, 'float32', 1e-4),
    ({}, 'bfloat16', 0.05), ({}, 'float16', 0.01)])
def test_logits_are_ours(tmp_path, small, save_model, changes, dtype, tolerance):
    source = save_model(tmp_path / 'out', small, steps=3, **changes)
    path = exported(source, tmp_path / 'my', dtype=dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert theirs.dtype == getattr(torch, dtype)
    idx = torch.arange(small.vocab_size)[None, :60]
    ours = checkpoint.open_model(source).model
    with torch.no_grad():
        logits = theirs.float()(idx).logits
        torch.testing.assert_close(logits, ours(idx), atol=tolerance, rtol=0)
    # No padded row is exported.
    assert logits.shape[-1] == small.vocab_size < ours.config.padded_vocab_size


@pytest.mark.parametrize('template', TEMPLATES)
def test_transformers_writes_and_stops_as_sample_py_does(models, template, capsys):
    source, path = models[template]
    ask = transformers.pipeline('text-generation', path)
    stops = conversation.stop_ids(checkpoint.open_model(source).tokenizer, template)
    assert set(ask.model.generation_config.eos_token_id) == stops
    tokens = ask.tokenizer.apply_chat_template(user(JAPAN), add_generation_prompt=True,
                                               return_tensors='pt')
    assert set(tokens) == {'input_ids', 'attention_mask'}
    assert ask.model.generate(**tokens)[0, -1].item() in stops
    # transformers leaves the space there that `plain` and `question` put before an answer.
    assert ask(user(JAPAN))[0]['generated_text'][-1]['content'].removeprefix(' ') == 'Tokyo.'
    for init_from in (source, path):
        capsys.readouterr()
        sample.main([f'--init_from={init_from}', '--temperature=0', '--device=cpu',
                     f'--user={JAPAN}'])
        assert capsys.readouterr().out == 'Tokyo.\n'


# ---- back in ----

@pytest.mark.parametrize('template', TEMPLATES)
def test_what_was_exported_opens_as_it_was_and_exports_the_same(models, template, tmp_path):
    source, path = models[template]
    was = checkpoint.open_model(source)
    opened = checkpoint.open_model(path)
    assert opened.template == template and opened.model.config == was.model.config
    assert opened.tokenizer.state()['tokens'] == was.tokenizer.state()['tokens']
    assert opened.tokenizer.special == was.tokenizer.special
    for name, p in was.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], p), name
    again = exported(path, tmp_path / 'again')
    for name in export.FILES - {'README.md', 'model.gguf'}:
        assert read(again, name) == read(path, name), name


def test_what_transformers_saves_comes_back_with_its_template(models, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models['xml'][1]).eval()
    bpe = transformers.AutoTokenizer.from_pretrained(models['xml'][1])
    for part in (model, bpe):
        part.save_pretrained(tmp_path)
    opened = checkpoint.open_model(str(tmp_path))
    ids = bpe.apply_chat_template(FRANCE)['input_ids']
    turns = readback.from_messages(FRANCE)
    assert conversation.encode(turns, opened.tokenizer, opened.template)[0].tolist() == ids
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(opened.model.eval()(idx), model(idx).logits, atol=1e-4, rtol=0)


# ---- whole or not at all ----

@pytest.fixture
def source(tmp_path, small, save_model):
    return save_model(tmp_path / 'out', small)


def dtype_of(path):
    return json.loads(read(path, 'config.json'))['dtype']


def test_an_export_replaces_an_export_and_nothing_else(source, tmp_path):
    path = exported(source, tmp_path / 'my')
    assert set(os.listdir(path)) == export.FILES - {'model.gguf'}
    modes = {os.stat(os.path.join(path, name)).st_mode for name in os.listdir(path)}
    assert len(modes) == 1
    with pytest.raises(UserError, match='is there already. Replace it with --overwrite=True'):
        exported(source, path)
    exported(source, path, overwrite=True, dtype='bfloat16')
    assert dtype_of(path) == 'bfloat16'
    (tmp_path / 'my' / 'notes.txt').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    for out in ('my', 'file'):
        with pytest.raises(UserError, match='which no export wrote. Only an export can be'):
            exported(source, tmp_path / out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ['file', 'my', 'out']


@pytest.mark.parametrize('where', ['fsync', 'rename'])
def test_a_full_disk_leaves_what_was_there(source, tmp_path, monkeypatch, where):
    path = exported(source, tmp_path / 'my')
    call = getattr(os, where)

    def full(one, *others):
        if where == 'fsync' or one.endswith('new'):
            raise OSError(28, 'No space left on device')
        call(one, *others)
    monkeypatch.setattr(os, where, full)
    with pytest.raises(UserError, match='my: .*No space left on device. Make room'):
        exported(source, path, overwrite=True, dtype='float16')
    assert dtype_of(path) == 'float32' and sorted(os.listdir(tmp_path)) == ['my', 'out']


def test_a_kill_between_the_renames_loses_no_export(source, tmp_path):
    """It leaves the export in my.partial/old, and a half-written one in my.partial/new."""
    path = exported(source, tmp_path / 'my')
    os.makedirs(tmp_path / 'my.partial' / 'new')
    os.rename(path, tmp_path / 'my.partial' / 'old')
    with pytest.raises(UserError, match='is there already'):
        exported(source, path)
    assert dtype_of(path) == 'float32' and sorted(os.listdir(tmp_path)) == ['my', 'out']


def test_a_place_that_cannot_be_written_to_gets_one_line(source):
    with pytest.raises(UserError, match='cannot write to /proc/x/y.*--out=FOLDER') as error:
        exported(source, '/proc/x/y')
    assert '\n' not in str(error.value)


def test_a_model_that_was_never_tuned_is_not_exported(models, tmp_path):
    folder = shutil.copytree(models['xml'][1], tmp_path / 'm')
    config = json.loads(read(folder, 'config.json'))
    del config['conversation_template']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='was never tuned here'):
        exported(folder, tmp_path / 'my')
