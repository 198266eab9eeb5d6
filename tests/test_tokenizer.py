"""tokenizer.py: the ids are GPT-2's, no text becomes a tag, and a vocabulary reads back whole."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers

from core import tokenizer
from configurator import UserError
from core.tokenizer import END_OF_TEXT, TAGS
from conftest import ROOT, TEXTS

SPECIAL = (END_OF_TEXT, '<conversation>', '</conversation>', '<user>', '</user>', '<assistant>', '</assistant>')
TRICKY = ['', ' ', '\n\n\n', 'a  b', "I'll we've IT'S", '\0\x01\x7f', 'naïve café', '🙂👩‍👩‍👧‍👦', 'שלום عليكم', 'e\u0301\u0302', '日本語。', '\u2028\u00a0',
          '\ufeff', '\\\\n', 'aaaaaaaaaaaaaaaaa', '12345678901', '\t\t x', ' \u3000 ', '\U0010ffff', '²³½', 'ǅ', '\r\n', *TEXTS, *SPECIAL,
          '<<user>>', '</user', '<user >', '<|endoftext|><|endoftext|>', '<assistant>done.</assistant>']


def random_texts(n, seed=1):
    """Nasty strings: short repeats, all planes of Unicode, pieces of tags."""
    rng = random.Random(seed)
    pieces = [*'abeht  \n<>/|\'', 'the', ' cap', *TAGS, END_OF_TEXT, '\0', 'é', '🙂', '\u0301', '\u202e', '\\']
    for _ in range(n):
        yield ''.join(rng.choice(pieces) if rng.random() < 0.8 else chr(rng.choice((rng.randrange(0xd800), rng.randrange(0xe000, 0x110000))))
                      for _ in range(rng.randrange(30)))


def test_ids_are_gpt2s(gpt2):
    assert gpt2.encode("What's the capital of France?").tolist() == [2061, 338, 262, 3139, 286, 4881, 30]
    theirs = tiktoken.get_encoding('gpt2')
    for text in (*TRICKY, *random_texts(300)):
        assert gpt2.encode(text).tolist() == theirs.encode_ordinary(text), repr(text)
    assert gpt2.sha256 == tokenizer.GPT2_SHA256


def test_tags_stand_after_gpt2s_own_tokens(gpt2):
    assert [gpt2.special[piece] for piece in SPECIAL] == [50256, 50257, 50258, 50259, 50260, 50261, 50262]
    assert gpt2.end_of_text == 50256 and gpt2.vocab_size == 50263
    plain = tokenizer.load('gpt2', tags=False)
    assert plain.special == {END_OF_TEXT: 50256} and plain.vocab_size == 50257 and plain.tag_pieces() == {}
    assert gpt2.tag_pieces()[50259] == [27, 7220, 29]  # "<", "user", ">"
    assert list(gpt2.tag_pieces()) == [50257, 50258, 50259, 50260, 50261, 50262]


def test_text_never_encodes_to_a_special_id(small):
    n = len(small.tokens)
    for text in (*TRICKY, *random_texts(500)):
        ids = small.encode(text)
        assert ids.dtype == np.uint32 and (ids < n).all(), repr(text)
        assert small.decode_bytes(ids) == text.encode() and small.decode(ids) == text


def test_tags_count_where_the_person_at_the_keyboard_writes_them(small):
    n = len(small.tokens)
    ids = small.encode_with_tags('<conversation><user>Hi</user><assistant>' + END_OF_TEXT).tolist()
    assert ids == [n + 1, n + 3, *small.encode('Hi'), n + 4, n + 5, n]
    assert small.decode(ids) == '<conversation><user>Hi</user><assistant>' + END_OF_TEXT
    assert small.encode_with_tags('no tags').tolist() == small.encode('no tags').tolist()


def test_long_runs_of_white_space_cut_out_give_the_same_ids(small, gpt2, monkeypatch):
    rng, space = random.Random(5), '\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000'
    other = ["'s", 'the', '12', '!?', '\x1c', '\x1f', '\u200b', '\ufeff', '\u180e', 'é', '</user>', '<|endoftext|>', '\0']
    texts = [''.join(rng.choice(other) if rng.random() < 0.3 else rng.choice(space[rng.choice((0, 5)):][:rng.choice((1, 99))]) * rng.choice((1, 1, 2, 5))
                     for _ in range(rng.randrange(1, 12))) for _ in range(4000)]
    whole = [[bpe.encode(text).tolist() for text in texts] for bpe in (small, gpt2)]
    monkeypatch.setattr(tokenizer, 'LONG_RUN', 2)
    assert [[bpe.encode(text).tolist() for text in texts] for bpe in (small, gpt2)] == whole


@pytest.mark.parametrize('text', [' ' * 2_000_000, 'a' + '\n' * 1_500_000 + 'b', '\u3000 ' * 600_000 + ' x'])
def test_millions_of_white_space_characters_are_encoded(small, text):
    ids = small.encode(text)
    assert small.decode(ids.tolist()) == text and ids.dtype == np.uint32


@pytest.mark.parametrize('encode', ['encode', 'encode_with_tags'])
def test_half_a_surrogate_pair_is_a_value_error(small, encode):
    for text in ('a\ud800b', '\udfff', '<user>\udc80'):
        with pytest.raises(ValueError):
            getattr(small, encode)(text)


def test_an_incomplete_character_is_shown_as_such(small):
    ids = small.encode('🙂')
    assert len(ids) > 1 and small.decode(ids[:-1]).endswith('\ufffd') and small.decode(ids) == '🙂'


def test_remembering_changes_nothing(vocabulary):
    bpe = tokenizer.load(vocabulary)
    before = [bpe.encode(text).tolist() for text in TRICKY]
    bpe.remember(3)
    assert [bpe.encode(text).tolist() for text in TRICKY + TRICKY] == before + before


# ---- a learned vocabulary ----

@pytest.mark.parametrize('vocab_size', [256, 280, 400, 1000])
def test_a_learned_vocabulary_gives_the_ids_that_its_library_gives(tmp_path, vocab_size):
    texts = [*TEXTS, *random_texts(50, seed=2), *('ab' * k + 'a' * k for k in range(30))]
    tokenizer.learn(texts, vocab_size, str(tmp_path / 'tokenizer.json'))
    ours = tokenizer.load(str(tmp_path), tags=False)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert ours.vocab_size == vocab_size + 1 == theirs.get_vocab_size() + 1
    for text in (*TRICKY, *random_texts(1000), *texts):
        assert ours.encode(text).tolist() == theirs.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == text


def test_learning_gives_the_same_vocabulary_again_in_another_process(vocabulary, small, tmp_path):
    code = f'import tokenizer; tokenizer.learn({TEXTS * 3!r}, 320, {str(tmp_path / "again.json")!r})'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, env={**os.environ, 'PYTHONHASHSEED': '5'})
    assert tokenizer.load(str(tmp_path / 'again.json')).sha256 == small.sha256


def parts(vocabulary):
    """(vocab, merges) of a tokenizer.json."""
    with open(vocabulary, encoding='utf-8') as file:
        model = json.load(file)['model']
    return model['vocab'], model['merges']


def write_files(folder, vocab, merges):
    """The older form: vocab.json and merges.txt."""
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text('#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges), encoding='utf-8')


def test_vocab_json_and_merges_txt(vocabulary, small, tmp_path):
    vocab, merges = parts(vocabulary)
    write_files(tmp_path, {**vocab, END_OF_TEXT: len(vocab), '<user>': len(vocab) + 1}, merges)
    assert tokenizer.load(str(tmp_path)).sha256 == small.sha256
    assert tokenizer.load(str(tmp_path)).special == small.special


def test_a_folder_that_transformers_has_saved(vocabulary, small, tmp_path):
    transformers = pytest.importorskip('transformers')
    vocab, merges = parts(vocabulary)
    theirs = transformers.GPT2Tokenizer(vocab={**vocab, END_OF_TEXT: len(vocab)}, merges=[tuple(merge) for merge in merges])
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load(str(tmp_path), tags=False)
    assert ours.sha256 == small.sha256 and ours.special == {END_OF_TEXT: len(vocab)}
    for text in TRICKY:
        if END_OF_TEXT not in text:
            assert ours.encode(text).tolist() == theirs(text)['input_ids'], repr(text)


def test_merges_may_be_written_as_one_text(vocabulary, small, tmp_path):
    vocab, merges = parts(vocabulary)
    (tmp_path / 'old.json').write_text(json.dumps({'model': {'vocab': vocab, 'merges': [f'{a} {b}' for a, b in merges]}}))
    assert tokenizer.load(str(tmp_path / 'old.json')).sha256 == small.sha256


def break_it(vocab, merges, how):
    """Text of a tokenizer.json that is wrong in one way."""
    names = list(vocab)
    if how == 'gap':
        vocab = {name: i + (i > 300) for name, i in vocab.items()}
    elif how == 'twice':
        vocab = {**vocab, names[0]: 5}
    elif how == 'a byte lacks':
        vocab, merges = {name: i - 1 for name, i in vocab.items() if i}, []
    elif how == 'no byte':
        vocab = {**vocab, '日': len(vocab)}
    elif how == 'order':  # as RoBERTa has it: the same tokens under other ids
        vocab = {**vocab, names[300]: vocab[names[301]], names[301]: vocab[names[300]]}
    elif how == 'merges cut':
        merges = merges[:-1]
    elif how == 'text ids':
        vocab = {name: str(i) for name, i in vocab.items()}
    elif how == 'too many':
        more = [(a, b) for a in list(vocab)[:256] for b in list(vocab)[:256]]
        vocab = dict.fromkeys([*list(vocab)[:256], *map(''.join, more)])
        vocab, merges = {name: i for i, name in enumerate(vocab)}, more
    return json.dumps({'model': {'vocab': vocab, 'merges': merges}})


@pytest.mark.parametrize('how', ['gap', 'twice', 'a byte lacks', 'no byte', 'order', 'merges cut', 'text ids', 'too many'])
def test_a_wrong_vocabulary_is_refused_in_a_line(vocabulary, tmp_path, how):
    path = tmp_path / 'tokenizer.json'
    path.write_text(break_it(*parts(vocabulary), how))
    refused(path, 'does not hold a byte-level vocabulary')


@pytest.mark.parametrize('text', ['', '{', '[]', '5', 'null', '{"model": {}}', '{"model": {"vocab": [], "merges": []}}', '{"model": []}',
                                  '{"model": {"vocab": {}, "merges": null}}', '{"model": {"vocab": {"a": 0}, "merges": [5]}}',
                                  b'\xff\xfe', '[' * 100_000])
def test_a_broken_file_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(path, 'does not hold a byte-level vocabulary')


def test_a_folder_without_the_files_is_refused_in_a_line(vocabulary, tmp_path):
    refused(tmp_path, 'no vocabulary in')
    refused(tmp_path / 'gpt3', 'no vocabulary in')
    write_files(tmp_path, *parts(vocabulary))
    os.remove(tmp_path / 'merges.txt')
    refused(tmp_path, 'merges.txt')


def refused(path, why):
    with pytest.raises(UserError) as caught:
        tokenizer.load(str(path))
    assert why in str(caught.value) and '\n' not in str(caught.value) and str(path) in str(caught.value)


def test_gpt2_without_cache_and_network_is_a_line(tmp_path):
    code = 'import configurator, tokenizer; configurator.run(lambda argv: tokenizer.load("gpt2"))'
    env = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9', 'no_proxy': ''}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'TIKTOKEN_CACHE_DIR' in done.stderr, done.stderr


# ---- what a checkpoint keeps ----

def test_the_state_brings_the_tokenizer_back(small):
    state = json.loads(json.dumps(small.state()))
    assert set(state) == {'name', 'sha256', 'tags', 'tokens'} and len(state['tokens']) == len(small.tokens)
    again = tokenizer.from_state(state)
    assert (again.name, again.sha256, again.special) == (small.name, small.sha256, small.special)
    for text in TRICKY:
        assert again.encode(text).tolist() == small.encode(text).tolist()
    without = tokenizer.from_state({**state, 'tags': False})
    assert without.special == {END_OF_TEXT: len(small.tokens)} and without.sha256 == small.sha256


def test_gpt2s_own_vocabulary_is_kept_by_name(gpt2):
    assert gpt2.state() == {'name': 'gpt2', 'sha256': tokenizer.GPT2_SHA256, 'tags': True, 'tokens': None}
    assert tokenizer.from_state(gpt2.state()).special == gpt2.special


def test_another_vocabulary_in_a_folder_named_gpt2_is_kept_whole(vocabulary, small, tmp_path):
    (tmp_path / 'gpt2').mkdir()
    write_files(tmp_path / 'gpt2', *parts(vocabulary))
    state = tokenizer.load(str(tmp_path / 'gpt2')).state()
    assert state['name'] == 'gpt2' and tokenizer.from_state(state).sha256 == small.sha256


def test_a_state_with_another_hash_is_refused(small):
    state = small.state()
    for wrong in ({**state, 'sha256': '0' * 64}, {**state, 'tokens': state['tokens'][:-1]},
                  {**state, 'tokens': [*state['tokens'][:-2], *state['tokens'][:-3:-1]]}):
        with pytest.raises(UserError, match='does not have the hash'):
            tokenizer.from_state(wrong)
