"""Checkpoints and model files: whole or not at all, and nothing in them is ever run."""
import io
import os
import pickle

import numpy as np
import pytest
import torch

from core import checkpoint
from core import tokenfile
from core import tokenizer
from configurator import UserError
from model import GPT, GPTConfig
from core.tokenizer import Tokenizer

TOKENS = [bytes([b]) for b in range(256)] + [b'ab', b'abc']


def contents():
    torch.manual_seed(0)
    bpe = Tokenizer('tiny', TOKENS, tags=True)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=bpe.vocab_size))
    return checkpoint.pack(model, bpe, 'xml', {'seed': 1}, 7, 1.25, data=['x'])


def test_a_checkpoint_reads_back(tmp_path):
    saved = contents()
    checkpoint.save(saved, str(tmp_path / 'ckpt.pt'))
    opened = checkpoint.open_model('resume', str(tmp_path))
    assert opened.template == 'xml' and opened.tokenizer.tokens == TOKENS and opened.contents['step'] == 7
    assert 'step 7' in opened.description and '1.2500' in opened.description
    for name, p in opened.model.state_dict().items():
        assert torch.equal(p, saved['model'][name])
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_best_is_taken_where_there_is_one(tmp_path):
    checkpoint.save(contents(), str(tmp_path / 'ckpt.pt'))
    assert 'ckpt.pt' in checkpoint.open_model('resume', str(tmp_path), 'best').description
    checkpoint.save(contents(), str(tmp_path / 'best.pt'))
    assert 'best.pt' in checkpoint.open_model('resume', str(tmp_path), 'best').description
    assert 'ckpt.pt' in checkpoint.open_model('resume', str(tmp_path), 'last').description


def test_a_save_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(contents(), path)
    before = open(path, 'rb').read()

    def full(saved, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='No space left on device.*still is'):
        checkpoint.save(contents(), path)
    assert open(path, 'rb').read() == before and os.listdir(tmp_path) == ['ckpt.pt']


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize('write', ['torch', 'pickle'])
@pytest.mark.parametrize('name', ['ckpt.pt', 'pytorch_model.bin'])
def test_planted_code_is_refused_and_not_run(tmp_path, write, name):
    proof, path = str(tmp_path / 'ran'), tmp_path / name
    planted = {**contents(), 'step': Payload(proof)}
    if write == 'torch':
        torch.save(planted, path)
    else:
        path.write_bytes(pickle.dumps(planted['step']))
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 1}')
    with pytest.raises(UserError) as error:
        checkpoint.open_model('resume' if name == 'ckpt.pt' else str(tmp_path), str(tmp_path))
    assert 'safely' in str(error.value) and '\n' not in str(error.value)
    assert not os.path.exists(proof)


def test_planted_code_in_other_files_is_refused_and_not_run(tmp_path):
    """Token files and vocabularies are numbers and JSON: no pickle is ever looked for in them."""
    proof, bpe = str(tmp_path / 'ran'), Tokenizer('tiny', TOKENS, tags=True)
    npy = io.BytesIO()
    np.save(npy, np.array([Payload(proof)]), allow_pickle=True)
    names = [split + ending for split in ('train',) for ending in tokenfile.DTYPES]
    for name in (*names, 'meta.json', 'tokenizer.json', 'vocab.json', 'config.json', 'model.safetensors'):
        for i, planted in enumerate((pickle.dumps(Payload(proof)), pickle.dumps(Payload(proof), protocol=0), npy.getvalue())):
            folder = tmp_path / f'{name}-{i}'
            with tokenfile.Writer(str(folder), ('train',)) as writer:
                writer.add('train', [1, 2, 3, 4], [0, 1, 1, 0], [4])
                writer.finish({'template': 'xml', 'tokenizer': bpe.state()})
            (folder / 'merges.txt').write_text('')
            (folder / 'config.json').write_text('{"model_type": "gpt2"}')
            (folder / name).write_bytes(planted)
            with pytest.raises(UserError) as error:
                if name in (*names, 'meta.json'):
                    tokenfile.Split([str(folder)], 'train')
                elif name in ('tokenizer.json', 'vocab.json'):
                    tokenizer.load(str(folder))
                else:
                    checkpoint.open_model(str(folder))
            assert '\n' not in str(error.value) and not os.path.exists(proof), name
    with pytest.raises(FileExistsError):  # so it does run where somebody lets it
        os.mkdir(proof)
        pickle.loads(pickle.dumps(Payload(proof)))


@pytest.mark.parametrize('spoil, said', [
    (lambda c: c.pop('model'), 'missing model'), (lambda c: c.update(format_version=99), 'is of format 99, newer'),
    (lambda c: c['tokenizer'].update(sha256='0' * 64), 'hash'), (lambda c: c['model_args'].update(n_embd=8), 'does not fit'),
    (lambda c: c['model'].pop('transformer.wpe.weight'), 'does not fit'), (lambda c: c.update(tokenizer=3), 'wrong types of tokenizer'),
    (lambda c: c.update(val_loss=[]), 'wrong types of val_loss'), (lambda c: c.update(step='7'), 'wrong types of step'),  # by the fuzzer
    (lambda c: c['model_args'].update(n_head=0), 'does not fit'), (lambda c: c['model_args'].update(block_size=True), 'does not fit'),
    (lambda c: c['tokenizer'].update(tokens=['Ā', 'no such byte: ☃']), 'cannot be used'),
    (lambda c: c.update(template='ximl'), 'does not fit')])
def test_a_spoilt_checkpoint_is_refused_in_one_line(tmp_path, spoil, said):
    saved = contents()
    spoil(saved)
    torch.save(saved, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=said) as error:
        checkpoint.open_model('resume', str(tmp_path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('data', [b'', b'not a checkpoint', b'PK\x03\x04' + b'\0' * 100])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, data):
    (tmp_path / 'ckpt.pt').write_bytes(data)
    with pytest.raises(UserError, match='not a checkpoint') as error:
        checkpoint.open_model('resume', str(tmp_path))
    assert '\n' not in str(error.value)


def test_half_a_checkpoint_is_refused_in_one_line(tmp_path):
    checkpoint.save(contents(), str(tmp_path / 'ckpt.pt'))
    data = (tmp_path / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match='not a checkpoint'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('files, said', [
    ({}, 'config.json'), ({'config.json': '{'}, 'config.json'), ({'config.json': '[]'}, 'not a model folder'),
    ({'config.json': '{"model_type": "llama"}', 'model.safetensors': ''}, 'damaged'),
    ({'config.json': '{"model_type": "gpt2"}'}, 'neither model.safetensors nor')])
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as error:
        checkpoint.open_model(str(tmp_path))
    assert '\n' not in str(error.value)
