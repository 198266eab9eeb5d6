"""Continuous batching: whoever else is there, an answer is what it would be alone."""
import threading
import time

import pytest
import torch

from web.batching import PIECE, Batch, Full, Request, Worker
from core.generate import KVCache, generate, prepare
from model import GPT, GPTConfig


@pytest.fixture(scope='module')
def tiny():
    """A small untrained model of 256 positions, its embeddings large enough for varied answers."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=256, vocab_size=90)).eval()
    with torch.no_grad():
        model.transformer.wte.weight *= 30
    return model


def prompt(n, seed=0):
    return torch.randint(0, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, ids, n, seed=0, **how):
    """The tokens that decoding.generate gives."""
    return [tokens[0] for tokens in generate(model, [ids], n, seed=seed, **how)]


class Asked:
    """A Request and what was delivered for it."""

    def __init__(self, ids, n, **how):
        self.events = []
        self.request = Request(ids, n, lambda token, finish: self.events.append((token, finish)), **how)

    @property
    def tokens(self):
        return [token for token, _ in self.events if token is not None]

    @property
    def finish(self):
        return self.events[-1][1] if self.events else None


def finish(batch, asked, rounds=1000):
    """Do rounds until all asked have ended."""
    with torch.inference_mode():
        for _ in range(rounds):
            if all(one.finish or one.request.cancelled for one in asked):
                return
            batch.sweep()
            batch.round()
    raise AssertionError([one.events[-3:] for one in asked])


def test_answers_written_together_are_those_written_alone(tiny):
    batch = Batch(tiny, size=3, remember=0)
    asked = [Asked(prompt(n, n), 10 + n % 7, temperature=0.0 if n % 2 else 0.9, top_k=20 * (n % 3), top_p=1 - 0.1 * (n % 2), seed=n)
             for n in (3, 17, 40, 5, 200, 1, 9)]
    for one in asked:
        batch.waiting.append(one.request)
    finish(batch, asked)
    for one in asked:
        r = one.request
        assert one.tokens == alone(tiny, r.prompt, r.max_new_tokens, r.seed, temperature=r.temperature, top_k=r.top_k, top_p=r.top_p)
        assert one.finish == 'length'
    assert batch.busy == 0 and len(batch.slots.lengths) == 0


def test_one_joins_while_another_writes_and_its_prompt_is_read_in_pieces(tiny):
    batch = Batch(tiny, remember=0)
    first, second = Asked(prompt(4), 30, temperature=0.0), Asked(prompt(PIECE + 60, 1), 5, temperature=0.0)
    with torch.inference_mode():
        batch.waiting.append(first.request)
        batch.round()
        batch.waiting.append(second.request)
        before = len(first.tokens)
        batch.round()
        assert len(first.tokens) == before + 1 and batch.reading and not second.events  # one piece: the first goes on
        batch.round()
        assert len(first.tokens) == before + 2 and second.tokens
    finish(batch, [first, second])
    assert first.tokens == alone(tiny, first.request.prompt, 30, temperature=0.0)
    assert second.tokens == alone(tiny, second.request.prompt, 5, temperature=0.0)


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(tiny):
    ids = torch.tensor([prompt(50)])
    with torch.inference_mode():
        whole = KVCache(tiny, 1, 50).step(tiny, ids)
        cache = KVCache(tiny, 1, 50)
        for start, end in ((0, 7), (7, 8), (8, 40), (40, 50)):
            logits = cache.step(tiny, ids[:, start:end])
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def test_an_answer_ends_at_a_stop_at_its_length_and_where_the_window_is_full(tiny):
    ids = prompt(250)
    found = alone(tiny, ids, 20, temperature=0.0)
    assert len(found) == 7  # positions 250 to 255, and the token after the last
    batch = Batch(tiny)
    full, short, stopped = (Asked(ids, 20, temperature=0.0), Asked(ids, 3, temperature=0.0),
                            Asked(ids, 20, temperature=0.0, stops={found[4]}))
    batch.waiting += [full.request, short.request, stopped.request]
    finish(batch, [full, short, stopped])
    assert (full.tokens, full.finish) == (found, 'length')
    assert (short.tokens, short.finish) == (found[:3], 'length')
    assert (stopped.tokens, stopped.finish) == (found[:found.index(found[4])], 'stop')


def test_who_has_gone_leaves_the_place_free(tiny):
    batch = Batch(tiny, size=1)
    gone, waits, never = Asked(prompt(3), 200), Asked(prompt(4), 2), Asked(prompt(5), 2)
    batch.waiting += [gone.request, never.request, waits.request]
    with torch.inference_mode():
        batch.round()
        n = len(gone.events)
        gone.request.cancelled = never.request.cancelled = True
        batch.sweep()
        batch.round()
    assert len(gone.events) == n and waits.tokens and not never.events


def test_one_whose_time_is_up_is_told_wherever_it_is(tiny):
    batch = Batch(tiny, size=1)
    past = time.monotonic() - 1
    waiting, writing = Asked(prompt(3), 9, deadline=past), Asked(prompt(3), 9)
    batch.waiting.append(writing.request)
    with torch.inference_mode():
        batch.round()
        writing.request.deadline = past
        batch.waiting.append(waiting.request)
        batch.sweep()
        batch.round()
    assert waiting.events == [(None, 'time')] and writing.events[-1] == (None, 'time') and batch.busy == 0


def test_the_next_turn_of_a_chat_reads_only_what_is_new(tiny):
    batch = Batch(tiny, remember=2)
    first = Asked(prompt(30), 6, temperature=0.0)
    batch.waiting.append(first.request)
    finish(batch, [first])
    ids = first.request.prompt + first.tokens + prompt(8, 1)
    second, again, other = Asked(ids, 6, temperature=0.0), Asked(ids, 6, temperature=0.0), Asked(prompt(9, 2), 1)
    for one in (second, again, other):
        batch.waiting.append(one.request)
        finish(batch, [one])
    # of the first text the last token was chosen and never fed; of the same prompt all but its last are there
    assert [one.request.n_remembered for one in (first, second, again)] == [0, 35, 43]
    assert second.tokens == again.tokens == alone(tiny, ids, 6, temperature=0.0)
    assert len(batch.memory.texts) == 2
    assert other.request.n_remembered == 0


def test_a_thread_that_starts_after_prepare_has_all_of_torchs_threads():
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        prepare(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=90)), 'cpu')
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]


def test_a_store_that_grows_keeps_what_is_in_it(tiny):
    batch = Batch(tiny, size=20, remember=0)
    asked = [Asked(prompt(1 + i, i), 100, temperature=0.0) for i in range(20)]
    batch.waiting += [one.request for one in asked]
    finish(batch, asked)
    assert all(one.tokens == alone(tiny, one.request.prompt, 100, temperature=0.0) for one in asked)


def test_the_worker_refuses_more_than_may_wait(tiny):
    batch = Batch(tiny, size=1, queue=1)
    worker = Worker([batch])
    one, two = (Request(prompt(3), 2, lambda token, finish: None) for _ in range(2))
    worker.submit(batch, [one, two])
    with pytest.raises(Full):
        worker.submit(batch, [one])


@pytest.mark.parametrize('at', ['while reading', 'while writing'])
def test_a_failure_is_told_and_the_next_request_is_answered(tiny, monkeypatch, capsys, at):
    batch, events, done = Batch(tiny, size=1), [], threading.Event()
    worker = Worker([batch])

    def deliver(token, finish):
        events.append(finish)
        if finish:
            done.set()
    with monkeypatch.context() as patch:
        patch.setattr(*((batch, 'write') if at == 'while reading' else (batch.slots, 'step')), lambda *_: 1 / 0)
        worker.submit(batch, [Request(prompt(3), 5, deliver)])
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        assert done.wait(10) and events[-1] == 'error' and events.count('error') == 1
    done.clear()
    worker.submit(batch, [Request(prompt(3), 5, deliver, top_p=1e-300)])
    assert done.wait(10) and events[-1] == 'length'
    assert 'ZeroDivisionError' in capsys.readouterr().err
    worker.stop()
    thread.join(10)
    assert not thread.is_alive()
