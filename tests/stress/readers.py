"""The targets that read what this repository has written, or a stranger: checkpoints, token files, vocabularies.

    python -c "from stress import readers; readers.Checkpoint().check(b'\\x00PK')"
"""
import io
import json
import zipfile

import numpy as np
import torch

from core import checkpoint
import configurator
from core import tokenfile
from core import tokenizer as tokenizers
import train
from configurator import UserError
from core.conversation import TEMPLATES, Turn, encode
from core.generate import generate
from model import GPT, GPTConfig
from stress.targets import TOKENS, Target, change_bytes, spoil
from core.tokenizer import Tokenizer


class Checkpoint(Target):
    """A checkpoint of any bytes, or with any value in it: a model that answers, or a line."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=4, block_size=8, vocab_size=self.tokenizer.vocab_size))
        config = configurator.as_dict(train.Config(n_layer=1, n_head=2, n_embd=4, block_size=8))
        self.contents = checkpoint.pack(model, self.tokenizer, 'xml', config, 3, 1.5, data=['x'], best=1.5)
        file = io.BytesIO()
        torch.save(self.contents, file)
        self.whole = file.getvalue()
        with zipfile.ZipFile(file) as parts:
            self.parts = {name: parts.read(name) for name in parts.namelist()}
        self.pickle = next(name for name in self.parts if name.endswith('data.pkl'))
        self.seeds += [b'\0' + self.whole, b'\1\0' + self.parts[self.pickle]]

    def file(self, c):
        """The bytes of a checkpoint: any; its pickle any; some bytes changed; some value another."""
        how = c.number(4)
        if how == 0:
            return c.rest()
        if how == 2:
            return change_bytes(self.whole, c)
        file = io.BytesIO()
        if how == 3:
            contents = {**self.contents, 'model': dict(self.contents['model'])}
            for _ in range(1 + c.number(3)):
                contents = spoil(contents, c)
            torch.save(contents, file)
            return file.getvalue()
        data = change_bytes(self.parts[self.pickle], c) if c.number(2) else c.rest()
        with zipfile.ZipFile(file, 'w') as parts:
            for name, part in self.parts.items():
                parts.writestr(name, data if name == self.pickle else part)
        return file.getvalue()

    def run(self, c):
        """Open it as sample.py and as train.py --init_from=resume do."""
        self.write('ckpt.pt', self.file(c))
        opened = checkpoint.open_model('resume', self.folder)
        assert opened.template in TEMPLATES and str(opened.description)
        model = opened.model.to('cpu', torch.float32).eval()
        next(iter(generate(model, [[opened.tokenizer.end_of_text]], 1, temperature=0)))
        try:
            configurator.load(train.Config, [], {**opened.contents['config'], 'out_dir': 'x'})
        except UserError as error:
            assert str(error).strip()
        return True


class TokenFile(Target):
    """Token files and meta.json of any bytes: conversations of ids that the vocabulary has, or a line."""

    def __init__(self):
        super().__init__()
        turns = [[Turn('user', 'x' * n), Turn('assistant', 'y' * n)] for n in range(4)]
        with tokenfile.Writer(self.path('new'), ('train', 'val')) as writer:
            for conversation in turns:
                ids, mask, _ = encode(conversation, self.tokenizer)
                writer.add('train', ids, mask, [len(ids)])
            writer.finish({'template': 'xml', 'tokenizer': self.tokenizer.state(), 'source': {'name': 'x'}, 'seen': 4, 'kept': 4,
                           'dropped': {'language': 0}, 'options': {}})
        self.files = {}
        for name in [split + ending for split in ('train', 'val') for ending in tokenfile.DTYPES] + ['meta.json']:
            with open(self.path('new', name), 'rb') as file:
                self.files[name] = file.read()
        self.seeds += [bytes([0, i]) + data for i, data in enumerate(self.files.values())]

    def run(self, c):
        """Open the train split as train.py does, and make its batches."""
        how, files = c.number(4), dict(self.files)
        if how == 3:
            meta = json.loads(files['meta.json'])
            for _ in range(1 + c.number(3)):
                meta = spoil(meta, c)
            files['meta.json'] = json.dumps(meta).encode()
        else:
            name = c.of(list(files))
            if how == 0:
                files[name] = c.rest()
            elif how == 1:
                files[name] = change_bytes(files[name], c)
            else:  # as long as it was
                at = c.number(256) % max(1, len(files[name]))
                files[name] = (files[name][:at] + c.rest() + files[name][at:][len(c.rest()):])[:len(files[name])]
        for name, data in files.items():
            self.write(name, data)
        bpe = tokenizers.from_state({**tokenfile.read_meta(self.folder)['tokenizer'], 'tags': True})
        split = tokenfile.Split([self.folder], 'train', vocab_size=bpe.vocab_size)
        assert split.lengths.sum() == sum(len(split[i][0]) for i in range(len(split)))
        for batch in tokenfile.Rows(split, 64, seed=1).batches(2):
            assert len(batch.idx) == len(batch.positions) == sum(n * length for n, length in batch.runs)
            assert max(batch.idx.max(), batch.targets.max()) < bpe.vocab_size
        tokenfile.fingerprint(self.folder)
        return True


class Vocabulary(Target):
    """tokenizer.json, vocab.json with merges.txt, and the state in a checkpoint: a vocabulary that works, or a line."""

    def __init__(self):
        super().__init__()
        texts = [tokenizers.to_unicode(token) for token in TOKENS]
        merges = [[text[:1], text[1:]] if len(text) == 2 else [text[:-1], text[-1:]] for text in texts[256:]]
        self.json = {'version': '1.0', 'model': {'type': 'BPE', 'vocab': {text: i for i, text in enumerate(texts)}, 'merges': merges}}
        self.state = self.tokenizer.state()
        self.seeds += [b'\0' + json.dumps(self.json).encode(), b'\1' + json.dumps(self.state).encode()]

    def run(self, c):
        """A tokenizer, and a text there and back."""
        how = c.number(4)
        value = [self.json, self.state][how % 2]
        for _ in range(1 + c.number(3) if how > 1 else 0):
            value = spoil(value, c)
        data = c.rest() if how < 2 else json.dumps(value).encode()
        if how % 2:
            try:
                state = json.loads(data)
            except (ValueError, RecursionError):
                return False
            bpe = tokenizers.from_state(state)
        else:
            if how == 2 and c.number(2) and isinstance(value, dict) and isinstance(value.get('model'), dict):
                self.write('vocab.json', json.dumps(value['model'].get('vocab')).encode())
                merges = value['model'].get('merges')
                data = '\n'.join(' '.join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges) if isinstance(merges, list) else 'x'
                self.write('merges.txt', data.encode('utf-8', 'surrogatepass'))
                bpe = tokenizers.load(self.folder)
            else:
                bpe = tokenizers.load(self.write('other.json', data))
        text = 'the user\'s é 🙂\0</user> ' + ''.join(map(chr, range(256)))
        ids = bpe.encode(text)
        assert bpe.decode(ids.tolist()) == text and ids.max() < bpe.end_of_text < bpe.vocab_size < 2 ** 16
        assert len(bpe.special) == (7 if bpe.tags else 1)
        np.asarray(ids, np.uint16)
        return True
