"""data/oasst/prepare.py: from trees to token files, nothing lost and nothing twice."""
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from configurator import UserError
from conftest import ROOT
from core import readback, rows, tokenfile, tokenizer
from core.conversation import Turn
from data import common
from data.oasst import prepare

WHOLE = '--max_tokens=1000000'
FILES = [f'{split}{ending}' for split in ('train', 'val') for ending in tokenfile.DTYPES]


# ---- making trees ----

def message(key, *replies, text='', **more):
    """A message. Its text is its id; `tree` fills in the role."""
    return {'message_id': key, 'text': text or key, 'lang': 'en', 'review_result': True,
            'deleted': False, 'synthetic': False, 'replies': list(replies), **more}


def tree(root):
    """The line of a tree, with roles and the ids of parents where they are missing."""
    waiting = [(root, None, 'prompter')]
    while waiting:
        node, parent, role = waiting.pop()
        node.setdefault('role', role)
        if parent:
            node.setdefault('parent_id', parent)
        below = 'assistant' if role == 'prompter' else 'prompter'
        waiting += [(reply, node['message_id'], below) for reply in node['replies']]
    return {'message_tree_id': root['message_id'], 'tree_state': 'ready', 'prompt': root}


def messages_of(node):
    """The message and all below it."""
    found = [node]
    for other in found:
        found += other['replies']
    return found


def flat(trees):
    """All messages as the flat export has them: no nulls, no replies, NaN for a missing rank."""
    found = []
    for a_tree in trees:
        for node in messages_of(a_tree['prompt']):
            rank = node.get('rank')
            node = {**node, 'message_tree_id': a_tree['message_tree_id'], 'labels': {'name': ['x']},
                    'rank': float('nan') if rank is None else float(rank)}
            del node['replies']
            found.append({key: value for key, value in node.items() if value is not None})
    random.Random(1).shuffle(found)
    return found


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
    """run(records, text, bytes or path, *flags): meta.json, and more that it adds.

    'conversations' holds all of them, read back; 'output' and 'errors' what was printed.
    """
    def run(source, *flags, out='out'):
        path = tmp_path / 'trees.jsonl'
        if isinstance(source, list):
            source = lines(source)
        if isinstance(source, str):
            source = source.encode()
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            path = source
        folder = str(tmp_path / out)
        flags = [f'--input={path}', f'--out_dir={folder}', f'--tokenizer={vocabulary}', *flags]
        prepare.main(flags)
        meta = tokenfile.read_meta(folder)
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        bpe = tokenizer.from_state(meta['tokenizer'])
        meta['conversations'] = []
        for name in meta['splits']:
            split = tokenfile.Split([folder], name)
            for i in range(len(split)):
                turns = readback.decode(*split[i], bpe, meta['template'])
                meta['conversations'].append(turns)
        assert meta['kept'] == len(meta['conversations'])
        printed = capsys.readouterr()
        return {**meta, 'output': printed.out, 'errors': printed.err}
    return run


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def texts(conversations):
    return sorted([turn.text for turn in turns] for turns in conversations)


def supervised(conversations):
    """The texts of all supervised answers."""
    found = []
    for turns in conversations:
        found += [turn.text for turn in turns if turn.role == 'assistant' and turn.supervised]
    return sorted(found)


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

@pytest.fixture(scope='module')
def trees(real_trees):
    with open(real_trees, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def test_first_gives_the_root_and_each_direct_reply(run, real_trees, trees):
    meta = run(real_trees, WHOLE)
    assert meta['counts'] == {'trees': 100, 'messages': 1167}
    assert meta['answers'] == {'learned': 333, 'cut': 0, 'lost': 0, 'tokens_lost': 0}
    assert (meta['seen'], meta['kept'], meta['truncated'], meta['broken_lines']) == (333, 333, 0, 0)
    expected = []
    for a_tree in trees:
        for reply in a_tree['prompt']['replies']:
            expected.append([a_tree['prompt']['text'], reply['text']])
    assert texts(meta['conversations']) == sorted(expected)


def test_synthetic_messages_can_be_left_out(run, real_trees):
    meta = run(real_trees, WHOLE, '--synthetic=false')
    assert meta['dropped'] == {'synthetic': 17} and meta['kept'] == 316
    assert meta['counts']['messages left out: synthetic'] == 22


def test_all_supervises_each_of_687_answers_once(run, real_trees, trees):
    meta = run(real_trees, WHOLE, '--turns=all')
    answers = []
    threads = []
    for a_tree in trees:
        threads += threads_of(a_tree['prompt'])
        answers += [node['text'] for node in messages_of(a_tree['prompt'])
                    if node['role'] == 'assistant']
    assert supervised(meta['conversations']) == sorted(answers)
    assert len(answers) == 687 == meta['answers']['learned']
    assert texts(meta['conversations']) == sorted(threads)
    assert meta['seen'] == meta['kept'] == 546


def test_in_gpt2s_ids(gpt2, real_trees, tmp_path, capsys):
    """The numbers of the default command. The rows that are packed of it are nearly full."""
    prepare.main([f'--input={real_trees}', f'--out_dir={tmp_path}'])
    meta = tokenfile.read_meta(str(tmp_path))
    assert (meta['kept'], meta['dropped']) == (333, {})
    assert meta['answers'] == {'learned': 333, 'cut': 6, 'lost': 0, 'tokens_lost': 3580}
    assert meta['tokenizer'] == gpt2.state()
    output = capsys.readouterr().out
    assert 'answer tokens lost, 5.1%           3,580\n' in output
    assert 'train           312 conversations      76,894 tokens, 80.9% supervised\n' in output
    assert 'val              21 conversations       5,187 tokens, 85.3% supervised\n' in output
    split = tokenfile.Split([str(tmp_path)], 'train')
    n_positions = 76_894 - 312
    assert rows.Rows(split, 1024).n_rows == 75 == -(-n_positions // 1024)
    prepare.main([f'--input={real_trees}', f'--out_dir={tmp_path}', '--too_long=drop'])
    output = capsys.readouterr().out
    assert 'answer tokens lost, 10.2%          7,163\n' in output
    assert 'train           306 conversations      70,752 tokens, 82.9% supervised\n' in output


def test_max_tokens_holds_and_what_is_lost_is_counted(run, real_trees):
    whole = run(real_trees, WHOLE, '--turns=all')['conversations']
    meta = run(real_trees, '--turns=all', '--max_tokens=1500', '--too_long=drop')
    assert meta['truncated'] > 20 and meta['dropped'].keys() == {'too long'} and meta['seen'] == 546
    cut = [turns for turns in meta['conversations'] if turns not in whole]
    assert len(cut) == meta['truncated']
    beginnings = {tuple(turns[:n]) for turns in whole for n in range(2, len(turns), 2)}
    assert beginnings.issuperset(map(tuple, cut))
    kept = Counter(supervised(meta['conversations']))
    assert not kept - Counter(supervised(whole))


@pytest.mark.parametrize('max_tokens', [500, 1500])
def test_an_answer_that_is_cut_keeps_its_beginning(run, real_trees, max_tokens):
    """Every token of an answer is learned or counted, and so is every answer."""
    whole = run(real_trees, WHOLE, '--turns=all')
    meta = run(real_trees, '--turns=all', f'--max_tokens={max_tokens}')
    answers = meta['answers']
    assert answers['learned'] + answers['lost'] == 687
    n_learned = len(supervised(meta['conversations']))
    assert n_learned == answers['learned']
    tokens = [sum(split['supervised_tokens'] for split in found['splits'].values())
              for found in (whole, meta)]
    assert tokens[0] == tokens[1] + answers['tokens_lost']
    threads = Counter()
    for turns in whole['conversations']:
        threads.update(tuple(turns[:n]) for n in range(2, len(turns) + 1, 2))
    cut = [turns for turns in meta['conversations'] if tuple(turns) not in threads]
    assert 20 < len(cut) <= answers['cut'] <= len(cut) + 3  # some lack only the tag that ends them
    for *before, last in cut:
        assert any(list(turns[:len(before)]) == before and last.text
                   and turns[len(before)].text.startswith(last.text)
                   for turns in threads if len(turns) == len(before) + 1)


# ---- both forms, any number of processes ----

FLAGS = [[], ['--turns=all', '--top_k=2', '--synthetic=false'],
         ['--turns=all', '--template=dialogpt', '--lang=all']]


@pytest.mark.parametrize('real, flags', [(False, flags) for flags in FLAGS] + [(True, FLAGS[1])])
def test_flat_messages_give_the_same_files_as_their_trees(run, request, tmp_path, real, flags):
    some = request.getfixturevalue('trees') if real else random_trees(100)
    a = run(some, WHOLE, *flags, out='trees')
    b = run(flat(some), WHOLE, *flags, out='flat')
    assert files_of(tmp_path / 'trees') == files_of(tmp_path / 'flat')
    assert dict(a, source=0, errors=0, output=0) == dict(b, source=0, errors=0, output=0)


@pytest.mark.parametrize('flags', FLAGS, ids=' '.join)
def test_many_processes_give_the_same_files_as_one(run, tmp_path, monkeypatch, flags):
    some = random_trees(201)
    run(some, *flags, out='one')
    pools = []
    alone = common.encode_all

    class Pool(common.ProcessPoolExecutor):
        def __init__(self, **options):
            pools.append(1)
            super().__init__(**options)
    monkeypatch.setattr(common, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(common, 'encode_all', lambda some, config, _: alone(some, config, 1e9))
    run(some, *flags, out='many')
    assert pools == [1]
    for name in (*FILES, 'meta.json'):
        one, many = tmp_path / 'one' / name, tmp_path / 'many' / name
        assert one.read_bytes() == many.read_bytes(), name


@pytest.mark.parametrize('seed', range(3))
def test_every_answer_that_can_be_reached_is_learned_once(run, seed):
    some = random_trees(150, seed)
    meta = run(some, WHOLE, '--turns=all')

    def usable(node):
        return (not node['deleted'] and node['review_result'] and node['lang'] == 'en'
                and node['text'].strip())

    def prune(node):
        replies = [prune(reply) for reply in node['replies'] if usable(reply)]
        return {**node, 'replies': replies}

    threads = []
    answers = []
    for a_tree in some:
        if usable(a_tree['prompt']):
            root = prune(a_tree['prompt'])
            threads += threads_of(root)
            answers += [node['text'] for node in messages_of(root) if node['role'] == 'assistant']
    assert texts(meta['conversations']) == sorted(threads)
    assert supervised(meta['conversations']) == sorted(answers)
    assert len(answers) == meta['answers']['learned'] > 60
    assert meta['seen'] == sum(len(threads_of(a_tree['prompt'])) for a_tree in some)


def test_more_trees_move_none_from_split_to_split(run):
    def val(some, *flags):
        meta = run(some, '--val_fraction=0.3', *flags)
        n_train = meta['splits']['train']['conversations']
        return {turns[0].text for turns in meta['conversations'][n_train:]}
    whole = val(GOOD)
    part = val(GOOD[:100])
    assert 30 < len(whole) < 60 and part == {text for text in whole if int(text[1:]) < 100}
    assert val(GOOD[::-1]) == whole != val(GOOD, '--seed=1')


def test_meta_json_has_the_keys_that_other_tools_rely_on(run, tmp_path):
    some = [GOOD[0], tree(message('q', message('a'), text='x' * 900))]
    run(some, '--max_tokens=200', '--val_fraction=0')
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['format_version'] == 1 and meta['template'] == 'xml' and meta['seed'] == 1337
    assert meta['tokenizer'].keys() >= {'name', 'sha256'}
    assert meta['source'].keys() == {'name', 'url', 'bytes', 'sha256', 'licence'}
    assert meta['source']['name'] == 'trees.jsonl' and meta['source']['licence'] is None
    assert (meta['seen'], meta['kept'], meta['dropped']) == (2, 1, {'too long': 1})
    assert (meta['truncated'], meta['languages']) == (0, {'en': 1})
    for counts in meta['splits'].values():
        assert counts.keys() >= {'conversations', 'tokens', 'supervised_tokens'}
    assert meta['splits'].keys() == {'train', 'val'} and meta['options']['max_tokens'] == 200
    assert str(tmp_path) not in str({**meta, 'options': dict(meta['options'], tokenizer='')})
    assert meta['split_rule'] == 'hash of the tree id'


# ---- what is kept of a tree ----

M = message
RULES = {  # name: (tree, flags, the conversations in short, what was dropped)
    'a tree without replies': (M('q'), '', [], {}),
    'a thread that ends on the person': (M('q', M('a', M('b'))), '--turns=all', ['q>[a]'], {}),
    'an answer in several threads is learned once': (
        M('q', M('a', M('b', M('c'), M('d')), M('e', M('f')))), '--turns=all',
        ['q>[a]>b>[c]', 'q>a>b>[d]', 'q>a>e>[f]'], {}),
    'first takes direct replies only': (
        M('q', M('a', M('b', M('c'))), M('d')), '', ['q>[a]', 'q>[d]'], {}),
    'deleted': (M('q', M('a'), M('b', deleted=True)), '', ['q>[a]'], {'deleted': 1}),
    'a deleted root': (M('q', M('a'), M('b'), deleted=True), '', [], {'deleted': 2}),
    'rejected in review': (
        M('q', M('a'), M('b', review_result=False)), '', ['q>[a]'], {'review_result': 1}),
    'not yet reviewed': (M('q', M('a', review_result=None)), '', ['q>[a]'], {}),
    'empty text': (M('q', M('a'), M('b', text=' \n\t\u3000')), '', ['q>[a]'], {'empty text': 1}),
    'synthetic is kept': (M('q', M('a', synthetic=True)), '', ['q>[a]'], {}),
    'synthetic is not': (
        M('q', M('a', synthetic=True), M('b')), '--synthetic=false', ['q>[b]'], {'synthetic': 1}),
    'another language': (M('q', M('a', lang='de'), M('b')), '', ['q>[b]'], {'language': 1}),
    'two languages': (
        M('q', M('a', lang='de'), M('b', lang='fr')), '--lang=en, de', ['q>[a]'], {'language': 1}),
    'all languages': (
        M('q', M('a', lang='de'), M('b', lang=None), lang='ru'), '--lang=all',
        ['q>[a]', 'q>[b]'], {}),
    'no language': (M('q', M('a', lang=None)), '', [], {'language': 1}),
    'another language cuts a thread': (
        M('q', M('a', M('b', M('c'), lang='es'))), '--turns=all', ['q>[a]'], {}),
    'what is cut to a thread that another one has is dropped': (
        M('q', M('a', M('b', M('c', deleted=True)), M('d', M('e')))), '--turns=all',
        ['q>[a]>d>[e]'], {'deleted': 1}),
    'two threads cut to the same are one': (
        M('q', M('a', M('b', M('c'), M('d'), lang='es'))), '--turns=all', ['q>[a]'],
        {'language': 1}),
    'a whole thread is dropped for its first reason': (
        M('q', M('a', M('b', M('c', lang='es')), deleted=True)), '--turns=all', [],
        {'deleted': 1}),
    'top_k, the best first and unranked last': (
        M('q', M('x'), M('b', rank=2), M('a', rank=0), M('c', rank=1)), '--top_k=3',
        ['q>[a]', 'q>[b]', 'q>[c]'], {'top_k': 1}),
    'top_k gives no place to what is left out': (
        M('q', M('a', rank=0, deleted=True), M('b', rank=1), M('c', rank=2)), '--top_k=1',
        ['q>[b]'], {'deleted': 1, 'top_k': 1}),
    'what is left out keeps its reason beyond top_k': (
        M('q', M('a', rank=0), M('b', rank=1), M('c', rank=2, deleted=True)), '--top_k=1',
        ['q>[a]'], {'deleted': 1, 'top_k': 1}),
    'top_k of persons too': (
        M('q', M('a', M('b', M('c'), rank=1), M('d', M('e'), rank=0))), '--turns=all --top_k=1',
        ['q>[a]>d>[e]'], {'top_k': 1}),
    'a person who answers a person': (
        M('q', M('x', M('y'), role='prompter'), M('b')), '--turns=all', ['q>[b]'], {}),
    'an assistant who follows an assistant': (
        M('q', M('a', M('b', role='assistant'))), '--turns=all', ['q>[a]'], {}),
    'an assistant who begins': (M('q', M('a'), role='assistant'), '', [], {'roles': 1}),
    'tags that people typed': (
        M('</user><user>', M('<|endoftext|></assistant>')), '',
        ['</user><user>>[<|endoftext|></assistant>]'], {}),
}


@pytest.mark.parametrize('form', [list, flat])
@pytest.mark.parametrize('name', RULES)
def test_what_is_kept_of_a_tree(run, name, form):
    root, flags, expected, dropped = RULES[name]
    filler = tree(M('filler', M('kept')))  # something is always kept
    meta = run(form([tree(root), filler]), *re.findall('--[^-]+\\b', flags))
    assert shown(meta['conversations']) == sorted([*expected, 'filler>[kept]'])
    assert meta['dropped'] == dropped


def test_replies_are_sorted_by_rank_and_unranked_ones_by_id():
    replies = [M('z'), M('c', rank=1.0), M('y', rank=float('nan')), M('a', rank=2),
               M('x', rank=None), M('b', rank=0)]
    messages = prepare.read_tree(tree(M('q', *replies))['prompt'], prepare.Config())
    assert [node.text for node in messages] == ['q', 'b', 'c', 'a', 'x', 'y', 'z']


@pytest.mark.parametrize('form', [list, flat])
def test_texts_made_to_break_things_come_through(run, form):
    nasty = ['NUL \0 inside', '\u202eright to left שלום', 'e' + '\u0301' * 500, '\ufeff',
             '</user><assistant><|endoftext|>', 'a\u2028\x85', '"\\n\n', '👩‍👩‍👧‍👦', 'y' * 100_000]
    some = [tree(M(f'q{i}', M(f'a{i}', text=text), text=text)) for i, text in enumerate(nasty)]
    for a_tree in some:
        a_tree['prompt'] |= {'emojis': float('nan'), 'detoxify': {'toxicity': float('inf')}}
    found = run(form(some), WHOLE)['conversations']
    assert texts(found) == sorted([text, text] for text in nasty)


def test_what_cannot_be_encoded_is_dropped(run):
    some = [tree(M(f'q{i}', M(f'a{i}', text=text))) for i, text in
            enumerate(['fine', 'half \ud83d a pair', '\n' * 1_100_000 + 'x'])]
    meta = run(lines(some).encode('utf-8', 'surrogatepass'), WHOLE)
    assert meta['dropped'] == {'half a surrogate pair': 1, 'cannot be encoded': 1}
    assert shown(meta['conversations']) == ['q0>[fine]']


# ---- flat messages and broken records ----

def test_flat_messages_without_a_root_are_counted(run):
    cycle = [M('c1', parent_id='c2'), M('c2', parent_id='c1'), M('self', parent_id='self')]
    records = [*flat([tree(M('q', M('a', M('b'))))]), M('orphan', parent_id='gone'), *cycle]
    for record in records:
        record.setdefault('role', 'assistant')
    meta = run(records)
    assert shown(meta['conversations']) == ['q>[a]'] and meta['counts']['trees'] == 1
    assert meta['counts']['messages without a root'] == 4 and meta['counts']['messages'] == 3
    repeated = run(records[:3] + records[:2])
    assert shown(repeated['conversations']) == ['q>[a]']
    assert repeated['counts']['messages without a root'] == 2


def test_trees_may_come_without_ids(run):
    some = []
    for i in range(3):
        reply = {'text': f'a{i}', 'role': 'assistant', 'lang': 'en'}
        root = {'text': f'q{i}', 'role': 'prompter', 'lang': 'en', 'replies': [reply]}
        some.append({'prompt': root})
    assert shown(run(some)['conversations']) == ['q0>[a0]', 'q1>[a1]', 'q2>[a2]']


def test_a_thread_of_ten_thousand_replies(run):
    records = []
    for i in range(10_001):
        role = ('prompter', 'assistant')[i % 2]
        records.append({'message_id': str(i), 'text': f't{i}', 'role': role, 'lang': 'en'})
        if i:
            records[-1]['parent_id'] = str(i - 1)
    random.Random(0).shuffle(records)
    turns, = run(records, '--turns=all', WHOLE)['conversations']
    assert [turn.text for turn in turns] == [f't{i}' for i in range(10_000)]
    meta = run(records, '--turns=all')
    assert meta['truncated'] == 1 and sum(s['tokens'] for s in meta['splits'].values()) <= 1024


DEEP = '{"prompt":' + '{"role":"prompter","text":"x","replies":[' * 10_000 + ']}' * 10_000 + '}'
BROKEN = {  # name: (a line, what is said)
    'deep': (DEEP, 'recursion'),
    'no text': (tree(M('x', {**M('y'), 'text': None})), 'expected a message with text and role'),
    'text of numbers': (tree(M('x', {**M('y'), 'text': 5})), 'expected a message with text'),
    'no role': (tree(M('x', role=None)), 'expected a message with text and role'),
    'odd role': (tree(M('x', role='system')), 'expected a message with text and role'),
    'list of roles': (tree(M('x', role=['prompter'])), 'unhashable'),
    'odd reply': ({'prompt': {'text': 'x', 'role': 'prompter', 'replies': ['y']}}, 'no attribute'),
    'odd replies': ({'prompt': {'text': 'x', 'role': 'prompter', 'replies': 5}}, 'not iterable'),
    'prompt of text': ({'prompt': 'hi'}, 'no attribute'),
    'neither tree nor message': ({'other': 5}, "found \"{'other': 5}\""),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_record_is_counted_and_named(run, name):
    bad, why = BROKEN[name]
    if isinstance(bad, dict):
        bad = json.dumps(bad)
    meta = run(lines(GOOD) + bad + '\n')
    assert meta['kept'] == 150 and meta['broken_lines'] == 1
    assert meta['errors'].startswith('broken record 151: ') and why in meta['errors']


def test_a_broken_flat_message_leaves_the_rest(run):
    bad = [{'message_id': 'x'}, {'message_id': 'y', 'text': 't', 'role': 'robot'}]
    meta = run([*flat(GOOD), *bad])
    assert meta['broken_lines'] == 2 and meta['kept'] == 150
    odd = [{**M('z', rank='first', message_tree_id=1), 'role': 'prompter'},
           {**M(['key'], parent_id={}, lang=3), 'role': 'prompter'}]
    assert run([*flat(GOOD), *odd])['kept'] == 150


@pytest.mark.parametrize('source, said', [
    ('', 'no conversation can be used'), ('\n\n', 'no conversation can be used'),
    ('5\n[]\n', '2 of 2 records of .* are broken'),
    ('{"instruction": "x", "output": "y"}\n', "found \"{'instruction': 'x'"),
    ('{"a\\nb": 1}', r"found \"{'a\\\\nb': 1}\""),
    (lines(GOOD[:1]).replace('"en"', '"de"'), "no conversation can be used.*{'language': 1}"),
    (gzip.compress(lines(GOOD).encode())[:-9], 'cannot be read'),
])
def test_a_source_that_gives_nothing_is_one_line_and_changes_nothing(run, tmp_path, source, said):
    run(GOOD)
    before = files_of(tmp_path / 'out')
    with pytest.raises(UserError, match=said) as error:
        run(source)
    assert '\n' not in str(error.value)
    assert files_of(tmp_path / 'out') == before
    assert set(os.listdir(tmp_path / 'out')) <= {*FILES, 'meta.json', '.lock'}


# ---- as a person runs it ----

@pytest.fixture
def command(script, vocabulary):
    def run(*flags, **options):
        return script('data/oasst/prepare.py', f'--tokenizer={vocabulary}', *flags, **options)
    return run


def test_mistakes_are_a_line_each_and_exit_code_2(command, tmp_path):
    done = command('--input=none.jsonl', '--out_dir=out')
    assert done.returncode == 2 and done.stderr.startswith('none.jsonl not found')
    done = command('--turns=some', '--val_fraction=1', '--top_k=-1', '--source=x', '--max_tokens=0')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 5 and not done.stdout
    assert os.listdir(tmp_path) == []


def test_what_it_prints(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some = [tree(M('q', M('a'), M('b', deleted=True)))]
    meta = run(some, '--val_fraction=0', '--report', out='data/mine')
    assert (tmp_path / 'data' / 'mine' / 'report.html').exists()
    table = [' '.join(line.split()) for line in meta['output'].splitlines()]
    for row in ('trees 1', 'messages 3', 'answers learned 1', 'messages left out: deleted 1',
                'conversations seen 2', 'kept 1', 'dropped 1', 'deleted 1', 'broken records 0'):
        assert row in table
    assert table[-1].endswith('Next: python train.py config/finetune_own.py '
                              '--dataset=mine --out_dir=out/mine') and not meta['errors']


@pytest.mark.parametrize('max_tokens, recipe', [
    (1024, 'config/finetune_oasst.py'), (513, 'config/finetune_oasst_cpu.py')])
def test_the_next_command_for_the_published_file(tmp_path, vocabulary, capsys, monkeypatch,
                                                 max_tokens, recipe):
    """The recipe for a large GPU is not for what was prepared for a laptop."""
    path = tmp_path / 'trees.jsonl'
    path.write_text(lines(GOOD))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    published = {'url': None, 'sha256': sha256, 'licence': 'Apache-2.0'}
    monkeypatch.setattr(prepare, 'SOURCES', {'oasst2': published})
    monkeypatch.setattr(prepare, 'HERE', str(tmp_path / 'data' / 'oasst'))
    monkeypatch.chdir(tmp_path)
    prepare.main([f'--input={path}', f'--tokenizer={vocabulary}', f'--max_tokens={max_tokens}'])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f'Next: python train.py {recipe} --dataset=oasst --out_dir=out/oasst')


NASTY = ['</user><assistant>', '\\<user>', '🙂\0\r\n', '<|endoftext|>', ' x ', 'שלום',
         '</conversation>']


def test_stdout_is_the_same_conversations_as_text(command, tmp_path):
    some = []
    for i, text in enumerate(NASTY):
        some.append(tree(M(f'q{i}', M(f'a{i}', text=f'A {text}'), text=text)))
    (tmp_path / 'trees.jsonl').write_text(lines(some) + 'x\n' * 9)
    done = command('--input=trees.jsonl', '--stdout', '--out_dir=out', text=False)
    assert not (tmp_path / 'out').exists()
    expected = [[Turn('user', text), Turn('assistant', f'A {text}')] for text in NASTY]
    assert readback.from_text(done.stdout.decode()) == expected
    assert done.returncode == 2 and b'9 of 16 records' in done.stderr
    (tmp_path / 'trees.jsonl').write_text(lines(some[2:3]))
    ascii_only = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    done = command('--input=trees.jsonl', '--stdout', env=ascii_only)
    assert done.returncode == 0 and r'<user>\U0001f642' in done.stdout


def test_stdout_into_head_ends_quietly(tmp_path, vocabulary):
    (tmp_path / 'trees.jsonl').write_text(lines(GOOD * 20))
    path = os.path.join(ROOT, 'data', 'oasst', 'prepare.py')
    command = [sys.executable, path, '--input=trees.jsonl', '--stdout', f'--tokenizer={vocabulary}']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    assert process.stdout.readline().startswith(b'<conversation><user>')
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 0
