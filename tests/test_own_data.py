"""data/chat/prepare.py: every form of data, and from a file to a conversation in three commands."""
import csv
import gzip
import io
import json
import re
import shlex
from collections import Counter

import pytest

from conftest import one_line, read_back
from core import tokenfile, tokenizer
from data.chat import prepare

# Conversations, each a list of (role, text).
NASTY = 'He said, "hi";\r\nthen </user><assistant> 🙂\tand \\n, \'é\'\n\nEnd.'
PAIRS = [[('user', 'Hi'), ('assistant', 'Hello')],
         [('user', NASTY), ('assistant', f' {NASTY} ')],
         [('user', '4'), ('assistant', '=1+1')]]
LONGER = [[('user', NASTY), ('assistant', 'No.'), ('user', 'Why?'), ('assistant', NASTY)], *PAIRS]


def messages(turns, role='role', content='content', **names):
    return [{role: names.get(who, who), content: text} for who, text in turns]


def rows(question, answer):
    """PAIRS as rows with these two columns."""
    return [{question: turns[0][1], answer: turns[1][1]} for turns in PAIRS]


def as_csv(rows, delimiter=',', header=str):
    file = io.StringIO(newline='')
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(map(header, rows[0]))
    writer.writerows(row.values() for row in rows)
    return file.getvalue()


OPENAI = [{'messages': messages(turns)} for turns in LONGER]
IN_CSV = [{'messages': json.dumps(row['messages'])} for row in OPENAI]
SHAREGPT = [{'conversations': messages(turns, 'from', 'value', user='human', assistant='gpt')}
            for turns in LONGER]
LISTS = [{'prompt': messages(turns[:-1]), 'completion': messages(turns[-1:])} for turns in LONGER]
QUESTIONS = rows('question', 'answer')
EVERY_FORM = [*OPENAI, *SHAREGPT, *LISTS, *QUESTIONS, *rows('prompt', 'completion'),
              *rows('input', 'output')]
XML = """\
<conversation><user>Hi, <\\user></user><assistant>Hello
</assistant><user>1</user><assistant>2</assistant></conversation><|endoftext|>
""" * 2
FROM_XML = [[('user', 'Hi, <user>'), ('assistant', 'Hello\n'), ('user', '1'), ('assistant', '2')]]
FORMS = {  # name: (the file's content, its conversations, what the script says it is)
    'lines of every form': ('\n'.join(map(json.dumps, EVERY_FORM)), LONGER * 3 + PAIRS * 3, 'JSON'),
    'an array after a BOM': ('\ufeff \n' + json.dumps(OPENAI, indent=1), LONGER, 'JSON'),
    'messages in CSV': (as_csv(IN_CSV), LONGER, 'CSV'),
    "a German Excel's CSV": ('\ufeff' + as_csv(QUESTIONS, ';', str.title), PAIRS, 'CSV'),
    'tabs': (as_csv(QUESTIONS, '\t', ' {} '.format), PAIRS, 'CSV'),
    'XML of --stdout': (XML, FROM_XML * 2, 'XML')}


@pytest.fixture
def run(tmp_path, vocabulary, capsys):
    """run(text or bytes, *flags, name): its conversations, meta.json and what was said."""
    def run(content, *flags, name='my.jsonl'):
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        folder = tmp_path / 'out'
        prepare.main([f'--input={tmp_path / name}', f'--out_dir={folder}',
                      f'--tokenizer={vocabulary}', '--val_fraction=0', *flags])
        meta = tokenfile.read_meta(folder)
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        found = []
        if meta['template'] == 'xml':
            found = [[turn[:2] for turn in turns] for turns in read_back(folder)]
        return found, meta, capsys.readouterr().err
    return run


@pytest.mark.parametrize('content, expected, form', FORMS.values(), ids=FORMS)
def test_every_conversation_reads_back_as_it_went_in(run, content, expected, form):
    for data in (content.encode(), gzip.compress(content.encode())):
        found, _, said = run(data, name='my.data')
        assert found == expected and f'my.data holds {form}' in said


ROLES = {'s': 'system', 'd': 'developer', 'u': 'user', 'a': 'assistant', 't': 'tool'}


def talk(text):
    """Messages in short: 's:Be_kind. u:Hi a:Hello'."""
    turns = [part.replace('_', ' ').split(':') for part in text.split(' ')]
    return messages(turns, **ROLES)


CALL = {'role': 'assistant', 'content': 'x', 'tool_calls': [{'id': 'x'}]}
IMAGE = {'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}
PARTS = {'role': 'user', 'content': [{'type': 'text', 'text': part} for part in ('q', ' ', 'r')]}
RULES = [  # (messages, what is kept of them, or why nothing is)
    (talk('a:hi s:x a:ho u:q a:b'), 'u:x\n\nq a:b'),
    (talk('u:q u:r a:b a:c a:d'), 'u:q\n\nr a:b\n\nc\n\nd'),
    (talk('s:x d:y s: u:q a:b'), 'u:x\n\ny\n\nq a:b'),
    (talk('u:q a:b s:x u:r a:c'), 'u:x\n\nq a:b u:r a:c'),
    (talk('u:q a:b u:r'), 'u:q a:b'),
    ([*talk('a:hi'), PARTS, *talk('a:b')], 'u:q_r a:b'),
    (talk('u:q'), 'no answer'),
    (talk('a:b'), 'no question'),
    (talk('u:q a:'), 'empty message'),
    ([{'role': 'user', 'content': None}, *talk('a:b')], 'empty message'),
    ([*talk('u:q'), CALL], 'tool calls'),
    (talk('u:q t:4 a:b'), "the role 'tool'"),
    ([IMAGE, *talk('a:b')], 'parts not text')]


def test_rules(run):
    found, meta, _ = run(json.dumps([{'messages': said} for said, _ in RULES]))
    outcomes = [outcome for _, outcome in RULES]
    kept = [talk(outcome) for outcome in outcomes if ':' in outcome]
    assert [messages(turns) for turns in found] == kept
    assert meta['dropped'] == Counter(outcome for outcome in outcomes if ':' not in outcome)


def test_the_first_message_decides_the_split(tmp_path, run):
    rows = [{'question': f'q{i % 50}', 'answer': f'a{i}'} for i in range(100)]
    found, _, _ = run(json.dumps(rows), '--val_fraction=0.3')
    train = {turns[0][1] for turns in found}
    val = {turns[0].text for turns in read_back(tmp_path / 'out', 'val')}
    assert len(val) > 5 and len(train) + len(val) == 50 and not train & val


LONG = 'é🙂 wörd ' * 401


@pytest.mark.parametrize('text, flags, documents', [
    ('One.\nTwo.\n\n  Two,\r\n\r\n\n\nthree.\n', [], ['One.\nTwo.', '  Two,', 'three.']),
    ('a\n\nb<|>c<|>', ['--separator=<|>'], ['a\n\nb', 'c']),
    ('\ufeff[Verse 1]\n{not JSON}\n', [], ['[Verse 1]\n{not JSON}']),
    (f'{LONG}\n\nshort', ['--max_tokens=50'], [LONG, 'short'])])
def test_text_is_learned_whole(run, tmp_path, text, flags, documents):
    _, meta, said = run(text, *flags, name='my.TXT')
    split = tokenfile.Split([tmp_path / 'out'], 'train')
    assert split.mask.all() and max(split.lengths) <= meta['options']['max_tokens']
    bpe = tokenizer.from_state(meta['tokenizer'])
    assert bpe.decode(split.ids) == ''.join(f'{document}<|endoftext|>' for document in documents)
    assert 'holds text' in said and bpe.tags is False
    with one_line('--stdout prints conversations, .* plain text'):
        run(text, '--stdout', name='my.TXT')


@pytest.mark.parametrize('name, content, said', [
    ('binary.png', b'\x89PNG\r\n\x1a\n\0\0', 'Expected JSON or CSV'),
    ('text.csv', 'Some words.\nMore.', "the columns 'some words.'"),
    ('open-quote.csv', 'question,answer\na,"b\nc,d\n', 'cannot be read'),
    ('too-many-fields.csv', 'question,answer\na,b,c\n', 'more fields than'),
    ('other-columns.json', '[{"question": "a"}]', "found the columns 'question'"),
    ('alpaca.json', '[{"instruction": "a", "output": "b"}]', 'use data/alpaca/prepare.py'),
    ('role.jsonl', '{"messages": [{"role": "narrator", "content": "a"}]}', "role 'narrator'")])
def test_a_wrong_file_ends_in_one_line(run, name, content, said):
    with one_line(said):
        run(content, name=name)


def test_three_commands(script, tmp_path, vocabulary):
    """Prepare, train as the first command says, and talk as the second one says."""
    rows = [f'What colour has number {i}?,Blue.\n' for i in range(200)]
    (tmp_path / 'my.csv').write_text('question,answer\n' + ''.join(rows))

    def next_command(done):
        assert done.returncode == 0, done.stderr
        return shlex.split(re.search('(Next|Talk to it): python (.*)', done.stdout)[2])

    done = script('data/chat/prepare.py', '--input=my.csv', '--out_dir=data/mine',
                  f'--tokenizer={vocabulary}')
    train = next_command(done)
    assert train[:2] == ['train.py', 'config/finetune_own.py'] and '--dataset=mine' in train
    shape = '--init_from=scratch --n_layer=1 --n_head=2 --n_embd=32 --device=cpu'
    done = script(*train, *shape.split())
    assert '6 steps of 4 rows are 3.43 epochs' in done.stdout
    sample = next_command(done)
    done = script(*sample, '--max_new_tokens=9', input='What colour has number 7?\nAnd 8?\n')
    assert done.returncode == 0 and len(done.stdout.split()) > 2, done.stderr
