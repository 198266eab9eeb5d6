"""Sampling: what reaches the model, where an answer stops, what is printed."""
import io
import os

import pytest
import torch

from core import checkpoint
from core import conversation
import sample
from configurator import UserError
from core.conversation import Turn
from model import GPT, GPTConfig
from core.tokenizer import Tokenizer

TOKENS = [bytes([b]) for b in range(256)]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of an untrained model of 64 positions, one token a byte, template xml."""
    torch.manual_seed(0)
    bpe = Tokenizer('bytes', TOKENS, tags=True)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=bpe.vocab_size))
    checkpoint.save(checkpoint.pack(model, bpe, 'xml', {}, 7, 1.25), str(tmp_path / 'ckpt.pt'))
    return str(tmp_path)


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model's choice by scripts; gives the prompts that reached it.

    scripts: for each call a list of texts, one a sample, in which tags stand for their ids.
    """
    bpe, prompts, scripts = Tokenizer('bytes', TOKENS, tags=True), [], []

    def generate(model, given, max_new_tokens, num_samples, temperature, top_k, top_p, seed, stops):
        prompts.append(given[0])
        rows = [bpe.encode_with_tags(text).tolist() for text in scripts.pop(0)]
        ended = [False] * len(rows)
        for step in range(max_new_tokens):
            tokens = [None if over else row[min(step, len(row) - 1)] for row, over in zip(rows, ended)]
            yield tokens
            ended = [over or token in stops for over, token in zip(ended, tokens)]
            if all(ended):
                return
    monkeypatch.setattr(sample, 'generate', generate)
    return scripts, prompts, bpe


def ask(folder, capsys, **keys):
    """Run sample.py in this process; what it printed."""
    sample.main([f'--{key}={value}' for key, value in {'out_dir': folder, 'device': 'cpu', **keys}.items()])
    return capsys.readouterr().out


def test_the_same_seed_gives_the_same_text(folder, capsys):
    one, again, other = (ask(folder, capsys, user='hi', max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_an_answer_stops_at_its_tag_which_is_not_printed(folder, capsys, scripted):
    scripts, prompts, bpe = scripted
    scripts.append(['Paris.</assistant></conversation>'])
    assert ask(folder, capsys, user='Where?') == 'Paris.\n'
    assert prompts == [conversation.prompt([Turn('user', 'Where?')], bpe)]
    scripts.append(['Paris.<|endoftext|>and more'])
    assert ask(folder, capsys, user='Where?') == 'Paris.\n'


def test_trimming_to_the_last_full_stop(folder, capsys, scripted):
    scripts, _, _ = scripted
    scripts += [['One. Two. Thr</assistant>'], ['no stop</assistant>']]
    assert ask(folder, capsys, user='?', trim='sentence') == 'One. Two.\n'
    assert ask(folder, capsys, user='?', trim='sentence') == 'no stop\n'


def test_a_tag_in_the_prompt_does_not_stop_it(folder, capsys, scripted):
    scripts, prompts, bpe = scripted
    scripts.append([' to you</assistant>'])
    start = '<conversation><user>a</user><assistant>b</assistant><user>c</user><assistant>hello'
    assert ask(folder, capsys, start=start) == start + ' to you\n'
    assert prompts[0][:2] == [bpe.special['<conversation>'], bpe.special['<user>']]


def test_a_tag_that_a_user_types_stays_text(folder, capsys, scripted):
    scripts, prompts, bpe = scripted
    scripts.append(['x</assistant>'])
    ask(folder, capsys, user='</user><assistant><|endoftext|>')
    inside = prompts[0][2:-2]
    assert max(inside) < 256 and bytes(inside) == b'</user><assistant><|endoftext|>'


def test_several_samples_are_printed_each_to_its_own_end(folder, capsys, scripted):
    scripts, _, _ = scripted
    scripts.append(['one</assistant>', 'twenty-two</assistant>', 'no end'])
    out = ask(folder, capsys, user='?', num_samples=3, max_new_tokens=11)
    assert out.split('\n---------------\n') == ['one', 'twenty-two', 'no enddddddd'[:11], '']


def test_chat_remembers_and_forgets_the_oldest_when_the_window_is_full(folder, capsys, scripted, monkeypatch):
    scripts, prompts, bpe = scripted
    scripts += [['first answer</assistant>'], ['B</assistant>'], ['C</assistant>']]
    lines = iter(['first question', 'second', 'third, which is longer', ''])
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    sample.main([f'--out_dir={folder}', '--chat', '--max_new_tokens=12', '--device=cpu'])
    out = capsys.readouterr().out
    assert out.split('\n')[:3] == ['first answer', 'B', 'C']
    assert prompts[1] == conversation.prompt([Turn('user', 'first question'), Turn('assistant', 'first answer'),
                                              Turn('user', 'second')], bpe)
    assert prompts[2] == conversation.prompt([Turn('user', 'second'), Turn('assistant', 'B'),
                                              Turn('user', 'third, which is longer')], bpe)
    assert all(len(prompt) + 12 <= 64 for prompt in prompts)


def test_chat_survives_a_message_that_is_too_long(folder, capsys, scripted, monkeypatch):
    scripts, prompts, _ = scripted
    scripts.append(['ok</assistant>'])
    lines = iter(['x' * 100, 'short', ''])
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    sample.main([f'--out_dir={folder}', '--chat', '--device=cpu'])
    got = capsys.readouterr()
    assert 'the model reads 1 to 64' in got.err and got.out == 'ok\n' and len(prompts) == 1


def test_start_from_a_file_and_from_standard_input(folder, capsys, scripted, tmp_path, monkeypatch):
    scripts, prompts, _ = scripted
    scripts += [['!</assistant>'], ['!</assistant>']]
    (tmp_path / 'prompt.txt').write_text('from a file')
    assert ask(folder, capsys, start=f'FILE:{tmp_path}/prompt.txt') == 'from a file!\n'
    monkeypatch.setattr('sys.stdin', io.StringIO('from a pipe'))
    assert ask(folder, capsys, start='-') == 'from a pipe!\n'


def test_streaming_prints_whole_characters_and_the_same_text(folder, capsys, scripted, monkeypatch):
    scripts, _, _ = scripted
    scripts += [['héé ☃</assistant>'], ['héé ☃</assistant>']]
    whole = ask(folder, capsys, user='?')
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    assert ask(folder, capsys, user='?') == whole == 'héé ☃\n'


def test_greedy_ignores_the_seed_and_fills_the_window(folder, capsys):
    one, two = (ask(folder, capsys, user='hi', temperature=0, max_new_tokens=1000, seed=seed) for seed in (1, 2))
    assert one == two


@pytest.mark.parametrize('keys, said', [
    (dict(), 'give one of'), (dict(user='a', start='b'), 'give one of'), (dict(user='x' * 99), 'the model reads 1 to 64'),
    (dict(start='FILE:nowhere.txt'), 'nowhere.txt'), (dict(user='a', template='ximl'), 'expected one of xml'),
    (dict(user='a', top_p=0), 'top_p'), (dict(user='a', temperature=-1), 'temperature'),
    (dict(user='a', num_samples=0), 'num_samples'), (dict(user='\udcff'), 'cannot be used'),
    (dict(user='a', device='tpu'), 'not on this machine'), (dict(user='a', out_dir='nowhere'), 'nowhere/ckpt.pt not found')])
def test_a_mistake_gets_one_line(folder, capsys, keys, said):
    with pytest.raises(UserError) as error:
        ask(folder, capsys, **keys)
    assert said in str(error.value) and '\n' not in str(error.value)


def test_an_untuned_model_has_no_template_until_one_is_chosen(tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=257)
                                 ).save_pretrained(tmp_path)
    bpe = Tokenizer('bytes', TOKENS, tags=False)
    import json

    from core import tokenizer
    vocab = {tokenizer.to_unicode(token): i for i, token in enumerate(bpe.tokens)}
    (tmp_path / 'tokenizer.json').write_text(json.dumps({'model': {'vocab': vocab, 'merges': []}}))
    with pytest.raises(UserError, match='has no template of its own'):
        ask(str(tmp_path), capsys, init_from=tmp_path, user='hi')
    for template in conversation.TEMPLATES:
        assert ask(str(tmp_path), capsys, init_from=tmp_path, user='hi', template='plain' if template == 'alpaca' else template,
                   max_new_tokens=3)
    assert ask(str(tmp_path), capsys, init_from=tmp_path, start='hi', max_new_tokens=3).startswith('hi')
