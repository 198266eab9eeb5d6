"""An exported folder: transformers reads in it what we have, id for id, and it comes back in as it went out."""
import json
import os
import stat

import pytest
import torch

pytest.importorskip('hypothesis', reason='hypothesis is not installed: pip install -r requirements-test.txt')
from hypothesis import given, settings, strategies as st
from jinja2.exceptions import TemplateError

from formats import chat_template
from core import checkpoint
from core import conversation
import evaluate
import export
import sample
from core import tokenfile
from core import tokenizer as tokenizers
import train
from configurator import UserError
from core.conversation import TEMPLATES, Turn
from model import GPT, GPTConfig
from core.tokenizer import END_OF_TEXT, TAGS
from conftest import TEXTS

transformers = pytest.importorskip('transformers')
PIECES = [*TAGS, END_OF_TEXT, '<', '>', '<user', '</', '|>', '### Response:', '### Instruction:', '\n', '\n\n', ' ', '  ', '\t', '\xa0', '\u2003', '\x1c',
          '\x85', 'Answer:', "'s", '12', 'a', 'the', '.', '{{ x }}', '{%', "'", '\\n', '\0', 'e\u0301', '🙂', '\ufeff', '\ufdd2']
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=7).map(''.join).filter(
    lambda text: not {chat_template.BREAK, chat_template.JOINT} & set(text))
SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, database=None)
FRANCE = [{'role': 'user', 'content': 'What is the capital of France?'}, {'role': 'assistant', 'content': 'The capital of France is Paris.'}]


def make(folder, bpe, template='xml', steps=0, **shape):
    """A folder with the checkpoint of a tiny model, after some steps on what Japan's capital is."""
    torch.manual_seed(0)
    keys = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, dropout=0.0, bias=True, vocab_size=bpe.vocab_size) | shape
    model = GPT(GPTConfig(**keys))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids, mask, _ = conversation.encode([Turn('user', 'What is the capital of Japan?'), Turn('assistant', 'Tokyo.')], bpe, template)
        logits = model(torch.tensor(ids[None, :-1].astype(int)))[0]
        loss = torch.nn.functional.cross_entropy(logits[mask[1:] == 1], torch.tensor(ids[1:][mask[1:] == 1].astype(int)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    os.makedirs(folder)
    checkpoint.save(checkpoint.pack(model, bpe, template, {'max_iters': steps}, steps, 1.25), os.path.join(folder, 'ckpt.pt'))
    return str(folder)


def exported(source, out, **keys):
    """Run export.py in this process; the folder."""
    export.main([f'--{key}={value}' for key, value in {'init_from': source, 'out': out, **keys}.items()])
    return str(out)


@pytest.fixture(scope='session')
def spaced(tmp_path_factory):
    """The path of a vocabulary that has runs of white space as tokens, as GPT-2's has: what stands side by side can fuse."""
    path = str(tmp_path_factory.mktemp('spaced') / 'tokenizer.json')
    runs = [one + other + letter for one in (' ', '\n', '\t', '\n\n', '  ') for other in ('', ' ', '\n', '\t') for letter in ('', 'a', '.')]
    tokenizers.learn([*TEXTS, *(run * n for run in runs for n in (1, 2, 3))], 400, path)
    return path


@pytest.fixture(scope='session')
def folders(tmp_path_factory, spaced):
    """{template: (exported folder, our tokenizer)}; two have the tags without needing them."""
    base, found = tmp_path_factory.mktemp('exported'), {}
    for template in TEMPLATES:
        bpe = tokenizers.load(spaced, tags=template in ('xml', 'plain', 'alpaca'))
        found[template] = exported(make(base / f'out-{template}', bpe, template), base / template), bpe
    return found


@pytest.fixture(params=TEMPLATES)
def each(request, folders):
    """(template, transformers' tokenizer, ours) of each template."""
    folder, bpe = folders[request.param]
    return request.param, transformers.AutoTokenizer.from_pretrained(folder), bpe


def test_gpt2s_merges_are_found_again(gpt2, vocabulary):
    from tiktoken.load import read_file_cached
    lines = read_file_cached(tokenizers.GPT2_MERGES, tokenizers.GPT2_MERGES_SHA256).decode().split('\n')[1:-1]
    assert [tuple(map(tokenizers.to_unicode, pair)) for pair in chat_template.merges(gpt2.tokens)] == [tuple(line.split()) for line in lines]
    with open(vocabulary, encoding='utf-8') as file:
        learned = json.load(file)['model']['merges']
    assert [[*map(tokenizers.to_unicode, pair)] for pair in chat_template.merges(tokenizers.load(vocabulary).tokens)] == learned


def test_a_vocabulary_that_no_merging_makes_is_refused():
    with pytest.raises(UserError, match="its token b'user'"):
        chat_template.merges([bytes([b]) for b in range(256)] + [b'user'])


# ---- the chat template ----

def test_any_conversation_has_the_ids_and_the_mask_of_conversation_py(each):
    template, theirs, bpe = each

    @SETTINGS
    @given(texts=st.lists(TEXT, min_size=1, max_size=5), system=st.none() | TEXT)
    def check(texts, system):
        messages = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]
        messages = ([] if system is None else [{'role': 'system', 'content': system}]) + messages
        turns = conversation.from_messages(messages)
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


def test_the_template_works_with_gpt2s_vocabulary_and_ids_read_back(tmp_path, gpt2):
    folder = exported(make(tmp_path / 'out', gpt2, n_embd=8, n_layer=1), tmp_path / 'my')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{'role': 'user', 'content': ' done.</user>\n'}, {'role': 'assistant', 'content': 'Grüße 🙂 <|endoftext|>'}]
    ids = conversation.encode(conversation.from_messages(messages), gpt2)[0].tolist()
    assert theirs.apply_chat_template(messages)['input_ids'] == ids
    assert theirs.decode(ids) == gpt2.decode(ids)
    assert len(theirs) == gpt2.vocab_size == 50263
    for text in ("It's 12 words;\n\n  done ", '<user>Hi</user>' + END_OF_TEXT):
        assert theirs(text)['input_ids'] == gpt2.encode_with_tags(text).tolist()


@pytest.mark.parametrize('messages, said', [
    ([{'role': 'assistant', 'content': 'Hi'}], 'user and assistant in turn'),
    ([FRANCE[0], FRANCE[0]], 'user and assistant in turn'),
    ([FRANCE[0], {'role': 'system', 'content': 'x'}], 'user and assistant in turn'),
    ([{'role': 'tool', 'content': 'Hi'}], 'user and assistant in turn'),
    ([{'content': 'Hi'}], 'user and assistant in turn'),
    ([{'role': 'system', 'content': 'x'}], 'there is no message of a user'),
    ([{'role': 'user'}], 'must be a text'), ([{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}], 'must be a text'),
    ([{'role': 'user', 'content': 'a\ufdd0b'}], 'stand for no character'), ([{'role': 'user', 'content': '\ufdd1'}], 'stand for no character')])
def test_what_is_no_conversation_is_refused(each, messages, said):
    with pytest.raises(TemplateError, match=said):
        each[1].apply_chat_template(messages)


def test_joints_are_written_only_where_something_would_fuse(each):
    template, theirs, _ = each
    for text in ('What is it?', '1', 'é'):
        rendered = theirs.apply_chat_template([{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text}], tokenize=False)
        assert not {chat_template.BREAK, chat_template.JOINT} & set(rendered)  # so that llama.cpp, which takes none out, meets none
    rendered = theirs.apply_chat_template([{'role': 'user', 'content': 'a '}, {'role': 'assistant', 'content': ' b'}], tokenize=False)
    assert (chat_template.JOINT in rendered) == (template in ('plain', 'alpaca'))


# ---- the model ----

@pytest.mark.parametrize('bias, dtype, tolerance', [(True, 'float32', 1e-4), (False, 'float32', 1e-4), (True, 'bfloat16', 0.05), (True, 'float16', 0.01)])
def test_logits_are_ours(tmp_path, small, bias, dtype, tolerance):
    source = make(tmp_path / 'out', small, steps=3, bias=bias)
    folder = exported(source, tmp_path / 'my', dtype=dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert theirs.dtype == getattr(torch, dtype)
    idx = torch.arange(small.vocab_size)[None, :60]
    ours = checkpoint.open_model(source).model
    with torch.no_grad():
        logits = theirs.float()(idx).logits
        torch.testing.assert_close(logits, ours(idx), atol=tolerance, rtol=0)
    assert logits.shape[-1] == small.vocab_size < ours.config.padded_vocab_size  # no padded row is exported


@pytest.fixture(scope='session')
def tokyo(tmp_path_factory, vocabulary):
    """{template: (checkpoint's folder, exported folder)} of models that say Tokyo, and stop."""
    base = tmp_path_factory.mktemp('tokyo')
    return {template: (source := make(base / f'out-{template}', tokenizers.load(vocabulary, tags=TEMPLATES[template].tags), template, 40, block_size=192),
                       exported(source, base / template)) for template in TEMPLATES}


@pytest.mark.parametrize('template', TEMPLATES)
def test_generate_and_pipeline_write_and_stop_as_sample_py_does(tokyo, template, capsys):
    source, folder = tokyo[template]
    ask = transformers.pipeline('text-generation', folder)
    opened = checkpoint.open_model(source)
    stops = conversation.stop_ids(opened.tokenizer, template)
    assert set(ask.model.generation_config.eos_token_id) == stops and ask.tokenizer.eos_token_id in stops
    messages = [{'role': 'user', 'content': 'What is the capital of Japan?'}]
    tokens = ask.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt')
    assert set(tokens) == {'input_ids', 'attention_mask'} and ask.tokenizer.model_input_names == ['input_ids', 'attention_mask']
    written = ask.model.generate(**tokens)[0, tokens['input_ids'].shape[1]:].tolist()
    ours = evaluate.answer_all(opened, template, [conversation.from_messages(messages)])[0]
    assert ours.text == 'Tokyo.' and written[:-1] == ours.ids and written[-1] in stops
    capsys.readouterr()
    for init_from in (source, folder):
        sample.main([f'--init_from={init_from}', '--temperature=0', '--device=cpu', f"--user={messages[0]['content']}"])
        assert capsys.readouterr().out == 'Tokyo.\n'
    # in `plain` and `question` the space before the answer is the answer's, and transformers leaves it there
    assert ask(messages)[0]['generated_text'][-1]['content'].removeprefix(' ') == 'Tokyo.'


# ---- back in ----

@pytest.mark.parametrize('template', TEMPLATES)
def test_what_was_exported_opens_as_it_was(tokyo, template):
    source, folder = tokyo[template]
    was, opened = checkpoint.open_model(source), checkpoint.open_model(folder)
    assert opened.template == template and opened.tokenizer.sha256 == was.tokenizer.sha256
    assert opened.tokenizer.special == was.tokenizer.special
    assert opened.model.config == was.model.config
    for name, p in was.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], p), name


def test_an_export_can_be_trained_on_evaluated_and_exported_again(tokyo, tmp_path, small):
    data = tmp_path / 'data'
    with tokenfile.Writer(str(data / 'tiny'), ('train', 'val')) as writer:
        ids, mask, _ = conversation.encode(conversation.from_messages(FRANCE), small)
        for split in ('train', 'val'):
            writer.add(split, ids, mask, [len(ids)])
        writer.finish({'template': 'xml', 'tokenizer': small.state()})
    train.main([f'--{key}={value}' for key, value in dict(
        init_from=tokyo['xml'][1], dataset='tiny', data_dir=data, out_dir=tmp_path / 'out', block_size=192, max_iters=1, device='cpu',
        batch_size=1, gradient_accumulation_steps=1).items()])
    assert checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['template'] == 'xml'
    evaluate.main([f'--models={tokyo["xml"][1]}', '--dataset=tiny', f'--data_dir={data}', f'--out_dir={tmp_path / "report"}', '--device=cpu'])
    with open(tmp_path / 'report' / 'report.json', encoding='utf-8') as file:
        assert json.load(file)['models'][0]['template'] == 'xml'
    again = exported(tokyo['xml'][1], tmp_path / 'again')
    for name in export.FILES - {'README.md', 'model.gguf'}:
        with open(os.path.join(again, name), 'rb') as one, open(os.path.join(tokyo['xml'][1], name), 'rb') as other:
            assert one.read() == other.read(), name


@pytest.mark.parametrize('value, said', [('klingon', "conversation_template='klingon', known are xml"), (7, "conversation_template='7'"),
                                         ([], r"conversation_template='\[\]'"), ('xml', 'lacks the tags')])
def test_a_strange_template_in_config_json_is_a_line(folders, tmp_path, value, said):
    for name in os.listdir(folders['question'][0]):
        (tmp_path / name).write_bytes(open(os.path.join(folders['question'][0], name), 'rb').read())
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'conversation_template': value}))
    with pytest.raises(UserError, match=said):
        checkpoint.open_model(str(tmp_path))


# ---- whole or not at all ----

@pytest.fixture
def source(tmp_path, small):
    return make(tmp_path / 'out', small)


def test_an_export_replaces_an_export_and_nothing_else(source, tmp_path):
    folder = exported(source, tmp_path / 'my')
    assert set(os.listdir(folder)) == export.FILES - {'model.gguf'}
    assert len({stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) for name in os.listdir(folder)}) == 1
    with pytest.raises(UserError, match='is there already. Replace an export by --overwrite=True'):
        exported(source, folder)
    exported(source, folder, overwrite=True, dtype='bfloat16')
    assert json.load(open(os.path.join(folder, 'config.json')))['dtype'] == 'bfloat16'
    (tmp_path / 'my' / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='holds notes.txt, which no export wrote'):
        exported(source, folder, overwrite=True)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'config.json').write_text('{}')
    with pytest.raises(UserError, match='no export of ours'):
        exported(source, tmp_path / 'other', overwrite=True)
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(UserError, match='is not replaced'):
        exported(source, tmp_path / 'file', overwrite=True)
    (tmp_path / 'empty').mkdir()
    exported(source, tmp_path / 'empty')
    assert sorted(os.listdir(tmp_path)) == ['empty', 'file', 'my', 'other', 'out']


@pytest.mark.parametrize('broken', ['write', 'os.rename'])
def test_what_fails_leaves_what_was_there(source, tmp_path, monkeypatch, broken):
    folder = exported(source, tmp_path / 'my')
    rename, write = os.rename, export.write

    def fail(one, other, *rest):
        if broken == 'write':
            write(one, other, *rest)
        elif not one.endswith('new'):
            return rename(one, other)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(export if broken == 'write' else os, broken.removeprefix('os.'), fail)
    with pytest.raises(UserError, match='my: No space left on device. Make room'):
        exported(source, folder, overwrite=True, dtype='float16')
    assert json.load(open(os.path.join(folder, 'config.json')))['dtype'] == 'float32'
    assert sorted(os.listdir(tmp_path)) == ['my', 'out']


def test_what_a_kill_left_is_cleared_away(source, tmp_path):
    (tmp_path / 'my.partial' / 'new').mkdir(parents=True)
    exported(source, tmp_path / 'my')
    assert sorted(os.listdir(tmp_path)) == ['my', 'out']


@pytest.mark.parametrize('keys, said', [
    (dict(out=''), '--out=FOLDER'), (dict(dtype='int8'), "dtype='int8'"), (dict(which='first'), "which='first'"),
    (dict(init_from='nowhere'), 'neither a folder nor'), (dict(out='/proc/x/y'), 'cannot write to /proc/x/y.partial: .* Use --out=FOLDER')])
def test_a_mistake_gets_one_line(source, tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as caught:
        exported(**{'source': source, 'out': tmp_path / 'my', **keys} if 'init_from' not in keys else
                 {'source': keys['init_from'], 'out': tmp_path / 'my'})
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'my').exists()


def test_a_model_that_was_never_tuned_is_not_exported(tmp_path):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=257)).save_pretrained(tmp_path / 'm')
    (tmp_path / 'm' / 'vocab.json').write_text(json.dumps({tokenizers.to_unicode(bytes([b])): b for b in range(256)}))
    (tmp_path / 'm' / 'merges.txt').write_text('')
    with pytest.raises(UserError, match='was never tuned here'):
        exported(tmp_path / 'm', tmp_path / 'my')


def test_the_exact_gelu_goes_to_transformers_and_not_to_llama_cpp(small, tmp_path):
    source = make(tmp_path / 'source', small, gelu='none')
    folder = exported(source, tmp_path / 'my')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = checkpoint.open_model(source).model.eval()
    idx = torch.arange(40)[None]
    torch.testing.assert_close(theirs(idx).logits, ours(idx), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match='exact GELU'):
        exported(source, tmp_path / 'other', gguf=True)
    assert not os.path.exists(tmp_path / 'other')
