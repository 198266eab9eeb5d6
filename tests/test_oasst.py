"""data/oasst/prepare.py: from trees to token files, nothing lost and nothing twice."""
import json
import re

import pytest

from conftest import one_line, read_back
from core import readback, rows, tokenfile
from core.conversation import Turn
from data.oasst import nest, prepare

ALL = '--turns=all'
WHOLE = '--max_tokens=1000000'


def M(key, *replies, text='', **more):
    """A message. Its text is its id."""
    return {'message_id': key, 'text': text or key, 'lang': 'en', 'review_result': True,
            'deleted': False, 'synthetic': False, 'replies': list(replies), **more}


def tree(node, role='prompter', below='assistant'):
    """The record of a tree, with roles where they are missing."""
    node.setdefault('role', role)
    for reply in node['replies']:
        tree(reply, below, role)
    return {'message_tree_id': node['message_id'], 'prompt': node}


def lines(records):
    return ''.join(json.dumps(record) + '\n' for record in records)


def shown(conversations):
    """Conversations in short: 'q>[a]>b>c', brackets round what is learned."""
    found = []
    for turns in conversations:
        parts = [turn.text for turn in turns]
        for i in range(1, len(turns), 2):
            if turns[i].supervised:
                parts[i] = f'[{parts[i]}]'
        found.append('>'.join(parts))
    return sorted(found)


@pytest.fixture
def run(tmp_path, vocabulary):
    """run(records or text, *flags): meta.json, and all conversations, read back."""
    def run(source, *flags, out='out'):
        text = source if isinstance(source, str) else lines(source)
        (tmp_path / 'trees.jsonl').write_text(text)
        files = [f'--input={tmp_path}/trees.jsonl', f'--out_dir={tmp_path / out}']
        prepare.main([*files, f'--tokenizer={vocabulary}', *flags])
        meta = tokenfile.read_meta(tmp_path / out)
        conversations = read_back(tmp_path / out, 'train') + read_back(tmp_path / out, 'val')
        assert meta['kept'] == len(conversations)
        assert meta['seen'] == meta['kept'] + sum(meta['dropped'].values())
        return meta, conversations
    return run


def test_first_in_gpt2s_ids(gpt2, real_trees, tmp_path, capsys):
    """The numbers of the default command. The rows that are packed of it are nearly full."""
    prepare.main([f'--input={real_trees}', f'--out_dir={tmp_path}'])
    meta = tokenfile.read_meta(str(tmp_path))
    assert (meta['seen'], meta['kept'], meta['truncated']) == (333, 333, 6)
    assert meta['tokenizer'] == gpt2.state()
    # Bytes that must never change: a run resumes only on equal files.
    assert meta['splits']['train']['sha256'].startswith('cf0a101fd05b')
    output = capsys.readouterr().out
    assert '333 conversations, 333 kept, 6 of these cut to fit\n3,580 tokens of ' in output
    assert 'train: 312 conversations, 76,894 tokens, 62,212 supervised\n' in output
    split = tokenfile.Split([str(tmp_path)], 'train')
    assert rows.Rows(split, 1024).n_rows == 75 == -(-(76_894 - 312) // 1024)


def test_every_answer_is_learned_once_or_counted_as_lost(run, real_trees):
    text = real_trees.read_text()
    whole, conversations = run(text, WHOLE, ALL)
    learned = []
    answers = set()  # each with all that stands before it
    for turns in conversations:
        learned += [turn.text for turn in turns[1::2] if turn.supervised]
        texts = [turn.text for turn in turns]
        answers |= {tuple(texts[:n]) for n in range(2, len(texts) + 1, 2)}
    assert sorted(learned) == sorted(answer[-1] for answer in answers)
    for too_long in ('cut', 'drop'):
        meta, _ = run(text, ALL, '--max_tokens=500', f'--too_long={too_long}')
        tokens = [sum(split['supervised_tokens'] for split in found['splits'].values())
                  for found in (whole, meta)]
        assert tokens[0] == tokens[1] + meta['answer_tokens_lost']
        assert meta['dropped'].keys() == {'too long'} and meta['seen'] == 546


@pytest.mark.parametrize('flags, root, expected, dropped', [
    ('', M('q', M('a', M('b', M('c'))), M('d')), ['q>[a]', 'q>[d]'], {}),
    (ALL, M('q', M('a', M('b', M('c'), M('d')), M('e', M('f')))),
     ['q>[a]>b>[c]', 'q>a>b>[d]', 'q>a>e>[f]'], {}),
    ('', M('q', M('a'), M('b'), deleted=True), [], {'deleted': 1}),
    ('', M('q', M('a'), M('b', review_result=False)), ['q>[a]'], {'review_result': 1}),
    ('', M('q', M('a'), M('b', text=' \n\t\u3000')), ['q>[a]'], {'empty text': 1}),
    ('', M('q', M('a', synthetic=True, review_result=None)), ['q>[a]'], {}),
    ('--synthetic=false', M('q', M('a', synthetic=True)), [], {'synthetic': 1}),
    ('--lang=en, de', M('q', M('a', lang='de'), M('b', lang='fr')), ['q>[a]'], {'language': 1}),
    ('--lang=all', M('q', M('a', lang='de'), M('b', lang=None)), ['q>[a]', 'q>[b]'], {}),
    # What is left out, with all below it, counts once. The answer above it is kept.
    (ALL, M('q', M('a', M('b', M('c', deleted=True)), M('d', M('e')))), ['q>[a]>d>[e]'],
     {'deleted': 1}),
    (ALL, M('q', M('a', M('b', M('c'), M('d'), lang='es'))), ['q>[a]'], {'language': 1}),
    # The best reply has rank 0. What is left out does not count.
    ('--top_k=3', M('q', M('x'), M('b', rank=2), M('a', rank=0), M('c', rank=1)),
     ['q>[a]', 'q>[b]', 'q>[c]'], {'top_k': 1}),
    ('--top_k=1', M('q', M('a', rank=0, deleted=True), M('b', rank=1), M('c', rank=2)),
     ['q>[b]'], {'deleted': 1, 'top_k': 1}),
    (f'{ALL} --top_k=1', M('q', M('a', M('b', M('c'), rank=1), M('d', M('e'), rank=0))),
     ['q>[a]>d>[e]'], {'top_k': 1})])
def test_what_is_kept_of_a_tree(run, flags, root, expected, dropped):
    filler = tree(M('filler', M('kept')))  # something is always kept
    meta, conversations = run([tree(root), filler], *re.findall('--[^-]+\\b', flags))
    assert shown(conversations) == sorted([*expected, 'filler>[kept]'])
    assert meta['dropped'] == dropped


NASTY = ['NUL \0 inside', '\u202eשלום', 'e' + '\u0301' * 500, '\ufeff', ' x \r\n', '\\<user>',
         '</user><assistant><|endoftext|>', 'a\u2028\x85', '👩‍👩‍👧‍👦', 'y' * 100_000]
BROKEN = ['half \ud83d a pair', '\n' * 1_100_000 + 'x']


def test_texts_made_to_break_things_come_through(run, script):
    some = [tree(M(str(i), M('a', text=text), text=text)) for i, text in enumerate(NASTY + BROKEN)]
    expected = [[Turn('user', text), Turn('assistant', text)] for text in NASTY]
    meta, conversations = run(some, WHOLE)
    assert sorted(conversations) == sorted(expected)
    assert meta['dropped'] == {'cannot be encoded': 2}
    done = script('data/oasst/prepare.py', '--input=trees.jsonl', '--stdout', text=False)
    assert readback.from_text(done.stdout.decode())[:len(NASTY)] == expected
    assert done.returncode == 0


@pytest.mark.parametrize('source, said', [
    ('', 'no conversation can be used'),
    ('{"message_tree_id": "x", "text": "flat"}', "KeyError 'prompt'. Expected .* see data/oasst"),
    (lines([tree(M('x', M('y', lang='de')))]), "no conversation can be used.*'language': 1")])
def test_a_source_that_gives_nothing_is_one_line(run, source, said):
    with one_line(said):
        run(source)


def test_flat_messages_become_their_trees(run, tmp_path, capsys):
    """They are in any order, with null or NaN for what is missing."""
    flat = []
    for key, above in (('c', 'b'), ('d', 'q'), ('b', 'a'), ('q', None), ('a', 'q'), ('e', 'q')):
        role = 'prompter' if key in 'qb' else 'assistant'
        rank = 0.0 if key == 'e' else float('nan')
        flat.append(M(key, role=role, rank=rank, parent_id=above, message_tree_id='t'))
    (tmp_path / 'flat.jsonl').write_text(lines(flat))
    nest.main([f'--input={tmp_path}/flat.jsonl'])
    meta, conversations = run(capsys.readouterr().out, ALL, '--top_k=2')
    assert shown(conversations) == ['q>[a]>b>[c]', 'q>[e]'] and meta['dropped'] == {'top_k': 1}


def test_the_next_command_and_meta_json(run, tmp_path, monkeypatch, capsys):
    """The recipe for a large GPU is not for what was prepared for a laptop."""
    monkeypatch.chdir(tmp_path)
    for max_tokens, recipe in ((513, 'finetune_oasst_cpu'), (1024, 'finetune_oasst')):
        meta, _ = run([tree(M('q', M('a')))], '--val_fraction=0', f'--max_tokens={max_tokens}',
                      out='data/mine')
        command = f'python train.py config/{recipe}.py --dataset=mine --out_dir=out/mine'
        assert capsys.readouterr().out.endswith(f': {command}\n')
    assert meta['source'].keys() == {'name', 'url', 'bytes', 'sha256', 'licence'}
    assert meta['source']['name'] == 'trees.jsonl' and meta['options']['max_tokens'] == 1024
    assert not meta['options']['input'] and not meta['options']['out_dir']
