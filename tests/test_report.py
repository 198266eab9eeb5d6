"""The page about a data set: right numbers, every token, and nothing in it that can act."""
import json
import os
import re

import numpy as np
import pytest

from configurator import UserError
from core import tokenfile
from core.conversation import Turn, encode
from data import report

EVIL = '<script>alert(1)</script> & "q" </user> \u202e turned \x07 🙂👩‍👩‍👧 Ünï\r\n\ttab'


@pytest.fixture
def prepared(tmp_path, small):
    """A function that prepares a folder of n conversations; keywords go into meta.json."""
    def run(n=40, **meta):
        folder = str(tmp_path / 'out')
        splits = {'train': [], 'val': []}
        for i in range(n):
            turns = [Turn('user', f'question {i} {EVIL}'), Turn('assistant', 'yes ' * i + EVIL)]
            splits['val' if i % 10 == 9 else 'train'].append(encode(turns, small)[:2])
        tokenfile.write(folder, splits, {'template': 'xml', 'tokenizer': small.state()} | meta)
        return folder
    return run


@pytest.mark.parametrize('template', ['xml', 'alpaca'])
def test_every_token_is_there_with_its_mask_and_reads_as_the_text(small, template):
    ids, mask, _ = encode([Turn('user', EVIL), Turn('assistant', EVIL)], small, template)
    tokens = report.tokens_of(ids, mask, small)
    pairs = [(i, token.supervised) for token in tokens for i in token.ids]
    assert pairs == list(zip(ids.tolist(), mask.astype(bool).tolist()))
    assert ''.join(token.text for token in tokens) == small.decode(ids.tolist())
    assert '\ufffd' not in ''.join(token.text for token in tokens)
    assert [i for token in tokens if token.tag for i in token.ids] == [
        i for i in ids if i in small.special.values()]


def test_half_a_character_is_shown_as_such(small):
    ids, mask, _ = encode([Turn('user', '🙂'), Turn('assistant', '🙂')], small)
    for cut in range(1, len(ids)):
        tokens = report.tokens_of(ids[:cut], mask[:cut], small)
        assert [i for token in tokens for i in token.ids] == ids[:cut].tolist()
    half = small.encode('🙂').tolist()[:2]
    broken = np.array([*half, small.special['</user>'], *small.encode('a').tolist()])
    tokens = report.tokens_of(broken, np.array([0, 0, 0, 1]), small)
    assert [token.text for token in tokens] == ['\ufffd', '</user>', 'a']


def test_what_cannot_be_seen_is_marked():
    assert report.visible('<b>&\n\t\x07\u202e') == (
        '&lt;b&gt;&amp;<s>↵</s>\n<s>→</s>\t␇<s>U+202E</s>')


def test_the_page_says_what_the_files_say(prepared):
    languages = {'en': 30, '<b>x': 2} | {f'l{i}': 1 for i in range(15)}
    folder = prepared(
        seen=57, dropped={'language': 5, 'deleted': 0, '<i>new': 12}, languages=languages,
        truncated=3, counts={'trees': 1234}, source={'name': '<u>', 'url': 'https://x/y'},
        options={'turns': 'all', 'lang': 'en'}, split_rule='by position', seed=7)
    page = report.page(folder, 1).decode()
    for said in (
            '<h1>&lt;u&gt;</h1>', 'https://x/y', '<b>40</b><span>conversations kept of 57',
            'language<small>a message is in a language', '<td>5</td>', '&lt;i&gt;new',
            '&lt;b&gt;x', 'others', '<td>1,234</td>', '3 kept ones are cut', 'by position',
            'Seed: 7', 'several threads share', 'turns=all', '<td>36</td>'):
        assert said in page, said
    assert 'deleted' not in page and page.count('<details open>') == 20
    assert not re.search(r'<(script|img|link|iframe|u>)|\b(src|href|on\w+)=|@import|url\(', page)
    assert '\u202e' not in page
    # A token has its ids in its title and is bold if it is supervised.
    pattern = r'<summary>train (\d+) .*?<div class="ids" dir="auto">(.*?)</div>'
    shown = re.search(pattern, page, re.DOTALL)
    ids, mask = tokenfile.Split([folder], 'train')[int(shown[1])]
    found = []
    for kind, title in re.findall(r'<([bi])(?: class="tag")? title="([\d ]+)">', shown[2]):
        found += [(int(i), kind == 'b') for i in title.split()]
    assert found == list(zip(ids.tolist(), mask.astype(bool).tolist()))


def test_the_script_writes_the_page_and_the_seed_draws_what_it_shows(prepared, script):
    folder = prepared()
    assert b'The source does not say.' in report.page(folder, 1)
    assert report.page(folder, 1) != report.page(folder, 2)
    found = script('data/report.py', '--folder=out', '--seed=1')
    assert found.returncode == 0, found.stderr
    with open(os.path.join(folder, 'report.html'), 'rb') as file:
        assert file.read() == report.page(folder, 1)
    with pytest.raises(UserError, match='nowhere/meta.json not found'):
        report.main(['--folder=nowhere'])


@pytest.mark.parametrize('lengths', [[5], [3] * 9, range(2, 1025), [40] * 1000 + [100_000]])
def test_a_histogram_has_all_of_them_in_few_columns(lengths):
    lengths = np.array(lengths)
    columns = report.histogram(lengths, lengths // 2)
    assert sum(column.conversations for column in columns) == len(lengths)
    assert len(columns) <= report.COLUMNS and columns[-1].last >= lengths.max()
    for before, column in zip(columns, columns[1:]):
        assert column.first == before.last + 1
    ticks = report.ticks_of(columns)
    assert 2 <= len(ticks) <= 7 and ticks[0] == (0, 0) and ticks[-1][0] <= 100
    assert ('longer ones' in report.remark_on(columns)) == (max(lengths) == 100_000)


@pytest.mark.parametrize('changes', [
    {'dropped': [1]}, {'dropped': {'a': '<b>'}}, {'languages': {'en': None}}, {'counts': 'x'},
    {'source': 'x'}, {'options': 3}, {'truncated': '1'},
    {'tokenizer': {'name': 'x', 'sha256': 'y', 'tokens': None}}])
def test_a_strangers_meta_json_is_a_line(prepared, changes):
    folder = prepared(n=10)
    path = os.path.join(folder, 'meta.json')
    with open(path) as file:
        meta = json.load(file)
    with open(path, 'w') as file:
        json.dump(meta | changes, file)
    with pytest.raises(UserError, match='meta.json cannot be read') as error:
        report.write(folder, 1)
    assert '\n' not in str(error.value)
    assert not os.path.exists(os.path.join(folder, 'report.html'))


def test_prepare_writes_the_page_if_asked(tmp_path, vocabulary):
    from data.alpaca import prepare as alpaca
    rows = [{'instruction': f'Do {i}', 'input': '', 'output': 'done' * (i > 0)} for i in range(9)]
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    alpaca.main([f'--input={tmp_path / "rows.json"}', f'--tokenizer={vocabulary}',
                 f'--out_dir={tmp_path / "out"}', '--report=True'])
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert 'empty output<small>' in page and page.count('<details open>') <= 8
