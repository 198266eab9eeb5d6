"""GPT-2's byte-level BPE, through tiktoken, with our tags as tokens of their own.

    python -c "import tokenizer; print(tokenizer.load('gpt2').encode('Hello'))"

Three places to have a vocabulary from: GPT-2's own (tiktoken downloads it once, checks its sha256
and caches it in TIKTOKEN_CACHE_DIR), a folder with the files of `transformers` (tokenizer.json, or
vocab.json and merges.txt), or a small one learned from a text.

Ids: the text tokens first, in order of merging; then <|endoftext|>; then, where a template needs
them, the six tags. Text is always encoded as ordinary text and cannot produce any of those seven.
Source: Radford et al. 2019, https://github.com/openai/gpt-2/blob/master/src/encoder.py
"""
import hashlib
import json
import os
import re
from functools import cached_property, lru_cache

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached

from configurator import UserError

END_OF_TEXT = '<|endoftext|>'
TAGS = ('<conversation>', '</conversation>', '<user>', '</user>', '<assistant>', '</assistant>')

# How GPT-2 splits text before merging: contractions, words, numbers, signs, white space. tiktoken's own
# pattern, with possessive quantifiers, is no faster on conversations (2.7 s against 2.55 for 50 MB of them).
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken gives up on a run of white space of about a million characters: the pattern tries all of it, then
# goes back one. What it would find is plain, so longer runs than this are cut out. Its \s, not Python's.
LONG_RUN = 100_000
_SPACE = '[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'

# The pairs that GPT-2 merges, in order, where tiktoken has them from.
GPT2_MERGES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
GPT2_MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
GPT2_SHA256 = 'e9e45993123ec6a64707a12a963fa02d1c51d715b1f66650519ed8c417fbfaff'  # Tokenizer.sha256 of its tokens


class Tokenizer:
    """Text tokens (bytes, in order of merging), <|endoftext|>, and the tags if `tags` is true."""

    def __init__(self, name, tokens, tags):
        self.name, self.tokens, self.tags = name, tokens, tags
        n = len(tokens)
        self.special = {piece: n + i for i, piece in enumerate((END_OF_TEXT, *TAGS)[:7 if tags else 1])}
        self.end_of_text = n
        self.vocab_size = n + len(self.special)

    @cached_property
    def _bpe(self):
        return tiktoken.Encoding(self.name, pat_str=PATTERN, special_tokens=self.special,
                                 mergeable_ranks={token: i for i, token in enumerate(self.tokens)})

    def encode(self, text):
        """Ordinary text -> uint32 array of ids, none of them special. ValueError for lone surrogates."""
        text.encode('utf-8')  # tiktoken would silently put U+FFFD where this raises
        found, start = [], 0
        for run in re.finditer(f'{_SPACE}{{{LONG_RUN},}}', text) if len(text) > LONG_RUN else ():
            end = run.end() - (run.end() < len(text))  # the last one belongs to what follows
            found += [self._bpe.encode_to_numpy(text[start:run.start()], disallowed_special=()),
                      np.array(self._bpe._encode_single_piece(text[run.start():end]), np.uint32)]
            start = end
        rest = self._bpe.encode_to_numpy(text[start:], disallowed_special=())
        return np.concatenate([*found, rest]) if found else rest

    def remember(self, n=64):
        """Keep the last n results of encode: the threads of one tree share most of their turns."""
        self.encode = lru_cache(n)(self.encode)

    def encode_with_tags(self, text):
        """What the person at the keyboard wrote: tags and <|endoftext|> count as such. ValueError as above."""
        text.encode('utf-8')
        return self._bpe.encode_to_numpy(text, allowed_special='all')

    def decode_bytes(self, ids):
        """The bytes of the ids; tags as they are written."""
        return self._bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of the ids; U+FFFD where they end inside a character."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def tag_pieces(self):
        """{tag id: the ids that the tag's text would have as ordinary text}; {} without tags."""
        return {self.special[tag]: self.encode(tag).tolist() for tag in TAGS} if self.tags else {}

    @property
    def sha256(self):
        """Hash of the text tokens: equal hashes mean equal ids for all text."""
        return hashlib.sha256(b''.join(b'%d:%b' % (len(t), t) for t in self.tokens)).hexdigest()

    def state(self):
        """What checkpoints and meta.json keep: the name for GPT-2's own vocabulary, the whole of any other."""
        gpt2 = self.name == 'gpt2' and self.sha256 == GPT2_SHA256  # a folder may be called gpt2, too
        tokens = None if gpt2 else [to_unicode(token) for token in self.tokens]
        return {'name': self.name, 'sha256': self.sha256, 'tags': self.tags, 'tokens': tokens}


def load(name, tags=True):
    """The Tokenizer `name`: 'gpt2', or a folder or tokenizer.json in transformers' form."""
    if name != 'gpt2':
        return Tokenizer(os.path.basename(os.path.normpath(name)), _read_folder(name), tags)
    try:
        merges = read_file_cached(GPT2_MERGES, GPT2_MERGES_SHA256).decode().split('\n')[1:-1]
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: wrong hash
        raise UserError(f"GPT-2's vocabulary is not in tiktoken's cache and could not be downloaded "
                        f'({type(error).__name__}). Connect once, or set TIKTOKEN_CACHE_DIR to a '
                        'folder that has it.') from None
    # Twice as fast as tiktoken's own reading, which takes a second file to check the first by.
    return Tokenizer('gpt2', [*map(to_bytes, _BYTE), *(to_bytes(merge.replace(' ', '')) for merge in merges)], tags)


def from_state(state):
    """The Tokenizer of a state. UserError where its vocabulary is not what its hash says."""
    try:
        name, tokens = state['name'], state.get('tokens')
        if tokens is not None:
            tokenizer = Tokenizer(name, [to_bytes(token) for token in tokens], state['tags'])
        elif name == 'gpt2':
            tokenizer = load('gpt2', state['tags'])
        else:
            raise ValueError('its tokens are missing')
        if tokenizer.sha256 != state['sha256']:
            raise ValueError('it does not have the hash that is stored with it')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'the vocabulary that is stored here cannot be used: {type(error).__name__} {error}. '
                        'The file is damaged, or was edited.') from None
    return tokenizer


def learn(texts, vocab_size, path):
    """Learn vocab_size byte-level BPE tokens from the texts; write them as a tokenizer.json."""
    import tokenizers  # comes with transformers; only needed here
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    bpe.save(path)


def _read_folder(path):
    """The text tokens, in order of merging, of a folder or a tokenizer.json."""
    whole = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    try:
        if os.path.isfile(whole):
            with open(whole, encoding='utf-8') as file:
                model = json.load(file)['model']
            vocab, merges = model['vocab'], model['merges']
        elif os.path.isfile(os.path.join(path, 'vocab.json')):
            with open(os.path.join(path, 'vocab.json'), encoding='utf-8') as file:
                vocab = json.load(file)
            with open(os.path.join(path, 'merges.txt'), encoding='utf-8') as file:
                merges = [line for line in file.read().split('\n') if line and not line.startswith('#version')]
        else:
            raise UserError(f'no vocabulary in {path}: expected tokenizer.json, or vocab.json and '
                            'merges.txt. Or use GPT-2\'s own: gpt2.')
        text = sorted((token for token in vocab if token not in (END_OF_TEXT, *TAGS)), key=vocab.get)
        tokens = [to_bytes(token) for token in text]
        merged = [''.join(merge.split(' ') if isinstance(merge, str) else merge) for merge in merges]
        if [vocab[token] for token in text] != list(range(len(text))):
            raise ValueError('ids are not 0, 1, 2, …')
        if sorted(tokens[:256]) != [bytes([b]) for b in range(256)]:
            raise ValueError('the first 256 tokens are not the 256 bytes')
        if text[256:] != list(dict.fromkeys(merged)):  # tiktoken merges in the order of the ids
            raise ValueError('ids are not in the order of merging')
        if len(text) > 2 ** 16 - 7:
            raise ValueError(f'{len(text):,} tokens, more than token files of 16 bits can hold')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not hold a byte-level vocabulary of GPT-2's kind ({type(error).__name__}: "
                        f"{error}). Expected a folder that transformers' GPT-2 tokenizer has saved.") from None
    return tokens


# GPT-2's files write each byte as one printable character: itself where it is printable, the next
# free one from U+0100 on where it is not.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_CHAR = {b: chr(b) for b in _PRINTABLE}
_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _CHAR)}
_BYTE = {char: b for b, char in _CHAR.items()}
_LATIN = dict.fromkeys(range(256), '\uffff') | {ord(char): b for char, b in _BYTE.items()}  # U+FFFF: no byte


def to_unicode(token):
    """A token's bytes as GPT-2's vocabulary files write them."""
    return ''.join(_CHAR[b] for b in token)


def to_bytes(token):
    """The other way; ValueError for a character that stands for no byte."""
    return token.translate(_LATIN).encode('latin-1')
