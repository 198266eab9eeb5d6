"""The page about a data set: right numbers, every token, and nothing in it that can act."""
import re

import numpy as np
import pytest

from conftest import one_line
from core import tokenfile
from core.conversation import Turn, encode
from data import report
from data.chat import prepare

EVIL = '<script>alert(1)</script> & "q" </user> 🙂👩‍👩‍👧 Ünï\r\n\ttab'


def test_tokens_read_as_the_text_and_half_a_character_is_shown_as_such(small):
    ids, mask, _ = encode([Turn('user', EVIL), Turn('assistant', EVIL)], small)
    tokens = report.tokens_of(ids, mask, small)
    text = ''.join(token['text'] for token in tokens)
    assert text == small.decode(ids.tolist()) and '\ufffd' not in text
    tags = [token['text'] for token in tokens if token['tag']]
    assert ''.join(tags) == ('<conversation><user></user><assistant></assistant></conversation>'
                             '<|endoftext|>')
    half = small.encode('🙂').tolist()[:2]
    ids = np.array([*half, small.special['</user>'], *small.encode('a').tolist()])
    tokens = report.tokens_of(ids, np.array([0, 0, 0, 1]), small)
    assert [token['text'] for token in tokens] == ['\ufffd', '</user>', 'a']


def test_the_page_says_what_the_files_say(tmp_path, small):
    examples = []
    for i in range(40):
        turns = [Turn('user', f'question {i} {EVIL}'), Turn('assistant', 'yes ' * i + EVIL)]
        examples.append(encode(turns, small)[:2])
    tokenfile.write(str(tmp_path), {'train': examples[4:], 'val': examples[:4]}, {
        'template': 'xml', 'tokenizer': small.state(), 'seen': 57, 'truncated': 3, 'seed': 7,
        'dropped': {'language': 5, '<i>new': 12}, 'source': {'name': '<u>', 'url': 'https://x/y'},
        'options': {'turns': 'all', 'lang': 'en'}, 'split_rule': 'by position'})
    report.main([f'--folder={tmp_path}', '--seed=1'])
    page = (tmp_path / 'report.html').read_text(encoding='utf-8')
    for said in (
            '<h1>&lt;u&gt;</h1>', 'https://x/y', '<b>40</b><span>conversations kept of 57',
            '<td>language</td>', '<td>5</td>', '&lt;i&gt;new', '3 kept ones are cut',
            'by position', 'Seed: 7', 'several threads share', 'turns=all', '<td>36</td>',
             '<s>↵</s>', '&amp;'):
        assert said in page, said
    assert page.count('<details open>') == 20
    assert not re.search(r'<(script|img|link|iframe|u>)|\b(src|href|on\w+)=|@import|url\(', page)
    # A token has its ids in its title and is bold if it is supervised.
    pattern = r'<summary>train (\d+) .*?<div class="ids" dir="auto">(.*?)</div>'
    shown = re.search(pattern, page, re.DOTALL)
    ids, mask = tokenfile.Split([tmp_path], 'train')[int(shown[1])]
    found = []
    for kind, title in re.findall(r'<([bi])(?: class="tag")? title="([\d ]+)">', shown[2]):
        found += [(int(i), kind == 'b') for i in title.split()]
    assert found == list(zip(ids.tolist(), mask.astype(bool).tolist()))


@pytest.mark.parametrize('lengths', [[5], [3] * 9, range(2, 1025)])
def test_a_histogram_has_all_of_them_in_few_columns(lengths):
    lengths = np.array(lengths)
    columns = report.histogram(lengths, lengths // 2)
    assert sum(column['conversations'] for column in columns) == len(lengths)
    assert len(columns) <= report.COLUMNS and columns[-1]['last'] >= lengths.max()


def test_prepare_writes_the_page_if_asked(tmp_path, vocabulary):
    rows = '[{"question": "Hi", "answer": "Ho"}, {"question": "Hi", "answer": ""}]'
    (tmp_path / 'rows.json').write_text(rows)
    prepare.main([f'--input={tmp_path}/rows.json', f'--tokenizer={vocabulary}',
                  f'--out_dir={tmp_path}/out', '--val_fraction=0', '--report=True'])
    assert 'empty message' in (tmp_path / 'out' / 'report.html').read_text()
    with one_line('nowhere/meta.json not found'):
        report.main(['--folder=nowhere'])
