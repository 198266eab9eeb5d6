"""Continuous batching: whoever else is there, an answer is what it would be alone."""
import queue
import threading

import pytest
import torch

from core.decoding_weights import prepare
from core.generate import KVCache, Sampling, generate
from model import GPT, GPTConfig
from web import batching, slots
from web.batching import PIECE, Batch, Request, Worker

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope='module')
def tiny():
    """A small untrained model of 256 positions, its embeddings large enough for varied answers."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=256, vocab_size=90)).eval()
    with torch.no_grad():
        model.transformer.wte.weight *= 30
    return model


def prompt(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 90, (n,), generator=generator).tolist()


def ask(ids, n, **how):
    """A Request that keeps what is delivered for it."""
    request = Request(ids, n, None, **{'sampling': GREEDY, **how})
    request.events = []
    request.deliver = lambda ids, finish: request.events.append((ids, finish))
    return request


def tokens(request):
    return [token for ids, _ in request.events for token in ids]


def finish(request):
    return request.events[-1][1]


def alone(model, request):
    """The tokens that core.generate writes for the request."""
    found = generate(model, [request.prompt], request.max_new_tokens, request.sampling,
                     seed=request.seed)
    return [step[0] for step in found]


@torch.inference_mode()
def run(batch, *requests):
    """Let the batch answer the requests."""
    batch.waiting.extend(requests)
    for _ in range(1000):
        if all(request.ended for request in requests) and not batch.busy:
            return
        batch.round()
    raise AssertionError([request.events[-3:] for request in requests])


@torch.inference_mode()
def a_round(batch, *requests):
    batch.waiting.extend(requests)
    batch.round()


def test_answers_written_together_are_those_written_alone(tiny):
    requests = []
    for n in (3, 17, 40, 5, 200, 1, 9):
        sampling = Sampling(0.9 * (n != 17), 20 * (n % 3), 1 - 0.1 * (n % 2), repetition_penalty=n)
        requests.append(ask(prompt(n, n), 10 + n % 7, sampling=sampling, seed=n))
    batch = Batch(tiny, size=3, remember=0)
    run(batch, *requests)
    for request in requests:
        assert tokens(request) == alone(tiny, request) and finish(request) == 'length'
    assert batch.slots.lengths == []


def test_a_store_that_grows_keeps_what_is_in_it(tiny, monkeypatch):
    monkeypatch.setattr(slots, 'GROWTH', 32)
    batch = Batch(tiny, size=20, remember=0)
    requests = [ask(prompt(1 + i, i), 20) for i in range(20)]
    run(batch, *requests)
    longer = ask(prompt(20), 236)  # with fewer rows than the store has, and more positions
    run(batch, longer)
    for request in (*requests, longer):
        assert tokens(request) == alone(tiny, request)


def test_a_prompt_is_read_in_pieces_while_another_answer_goes_on(tiny):
    batch = Batch(tiny, remember=0)
    first = ask(prompt(4), 30)
    second = ask(prompt(PIECE + 60, 1), 5)
    a_round(batch, first)
    n = len(first.events)
    a_round(batch, second)
    assert len(first.events) == n + 1 and batch.reading and not second.events
    a_round(batch)
    assert len(first.events) == n + 2 and second.events
    run(batch)
    for request in (first, second):
        assert tokens(request) == alone(tiny, request)


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(tiny):
    ids = torch.tensor([prompt(50)])
    with torch.inference_mode():
        whole = KVCache(tiny, 1, 50).step(tiny, ids)
        cache = KVCache(tiny, 1, 50)
        for start, end in ((0, 7), (7, 8), (8, 40), (40, 50)):
            logits = cache.step(tiny, ids[:, start:end])
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def test_an_answer_ends_at_a_stop_at_its_length_and_where_the_window_is_full(tiny):
    full = ask(prompt(250), 20)
    found = alone(tiny, full)
    assert len(found) == 7  # at positions 250 to 255, and the token after the last
    short = ask(prompt(250), 3)
    stopped = ask(prompt(250), 20, stops={found[4]})
    run(Batch(tiny), full, short, stopped)
    assert (tokens(full), finish(full)) == (found, 'length')
    assert (tokens(short), finish(short)) == (found[:3], 'length')
    assert (tokens(stopped), finish(stopped)) == (found[:found.index(found[4])], 'stop')


def test_a_place_is_free_when_a_client_has_gone_or_the_server_closes(tiny):
    batch = Batch(tiny, size=1)
    worker = Worker([batch])
    gone, never, last = ask(prompt(3), 200), ask(prompt(5), 2), ask(prompt(4), 200)
    waiting = ask(prompt(4), 2)
    a_round(batch, gone, never, last)
    n = len(gone.events)
    gone.ended = never.ended = True
    a_round(batch, waiting)
    assert len(gone.events) == n and never.events == [] and last.events
    worker.end_all()
    run(batch)
    assert finish(last) == 'closing' and waiting.events == [([], 'closing')]


def test_the_next_turn_of_a_chat_reads_only_what_is_new(tiny):
    batch = Batch(tiny, remember=2)
    first = ask(prompt(30), 6)
    run(batch, first)
    ids = first.prompt + tokens(first) + prompt(8, 1)
    second, again, other = ask(ids, 6), ask(ids, 6), ask(prompt(9, 2), 1)
    for request in (second, again, other):
        run(batch, request)
    # The last token of an answer is chosen and never read; the last one of a prompt always is.
    assert [request.n_remembered for request in (first, second, again, other)] == [0, 35, 43, 0]
    assert tokens(second) == tokens(again) == alone(tiny, second)
    assert len(batch.memory.texts) == 2


def test_a_thread_that_starts_after_prepare_has_all_of_torchs_threads():
    before = torch.get_num_threads()
    found = []
    torch.set_num_threads(3)
    try:
        prepare(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=90)), 'cpu')
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]


def test_as_many_wait_as_may_and_one_that_has_gone_does_not(tiny):
    batch = Batch(tiny, size=1, queue=1)
    worker = Worker([batch])
    first, second = ask(prompt(3), 250), ask(prompt(3), 2)
    worker.submit(batch, first)
    worker.submit(batch, second)
    with pytest.raises(queue.Full):
        worker.submit(batch, ask(prompt(3), 2))
    second.ended = True
    first.deliver = lambda ids, finish: batch.waiting or worker.stop()
    worker.run()
    assert not first.ended


def test_an_answer_that_fails_ends_no_other(tiny, monkeypatch, capsys):
    real = batching.choose

    def choose(logits, sampling, *arguments):
        if sampling.temperature == 2 and len(bad.written) == 2 or sampling.temperature == 1:
            raise RuntimeError('probability tensor contains inf')
        return real(logits, sampling, *arguments)
    monkeypatch.setattr(batching, 'choose', choose)
    good = ask(prompt(3), 9)
    bad = ask(prompt(4), 9, sampling=Sampling(2))
    bad_at_once = ask(prompt(5), 9, sampling=Sampling(1))
    run(Batch(tiny), good, bad, bad_at_once)
    assert tokens(good) == alone(tiny, good) and finish(good) == 'length'
    assert len(tokens(bad)) == 2 and finish(bad) == 'error'
    assert bad_at_once.events == [([], 'error')]
    assert 'RuntimeError' in capsys.readouterr().err


@pytest.mark.parametrize('at', ['reading', 'writing'])
def test_the_server_goes_on_after_a_step_that_fails(tiny, monkeypatch, capsys, at):
    batch = Batch(tiny, size=1)
    worker = Worker([batch])
    thread = threading.Thread(target=worker.run, daemon=True)
    ends = queue.Queue()
    failing = Request(prompt(3), 5, lambda ids, finish: finish and ends.put(finish), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(KVCache if at == 'reading' else batch.slots, 'step', lambda *_: 1 / 0)
        worker.submit(batch, failing)
        thread.start()
        assert ends.get(timeout=10) == 'error'
    worker.submit(batch, Request(prompt(3), 5, failing.deliver, GREEDY))
    assert ends.get(timeout=10) == 'length'
    assert 'ZeroDivisionError' in capsys.readouterr().err
    worker.stop()
    thread.join(10)
    assert not thread.is_alive() and ends.empty()
