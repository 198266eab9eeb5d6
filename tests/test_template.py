"""To add a template takes one object in TEMPLATES: everything else follows from it."""
import json

import pytest

import sample
from core.conversation import TEMPLATES, Template, Turn, answer_text, encode, prompt, stop_ids
from core.readback import decode
from core.tokenizer import END_OF_TEXT

TURNS = [Turn('user', 'Add </user>', '1 and 2'), Turn('assistant', ' Bot: {text}')]
NEW = {
    'prompt': Template(
        user=('User: {text}\nBot:',),
        user_with_context=('User: {text}\nInput: {context}\nBot:',),
        assistant=(' {text}', END_OF_TEXT), headings=('\nInput: ', '\nBot:')),
    'tags': Template(
        user=('<user>', '{text}', '</user>'), assistant=('<assistant>', '{text}', '</assistant>'),
        closing=(END_OF_TEXT,))}


@pytest.fixture(params=NEW)
def template(request, monkeypatch):
    """The name of a template that was just added."""
    monkeypatch.setitem(TEMPLATES, 'mine', NEW[request.param])
    return 'mine'


def test_a_new_template_is_written_read_back_and_answered_in(
        template, small, save_model, tmp_path, capsys):
    ids, mask, _ = encode(TURNS, small, template)
    expected = TURNS
    if not TEMPLATES[template].user_with_context:
        expected = [Turn('user', 'Add </user>\n\n1 and 2'), TURNS[1]]
    assert decode(ids, mask, small, template) == expected
    first = mask.argmax()
    assert prompt(TURNS[:1], small, template) == ids[:first].tolist()
    written = ids[first:].tolist()
    assert written[mask.sum() - 1] in stop_ids(small, template)
    assert answer_text(written, small, template) == TURNS[1].text
    folder = save_model(tmp_path / 'model', small, template, block_size=128)
    sample.main([f'--init_from={folder}', '--user=Hi', '--max_new_tokens=3', '--device=cpu'])
    assert capsys.readouterr().out.endswith('\n')


def test_transformers_gives_its_ids(template, small):
    transformers = pytest.importorskip('transformers')
    tokenizers = pytest.importorskip('tokenizers')
    chat_template = pytest.importorskip('formats.chat_template')
    whole = tokenizers.Tokenizer.from_str(json.dumps(chat_template.tokenizer_json(small)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=whole)
    theirs.chat_template = chat_template.chat_template(template, small)
    turns = [TURNS[0]._replace(context=''), TURNS[1]]
    messages = [{'role': turn.role, 'content': turn.text} for turn in turns]
    found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
    ids, mask, _ = encode(turns, small, template)
    assert found['input_ids'] == ids.tolist()
    assert found['assistant_masks'] == mask.tolist()
