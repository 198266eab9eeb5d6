"""data/oasst/prepare.py and data/pipeline.py: from trees to token files, nothing lost and nothing twice."""
import gzip
import json
import os
import pathlib
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from core import conversation
from core import tokenfile
from core import tokenizer
from configurator import UserError
from core.conversation import Turn
from data import pipeline
from data.oasst import prepare
from conftest import ROOT

FILES = [f'{split}{ending}' for split in ('train', 'val') for ending in tokenfile.DTYPES]
BIG = '--max_tokens=1000000'


def message(key, text='', *replies, **more):
    """A message with its replies; roles alternate below an assistant or a prompter, as `tree` sees to."""
    return {'message_id': key, 'text': text or f'text of {key}', 'lang': 'en', 'review_result': True, 'deleted': False,
            'synthetic': False, 'replies': list(replies), **more}


def tree(root, **more):
    """The line of a tree: roles by depth and ids of parents filled in where they lack."""
    waiting = [(root, None, 'prompter')]
    while waiting:
        node, parent, role = waiting.pop()
        node.setdefault('role', role)
        if parent:
            node.setdefault('parent_id', parent)
        below = 'assistant' if role == 'prompter' else 'prompter'
        waiting += [(reply, node['message_id'], below) for reply in node['replies'] if isinstance(reply, dict)]
    return {'message_tree_id': root['message_id'], 'tree_state': 'ready_for_export', 'prompt': root, **more}


def messages_of(a_tree):
    """The messages of a tree, each before its replies."""
    waiting, found = [a_tree['prompt']], []
    while waiting:
        found.append(waiting.pop(0))
        waiting += found[-1]['replies']
    return found


def flat(a_tree):
    """The messages of a tree as the flat export has them: no replies, ranks as numbers with a point, no nulls."""
    for node in messages_of(a_tree):
        more = {'message_tree_id': a_tree['message_tree_id'], 'rank': float(node['rank']) if node.get('rank') is not None else float('nan'),
                'labels': {'name': ['spam', 'quality'], 'value': [0.0, 0.75], 'count': [3, 3]}, 'emojis': {'name': ['+1'], 'count': [2]}}
        yield {key: value for key, value in {**node, **more}.items() if key != 'replies' and value is not None}


def random_trees(n, seed=0):
    """Trees of all shapes, with some of everything that leaves a message out."""
    rng = random.Random(seed)

    def grown(key, depth):
        more = rng.choice([{}] * 20 + [{'deleted': True}, {'review_result': False}, {'lang': 'de'}, {'synthetic': True}, {'lang': None}])
        below = [grown(f'{key}.{i}', depth + 1) for i in range(rng.choice((0, 1, 1, 2, 3)) if depth < 6 else 0)]
        node = message(key, rng.choice([f'text {key}', f'{key} é🙂</user>'] * 6 + [' ']), *below, **more)
        return {**node, 'rank': rng.choice((None, 0, 1, 2))} if depth else node
    return [tree(grown(f'{rng.random()}', 0)) for _ in range(n)]


def lines(records):
    return '\n'.join(json.dumps(record, ensure_ascii=False) for record in records) + '\n'


@pytest.fixture
def run(tmp_path, vocabulary, capsys):
    """run(trees, text, bytes or path of a file, *flags): meta.json, and more under 'conversations' and 'printed'."""
    def run(source, *flags, out='out', name='trees.jsonl'):
        path = source if isinstance(source, pathlib.Path) else tmp_path / name
        if path is not source:
            source = lines(source) if isinstance(source, list) else source
            path.write_bytes(source if isinstance(source, bytes) else source.encode())
        prepare.main([f'--input={path}', f'--out_dir={tmp_path / out}', f'--tokenizer={vocabulary}', *flags])
        meta = tokenfile.read_meta(str(tmp_path / out))
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        assert meta['kept'] == sum(counts['conversations'] for counts in meta['splits'].values())
        meta['conversations'] = read_back(tmp_path / out, meta)
        meta['printed'] = capsys.readouterr()
        return meta
    return run


def read_back(folder, meta):
    """All conversations of a prepared folder, split after split."""
    bpe = tokenizer.from_state(meta['tokenizer'])
    splits = [tokenfile.Split([str(folder)], name) for name in meta['splits']]
    return [conversation.decode(*split[i], bpe, meta['template']) for split in splits for i in range(len(split))]


def refused(run, tmp_path, *arguments):
    """The one line of the UserError; nothing was written."""
    with pytest.raises(UserError) as caught:
        run(*arguments, out='refused')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'refused').exists() or os.listdir(tmp_path / 'refused') == []
    return str(caught.value)


def shown(conversations):
    """Conversations in short: 'a>b' for two turns, brackets where the answer is supervised."""
    return sorted('>'.join(f'[{turn.text}]' if turn.role == 'assistant' and turn.supervised else turn.text for turn in turns)
                  for turns in conversations)


# ---- the 100 real trees ----

@pytest.fixture(scope='module')
def trees(real_trees):
    with open(real_trees, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def test_first_gives_the_root_and_each_direct_reply(run, real_trees, trees):
    meta = run(real_trees, BIG)
    assert (meta['counts']['trees'], meta['counts']['messages'], meta['counts']['different answers']) == (100, 1167, 333)
    assert (meta['seen'], meta['kept'], meta['dropped'], meta['truncated'], meta['broken_lines']) == (333, 333, {}, 0, 0)
    # the loop of the blog post
    expected = [[Turn('user', t['prompt']['text']), Turn('assistant', reply['text'])] for t in trees for reply in t['prompt']['replies']]
    assert sorted(meta['conversations']) == sorted(expected)


def test_deleted_and_rejected_ones_are_none_and_synthetic_ones_17(run, real_trees, trees):
    every = [node for t in trees for node in messages_of(t)]
    assert sum(node['synthetic'] for node in every) == 22
    meta = run(real_trees, BIG, '--synthetic=false')
    assert meta['dropped'] == {'synthetic': 17} and meta['seen'] == 333 and meta['kept'] == 316
    assert {key: n for key, n in meta['counts'].items() if 'left out' in key} == {'messages left out: synthetic': 22}
    expected = [[t['prompt']['text'], reply['text']] for t in trees for reply in t['prompt']['replies']
                if not t['prompt']['synthetic'] and not reply['synthetic']]
    assert sorted([turn.text for turn in turns] for turns in meta['conversations']) == sorted(expected)


def threads_of(node, before=()):
    """Every way from a message down to a last assistant message: lists of texts, by plain recursion."""
    here = [*before, node['text']]
    below = [thread for reply in node['replies'] for thread in threads_of(reply, here)]
    return below or ([here] if node['role'] == 'assistant' else [])


def test_all_supervises_each_of_687_answers_once(run, real_trees, trees):
    meta = run(real_trees, BIG, '--turns=all')
    answers = [node['text'] for t in trees for node in messages_of(t) if node['role'] == 'assistant']
    supervised = [turn.text for turns in meta['conversations'] for turn in turns if turn.role == 'assistant' and turn.supervised]
    assert len(answers) == len(supervised) == 687 == meta['counts']['different answers']
    assert sorted(supervised) == sorted(answers)
    expected = [thread for t in trees for thread in threads_of(t['prompt'])]
    assert sorted([turn.text for turn in turns] for turns in meta['conversations']) == sorted(expected)
    assert meta['seen'] == meta['kept'] == len(expected) == 546


def test_in_gpt2s_ids(gpt2, real_trees, tmp_path, capsys):
    """The numbers of the default command; and of real lengths, the rows are nearly full."""
    prepare.main([f'--input={real_trees}', f'--out_dir={tmp_path}'])
    meta, printed = tokenfile.read_meta(str(tmp_path)), capsys.readouterr().out
    assert (meta['seen'], meta['kept'], meta['dropped'], meta['truncated']) == (333, 327, {'too long': 6}, 0)
    assert meta['tokenizer'] == gpt2.state()
    assert 'train           306 conversations      70,752 tokens, 82.9% supervised\n' in printed
    assert 'val              21 conversations       5,187 tokens, 85.3% supervised\n' in printed
    split = tokenfile.Split([str(tmp_path)], 'train')
    positions = int((split.lengths - 1).sum())
    assert split.lengths.max() <= 1024 and positions == 70_752 - 306
    assert tokenfile.Rows(split, 1024).n_rows == 69 == -(-positions // 1024)  # not one more than the tokens need


def test_max_tokens_holds_and_what_is_lost_is_counted(run, real_trees):
    whole = run(real_trees, BIG, '--turns=all')['conversations']
    meta = run(real_trees, '--turns=all', '--max_tokens=1500')
    assert meta['truncated'] > 20 and meta['dropped'].keys() == {'too long'} and meta['seen'] == 546
    n_shorter = 0
    for turns in meta['conversations']:
        assert turns[-1].role == 'assistant' and any(turn.supervised for turn in turns if turn.role == 'assistant')
        n_shorter += turns not in whole
        assert any(other[:len(turns)] == turns for other in whole)
    assert n_shorter == meta['truncated']
    supervised = Counter(turn.text for turns in meta['conversations'] for turn in turns if turn.role == 'assistant' and turn.supervised)
    assert not supervised - Counter(turn.text for turns in whole for turn in turns if turn.role == 'assistant' and turn.supervised)


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


FLAGS = [[], ['--turns=all', '--top_k=2', '--synthetic=false'], ['--turns=all', '--template=dialogpt', '--lang=all']]


@pytest.mark.parametrize('flags', FLAGS, ids=' '.join)
@pytest.mark.parametrize('real', [False, True], ids=['random', 'real'])
def test_flat_messages_give_the_same_files_as_their_trees(run, request, tmp_path, real, flags):
    some = request.getfixturevalue('trees') if real else random_trees(100)
    a = run(some, BIG, *flags, out='trees')
    records = [record for t in some for record in flat(t)]
    assert any('NaN' in json.dumps(record) for record in records)
    random.Random(1).shuffle(records)
    b = run(records, BIG, *flags, out='flat')
    assert files_of(tmp_path / 'trees') == files_of(tmp_path / 'flat')
    same = ('seen', 'kept', 'dropped', 'truncated', 'splits', 'options', 'counts')
    assert {key: a[key] for key in same} == {key: b[key] for key in same}


@pytest.mark.parametrize('form', ['tree', 'flat'])
@pytest.mark.parametrize('flags', FLAGS, ids=' '.join)
def test_many_processes_give_the_same_files_as_one(run, tmp_path, monkeypatch, flags, form):
    some = random_trees(201) if form == 'tree' else [record for t in random_trees(201) for record in flat(t)]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'BLOCK', 1 << 30)
        patch.setattr(prepare, 'islice', lambda units, n: list(units))  # of flat messages, all trees at once
        patch.setattr(pipeline, 'ProcessPoolExecutor', None)  # nobody asks for it
        run(some, *flags, out='one')
    pools = []
    monkeypatch.setattr(pipeline, 'BLOCK', 30_000)
    monkeypatch.setattr(pipeline, 'ProcessPoolExecutor', lambda *args, **more: pools.append(args) or ProcessPoolExecutor(*args, **more))
    run(some, *flags, out='many')
    assert len(pools) == 1
    for name in (*FILES, 'meta.json'):
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'many' / name).read_bytes(), name


@pytest.mark.parametrize('seed', range(3))
def test_every_answer_that_can_be_reached_is_learned_once(run, seed):
    some = random_trees(150, seed)
    meta = run(some, BIG, '--turns=all')

    def usable(node):
        return not node['deleted'] and node['review_result'] and node['lang'] == 'en' and node['text'].strip()

    def cut(node):  # the tree without what cannot be used, and what is below it
        return {**node, 'replies': [cut(reply) for reply in node['replies'] if usable(reply)]}
    expected = [thread for t in some if usable(t['prompt']) for thread in threads_of(cut(t['prompt']))]
    assert sorted([turn.text for turn in turns] for turns in meta['conversations']) == sorted(expected)
    supervised = [turn.text for turns in meta['conversations'] for turn in turns if turn.role == 'assistant' and turn.supervised]
    answers = [node['text'] for t in some if usable(t['prompt']) for node in messages_of({'prompt': cut(t['prompt'])}) if node['role'] == 'assistant']
    assert sorted(supervised) == sorted(answers) and len(answers) == meta['counts']['different answers'] > 60
    assert meta['seen'] == len([thread for t in some for thread in threads_of(t['prompt'])])


def test_more_trees_move_none_from_split_to_split(run, tmp_path):
    def val(some, *flags):
        meta = run(some, '--val_fraction=0.3', '--lang=all', *flags)
        return {turns[0].text for turns in meta['conversations'][meta['splits']['train']['conversations']:]}
    some = [tree(message(f'q{i}', '', message(f'a{i}'))) for i in range(200)]
    whole, part = val(some), val(some[:100])
    assert 40 < len(whole) < 80 and part == {text for text in whole if int(text[9:]) < 100}
    assert val(some[::-1]) == whole != val(some, '--seed=1')


def test_the_split_is_a_hash_that_stays_what_it_is():
    """With another, a run that is resumed on data prepared anew would learn what it was tested on."""
    split_of = pipeline.split_by_hash(1337, val=0.2, test=0.3)
    assert [split_of(f'tree {i}') for i in range(12)] == 'test train test train test train test train val test train test'.split()
    shares = Counter(split_of(str(i)) for i in range(10_000))
    assert abs(shares['val'] - 2000) < 150 and abs(shares['test'] - 3000) < 150 and shares.total() == 10_000
    assert split_of('\ud800')  # any text will do


def test_gzip_is_told_by_content(run, real_trees, tmp_path):
    run(real_trees, BIG, out='plain')
    with open(real_trees, 'rb') as file:
        run(gzip.compress(file.read()), BIG, out='zipped', name='looks_plain.jsonl')
    assert files_of(tmp_path / 'plain') == files_of(tmp_path / 'zipped')


def test_meta_json_has_the_keys_that_other_tools_rely_on(run, tmp_path):
    run([tree(message('q', '', message('a'))), tree(message('q2', '', message('a2', 'x' * 900)))], '--max_tokens=200', '--val_fraction=0')
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['format_version'] == 1 and meta['template'] == 'xml'
    assert meta['tokenizer']['name'] == 'tokenizer.json' and len(meta['tokenizer']['sha256']) == 64
    size = (tmp_path / 'trees.jsonl').stat().st_size
    assert meta['source'] == {'name': 'trees.jsonl', 'url': None, 'bytes': size, 'sha256': meta['source']['sha256'], 'licence': None}
    assert (meta['seen'], meta['kept'], meta['dropped'], meta['truncated']) == (2, 1, {'too long': 1}, 0)
    for counts in meta['splits'].values():
        assert {'conversations', 'tokens', 'supervised_tokens'} <= counts.keys()
    assert meta['splits'].keys() == {'train', 'val'} and meta['splits']['val']['conversations'] == 0
    assert meta['options']['max_tokens'] == 200 and meta['options']['lang'] == 'en' and str(tmp_path) not in str(meta['source'])
    assert meta['seed'] == 1337 and meta['split_rule'] == 'hash of the tree id'


# ---- what is kept of a tree ----

def replies(*keys, **more):
    return [message(key, key, **more) for key in keys]


RULES = {  # name: (tree, flags, the conversations in short, what was dropped)
    'a tree without replies': (message('q'), [], [], {}),
    'a thread that ends on the person': (
        message('q', 'q', message('a', 'a', message('b', 'b'))), ['--turns=all'], ['q>[a]'], {}),
    'an answer in two threads is learned once': (
        message('q', 'q', message('a', 'a', message('b', 'b', *replies('c', 'd')), message('e', 'e', message('f', 'f')))),
        ['--turns=all'], ['q>[a]>b>[c]', 'q>a>b>[d]', 'q>a>e>[f]'], {}),
    'first takes direct replies alone': (
        message('q', 'q', message('a', 'a', message('b', 'b', message('c', 'c'))), message('d', 'd')), [], ['q>[a]', 'q>[d]'], {}),
    'deleted': (message('q', 'q', *replies('a'), *replies('b', deleted=True)), [], ['q>[a]'], {'deleted': 1}),
    'a deleted root': (message('q', 'q', *replies('a', 'b'), deleted=True), [], [], {'deleted': 2}),
    'rejected in review': (message('q', 'q', *replies('a'), *replies('b', review_result=False)), [], ['q>[a]'], {'review_result': 1}),
    'not yet reviewed': (message('q', 'q', *replies('a', review_result=None)), [], ['q>[a]'], {}),
    'empty text': (message('q', 'q', *replies('a'), message('b', ' \n\t\u3000')), [], ['q>[a]'], {'empty text': 1}),
    'synthetic is kept': (message('q', 'q', *replies('a', synthetic=True)), [], ['q>[a]'], {}),
    'synthetic is not': (message('q', 'q', *replies('a', synthetic=True), *replies('b')), ['--synthetic=false'], ['q>[b]'], {'synthetic': 1}),
    'another language': (message('q', 'q', *replies('a', lang='de'), *replies('b')), [], ['q>[b]'], {'language': 1}),
    'two languages': (message('q', 'q', *replies('a', lang='de'), *replies('b', lang='fr')), ['--lang=en, de'], ['q>[a]'], {'language': 1}),
    'all languages': (message('q', 'q', *replies('a', lang='de'), *replies('b', lang=None), lang='ru'), ['--lang=all'], ['q>[a]', 'q>[b]'], {}),
    'no language': (message('q', 'q', *replies('a', lang=None)), [], [], {'language': 1}),
    'another language cuts a thread': (
        message('q', 'q', message('a', 'a', message('b', 'b', message('c', 'c'), lang='es'))), ['--turns=all'], ['q>[a]'], {}),
    'what is cut to a thread that another has is dropped': (
        message('q', 'q', message('a', 'a', message('b', 'b', message('c', 'c', deleted=True)), message('d', 'd', message('e', 'e')))),
        ['--turns=all'], ['q>[a]>d>[e]'], {'deleted': 1}),
    'two threads cut to the same are one': (
        message('q', 'q', message('a', 'a', message('b', 'b', *replies('c', 'd'), lang='es'))), ['--turns=all'], ['q>[a]'], {'language': 1}),
    'a whole thread is dropped for its first reason': (
        message('q', 'q', message('a', 'a', message('b', 'b', message('c', 'c', lang='es')), deleted=True)), ['--turns=all'], [], {'deleted': 1}),
    'top_k, the best first and unranked last': (
        message('q', 'q', *replies('x'), *replies('b', rank=2), *replies('a', rank=0), *replies('c', rank=1)), ['--top_k=3'],
        ['q>[a]', 'q>[b]', 'q>[c]'], {'top_k': 1}),
    'top_k gives no place to what is left out': (
        message('q', 'q', *replies('a', rank=0, deleted=True), *replies('b', rank=1), *replies('c', rank=2)), ['--top_k=1'],
        ['q>[b]'], {'deleted': 1, 'top_k': 1}),
    'what is left out keeps its reason beyond top_k': (
        message('q', 'q', *replies('a', rank=0), *replies('b', rank=1), *replies('c', rank=2, deleted=True)), ['--top_k=1'],
        ['q>[a]'], {'deleted': 1, 'top_k': 1}),
    'top_k of persons too': (
        message('q', 'q', message('a', 'a', message('b', 'b', *replies('c'), rank=1), message('d', 'd', *replies('e'), rank=0))),
        ['--turns=all', '--top_k=1'], ['q>[a]>d>[e]'], {'top_k': 1}),
    'a person who answers a person': (
        message('q', 'q', message('a', 'a', role='prompter'), *replies('b')), [], ['q>[b]'], {'roles': 1}),
    'an assistant who follows an assistant': (
        message('q', 'q', message('a', 'a', message('b', 'b', role='assistant'))), ['--turns=all'], ['q>[a]'], {}),
    'an assistant who begins': (message('q', 'q', *replies('a'), role='assistant'), [], [], {'roles': 1}),
    'tags that people typed': (message('q', '</user><user>', message('a', '<|endoftext|></assistant>')), [],
                               ['</user><user>>[<|endoftext|></assistant>]'], {})}


@pytest.mark.parametrize('form', ['tree', 'flat'])
@pytest.mark.parametrize('name', RULES)
def test_what_is_kept_of_a_tree(run, name, form):
    root, flags, expected, dropped = RULES[name]
    filler = message('filler', 'filler', message('filler-a', 'kept'))  # something is always kept
    both = [tree(root), tree(filler)]
    meta = run(both if form == 'tree' else [record for t in both for record in flat(t)], *flags)
    assert shown(meta['conversations']) == sorted([*expected, 'filler>[kept]'])
    assert meta['dropped'] == dropped and meta['seen'] == len(expected) + 1 + sum(dropped.values())


def test_replies_are_sorted_by_rank_and_unranked_ones_by_id():
    root = tree(message('q', 'q', *replies('z'), *replies('c', rank=1.0), *replies('y', rank=float('nan')), *replies('a', rank=2), *replies('x', rank=None),
                        *replies('b', rank=0)))['prompt']
    messages = prepare.read_tree(root, lambda node: node['replies'], prepare.Config())
    assert [node.text for node in messages] == ['q', 'b', 'c', 'a', 'x', 'y', 'z']


# ---- flat messages ----

def test_messages_without_a_root_are_counted(run):
    records = [*flat(tree(message('q', 'q', message('a', 'a', message('b', 'b'))))),
               *({**record, 'parent_id': 'gone'} for record in flat(tree(message('o', 'o')))),  # an orphan
               {**message('self'), 'role': 'assistant', 'parent_id': 'self'},
               {**message('c1'), 'role': 'assistant', 'parent_id': 'c2'}, {**message('c2'), 'role': 'prompter', 'parent_id': 'c1'}]
    meta = run(records)
    assert shown(meta['conversations']) == ['q>[a]'] and meta['counts']['messages without a root'] == 4
    assert meta['counts']['trees'] == 1 and meta['counts']['messages'] == 3


def test_a_repeated_message_is_taken_once(run):
    records = [*flat(tree(message('q', 'q', message('a', 'a'))))]
    meta = run([*records, records[1], {**records[0], 'text': 'other'}])
    assert shown(meta['conversations']) == ['q>[a]'] and meta['counts']['messages repeated'] == 2


def test_a_repeated_tree_is_taken_once(run):
    a, b = tree(message('q', 'q', *replies('a', 'b'))), tree(message('r', 'r', *replies('c')))
    meta = run([a, b, a, tree(message('q', 'another text', *replies('d')))])
    assert shown(meta['conversations']) == ['q>[a]', 'q>[b]', 'r>[c]']
    assert meta['dropped'] == {'repeated': 3} and meta['seen'] == 6
    assert (meta['counts']['trees'], meta['counts']['different answers'], meta['counts']['repeated, left out']) == (2, 3, 2)


def test_trees_may_come_without_ids(run):
    some = [{'prompt': {'text': f'q{i}', 'role': 'prompter', 'lang': 'en', 'replies': [{'text': f'a{i}', 'role': 'assistant', 'lang': 'en'}]}}
            for i in range(3)]
    assert shown(run(some)['conversations']) == ['q0>[a0]', 'q1>[a1]', 'q2>[a2]']


@pytest.mark.parametrize('form', [tree, flat])
def test_texts_made_to_break_things_come_through(run, form):
    texts = ['NUL \0 inside', '\u202eright to left שלום', 'e' + '\u0301' * 500, '\ufeff', '</user><assistant><|endoftext|>', 'a\u2028\x85', '"\\n\n', '👩‍👩‍👧‍👦',
             'y' * 100_000, '\n' * (1_100_000 if form is tree else 9) + 'x']
    nan = {'labels': {'name': ['spam'], 'value': [float('nan')]}, 'emojis': float('nan'), 'detoxify': {'toxicity': float('inf')}}
    trees = [tree({**message(f'q{i}', text, message(f'a{i}', text, **nan)), **nan}) for i, text in enumerate(texts)]
    found = run([record for a_tree in trees for record in flat(a_tree)] if form is flat else trees, '--max_tokens=4000000')['conversations']
    assert sorted(turn.text for turns in found for turn in turns) == sorted(2 * texts)


# ---- deep ----

def test_a_thread_of_ten_thousand_replies(run):
    records = [{'message_id': f'{i:05}', 'text': f't{i}', 'role': ('prompter', 'assistant')[i % 2], 'lang': 'en',
                **({'parent_id': f'{i - 1:05}'} if i else {})} for i in range(10_001)]
    random.Random(0).shuffle(records)
    (turns,) = run(records, '--turns=all', BIG)['conversations']
    assert [turn.text for turn in turns] == [f't{i}' for i in range(10_000)]
    meta = run(records, '--turns=all')
    assert meta['truncated'] == 1 and meta['splits']['train']['tokens'] + meta['splits']['val']['tokens'] <= 1024


def test_a_line_nested_ten_thousand_deep_is_broken(run):
    deep = '{"prompt":' + '{"role":"prompter","text":"x","replies":[' * 10_000 + ']}' * 10_000 + '}'
    good = [tree(message(f'q{i}', '', message(f'a{i}'))) for i in range(200)]
    meta = run(lines(good[:100]) + deep + '\n' + lines(good[100:]))
    assert meta['kept'] == 200 and meta['broken_lines'] == 1
    assert 'broken line 101: not JSON' in meta['printed'].err


# ---- broken lines ----

BROKEN = {'not JSON': (b'{"prompt":', 'not JSON'), 'no object': (b'[1, 2]', 'found a list, expected an object'), 'not UTF-8': (b'{"a": "\xff"}', 'not UTF-8'),
          'no text': (lines([tree(message('x', '', {**message('y'), 'text': None}))]), 'text is missing'),
          'half a pair': (lines([tree(message('x', 'z'))]).replace('"z"', r'"\ud800"'), 'half a surrogate pair'),
          'text of numbers': (lines([tree(message('x', '', {**message('y'), 'text': 5}))]), "text is int '5'"),
          'no role': (lines([tree(message('x', role=None))]), 'role is None'), 'odd role': (lines([tree(message('x', role='system'))]), "role is 'system'"),
          'odd rank': (lines([tree(message('x', '', message('y', rank='first')))]), "rank is str 'first'"),
          'a rank of true': (lines([tree(message('x', '', message('y', rank=True)))]), "rank is bool 'True'"),
          'odd deleted': (lines([tree(message('x', deleted='no'))]), "deleted is str 'no'"), 'odd lang': (lines([tree(message('x', lang=['en']))]), 'lang is list'),
          'odd id': (lines([tree(message(5))]), "message_tree_id is int '5'"), 'odd reply': (lines([tree(message('x', '', 'reply'))]), 'a reply is str'),
          'odd replies': (lines([{'prompt': message('x', role='prompter', replies='none')}]), 'replies is a str'),
          'no prompt': (b'{"other": 5}', 'a message is NoneType'), 'prompt of text': (b'{"prompt": "hi"}', 'a message is str'),
          'a number of 5,000 digits': (b'{"a": ' + b'9' * 5000 + b'}', 'not JSON')}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_line_is_counted_and_named(run, name):
    bad, why = BROKEN[name]
    good = lines(tree(message(f'q{i}', '', message(f'a{i}'))) for i in range(150)).encode()
    bad = bad if isinstance(bad, bytes) else bad.encode()
    meta = run(good + b'\n\n' + bad.strip() + b'\n')  # two blank lines are lines, and not broken
    assert meta['kept'] == 150 and meta['broken_lines'] == 1
    assert f'broken line 153: ' in meta['printed'].err and why in meta['printed'].err


def test_broken_flat_messages_are_counted_by_lines_not_by_trees(run, tmp_path):
    records = [record for i in range(100) for record in flat(tree(message(f'q{i}', '', message(f'a{i}', '', message(f'b{i}')))))]
    bad = '{"message_id": "x"}\n{"message_id": "y", "text": "t", "role": "prompter", "rank": "1"}\n{"text": "t", "role": "prompter"}\n'
    meta = run(lines(records) + bad)  # 3 of 303
    assert meta['broken_lines'] == 3 and meta['kept'] == 100
    for line, why in ((301, 'text is missing'), (302, "rank is str '1'"), (303, 'message_id is missing')):
        assert f'broken line {line}: {why}' in meta['printed'].err
    assert '4 of 304 lines are broken, more than 1%' in refused(run, tmp_path, lines(records) + bad + '5\n')


def test_a_flat_message_with_an_odd_tree_id_is_broken(run):
    """Found by the fuzzer: a traceback, since nothing looked at it before the trees were made."""
    records = [record for i in range(100) for record in flat(tree(message(f'q{i}', '', message(f'a{i}'))))]
    meta = run([*records, {**records[0], 'message_id': 'x', 'message_tree_id': 1}])
    assert meta['broken_lines'] == 1 and meta['kept'] == 100 and "message_tree_id is int '1'" in meta['printed'].err


def test_more_than_one_in_a_hundred_broken_lines_are_an_error(run, tmp_path):
    good = [tree(message(f'q{i}', '', message(f'a{i}'))) for i in range(198)]
    assert run(lines(good) + 'x\n[]\n', out='few')['broken_lines'] == 2  # 2 of 200
    said = refused(run, tmp_path, lines(good) + 'x\n[]\n5\n')
    assert said.startswith('3 of 201 lines are broken, more than 1%; the first: line 199: not JSON') and 'Nothing was written' in said


def test_a_line_that_is_too_long_is_broken(run, monkeypatch):
    monkeypatch.setattr(pipeline, 'BLOCK', 1000)
    monkeypatch.setattr(pipeline, 'LONGEST_LINE', 4000)
    good = [lines([tree(message(f'q{i:03}', '', message(f'a{i:03}')))]) for i in range(300)]
    for size in (3900, 4100, 5000, 8000, 8001, 50_000):
        for end in ('\n', ''):
            meta = run(''.join(good[:150]) + 'x' * size + '\n' + ''.join(good[150:-1]) + good[-1].rstrip('\n') + end)
            assert meta['kept'] == 300 and meta['broken_lines'] == 1, size
            assert 'broken line 151: ' in meta['printed'].err
    meta = run(''.join(good[:150]) + 'x' * 9000)
    assert meta['kept'] == 150 and 'broken line 151: ' in meta['printed'].err
    whole = lines([tree(message('long', 'x' * 3000, message('a')))])
    assert run(''.join(good) + whole + ''.join(good[:1]), '--max_tokens=9999')['kept'] == 301


@pytest.mark.parametrize('source, said', [
    (b'', 'holds no line with a JSON object'), (b'\n\n', 'holds no line with a JSON object'), (b'5\n[]\n', 'holds no line with a JSON object'),
    (b'{"instruction": "x", "output": "y"}\n', 'holds objects with the keys instruction, output; expected on each line a message tree'),
    (br'{"a\nb": 1}', r'holds objects with the keys a\nb; expected')])  # by the fuzzer
def test_a_file_of_something_else_is_a_line(run, tmp_path, source, said):
    assert said in refused(run, tmp_path, source)


def test_a_first_line_that_is_broken_does_not_decide_the_form(run):
    good = lines(tree(message(f'q{i}', '', message(f'a{i}'))) for i in range(200))
    assert run('{}\n' + good)['kept'] == 200


def test_nothing_kept_is_a_line(run, tmp_path):
    assert "no conversation was kept of 1 seen; dropped: {'language': 1}" in refused(run, tmp_path, [tree(message('q', '', message('a')))], '--lang=de')


# ---- as a person runs it ----

@pytest.fixture
def command(script, vocabulary):
    return lambda *flags, **options: script('data/oasst/prepare.py', f'--tokenizer={vocabulary}', *flags, **options)


def zipped_trees(n=4000):
    return gzip.compress(lines(tree(message(f'q{i}', f'{random.Random(i).random()}', message(f'a{i}'))) for i in range(n)).encode())


@pytest.mark.parametrize('damage', [lambda data: data[:len(data) // 2], lambda data: data[:-4], lambda data: data[:5000] + bytes(100) + data[5100:],
                                    lambda data: data[:5000] + b'\xff' * 100 + data[5100:], lambda data: data + b'rubbish'])
def test_a_damaged_gzip_is_a_line_and_the_old_files_stay(command, tmp_path, damage):
    (tmp_path / 'good.jsonl').write_text(lines([tree(message('q', '', message('a')))]))
    assert command('--input=good.jsonl', '--out_dir=out').returncode == 0
    before = {name: (tmp_path / 'out' / name).read_bytes() for name in os.listdir(tmp_path / 'out')}
    (tmp_path / 'bad.gz').write_bytes(damage(zipped_trees()))
    done = command('--input=bad.gz', '--out_dir=out')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'bad.gz cannot be read to its end' in done.stderr, done.stderr
    assert {name: (tmp_path / 'out' / name).read_bytes() for name in os.listdir(tmp_path / 'out')} == before


def test_a_line_of_256_megabytes_takes_a_bounded_amount_of_memory(tmp_path, vocabulary):
    """Of a quarter of a megabyte of gzip."""
    if not os.path.exists('/proc/self/status'):
        pytest.skip('no /proc, which says how much memory a process has had')
    good = [gzip.compress(lines(tree(message(f'{key}{i}', '', message(f'{key}{i}.'))) for i in range(100)).encode()) for key in 'qr']
    (tmp_path / 'bomb.gz').write_bytes(good[0] + gzip.compress(b'[' * (64 << 20)) * 4 + gzip.compress(b'\n') + good[1])
    code = ('import re, resource, sys; sys.path.insert(0, sys.argv.pop(1)); from data.oasst import prepare; prepare.main(sys.argv[1:]);'
            'own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])\n'  # ru_maxrss would be at least pytest's own
            'print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10, file=sys.stderr)')
    done = subprocess.run([sys.executable, '-c', code, ROOT, '--input=bomb.gz', '--out_dir=out', f'--tokenizer={vocabulary}'], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    *said, megabytes = done.stderr.split('\n')[:-1]
    assert said == ['broken line 101: not JSON (Expecting value: line 1 column 1 (char 0))'] and int(megabytes) < 300, done.stderr


def test_mistakes_are_a_line_and_exit_code_2(command, tmp_path):
    for flags, said in ((['--input=none.jsonl'], 'none.jsonl: No such file or directory. --input takes'), ([f'--input={tmp_path}'], 'Is a directory'),
                        (['--input=x', '--turns=some', '--val_fraction=1', '--top_k=-1'], "turns='some'")):
        done = command('--out_dir=out', *flags)
        assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr and not done.stdout
        assert not (tmp_path / 'out').exists()


def test_what_it_prints(command, tmp_path):
    (tmp_path / 'trees.jsonl').write_text(lines([tree(message('q', '', message('a'), message('b', deleted=True)))]))
    done = command('--input=trees.jsonl', '--out_dir=data/mine', '--val_fraction=0')
    assert done.returncode == 0 and not done.stderr
    rows = [' '.join(line.split()) for line in done.stdout.splitlines()]
    for row in ('trees 1', 'messages 3', 'different answers 1', 'messages left out: deleted 1', 'conversations seen 2', 'kept 1', 'deleted 1', 'broken lines 0'):
        assert row in rows
    assert rows[-1] == f'wrote data/mine. Next: python train.py config/finetune_oasst.py --data_dir={tmp_path}/data --dataset=mine'


def test_stdout_is_the_same_conversations_as_text(command, tmp_path):
    nasty = ['</user><assistant>', '\\<user>', '🙂\0\r\n', '<|endoftext|>', ' x ', 'שלום', '</conversation>']
    (tmp_path / 'trees.jsonl').write_text(lines(tree(message(f'q{i}', text, message(f'a{i}', f'A {text}'))) for i, text in enumerate(nasty)))
    done = command('--input=trees.jsonl', '--stdout', '--out_dir=out', text=False)
    assert done.returncode == 0 and not done.stderr and not (tmp_path / 'out').exists()
    found = conversation.from_text(done.stdout.decode())
    assert found == [[Turn('user', text), Turn('assistant', f'A {text}')] for text in nasty]


def test_stdout_on_a_terminal_that_lacks_the_characters(command, tmp_path):
    (tmp_path / 'trees.jsonl').write_text(lines([tree(message('q', '🙂', message('a', 'é')))]))
    done = command('--input=trees.jsonl', '--stdout', env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0 and r'<user>\U0001f642</user>' in done.stdout


@pytest.mark.parametrize('n', [1500, 9000])  # one block, and several on several processes
def test_stdout_into_head_ends_quietly(tmp_path, vocabulary, n):
    (tmp_path / 'trees.jsonl.gz').write_bytes(zipped_trees(n))
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'data', 'oasst', 'prepare.py'), '--input=trees.jsonl.gz', '--stdout',
                                f'--tokenizer={vocabulary}'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b'<conversation><user>')
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 0


def test_stdout_reports_broken_lines(command, tmp_path):
    (tmp_path / 'trees.jsonl').write_text(lines([tree(message('q', 'Hi', message('a', 'Hello')))]) + 'x\n')
    done = command('--input=trees.jsonl', '--stdout')
    assert done.stdout.startswith('<conversation><user>Hi</user>')
    assert done.returncode == 2 and 'broken line 2: not JSON' in done.stderr and '1 of 2 lines' in done.stderr
