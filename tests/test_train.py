"""train.py: exact steps, when a run ends, what it writes, and the mistakes a person makes."""
import math
import os
from unittest import mock

import pytest
import torch

import train
from conftest import SMALL, assert_near, assert_same_bits, log_of, one_line, resume, run
from core import checkpoint, rows
from core.trainer import learning_rate

pytestmark = pytest.mark.usefixtures('no_pictures')


def test_the_loss_falls_from_ln_V_and_the_folder_holds_what_it_should(data, tmp_path, monkeypatch):
    monkeypatch.undo()  # with a picture
    saved = run(data, tmp_path, max_iters=40, lr_decay_iters=40, eval_interval=20)
    found = log_of(tmp_path)
    first = float(found[0]['val_loss'])
    last = float(found[-1]['val_loss'])
    assert abs(first - math.log(307)) < 0.15 and last < 0.7 * first, (first, last)
    assert [int(row['step']) for row in found if row['val_loss']] == [0, 20, 40]
    files = ['.lock', 'best.pt', 'ckpt.pt', 'log.csv', 'loss.png']
    assert sorted(os.listdir(tmp_path)) == files
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert saved.step == 40 and saved.template == 'xml'
    assert all(name.startswith('transformer.') for name in saved.model)
    assert saved.optimizer and not checkpoint.load(tmp_path / 'best.pt').optimizer


# ---- steps ----

def test_a_step_is_the_mean_over_all_its_supervised_tokens(data, tmp_path):
    """Micro-batches of one row equal one of four: the mean of their means would not."""
    for batch_size, n in ((4, 1), (1, 4)):
        run(data, tmp_path / str(n), batch_size=batch_size, gradient_accumulation_steps=n,
            dropout=0.0, log_interval=1)
    assert_near(tmp_path / '1', tmp_path / '4')


def test_evaluating_and_watching_answers_change_no_bit(data, whole, tmp_path, capsys):
    saved = run(data, tmp_path, **SMALL | {'eval_interval': 1000}, sample_every=5,
                sample_prompt='what is red')
    said = [line for line in capsys.readouterr().out.split('\n') if 'what is red -> ' in line]
    assert len(said) == 2 and said[0].startswith('step 5/12')
    other = checkpoint.load(whole / 'ckpt.pt')  # evaluated more often
    assert_same_bits([saved.model, saved.optimizer], [other.model, other.optimizer])


def test_an_epoch_sees_every_conversation_once(data, tmp_path, monkeypatch):
    spy = mock.Mock(wraps=rows.make_batch)
    monkeypatch.setattr(rows, 'make_batch', spy)
    # 27 rows in steps of 6: the last step begins the next epoch.
    assert run(data, tmp_path, epochs=1.0, batch_size=3, max_iters=1000).step == 5
    seen = []
    for split, conversations in (call.args for call in spy.call_args_list):
        if split.name == 'train':
            seen.extend(conversations)
    assert sorted(seen[:61]) == list(range(61))


def test_the_norm_of_the_gradient_is_logged_clipped_or_not(data, tmp_path):
    """grad_clip=0 does not clip."""
    models = []
    norms = set()
    for clip in (0, 1e9, 1e-3):
        saved = run(data, tmp_path, max_iters=2, grad_clip=clip, overwrite=True)
        models.append(saved.model['transformer.wpe.weight'])
        norms.add(log_of(tmp_path)[1]['grad_norm'])
    assert len(norms) == 1 and 0.1 < float(norms.pop()) < 10
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_the_learning_rate_rises_and_falls():
    config = train.Config(learning_rate=1.0, warmup_iters=4, lr_decay_iters=14, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert abs(rates[9] - 0.55) < 1e-9
    assert rates[14:] == [0.1] * 6
    assert learning_rate(train.Config(decay_lr=False, learning_rate=2.0), 500) == 2.0


# ---- how it begins and ends ----

def test_patience_ends_a_run_that_no_longer_improves(data, tmp_path):
    saved = run(data, tmp_path, max_iters=50, eval_interval=1, patience=2, learning_rate=0.0)
    assert saved.step == 2  # two evaluations without a better loss than before the first step


def test_without_validation_data_it_trains_and_saves(data, tmp_path):
    assert run(data, tmp_path, dataset='unvalidated', patience=1).step == 10
    assert not os.path.exists(tmp_path / 'best.pt')


def test_eval_only_prints_the_loss_and_writes_nothing(data, whole, capsys):
    before = {path: path.stat() for path in whole.iterdir()}
    resume(whole, eval_only=True)
    expected = log_of(whole)[-1]['val_loss']
    assert capsys.readouterr().out == f'val_loss {float(expected):.4f}\n'
    assert {path: path.stat() for path in whole.iterdir()} == before


def test_a_tuned_model_can_be_tuned_further(data, whole, tmp_path):
    """init_from=FOLDER takes the weights of a run, and nothing else of it."""
    saved = run(data, tmp_path, init_from=whole, max_iters=1, learning_rate=0.0)
    assert saved.step == 1
    assert_same_bits(saved.model, checkpoint.load(whole / 'ckpt.pt').model)


def test_a_pretrained_folder_gets_the_tags_and_trains(data, tmp_path):
    """A folder in transformers' form with the data's vocabulary, but without its tags."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=301)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'model')
    keys = {'init_from': tmp_path / 'model', 'max_iters': 1}
    assert run(data, tmp_path / 'out', **keys).model_args['vocab_size'] == 307
    with one_line('block_size=65 exceeds the 64 positions'):
        run(data, tmp_path / 'new', **keys, block_size=65)


@pytest.mark.parametrize('changes, said', [
    ({'dataset': 'nothing'}, 'nothing/meta.json not found'),
    ({'init_from': 'gpt 5'}, 'gpt 5 is not a folder here'),
    ({'init_from': 'resume'}, 'ckpt.pt not found. Expected a checkpoint. Train one'),
    ({'dataset': 'colours,alien'}, 'were prepared with different vocabularies'),
    ({'dataset': 'unvalidated', 'eval_only': True}, 'unvalidated has no validation data'),
    ({'block_size': 4}, 'nothing to learn in train: of 61 conversations, 61 are longer'),
    ({'device': 'mps' if torch.cuda.is_available() else 'cuda:7'}, 'is not on this machine'),
    ({'dtype': 'float16'}, 'needs a CUDA device'),
    ({'n_embd': 33}, 'n_embd=33 is not a multiple of n_head=2')])
def test_a_mistake_gets_one_line(data, tmp_path, changes, said):
    with one_line(said):
        run(data, tmp_path / 'out', **changes)
    assert not list(tmp_path.glob('out/*.pt'))
