"""GPT-2's byte-level BPE, through tiktoken, with our six tags as tokens of their own.

    python -c "from core import tokenizer; print(tokenizer.load('gpt2').encode('Hello'))"

Text is encoded as ordinary text: it never produces <|endoftext|>, a tag or any other special
token. Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py
"""
import hashlib
import json
import os
from functools import cached_property

import tiktoken
from tiktoken.load import read_file_cached

from core.files import reading

END_OF_TEXT = '<|endoftext|>'
# They follow the vocabulary in this order. With GPT-2's they are 50257 to 50262.
TAGS = ('<conversation>', '</conversation>', '<user>', '</user>', '<assistant>', '</assistant>')

# How GPT-2 splits text before merging: contractions, words, numbers, signs, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The pairs that GPT-2 merges, in order. tiktoken keeps the file in TIKTOKEN_CACHE_DIR.
GPT2_MERGES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
GPT2_MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
GPT2_SHA256 = 'e9e45993123ec6a64707a12a963fa02d1c51d715b1f66650519ed8c417fbfaff'

# GPT-2's files write a byte as one character: itself where it is printable, else the next
# from U+0100 on.
CHAR_OF = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
for b in range(256):
    CHAR_OF.setdefault(b, chr(len(CHAR_OF) + 68))
BYTE_OF = {ord(char): b for b, char in CHAR_OF.items()}


def to_unicode(token):
    """A token's bytes as GPT-2's files write them."""
    return ''.join(CHAR_OF[b] for b in token)


def to_bytes(token):
    """The inverse of to_unicode; ValueError for a character that stands for no byte."""
    return token.translate(BYTE_OF).encode('latin-1')


class Tokenizer:
    """A vocabulary: text tokens as bytes, in order of merging, and special tokens.

    added: {special piece: id}. Text tokens have the ids that are left. The six tags come
    last, if `tags`.
    """

    def __init__(self, name, tokens, tags, added=None):
        self.name = name
        self.tokens = tokens
        self.tags = tags
        self.added = added or {END_OF_TEXT: len(tokens)}
        n = len(tokens) + len(self.added)
        taken = set(self.added.values())
        self.text_ids = [i for i in range(n) if i not in taken]
        self.special = dict(self.added)
        if tags:
            self.special |= {tag: n + i for i, tag in enumerate(TAGS)}
        self.end_of_text = self.added[END_OF_TEXT]
        self.vocab_size = len(tokens) + len(self.special)

    @cached_property
    def _bpe(self):
        ranks = dict(zip(self.tokens, self.text_ids))
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens=self.special)

    def encode(self, text):
        """Ordinary text -> uint32 ids. ValueError for half a surrogate pair."""
        return self._bpe.encode_to_numpy(text, disallowed_special=())

    def encode_with_tags(self, text):
        """Text of whoever runs the script: special tokens in it count as such."""
        return self._bpe.encode_to_numpy(text, allowed_special='all')

    def decode_bytes(self, ids):
        """The bytes of the ids; special tokens as they are written."""
        return self._bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of the ids; U+FFFD where they end inside a character."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def pieces(self):
        """{piece: id} of all tokens, as GPT-2's files write them."""
        text = [to_unicode(token) for token in self.tokens]
        return dict(zip(text, self.text_ids)) | self.special

    def with_tags(self, tags=True):
        """The same vocabulary with the six tags, or without."""
        return Tokenizer(self.name, self.tokens, tags, self.added)

    @property
    def sha256(self):
        """Hash of everything but the tags: equal hashes mean equal ids for every text."""
        content = b''.join(b'%d:%b' % (len(token), token) for token in self.tokens)
        if self.added != {END_OF_TEXT: len(self.tokens)}:
            content += repr(sorted(self.added.items())).encode()
        return hashlib.sha256(content).hexdigest()

    def state(self):
        """What checkpoints and meta.json keep: GPT-2's own by name, any other one whole."""
        state = {'name': self.name, 'sha256': self.sha256, 'tags': self.tags}
        state['tokens'] = None
        if self.name != 'gpt2' or state['sha256'] != GPT2_SHA256:
            state['tokens'] = [to_unicode(token) for token in self.tokens]
            state['added'] = self.added
        return state


def from_state(state):
    """The Tokenizer of a state."""
    if state['tokens'] is None:
        return load('gpt2', state['tags'])
    tokens = [to_bytes(token) for token in state['tokens']]
    return Tokenizer(state['name'], tokens, state['tags'], state.get('added'))


def load(name, tags=True):
    """The Tokenizer `name`: 'gpt2', or a folder that formats/convert.py wrote."""
    if name != 'gpt2':
        path = os.path.join(name, 'vocabulary.json')
        with reading(path, 'Make it from a model: python formats/convert.py --input=MODEL'):
            with open(path, encoding='utf-8') as file:
                return from_state({**json.load(file), 'tags': tags})
    with reading("GPT-2's vocabulary", 'Connect to the network once, or set '
                                       'TIKTOKEN_CACHE_DIR to a folder that has it.'):
        merges = read_file_cached(GPT2_MERGES, GPT2_MERGES_SHA256).decode()
    # First the 256 bytes, in GPT-2's order, then one token for each merge.
    tokens = [bytes([b]) for b in CHAR_OF]
    for merge in merges.split('\n')[1:-1]:
        tokens.append(to_bytes(merge.replace(' ', '')))
    return Tokenizer('gpt2', tokens, tags)
