"""GPT-2's byte-level BPE, through tiktoken, with our six tags as tokens of their own.

    python -c "from core import tokenizer; print(tokenizer.load('gpt2').encode('Hello'))"

Text is always encoded as ordinary text: it never produces <|endoftext|>, a tag or any other special
token. Source: Radford et al. 2019, https://github.com/openai/gpt-2/blob/master/src/encoder.py
"""
import hashlib
import json
from functools import cached_property
from pathlib import Path

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

# GPT-2's files write a byte as one character: itself where it is printable, else the next from
# U+0100 on.
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

    added: {special piece: id}. Text tokens have the ids that are left, in order. The six tags
    come last, if `tags`.
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
        """Ordinary text -> uint32 array of ids. ValueError for half a surrogate pair."""
        return self._bpe.encode_to_numpy(text, disallowed_special=())

    def encode_with_tags(self, text):
        """For text typed by whoever runs the script: special tokens in it count as such."""
        return self._bpe.encode_to_numpy(text, allowed_special='all')

    def decode_bytes(self, ids):
        """The bytes of the ids; special tokens as they are written."""
        return self._bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of the ids; U+FFFD where they end inside a character."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def with_tags(self, tags=True):
        """The same vocabulary with the six tags, or without."""
        return Tokenizer(self.name, self.tokens, tags, self.added)

    def tag_pieces(self):
        """{tag id: the ids of the tag's text as ordinary text}."""
        return {self.special[tag]: self.encode(tag).tolist() for tag in TAGS}

    @property
    def sha256(self):
        """Hash of everything but the tags: equal hashes mean equal ids for every text."""
        content = b''.join(b'%d:%b' % (len(token), token) for token in self.tokens)
        if self.added != {END_OF_TEXT: len(self.tokens)}:
            content += repr(sorted(self.added.items())).encode()
        return hashlib.sha256(content).hexdigest()

    def state(self):
        """What checkpoints and meta.json keep: GPT-2's own by name, any other one whole."""
        state = {'name': self.name, 'sha256': self.sha256, 'tags': self.tags, 'tokens': None}
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
    """The Tokenizer `name`: 'gpt2', or a folder or tokenizer.json in transformers' form."""
    if name != 'gpt2':
        return read_folder(Path(name), tags)
    with reading("GPT-2's vocabulary", 'Connect to the network once, or set TIKTOKEN_CACHE_DIR '
                                       'to a folder that has it.'):
        merges = read_file_cached(GPT2_MERGES, GPT2_MERGES_SHA256).decode().split('\n')[1:-1]
    # First the 256 bytes, in GPT-2's order, then one token for each merge.
    tokens = [bytes([b]) for b in CHAR_OF]
    tokens += [to_bytes(merge.replace(' ', '')) for merge in merges]
    return Tokenizer('gpt2', tokens, tags)


def read_folder(path, tags):
    """The Tokenizer of a folder in transformers' form, or of a tokenizer.json."""
    with reading(path, 'Expected the vocabulary of a GPT-2: byte-level BPE.'):
        if path.is_dir() and not (path / 'tokenizer.json').exists():
            vocab = read_json(path / 'vocab.json')
            lines = (path / 'merges.txt').read_text('utf-8').split('\n')
            merges = [line for line in lines if line and line[:8] != '#version']
            extra = path / 'added_tokens.json'
            added = read_json(extra) if extra.exists() else {}
        else:
            content = read_json(path / 'tokenizer.json' if path.is_dir() else path)
            vocab = content['model']['vocab']
            merges = content['model']['merges']
            added = {token['content']: token['id'] for token in content['added_tokens']}
        if END_OF_TEXT in vocab:
            added.setdefault(END_OF_TEXT, vocab[END_OF_TEXT])
        # What is left besides special tokens is text, in the order of the ids.
        text = sorted(vocab.keys() - added.keys(), key=vocab.get)
        tokens = [to_bytes(token) for token in text]
        tags = tags or TAGS[0] in added
        added = {piece: i for piece, i in added.items() if piece not in TAGS}
        added.setdefault(END_OF_TEXT, len(text) + len(added))
        tokenizer = Tokenizer(path.name, tokens, tags, added)
        # A merge is 'a b', or ['a', 'b'].
        merged = [''.join(merge).replace(' ', '') for merge in merges]
        expected = sorted(CHAR_OF.values()) + list(dict.fromkeys(merged))
        in_order = sorted(text[:256]) + text[256:] == expected
        if not in_order or tokenizer.text_ids != [vocab[token] for token in text]:
            raise ValueError('the ids are not in the order of merging, without gaps')
        if tokenizer.with_tags().vocab_size > 2 ** 16:
            raise ValueError('more tokens than 16 bits can count')
    return tokenizer


def read_json(path):
    """The content of a JSON file."""
    return json.loads(path.read_text('utf-8'))
