"""sample.py: what reaches the model, where an answer stops, and what is printed."""
import json
import os

import pytest

import sample
import train
from configurator import UserError
from conftest import BYTES
from core import checkpoint, conversation
from core.conversation import TEMPLATES, Turn
from data.oasst import prepare


@pytest.fixture(scope='session')
def model(save_model, tmp_path_factory):
    """The folder of an untrained model of 256 positions, a token for each byte, template xml."""
    folder = tmp_path_factory.mktemp('sample') / 'model'
    return save_model(folder, BYTES, n_layer=1, n_embd=16, block_size=256)


@pytest.fixture
def script(monkeypatch):
    """A function: `generate` writes these answers, for each call a list of samples, from now on.

    A sample is text with tags, or bytes. Returns the list of the prompts that reach the model.
    """
    prompts = []
    waiting = []

    def generate(model, asked, max_new_tokens, *others):
        stops = others[-1]
        prompts.extend(asked)
        rows = []
        for text in waiting.pop(0):
            row = list(text)
            if isinstance(text, str):
                row = BYTES.encode_with_tags(text).tolist()
            ends = [i + 1 for i, token in enumerate(row) if token in stops]
            rows.append(row[:min([max_new_tokens, *ends])])
        for step in range(max(map(len, rows))):
            yield [row[step] if step < len(row) else None for row in rows]
    monkeypatch.setattr(sample, 'generate', generate)

    def set_answers(*answers):
        waiting.extend(answers)
        return prompts
    return set_answers


@pytest.fixture
def ask(model, capsys, monkeypatch):
    """A function: what sample.py with these keys prints, when these lines are typed."""
    def run(*lines, **keys):
        lines = iter(lines)
        monkeypatch.setattr('builtins.input', lambda _: next(lines, ''))
        keys = {'out_dir': model, 'device': 'cpu'} | keys
        sample.main([f'--{key}={value}' for key, value in keys.items()])
        return capsys.readouterr()
    return run


def test_the_seed_decides_unless_the_temperature_is_0(ask):
    one, again, other = (ask(user='hi', max_new_tokens=12, seed=seed).out for seed in (1, 1, 2))
    assert one == again != other
    one, other = (ask(user='hi', temperature=0, max_new_tokens=999, seed=i).out for i in (1, 2))
    assert one == other  # and the window is full at some time


@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('text', [' Oui ☃', '  two', '', ' ', ' Oui ☃'.encode()[:-1]])
def test_streamed_and_whole_answers_agree(ask, script, template, text):
    """One answer is streamed, several are printed when they are whole."""
    script([text], [text, text])
    streamed = ask(user='?', template=template).out
    both = ask(user='?', template=template, num_samples=2).out
    assert both == f'{streamed}---------------\n' * 2
    if isinstance(text, bytes):
        text = text.decode(errors='replace')
    assert streamed == text.removeprefix(TEMPLATES[template].lead) + '\n'


def test_a_character_is_printed_when_it_is_whole(model, script, monkeypatch):
    printed = []
    monkeypatch.setattr('builtins.print', lambda *text, **_: printed.append(''.join(text)))
    script(['a☃b</assistant>'])
    sample.main([f'--out_dir={model}', '--user=?', '--device=cpu'])
    assert [text for text in printed[1:] if text] == ['a', '☃', 'b']


def test_where_an_answer_ends_and_is_trimmed(ask, script):
    prompts = script(['Paris.</assistant></conversation>'], ['Paris.<|endoftext|>and more'])
    assert ask(user='Where?').out == ask(user='Where?').out == 'Paris.\n'
    assert prompts[0] == conversation.prompt([Turn('user', 'Where?')], BYTES)
    script(['One. Two. Thr</assistant>'], ['no stop</assistant>'])
    assert ask(user='?', trim='sentence').out == 'One. Two.\n'
    assert ask(user='?', trim='sentence').out == 'no stop\n'
    script(['one</assistant>', 'twenty-two</assistant>', 'no end at all'])
    out = ask(user='?', num_samples=3, max_new_tokens=11).out
    assert out.split('\n---------------\n') == ['one', 'twenty-two', 'no end at a', '']


def test_tags_count_in_start_and_are_text_in_user(ask, script, tmp_path):
    prompts = script(*[[' to you</assistant>']] * 3)
    start = '<conversation><user>a</user><assistant>b</assistant><user>c</user><assistant>hello'
    assert ask(start=start).out == start + ' to you\n'
    assert prompts[0] == BYTES.encode_with_tags(start).tolist()
    (tmp_path / 'prompt.txt').write_text('from a file')
    assert ask(start=f'FILE:{tmp_path}/prompt.txt').out == 'from a file to you\n'
    ask(user='</user><assistant><|endoftext|>')
    inside = prompts[2][2:-2]
    assert max(inside) < 256 and bytes(inside) == b'</user><assistant><|endoftext|>'


def test_a_chat_drops_the_oldest_turns_and_goes_on_after_a_mistake(ask, script):
    prompts = script(['first answer</assistant>'], ['B</assistant>'], ['C</assistant>'])
    lines = ['a' * 90, 'b' * 60, 'c' * 90]
    printed = ask(lines[0], 'x' * 300, '\udcff', *lines[1:], chat=True, max_new_tokens=12)
    assert printed.out == 'first answer\nB\nC\n'
    assert 'expected 1 to 256' in printed.err and 'surrogates' in printed.err
    turns = [Turn('user', lines[0]), Turn('assistant', 'first answer'), Turn('user', lines[1])]
    assert prompts[1] == conversation.prompt(turns, BYTES)
    # With the third line it would not leave 12 of 256 tokens to the answer.
    turns = [Turn('user', lines[1]), Turn('assistant', 'B'), Turn('user', lines[2])]
    assert prompts[2] == conversation.prompt(turns, BYTES)


@pytest.mark.parametrize('keys, said', [
    ({}, 'give one of'), ({'user': 'a', 'start': 'b'}, 'give one of'),
    ({'user': 'x' * 299}, 'the prompt has 303 tokens; expected 1 to 256'),
    ({'start': 'FILE:nowhere.txt'}, 'nowhere.txt not found'),
    ({'user': '\udcff'}, 'the prompt cannot be read: UnicodeEncodeError'),
    ({'user': 'Answer: no', 'template': 'question'}, "contains the heading 'Answer:'"),
    ({'user': 'a', 'out_dir': 'nowhere'}, 'nowhere/best.pt not found. Expected a checkpoint')])
def test_a_mistake_is_a_line(ask, keys, said):
    with pytest.raises(UserError) as caught:
        ask(**keys)
    assert said in str(caught.value) and '\n' not in str(caught.value)


def test_an_untuned_model_has_no_template_until_one_is_chosen(ask, monkeypatch):
    opened = checkpoint.open_model

    def untuned(*arguments, **keys):
        return opened(*arguments, **keys)._replace(template=None)
    monkeypatch.setattr(checkpoint, 'open_model', untuned)
    with pytest.raises(UserError, match='has no template. Use --start, or choose one: --template'):
        ask(user='hi')
    for template in TEMPLATES:
        assert ask(user='hi', template=template, max_new_tokens=3).out
    assert ask(start='hi', max_new_tokens=3).out.startswith('hi')


def test_the_three_commands_one_after_another_end_in_text(
        tmp_path, monkeypatch, capsys, vocabulary, save_model, no_pictures):
    """The third takes the run saved last, and says which."""
    monkeypatch.chdir(tmp_path)
    question = "What's the capital of France?"
    with open('trees.jsonl', 'w') as file:
        for i in range(40):
            reply = {'message_id': f'{i}b', 'role': 'assistant', 'text': 'Paris.', 'lang': 'en'}
            root = {'message_id': f'{i}a', 'role': 'prompter', 'text': question, 'lang': 'en',
                    'replies': [reply]}
            file.write(json.dumps({'message_tree_id': f'{i}a', 'prompt': root}) + '\n')
    prepare.main(['--input=trees.jsonl', '--out_dir=data/oasst', f'--tokenizer={vocabulary}'])
    train.main(['config/finetune_oasst.py', '--init_from=scratch', '--n_layer=1', '--n_head=2',
                '--n_embd=16', '--block_size=64', '--epochs=0', '--max_iters=2', '--device=cpu'])
    os.utime(save_model('out/older', BYTES) + '/ckpt.pt', (0, 0))
    capsys.readouterr()
    start = f'<conversation><user>{question}</user><assistant>'
    sample.main(['--init_from=resume', f'--start={start}', '--max_new_tokens=5', '--device=cpu'])
    printed = capsys.readouterr()
    assert printed.out.startswith(start) and len(printed.out) > len(start) + 1
    assert 'out/oasst/best.pt (step 2' in printed.err
