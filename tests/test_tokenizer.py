"""tokenizer.py: the ids are GPT-2's, no text becomes a tag, and a vocabulary reads back whole."""
import json
import random

import numpy as np
import pytest
import tiktoken

from configurator import UserError
from conftest import TEXTS, one_line
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


def test_a_folder_that_was_not_converted_is_a_line(tmp_path):
    with one_line('vocabulary.json not found. Make it from a model: python formats/convert.py'):
        tokenizer.load(str(tmp_path))


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
