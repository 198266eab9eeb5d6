"""The page about a data set: its numbers are those of the files, every token stands in it, and nothing in it can act."""
import html
import json
import os
import re

import numpy as np
import pytest

from core import tokenfile
from configurator import UserError
from core.conversation import Turn, encode
from data import report
from data.alpaca import prepare as alpaca
from data.oasst import prepare as oasst

EVIL = '<script>alert(1)</script> & "q" </user> \u202e turned \x07 🙂👩‍👩‍👧 Ünï\r\n\ttab'


def ids_of(shown):
    """The ids in the titles of the tokens, and whether each is supervised."""
    return [(int(i), kind == 'b') for kind, ids in re.findall(r'<([bi])(?: class="tag")? title="([\d ]+)">', shown) for i in ids.split()]


def text_of(shown):
    """What the tokens say, without the marks for what is not seen."""
    shown = re.sub(r'<s>U\+(\w+)</s>', lambda mark: chr(int(mark[1], 16)), shown)
    shown = html.unescape(re.sub(r'<s>.</s>|<[^>]+>', '', shown))
    return ''.join(chr(ord(c) - 0x2400) if 0x2400 <= ord(c) < 0x2420 else c for c in shown)


@pytest.mark.parametrize('template', ['xml', 'alpaca'])
def test_every_token_is_there_with_its_mask_and_reads_as_the_text(small, template):
    ids, mask, _ = encode([Turn('user', EVIL), Turn('assistant', EVIL)], small, template)
    shown = report.shown_tokens(ids, mask, small)
    assert ids_of(shown) == list(zip(ids.tolist(), mask.astype(bool).tolist()))
    assert text_of(shown) == small.decode(ids.tolist())
    assert set(re.findall(r'<(\w+)', shown)) == {'b', 'i', 's'} and '\u202e' not in shown
    assert ('<b class="tag"' in shown) and ('&lt;script&gt;' in shown or '&lt;' in shown)


def test_half_a_character_is_shown_as_such(small):
    ids, mask, _ = encode([Turn('user', '🙂'), Turn('assistant', '🙂')], small)
    for cut in range(1, len(ids)):
        shown = report.shown_tokens(ids[:cut], mask[:cut], small)
        assert [i for i, _ in ids_of(shown)] == ids[:cut].tolist()
    broken = [*small.encode('🙂').tolist()[:2], small.special['</user>'], *small.encode('a').tolist()]
    assert text_of(report.shown_tokens(np.array(broken), np.array([0, 0, 0, 1]), small)) == '�</user>a'


def trees(path, langs):
    """A file of trees, one exchange each in its language."""
    with open(path, 'w', encoding='utf-8') as file:
        for i, lang in enumerate(langs):
            reply = {'message_id': f'{i}b', 'text': f'answer {i} {EVIL}', 'role': 'assistant', 'lang': lang}
            root = {'message_id': f'{i}', 'text': f'question {i} {EVIL}', 'role': 'prompter', 'lang': lang, 'replies': [reply]}
            file.write(json.dumps({'message_tree_id': f't{i}', 'prompt': root}) + '\n')
    return path


def test_prepare_writes_the_page_and_counts_what_it_kept(tmp_path, vocabulary, capsys):
    langs = ['en'] * 30 + ['de'] * 20 + ['fr'] * 5 + ['<b>x'] * 2
    path = trees(tmp_path / 'trees.jsonl', langs)
    flags = [f'--input={path}', f'--tokenizer={vocabulary}', '--lang=en,de,<b>x', f'--out_dir={tmp_path / "out"}']
    oasst.main([*flags, '--report'])
    assert 'report.html' in capsys.readouterr().out
    meta, page = tokenfile.read_meta(str(tmp_path / 'out')), (tmp_path / 'out' / 'report.html').read_text()
    assert meta['languages'] == {'<b>x': 2, 'de': 20, 'en': 30} and 'report' not in meta['options']
    for said in ('>52<', 'conversations kept of 57', '>language<small>', '5</td>', '&lt;b&gt;x', 'trees.jsonl: what the model will learn'):
        assert said in page, said
    assert page.count('<details open>') == 20
    assert not re.search(r'<(script|img|link|iframe|b>x)|\b(src|href|on\w+)=|@import|url\(|https?:', page)
    before = page
    oasst.main(flags)  # without the page: the one before is not touched, and the same meta.json is written
    assert tokenfile.read_meta(str(tmp_path / 'out')) == meta and (tmp_path / 'out' / 'report.html').read_text() == before


def test_the_page_can_be_had_of_a_folder_that_is_prepared_already(tmp_path, vocabulary, script, capsys):
    path = trees(tmp_path / 'trees.jsonl', ['en'] * 40)
    oasst.main([f'--input={path}', f'--tokenizer={vocabulary}', f'--out_dir={tmp_path / "out"}'])
    first = report.page(str(tmp_path / 'out'), 1)
    assert first == report.page(str(tmp_path / 'out'), 1) != report.page(str(tmp_path / 'out'), 2)  # drawn by the seed
    found = script('data/report.py', '--folder=out', '--seed=1')
    assert found.returncode == 0 and (tmp_path / 'out' / 'report.html').read_text() == first, found.stderr
    shown = re.search(r'<summary>train (\d+) .*?<div class="ids" dir="auto">(.*?)</div>', first, re.DOTALL)
    ids, mask = tokenfile.Split([str(tmp_path / 'out')], 'train')[int(shown[1])]
    assert ids_of(shown[2]) == list(zip(ids.tolist(), mask.astype(bool).tolist()))


def test_rows_without_a_language_say_so(tmp_path, vocabulary):
    rows = [{'instruction': f'Do {i}', 'input': '', 'output': 'done' * (i > 0)} for i in range(9)]
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    alpaca.main([f'--input={tmp_path / "rows.json"}', f'--tokenizer={vocabulary}', f'--out_dir={tmp_path / "out"}', '--report=True'])
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert 'The source does not say.' in page and '>empty output<small>' in page and page.count('<details open>') <= 8


def test_a_histogram_has_all_of_them_and_few_bars():
    for lengths in ([5], [3] * 9, list(range(2, 1025)), [40] * 1000 + [100_000]):
        lengths = np.array(lengths)
        shown = report.histogram(lengths, lengths // 2)
        found = re.findall(r'<title>([\d,]+) to ([\d,]+) tokens: ([\d,]+) conversations', shown)
        assert sum(int(n.replace(',', '')) for _, _, n in found) == len(lengths) and len(found) <= report.BARS
        assert int(found[-1][1].replace(',', '')) >= lengths.max()


@pytest.mark.parametrize('spoil', [lambda m: m.update(dropped=[1]), lambda m: m.update(dropped={'a': '<b>'}), lambda m: m.update(languages={'en': None}),
                                   lambda m: m.update(counts='x'), lambda m: m.update(source='x'), lambda m: m.update(options=3),
                                   lambda m: m['tokenizer'].pop('sha256'), lambda m: m.update(truncated='1')])
def test_a_strangers_meta_json_is_a_line(tmp_path, vocabulary, spoil):
    path = trees(tmp_path / 'trees.jsonl', ['en'] * 5)
    oasst.main([f'--input={path}', f'--tokenizer={vocabulary}', f'--out_dir={tmp_path / "out"}'])
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    spoil(meta)
    (tmp_path / 'out' / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError) as error:
        report.write(str(tmp_path / 'out'), 1)
    assert '\n' not in str(error.value) and not os.path.exists(tmp_path / 'out' / 'report.html')


def test_nothing_to_show_is_a_line(tmp_path, script):
    for arguments, said in ((('data/report.py', '--folder=nowhere'), 'nowhere/meta.json not found'),
                            (('data/oasst/prepare.py', '--stdout', '--report'), 'leave one of them out')):
        found = script(*arguments)
        assert found.returncode == 2 and said in found.stderr and len(found.stderr.splitlines()) == 1, found.stderr
