"""data/oasst/prepare.py: from trees to token files, nothing lost and nothing twice."""
import json
import os
import random
import re

import pytest

from configurator import UserError
from core import readback, rows, tokenfile, tokenizer
from core.conversation import Turn
from data import common
from data.oasst import nest, prepare

WHOLE = '--max_tokens=1000000'


# ---- making trees ----

def message(key, *replies, text='', **more):
    """A message. Its text is its id; `tree` fills in the role."""
    return {'message_id': key, 'text': text or key, 'lang': 'en', 'review_result': True,
            'deleted': False, 'synthetic': False, 'replies': list(replies), **more}


def tree(root):
    """The record of a tree, with roles where they are missing."""
    waiting = [(root, 'prompter')]
    while waiting:
        node, role = waiting.pop()
        node.setdefault('role', role)
        below = 'assistant' if role == 'prompter' else 'prompter'
        waiting += [(reply, below) for reply in node['replies']]
    return {'message_tree_id': root['message_id'], 'tree_state': 'ready', 'prompt': root}


def random_trees(n, seed=0):
    """Trees of all shapes, with some of everything that leaves a message out."""
    rng = random.Random(seed)
    flaws = [{'deleted': True}, {'review_result': False}, {'lang': 'de'}, {'synthetic': True},
             {'lang': None}]

    def grow(key, depth):
        n_replies = rng.choice((0, 1, 1, 2, 3)) if depth < 6 else 0
        replies = [grow(f'{key}.{i}', depth + 1) for i in range(n_replies)]
        text = rng.choice([f'text {key}', f'{key} é🙂</user>'] * 6 + [' '])
        node = message(key, *replies, text=text, **rng.choice([{}] * 20 + flaws))
        return {**node, 'rank': rng.choice((None, 0, 1, 2))}
    return [tree(grow(f'{rng.random()}', 0)) for _ in range(n)]


def lines(records):
    return ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records)


GOOD = [tree(message(f'q{i}', message(f'a{i}'))) for i in range(150)]


# ---- preparing them ----

@pytest.fixture
def run(tmp_path, vocabulary, capsys):
    """run(records, text or path, *flags): meta.json, and more that it adds.

    'conversations' holds all of them, read back; 'output' and 'errors' what was printed.
    """
    def run(source, *flags, out='out'):
        path = tmp_path / 'trees.jsonl'
        if isinstance(source, list):
            source = lines(source)
        if isinstance(source, str):
            path.write_bytes(source.encode('utf-8', 'surrogatepass'))
        else:
            path = source
        folder = str(tmp_path / out)
        files = [f'--input={path}', f'--out_dir={folder}', f'--tokenizer={vocabulary}']
        prepare.main([*files, *flags])
        meta = tokenfile.read_meta(folder)
        bpe = tokenizer.from_state(meta['tokenizer'])
        meta['conversations'] = []
        for name in meta['splits']:
            split = tokenfile.Split([folder], name)
            for i in range(len(split)):
                turns = readback.decode(*split[i], bpe, meta['template'])
                meta['conversations'].append(turns)
        assert meta['kept'] == len(meta['conversations'])
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        printed = capsys.readouterr()
        return {**meta, 'output': printed.out, 'errors': printed.err}
    return run


def texts(conversations):
    return sorted([turn.text for turn in turns] for turns in conversations)


def shown(conversations):
    """Conversations in short: 'a>b' for two turns, brackets round a supervised answer."""
    found = []
    for turns in conversations:
        parts = [turn.text for turn in turns]
        for i, turn in enumerate(turns):
            if turn.role == 'assistant' and turn.supervised:
                parts[i] = f'[{turn.text}]'
        found.append('>'.join(parts))
    return sorted(found)


def supervised(conversations):
    """The texts of all supervised answers."""
    found = []
    for turns in conversations:
        found += [turn.text for turn in turns if turn.role == 'assistant' and turn.supervised]
    return sorted(found)


def threads_of(node, before=()):
    """Every way from a message to a last assistant message: lists of texts, by plain recursion."""
    here = [*before, node['text']]
    below = []
    for reply in node['replies']:
        below += threads_of(reply, here)
    if not below and node['role'] == 'assistant':
        return [here]
    return below


# ---- the 100 real trees ----

def test_first_in_gpt2s_ids(gpt2, real_trees, tmp_path, capsys):
    """The numbers of the default command. The rows that are packed of it are nearly full."""
    prepare.main([f'--input={real_trees}', f'--out_dir={tmp_path}'])
    meta = tokenfile.read_meta(str(tmp_path))
    assert (meta['seen'], meta['kept'], meta['dropped']) == (333, 333, {})
    assert (meta['truncated'], meta['answer_tokens_lost']) == (6, 3580)
    assert meta['tokenizer'] == gpt2.state()
    # Bytes that must never change: a run resumes only on equal files.
    assert meta['splits']['train']['sha256'].startswith('cf0a101fd05b')
    output = capsys.readouterr().out
    assert 'answer tokens lost, 5.1%           3,580\n' in output
    assert 'train           312 conversations      76,894 tokens, 80.9% supervised' in output
    split = tokenfile.Split([str(tmp_path)], 'train')
    assert rows.Rows(split, 1024).n_rows == 75 == -(-(76_894 - 312) // 1024)
    prepare.main([f'--input={real_trees}', f'--out_dir={tmp_path}', '--too_long=drop'])
    assert 'answer tokens lost, 10.2%          7,163\n' in capsys.readouterr().out


@pytest.mark.parametrize('max_tokens', [500, 1500])
@pytest.mark.parametrize('too_long', ['cut', 'drop'])
def test_every_token_of_an_answer_is_learned_or_counted_as_lost(
        run, real_trees, max_tokens, too_long):
    whole = run(real_trees, WHOLE, '--turns=all')
    meta = run(real_trees, '--turns=all', f'--max_tokens={max_tokens}', f'--too_long={too_long}')
    tokens = [sum(split['supervised_tokens'] for split in found['splits'].values())
              for found in (whole, meta)]
    assert tokens[0] == tokens[1] + meta['answer_tokens_lost']
    assert meta['dropped'].keys() == {'too long'} and meta['seen'] == 546
    shorter = [turns for turns in meta['conversations'] if turns not in whole['conversations']]
    assert 20 < len(shorter) <= meta['truncated'] <= len(shorter) + 3  # some lack only the end


# ---- any trees, any number of processes ----

def test_many_processes_give_the_same_files_as_one(run, tmp_path, monkeypatch):
    some = random_trees(201)
    flags = ['--turns=all', '--top_k=2', '--max_tokens=40']
    run(some, *flags, out='one')
    alone = common.encode_all
    monkeypatch.setattr(common, 'encode_all', lambda some, config, _: alone(some, config, 1e9))
    run(some, *flags, out='many')
    one, many = [tokenfile.read_meta(tmp_path / name) for name in ('one', 'many')]
    assert one['splits'] == many['splits'] and one['truncated'] == many['truncated'] > 0


@pytest.mark.parametrize('seed', [0, 1, 'real'])
def test_every_answer_that_can_be_reached_is_learned_once(run, request, seed):
    if seed == 'real':
        path = request.getfixturevalue('real_trees')
        some = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        some = random_trees(150, seed)
    meta = run(some, WHOLE, '--turns=all')

    def usable(node):
        return (not node['deleted'] and node['review_result'] and node['lang'] == 'en'
                and node['text'].strip())

    def prune(node):
        replies = [prune(reply) for reply in node['replies'] if usable(reply)]
        return {**node, 'replies': replies}

    threads = []
    for record in some:
        if usable(record['prompt']):
            threads += threads_of(prune(record['prompt']))
    beginnings = set()
    for thread in threads:
        beginnings |= {tuple(thread[:n]) for n in range(2, len(thread) + 1, 2)}
    answers = [beginning[-1] for beginning in beginnings]
    assert texts(meta['conversations']) == sorted(threads)
    assert supervised(meta['conversations']) == sorted(answers)
    assert len(answers) == 687 if seed == 'real' else len(answers) > 60
    assert meta['seen'] == sum(len(threads_of(record['prompt'])) for record in some)


def test_more_trees_move_none_from_split_to_split(run):
    def val(some, *flags):
        meta = run(some, '--val_fraction=0.3', *flags)
        n_train = meta['splits']['train']['conversations']
        return {turns[0].text for turns in meta['conversations'][n_train:]}
    whole = val(GOOD)
    part = val(GOOD[:100])
    assert 30 < len(whole) < 60 and part == {text for text in whole if int(text[1:]) < 100}
    assert val(GOOD[::-1]) == whole != val(GOOD, '--seed=1')


def test_meta_json_has_the_keys_that_other_tools_rely_on(run):
    some = [GOOD[0], tree(message('q', message('a'), text='x' * 900))]
    meta = run(some, '--max_tokens=200', '--val_fraction=0')
    expected = {'template': 'xml', 'seed': 1337, 'seen': 2, 'kept': 1, 'dropped': {'too long': 1},
                'truncated': 0, 'languages': {'en': 1}, 'broken_lines': 0}
    assert expected.items() <= meta.items()
    assert meta['source'].keys() == {'name', 'url', 'bytes', 'sha256', 'licence'}
    assert meta['source']['name'] == 'trees.jsonl' and meta['options']['max_tokens'] == 200
    assert not meta['options']['input'] and not meta['options']['out_dir']


# ---- what is kept of a tree ----

M = message
ALL = '--turns=all'


@pytest.mark.parametrize('flags, root, expected, dropped', [
    ('', M('q'), [], {}),
    ('', M('q', M('a', M('b', M('c'))), M('d')), ['q>[a]', 'q>[d]'], {}),
    (ALL, M('q', M('a', M('b', M('c'), M('d')), M('e', M('f')))),
     ['q>[a]>b>[c]', 'q>a>b>[d]', 'q>a>e>[f]'], {}),
    ('', M('q', M('a'), M('b'), deleted=True), [], {'deleted': 2}),
    ('', M('q', M('a'), M('b', review_result=False)), ['q>[a]'], {'review_result': 1}),
    ('', M('q', M('a'), M('b', text=' \n\t\u3000')), ['q>[a]'], {'empty text': 1}),
    ('', M('q', M('a', synthetic=True, review_result=None)), ['q>[a]'], {}),
    ('--synthetic=false', M('q', M('a', synthetic=True), M('b')), ['q>[b]'], {'synthetic': 1}),
    ('--lang=en, de', M('q', M('a', lang='de'), M('b', lang='fr')), ['q>[a]'], {'language': 1}),
    ('--lang=all', M('q', M('a', lang='de'), M('b', lang=None)), ['q>[a]', 'q>[b]'], {}),
    # What is left out cuts a thread. It is dropped if another thread has what is left of it.
    (ALL, M('q', M('a', M('b', M('c'), lang='es'))), ['q>[a]'], {}),
    (ALL, M('q', M('a', M('b', M('c', deleted=True)), M('d', M('e')))), ['q>[a]>d>[e]'],
     {'deleted': 1}),
    (ALL, M('q', M('a', M('b', M('c'), M('d'), lang='es'))), ['q>[a]'], {'language': 1}),
    (ALL, M('q', M('a', M('b', M('c', lang='es')), deleted=True)), [], {'deleted': 1}),
    # The best reply has rank 0. What is left out does not count.
    ('--top_k=3', M('q', M('x'), M('b', rank=2), M('a', rank=0), M('c', rank=1)),
     ['q>[a]', 'q>[b]', 'q>[c]'], {'top_k': 1}),
    ('--top_k=1', M('q', M('a', rank=0, deleted=True), M('b', rank=1), M('c', rank=2)),
     ['q>[b]'], {'deleted': 1, 'top_k': 1}),
    (f'{ALL} --top_k=1', M('q', M('a', M('b', M('c'), rank=1), M('d', M('e'), rank=0))),
     ['q>[a]>d>[e]'], {'top_k': 1}),
    # Persons and assistants take turns.
    (ALL, M('q', M('x', M('y'), role='prompter'), M('b')), ['q>[b]'], {}),
    (ALL, M('q', M('a', M('b', role='assistant'))), ['q>[a]'], {}),
    ('', M('q', M('a'), role='assistant'), [], {'roles': 1})])
def test_what_is_kept_of_a_tree(run, flags, root, expected, dropped):
    filler = tree(M('filler', M('kept')))  # something is always kept
    meta = run([tree(root), filler], *re.findall('--[^-]+\\b', flags))
    assert shown(meta['conversations']) == sorted([*expected, 'filler>[kept]'])
    assert meta['dropped'] == dropped


def test_texts_made_to_break_things_come_through(run):
    nasty = ['NUL \0 inside', '\u202eright to left שלום', 'e' + '\u0301' * 500, '\ufeff',
             '</user><assistant><|endoftext|>', 'a\u2028\x85', '"\\n\n', '👩‍👩‍👧‍👦', 'y' * 100_000]
    some = [tree(M(f'q{i}', M(f'a{i}', text=text), text=text)) for i, text in enumerate(nasty)]
    for i, text in enumerate(['half \ud83d a pair', '\n' * 1_100_000 + 'x']):
        some.append(tree(M(f'p{i}', M(f'b{i}', text=text))))
    meta = run(some, WHOLE)
    assert texts(meta['conversations']) == sorted([text, text] for text in nasty)
    assert meta['dropped'] == {'half a surrogate pair': 1, 'cannot be encoded': 1}


# ---- broken records ----

DEEP = '{"prompt":' + '{"role":"prompter","text":"x","replies":[' * 10_000 + ']}' * 10_000 + '}'


@pytest.mark.parametrize('bad, why', [
    (DEEP, 'RecursionError'), ('{"prompt": "hi"}', 'message_tree_id'),
    (lines([tree(M('x', M('y', text=5)))]), 'strip'),
    (lines([tree(M('x', M('y', role='system')))]), "KeyError 'system'")])
def test_a_broken_record_is_counted_and_named(run, bad, why):
    meta = run(lines(GOOD) + bad)
    assert meta['kept'] == 150 and meta['broken_lines'] == 1
    assert meta['errors'].startswith('broken record 151: ') and why in meta['errors']


@pytest.mark.parametrize('source, said', [
    ('', 'no conversation can be used'),
    ('{"message_id": "x", "text": "flat"}', "KeyError 'prompt'. Expected OpenAssistant's message"),
    (lines(GOOD[:1]).replace('"en"', '"de"'), "no conversation can be used.*{'language': 1}")])
def test_a_source_that_gives_nothing_is_one_line_and_changes_nothing(run, tmp_path, source, said):
    run(GOOD)
    files = os.listdir(tmp_path / 'out')
    before = (tmp_path / 'out' / 'train.bin').read_bytes()
    with pytest.raises(UserError, match=said) as error:
        run(source)
    assert '\n' not in str(error.value)
    assert (tmp_path / 'out' / 'train.bin').read_bytes() == before
    assert os.listdir(tmp_path / 'out') == files


# ---- flat messages ----

def flat(trees):
    """All messages as the flat export has them: in any order, null or NaN for a missing rank."""
    found = []
    for record in trees:
        waiting = [(record['prompt'], None)]
        while waiting:
            node, parent = waiting.pop()
            waiting += [(reply, node['message_id']) for reply in node['replies']]
            rank = float('nan') if node['rank'] is None else float(node['rank'])
            found.append({**node, 'rank': rank, 'parent_id': parent,
                          'message_tree_id': record['message_tree_id']})
            del found[-1]['replies']
    random.Random(1).shuffle(found)
    return found


def test_flat_messages_become_their_trees(run, tmp_path, capsys):
    some = random_trees(60)
    (tmp_path / 'flat.jsonl').write_text(lines(flat(some)))
    nest.main([f'--input={tmp_path / "flat.jsonl"}'])
    nested = capsys.readouterr().out
    hashes = []
    for records in (lines(some), nested):
        meta = run(records, WHOLE, '--turns=all', '--lang=all')
        hashes.append([split['sha256'] for split in meta['splits'].values()])
    assert hashes[0] == hashes[1] and nested.count('\n') == 60


# ---- as a person runs it ----

@pytest.mark.parametrize('max_tokens, recipe', [
    (1024, 'config/finetune_oasst.py'), (513, 'config/finetune_oasst_cpu.py')])
def test_what_it_prints(run, tmp_path, monkeypatch, max_tokens, recipe):
    """The recipe for a large GPU is not for what was prepared for a laptop."""
    monkeypatch.chdir(tmp_path)
    meta = run([tree(M('q', M('a'), M('b', deleted=True)))], '--val_fraction=0',
               f'--max_tokens={max_tokens}', out='data/mine')
    table = [' '.join(line.split()) for line in meta['output'].splitlines()]
    assert table[:8] == ['trees 1', 'messages 3', 'broken records 0', 'conversations seen 2',
                         'kept 1', 'of these, truncated 0', 'dropped: deleted 1',
                         'answer tokens lost, 0.0% 0']
    assert table[-1].endswith(f'Next: python train.py {recipe} --dataset=mine '
                              '--out_dir=out/mine') and not meta['errors']


NASTY = ['</user><assistant>', '\\<user>', '🙂\0\r\n', '<|endoftext|>', ' x ', 'שלום',
         '</conversation>']


def test_stdout_is_the_same_conversations_as_text(script, vocabulary, tmp_path):
    some = []
    for i, text in enumerate(NASTY):
        some.append(tree(M(f'q{i}', M(f'a{i}', text=f'A {text}'), text=text)))
    (tmp_path / 'trees.jsonl').write_text(lines(some))
    done = script('data/oasst/prepare.py', '--input=trees.jsonl', '--stdout', '--out_dir=out',
                  f'--tokenizer={vocabulary}', text=False)
    expected = [[Turn('user', text), Turn('assistant', f'A {text}')] for text in NASTY]
    assert readback.from_text(done.stdout.decode()) == expected
    assert done.returncode == 0 and not (tmp_path / 'out').exists()
