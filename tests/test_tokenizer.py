"""tokenizer.py: the ids are GPT-2's, no text becomes a tag, and a vocabulary reads back whole."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from configurator import UserError
from conftest import TEXTS
from core import tokenizer
from core.tokenizer import END_OF_TEXT, TAGS

TRICKY = [
    '', ' ', '\n\n\n', 'a  b', "I'll IT'S", '\0\x01\x7f', 'naïve café', '🙂👩‍👩‍👧‍👦', 'שלום عليكم',
    '日本語。', '\u2028\u00a0', '\ufeff', 'aaaaaaaaaaaaa', '12345678901', ' \u3000 ', '²³½', '\r\n',
    *TEXTS, *TAGS, END_OF_TEXT, '<<user>>', '</user', '<user >', '<assistant>done.</assistant>']


def random_texts(n, seed=1):
    """Short repeats, any characters of Unicode, pieces of tags."""
    rng = random.Random(seed)
    pieces = [*'abeht  \n<>/|\'', 'the', ' cap', *TAGS, END_OF_TEXT, '\0', 'é', '🙂', '\u0301']
    for _ in range(n):
        chars = [chr(rng.randrange(0xe000, 0x110000)) for _ in range(5)]
        yield ''.join(rng.choices(pieces + chars, k=rng.randrange(30)))


def test_ids_are_gpt2s(gpt2):
    assert gpt2.encode("What's the capital?").tolist() == [2061, 338, 262, 3139, 30]
    theirs = tiktoken.get_encoding('gpt2')
    for text in (*TRICKY, *random_texts(300)):
        assert gpt2.encode(text).tolist() == theirs.encode_ordinary(text), repr(text)
    assert gpt2.sha256 == tokenizer.GPT2_SHA256


def test_tags_stand_after_gpt2s_own_tokens(gpt2):
    assert [gpt2.special[tag] for tag in TAGS] == [50257, 50258, 50259, 50260, 50261, 50262]
    assert gpt2.end_of_text == 50256 and gpt2.vocab_size == 50263
    assert gpt2.tag_pieces()[50259] == [27, 7220, 29]  # "<", "user", ">"
    assert gpt2.with_tags(False).special == {END_OF_TEXT: 50256}
    state = gpt2.state()
    assert state == {'name': 'gpt2', 'sha256': tokenizer.GPT2_SHA256, 'tags': True, 'tokens': None}
    assert tokenizer.from_state(state).special == gpt2.special


def test_text_never_encodes_to_a_special_id(small):
    for text in (*TRICKY, *random_texts(300)):
        ids = small.encode(text)
        assert ids.dtype == np.uint32 and (ids < len(small.tokens)).all(), repr(text)
        assert small.decode(ids) == text


def test_tags_count_where_the_person_who_runs_the_script_writes_them(small):
    n = len(small.tokens)
    text = '<conversation><user>Hi</user><assistant>' + END_OF_TEXT
    ids = small.encode_with_tags(text).tolist()
    assert ids == [n + 1, n + 3, *small.encode('Hi'), n + 4, n + 5, n]
    assert small.decode(ids) == text
    with pytest.raises(ValueError):
        small.encode_with_tags('a\ud800b')  # half a surrogate pair


def write(path, content):
    path.write_text(json.dumps(content), encoding='utf-8')


@pytest.mark.parametrize('special, n', [([], 256), (['<pad>', END_OF_TEXT, '<mask>'], 400)])
def test_ids_are_those_of_transformers(learn, tmp_path, special, n):
    """Special tokens may have any names, and stand before or behind the text tokens."""
    transformers = pytest.importorskip('transformers')
    model = json.loads(Path(learn([*TEXTS, *random_texts(50, seed=2)], n)).read_text())['model']
    vocab = {token: i for i, token in enumerate([*special, *model['vocab']])}
    merges = [tuple(merge) for merge in model['merges']]
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    theirs.add_tokens([*special, '<last>'], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load(str(tmp_path), tags=False)
    assert ours.special == {piece: theirs.convert_tokens_to_ids(piece)
                            for piece in {*special, END_OF_TEXT, '<last>'}}
    for text in (*TRICKY, *random_texts(300)):
        ids = ours.encode(text).tolist()
        assert ours.decode(ids) == text and not {*ids} & {*ours.special.values()}
        if END_OF_TEXT not in text:
            assert ids == theirs(text)['input_ids'], repr(text)
    tagged = ours.with_tags()
    first = ours.vocab_size
    assert [tagged.special[tag] for tag in TAGS] == [*range(first, first + 6)]
    assert tokenizer.from_state(json.loads(json.dumps(tagged.state()))).special == tagged.special


def test_the_older_forms_of_the_files(vocabulary, small, tmp_path):
    content = json.loads(Path(vocabulary).read_text())
    n = len(small.tokens)
    # In an older tokenizer.json, a merge is one text.
    merges = [' '.join(merge) for merge in content['model']['merges']]
    content['model']['merges'] = merges
    write(tmp_path / 'c.json', content)
    assert tokenizer.load(str(tmp_path / 'c.json')).sha256 == small.sha256
    # Before it, there were two files.
    folder = tmp_path / 'gpt2'
    folder.mkdir()
    write(folder / 'vocab.json', content['model']['vocab'] | {END_OF_TEXT: n})
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']), 'utf-8')
    found = tokenizer.load(str(folder))
    assert (found.sha256, found.special) == (small.sha256, small.special)
    # In spite of its name it is kept whole.
    assert tokenizer.from_state(found.state()).sha256 == small.sha256
    # Names of special tokens may have a file of their own; our tags are not doubled.
    added = {END_OF_TEXT: n, '<|pad|>': n + 1}
    added |= {tag: n + 2 + i for i, tag in enumerate(TAGS)}
    write(folder / 'added_tokens.json', added)
    assert tokenizer.load(str(folder), tags=False).special == added


@pytest.mark.parametrize('change, said', [
    # As RoBERTa has them.
    (lambda vocab, merges: (vocab | {'an': vocab['is'], 'is': vocab['an']}, merges), 'the order'),
    (lambda vocab, merges: (vocab, merges[:-1]), 'not in the order of merging'),
    (lambda vocab, merges: ({t: i + (i > 300) for t, i in vocab.items()}, merges), 'without gaps'),
    (lambda vocab, merges: (vocab | {'\u2581the': 320}, merges), 'cannot be read'),
    (lambda vocab, merges: (vocab | {f'<{i}>': i for i in range(320, 65536)},
                            merges + [f'<{i} >' for i in range(320, 65536)]), '16 bits'),
    (lambda vocab, merges: (vocab, None), 'cannot be read')])
def test_a_vocabulary_of_another_kind_is_refused_in_a_line(vocabulary, tmp_path, change, said):
    content = json.loads(Path(vocabulary).read_text())
    vocab, merges = change(content['model']['vocab'], content['model']['merges'])
    write(tmp_path / 'tokenizer.json', content | {'model': {'vocab': vocab, 'merges': merges}})
    refused(tmp_path, said)


def test_a_folder_without_the_files_is_refused_in_a_line(tmp_path):
    refused(tmp_path / 'gpt3', 'not found')
    write(tmp_path / 'vocab.json', {})
    refused(tmp_path, 'not found')


def refused(path, why):
    with pytest.raises(UserError, match=f'{why}.* Expected the vocabulary of a GPT-2') as caught:
        tokenizer.load(str(path))
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)


def test_gpt2_without_cache_and_network_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('no_proxy', '')
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match='^[^\n]*TIKTOKEN_CACHE_DIR[^\n]*$'):
        tokenizer.load('gpt2')


def test_the_state_brings_the_tokenizer_back(small):
    state = json.loads(json.dumps(small.state()))
    again = tokenizer.from_state(state)
    assert (again.name, again.tokens, again.special) == (small.name, small.tokens, small.special)
    without = tokenizer.from_state(state | {'tags': False})
    assert without.special == {END_OF_TEXT: len(small.tokens)} and without.sha256 == small.sha256
    del state['added']  # as earlier versions wrote it
    assert tokenizer.from_state(state).special == small.special
