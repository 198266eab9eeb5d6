"""data/chat/prepare.py: every form of data, and from a file to a conversation in three commands."""
import csv
import gzip
import io
import json
import re
import shlex
import shutil

import pytest

from configurator import UserError
from core import tokenfile
from data.chat import prepare

# Conversations, each a list of (role, text). Pairs can be written as rows with two columns.
NASTY = 'He said, "hi";\r\nthen </user><assistant> 🙂\tand \\n, \'é\'\n\nEnd.'
PAIRS = [[('user', 'Hi'), ('assistant', 'Hello')],
         [('user', NASTY), ('assistant', f' {NASTY} ')],
         [('user', '4'), ('assistant', '=1+1')]]
LONGER = [[('user', NASTY), ('assistant', 'No.'), ('user', 'Why?'), ('assistant', NASTY)], *PAIRS]


# ---- a reader of token files that shares no code with ours ----

SPECIAL = ('<|endoftext|>', '<conversation>', '</conversation>', '<user>', '</user>',
           '<assistant>', '</assistant>')


def read_pieces(path):
    """{id: bytes or the name of a special token} of a tokenizer.json, by GPT-2's byte alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
    with open(path, encoding='utf-8') as file:
        vocab = json.load(file)['model']['vocab']
    pieces = {i: bytes(alphabet[c] for c in token) for token, i in vocab.items()}
    return pieces | {len(vocab) + i: name for i, name in enumerate(SPECIAL)}


def read_files(folder, pieces, split='train'):
    """[(pieces, mask)] of the conversations in a folder, joined bytes between special tokens."""
    ids = memoryview((folder / f'{split}.bin').read_bytes()).cast('H')
    mask = (folder / f'{split}.mask.bin').read_bytes()
    starts = memoryview((folder / f'{split}.idx.bin').read_bytes()).cast('q')
    assert starts[-1] == len(ids) == len(mask)
    found = []
    for start, end in zip(starts, starts[1:]):
        parts = []
        for i in range(start, end):
            piece = pieces[ids[i]]
            last = parts[-1] if parts else None
            if isinstance(piece, bytes) and last and isinstance(last[0], bytes):
                assert last[1] == mask[i]
                parts[-1] = (last[0] + piece, mask[i])
            else:
                parts.append((piece, mask[i]))
        found.append(parts)
    return found


def read_conversation(parts):
    """[(role, text)] of a conversation in the template xml, whose mask is checked."""
    assert parts[0] == ('<conversation>', 0)
    assert parts[-2:] == [('</conversation>', 0), ('<|endoftext|>', 0)]
    turns = []
    for i in range(1, len(parts) - 2, 3):
        role = parts[i][0].strip('<>')
        learned = int(role == 'assistant')
        text = parts[i + 1][0].decode()
        assert parts[i:i + 3] == [(f'<{role}>', 0), (text.encode(), learned),
                                  (f'</{role}>', learned)]
        turns.append((role, text))
    return turns


# ---- the forms ----

def messages(turns, role='role', content='content', **names):
    return [{role: names.get(who, who), content: text} for who, text in turns]


def share_gpt(turns):
    return messages(turns, 'from', 'value', user='human', assistant='gpt')


def in_parts(turns):
    """OpenAI's content as a list of parts."""
    found = messages(turns)
    for message in found:
        parts = message['content'][:3], message['content'][3:]
        message['content'] = [{'type': 'text', 'text': part} for part in parts]
    return found


def columns(first, second, lists=False):
    """A function that makes a row of two columns of a conversation."""
    def row(turns):
        if lists:
            return {first: messages(turns[:-1]), second: messages(turns[-1:])}
        return {first: turns[0][1], second: turns[1][1]}
    return row


def json_lines(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)


def as_csv(rows, delimiter=',', header=str, start=''):
    file = io.StringIO(newline='')
    file.write(start)
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(map(header, rows[0]))
    for row in rows:
        values = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        writer.writerow(values)
    return file.getvalue()


def as_xml(conversations):
    text = ''
    for turns in conversations:
        text += '<conversation>'
        for role, words in turns:
            words = words.replace('</user>', '<\\/user>').replace('<assistant>', '<\\assistant>')
            text += f'<{role}>{words}</{role}>'
        text += '</conversation><|endoftext|>\n'
    return text


def each(function, conversations):
    return [function(turns) for turns in conversations]


def keyed(name, function):
    return lambda turns: {name: function(turns)}


QUESTIONS = each(columns('question', 'answer'), PAIRS)
FORMS = {  # name: (the file's content, its conversations, what the script says it is)
    "OpenAI's messages": (json_lines(each(keyed('messages', messages), LONGER)), LONGER, 'JSON'),
    'messages as an array': (
        json.dumps(each(keyed('messages', messages), LONGER), indent=1), LONGER, 'JSON'),
    'messages in parts': (json_lines(each(keyed('messages', in_parts), LONGER)), LONGER, 'JSON'),
    'messages in CSV': (as_csv(each(keyed('messages', messages), LONGER)), LONGER, 'CSV'),
    "ShareGPT's conversations": (
        json_lines(each(keyed('conversations', share_gpt), LONGER)), LONGER, 'JSON'),
    'conversations with roles': (
        json_lines(each(keyed('conversations', messages), LONGER)), LONGER, 'JSON'),
    'prompt and completion': (json_lines(each(columns('prompt', 'completion'), PAIRS)), PAIRS,
                              'JSON'),
    'prompt and completion, lists': (
        json_lines(each(columns('prompt', 'completion', lists=True), LONGER)), LONGER, 'JSON'),
    'question and answer': (json_lines(QUESTIONS), PAIRS, 'JSON'),
    'input and output': (json_lines(each(columns('input', 'output'), PAIRS)), PAIRS, 'JSON'),
    'CSV': (as_csv(QUESTIONS), PAIRS, 'CSV'),
    "a German Excel's CSV": (as_csv(QUESTIONS, ';', str.title, '\ufeff'), PAIRS, 'CSV'),
    'tabs and a blank line above': (as_csv(QUESTIONS, '\t', str.upper, '\n'), PAIRS, 'CSV'),
    'JSON lines after a BOM': ('\ufeff' + json_lines(QUESTIONS), PAIRS, 'JSON'),
    'an array after a BOM': ('\ufeff \n' + json.dumps(QUESTIONS), PAIRS, 'JSON'),
    'XML of --stdout': (as_xml(LONGER), LONGER, 'XML'),
    'several forms in one file': (
        json_lines([*each(keyed('messages', messages), LONGER),
                    *each(keyed('conversations', share_gpt), LONGER), *QUESTIONS]),
        [*LONGER, *LONGER, *PAIRS], 'JSON'),
}


@pytest.fixture
def run(tmp_path, vocabulary, capsys):
    """run(text or bytes, *flags, name): what the folder's files hold, meta.json, what was said."""
    def run(content, *flags, name='my.jsonl'):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        folder = tmp_path / 'data' / 'mine'
        prepare.main([f'--input={path}', f'--out_dir={folder}', f'--tokenizer={vocabulary}',
                      '--val_fraction=0', *flags])
        meta = tokenfile.read_meta(str(folder))
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        return read_files(folder, read_pieces(vocabulary)), meta, capsys.readouterr()
    return run


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('content, expected, form', FORMS.values(), ids=FORMS)
def test_every_conversation_reads_back_as_it_went_in(run, content, expected, form, packed):
    content = content.encode()
    if packed:
        content = gzip.compress(content)
    found, meta, said = run(content, name='my.data')
    assert each(read_conversation, found) == expected
    assert f'my.data holds {form}' in said.err
    assert meta['answers']['learned'] == sum(len(turns) // 2 for turns in expected)
    assert 'python train.py config/finetune_own.py' in said.out.splitlines()[-1]


def test_what_stdout_prints_reads_back(tmp_path, run, capsys, vocabulary):
    path = tmp_path / 'rows.json'
    path.write_text(json.dumps(each(keyed('messages', messages), LONGER)))
    prepare.main([f'--input={path}', f'--tokenizer={vocabulary}', '--stdout'])
    text = capsys.readouterr().out
    assert text == as_xml(LONGER)
    assert each(read_conversation, run(text)[0]) == LONGER


# ---- the rules ----

def talk(text):
    """Messages in short: 's:Be kind. u:Hi a:Hello'."""
    names = {'s': 'system', 'd': 'developer', 'u': 'user', 'a': 'assistant'}
    found = []
    for part in text.split(' '):
        who, _, words = part.partition(':')
        found.append({'role': names[who], 'content': words})
    return found


TOOL = {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'x'}]}
IMAGE = {'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}
RULES = [  # (messages, the conversation or None, what is counted)
    (talk('u:q a:b'), 'u:q a:b', {}),
    (talk('a:hi u:q a:b'), 'u:q a:b', {'  greetings dropped': 1}),
    (talk('a:hi s:x a:ho u:q a:b'), 'u:x\n\nq a:b',
     {'  greetings dropped': 2, '  system messages moved': 1}),
    (talk('u:q u:r a:b a:c a:d'), 'u:q\n\nr a:b\n\nc\n\nd', {'  messages joined': 3}),
    (talk('s:x d:y u:q a:b'), 'u:x\n\ny\n\nq a:b', {'  system messages moved': 2}),
    (talk('s: u:q a:b'), 'u:q a:b', {}),
    (talk('u:q a:b s:x u:r a:c'), 'u:x\n\nq a:b u:r a:c', {'  system messages moved': 1}),
    (talk('u:q a:b u:r'), 'u:q a:b', {'  last questions dropped': 1}),
    (talk('u:q'), None, {'  last questions dropped': 1, 'no answer': 1}),
    (talk('a:b'), None, {'no question': 1}),
    ([], None, {'no question': 1}),
    (talk('u:q a:'), None, {'empty message': 1}),
    (talk('u: a:b'), None, {'empty message': 1}),
    ([{'role': 'user', 'content': None}, *talk('a:b')], None, {'empty message': 1}),
    ([*talk('u:q'), TOOL, *talk('a:b')], None, {'tool calls': 1}),
    ([*talk('u:q'), {'role': 'tool', 'content': '4'}, *talk('a:b')], None, {'tool calls': 1}),
    ([IMAGE, *talk('a:b')], None, {'parts not text': 1}),
    ([*talk('u:q'), {'role': 'assistant', 'content': 'b', 'weight': 0}], None, {'weight 0': 1}),
]
ROWS = {'rows of messages', '  greetings dropped', '  messages joined', '  system messages moved'}


@pytest.mark.parametrize('said, expected, counts', RULES)
def test_rules(run, said, expected, counts):
    """Each row stands beside a good one, so that something is kept."""
    found, meta, _ = run(json_lines([{'messages': said}, {'messages': talk('u:Q a:A')}]))
    read = each(read_conversation, found)
    assert read.pop() == [('user', 'Q'), ('assistant', 'A')]
    if expected:
        turns = [(message['role'], message['content']) for message in talk(expected)]
        assert read == [turns]
    else:
        assert read == []
    every = dict.fromkeys(ROWS, 0) | {'rows of messages': 2} | counts
    assert meta['counts'] | meta['dropped'] == every


def test_columns_that_are_not_used_are_named(run):
    row = QUESTIONS[0] | {'context': 'c', 'note': '', 'id': 7}
    _, meta, said = run(json_lines([row, row]))
    assert meta['counts']["  not used: 'context'"] == meta['counts']["  not used: 'id'"] == 2
    assert not [name for name in meta['counts'] if 'note' in name]
    assert "  not used: 'context'" in said.out


def test_the_first_message_decides_the_split(tmp_path, run, vocabulary):
    rows = [{'question': f'q{i % 50}', 'answer': f'a{i}'} for i in range(100)]
    pieces = read_pieces(vocabulary)
    found, _, _ = run(json_lines(rows), '--val_fraction=0.3')
    train = {turns[0] for turns in each(read_conversation, found)}
    folder = tmp_path / 'data' / 'mine'
    val = {turns[0] for turns in each(read_conversation, read_files(folder, pieces, 'val'))}
    assert len(val) > 5 and len(train) + len(val) == 50 and not train & val


# ---- plain text ----

@pytest.mark.parametrize('text, flags, documents', [
    ('One.\nLine two.\n\n  Two,\r\n\r\n \r\n\nthree.\n', [],
     ['One.\nLine two.', '  Two,', 'three.']),
    ('a\n\nb<|>c<|>', ['--separator=<|>'], ['a\n\nb', 'c']),
    ('a\n---\nb\n', ['--separator=\\n---\\n'], ['a', 'b']),
    ('\ufeff[Verse 1]\n{not JSON}\n', [], ['[Verse 1]\n{not JSON}']),
])
def test_text_is_learned_whole(run, text, flags, documents):
    found, meta, said = run(text, *flags, name='my.TXT')
    assert found == [[(document.encode(), 1), ('<|endoftext|>', 1)] for document in documents]
    assert 'holds text' in said.err and meta['template'] == 'plain'
    assert meta['tokenizer']['tags'] is False


def test_a_long_text_is_torn_and_nothing_is_lost(run):
    text = 'é🙂 wörd ' * 400
    found, meta, _ = run(text + '\n\nshort', '--max_tokens=50', name='my.txt')
    assert len(found) > 20
    assert b''.join(parts[0][0] for parts in found[:-1]).decode() == text
    assert meta['splits']['train']['tokens'] == meta['splits']['train']['supervised_tokens']
    _, meta, _ = run(text + '\n\nshort', '--max_tokens=50', '--too_long=drop', name='my.txt')
    assert (meta['kept'], meta['dropped']) == (1, {'too long': 1})


def test_a_text_that_cannot_be_encoded_is_counted(run):
    found, meta, _ = run(f'a{" " * 200_000}b\n\nc\n', name='my.txt')
    assert found == [[(b'c', 1), ('<|endoftext|>', 1)]]
    assert meta['dropped'] == {'cannot be encoded': 1}


# ---- what is wrong is one line, or counted ----

WHOLE = json_lines(QUESTIONS)
HOSTILE = {  # name: (the file's name, its content, what is said)
    'empty': ('x.jsonl', '', "found ''"),
    'only a BOM': ('x.txt', '\ufeff\n', "found ''"),
    'binary': ('x.bin', b'\x89PNG\r\n\x1a\n\0\0', 'Expected JSON or CSV'),
    'UTF-16': ('x.csv', as_csv(QUESTIONS).encode('utf-16'), 'Expected JSON or CSV'),
    'Latin-1': ('x.csv', as_csv(QUESTIONS).encode('latin-1', 'replace'), 'cannot be read'),
    'Latin-1 text': ('x.txt', 'Grüße'.encode('latin-1'), 'cannot be read'),
    'a damaged gzip': ('x.gz', gzip.compress(WHOLE.encode())[:-9], 'cannot be read'),
    'text that is not named so': ('x.csv', 'Some words.\nMore.', "found 'Some words.\\nMore.'"),
    'CSV without our columns': ('x.csv', 'question,notes\na,b\n', 'Expected JSON or CSV'),
    'CSV with a column twice': ('x.csv', 'question,answer,answer\na,b,c\n', 'Expected JSON or CSV'),
    'CSV with a quote left open': ('x.csv', 'question,answer\na,"b\nc,d\n', 'line 3: '),
    'CSV with text behind a quote': ('x.csv', 'question,answer\na,"b" c\n', 'line 2: '),
    'CSV with too few fields': ('x.csv', 'question,answer\na\n', '1 fields, but 2 columns'),
    'CSV with too many': ('x.csv', 'question,answer\na,b,c\n', '3 fields, but 2 columns'),
    'CSV without rows': ('x.csv', 'question,answer\n', 'no conversation can be used'),
    'CSV with messages that are not JSON': (
        'x.csv', 'messages\n"[{\'role\': \'user\'}]"\n', 'of 1 records'),
    'JSON without our columns': ('x.json', '[{"question": "a"}]', "found the columns 'question'"),
    'rows for alpaca': ('x.json', '[{"instruction": "a", "input": "", "output": "b"}]',
                        'use data/alpaca/prepare.py'),
    'JSON cut off': ('x.json', json.dumps(QUESTIONS)[:-9], 'cannot be read'),
    'JSON that is no object': ('x.jsonl', WHOLE + '[1]\n', "found '[1]', expected an object"),
    'a number as an answer': ('x.jsonl', '{"question": "a", "answer": 4}', "found '4'"),
    'messages as an object': ('x.jsonl', '{"messages": {"role": "user"}}', 'expected a message'),
    'messages as a number': ('x.jsonl', '{"messages": 4}', '1 of 1 records'),
    'messages null': ('x.jsonl', '{"messages": null}', '1 of 1 records'),
    'a list in a message': ('x.jsonl', '{"messages": [["user", "a"]]}', 'expected a message'),
    'a list as a role': ('x.jsonl', '{"messages": [{"role": [], "content": "a"}]}', '1 of 1'),
    'an unknown role': ('x.jsonl', '{"messages": [{"role": "narrator", "content": "a"}]}',
                        "found the role 'narrator'"),
    'a part without a type': (
        'x.jsonl', '{"messages": [{"role": "user", "content": [{}]}]}', '1 of 1 records'),
    'XML cut off': ('x.xml', as_xml(PAIRS)[:-30], 'expected a conversation as --stdout prints'),
    'XML with words between': ('x.xml', as_xml(PAIRS).replace('\n<c', '\nx<c'), 'found'),
    'XML with a tag left open': (
        'x.xml', as_xml(PAIRS[:1]).replace('</user>', ''), 'expected a conversation as'),
}


@pytest.mark.parametrize('name, content, said', HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_ends_in_one_line(run, tmp_path, name, content, said):
    with pytest.raises(UserError) as error:
        run(content, name=name)
    assert said in str(error.value) and '\n' not in str(error.value) and name in str(error.value)
    assert len(str(error.value)) < 600
    assert not list((tmp_path / 'data').rglob('*.bin'))


def test_a_few_broken_rows_are_counted(run):
    rows = [{'question': f'q{i}', 'answer': 'a'} for i in range(300)]
    content = json_lines([*rows, {'question': 'x'}]) + '{"question": "x", \n'
    found, meta, said = run(content)
    assert len(found) == 300 and meta['broken_lines'] == 2
    assert 'broken record 301' in said.err and 'broken record 302' in said.err


@pytest.mark.parametrize('flags, said', [
    ([], 'input is missing'),
    (['--input=none.jsonl'], 'none.jsonl not found'),
    (['--input={rows}', '--separator=x'], 'only for plain text'),
    (['--input={rows}', '--val_fraction=0.999999'], 'Put fewer aside'),
])
def test_mistakes_are_one_line_that_says_what_to_do(tmp_path, vocabulary, flags, said):
    path = tmp_path / 'rows.jsonl'
    path.write_text(WHOLE)
    flags = [flag.format(rows=path) for flag in flags]
    with pytest.raises(UserError) as error:
        prepare.main([*flags, f'--out_dir={tmp_path}/out', f'--tokenizer={vocabulary}'])
    assert said in str(error.value) and '\n' not in str(error.value)


# ---- from a file to a conversation ----

def test_three_commands(script, tmp_path, learn):
    """Prepare, train as the first command says, and talk as the second one says."""
    transformers = pytest.importorskip('transformers')
    model = tmp_path / 'model'
    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'n_positions': 1024, 'vocab_size': 320}
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    network.save_pretrained(model)
    vocabulary = learn(['What is the colour of the sky? Blue.'] * 3, 320, ['<|endoftext|>'])
    shutil.copy(vocabulary, model / 'tokenizer.json')
    rows = [{'question': f'What colour has number {i}?', 'answer': 'Blue.'} for i in range(200)]
    (tmp_path / 'my.csv').write_text(as_csv(rows))

    def next_command(done):
        assert done.returncode == 0, done.stderr
        command = re.search('(Next|Talk to it): python (.*)', done.stdout)[2]
        return shlex.split(command)

    done = script('data/chat/prepare.py', '--input=my.csv', '--out_dir=data/mine',
                  '--tokenizer=model')
    train = next_command(done)
    assert train == ['train.py', 'config/finetune_own.py', '--dataset=mine', '--out_dir=out/mine']
    done = script(*train, '--init_from=model', '--device=cpu')
    assert ' are 3.00 epochs' in done.stdout
    sample = next_command(done)
    assert sample[-1] == '--chat'
    done = script(*sample, '--max_new_tokens=9', input='What colour has number 7?\nAnd 8?\n')
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 2
