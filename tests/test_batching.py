"""Continuous batching: whoever else is there, an answer is what it would be alone."""
import pytest
import torch

from conftest import VOCAB_SIZE, tiny
from core.generate import KVCache, Sampling, generate
from web import slots
from web.batching import Batch, Request, Worker

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope='module')
def model():
    """A small untrained model of 256 positions, its embeddings large enough for varied answers."""
    model = tiny(block_size=256)
    with torch.no_grad():
        model.transformer.wte.weight *= 30
    return model


def prompt(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist()


def ask(ids, n, sampling=GREEDY, **more):
    """A Request that keeps why it ended, which alone is delivered without an id."""
    def deliver(ids, finish):
        request.finish = finish
    request = Request(ids, n, deliver, sampling, **more)
    return request


def alone(model, request):
    """The tokens that core.generate writes for the request."""
    ids, n = request.prompt, request.max_new_tokens
    return [step[0] for step in generate(model, [ids], n, request.sampling, seed=request.seed)]


@torch.inference_mode()
def run(batch, *requests, rounds=1000):
    """Let the batch answer the requests, in no more rounds than these."""
    batch.waiting.extend(requests)
    while rounds and (batch.waiting or batch.busy):
        rounds -= 1
        batch.round()


def test_answers_written_together_are_those_written_alone(model, monkeypatch):
    monkeypatch.setattr(slots, 'GROWTH', 32)
    requests = []
    for n in (3, 17, 40, 5, 200, 1, 9):
        sampling = Sampling(0.9 * (n != 17), 20 * (n % 3), 1 - 0.1 * (n % 2), repetition_penalty=n)
        requests.append(ask(prompt(n, n), 10 + n % 7, sampling, seed=n))
    batch = Batch(model, size=3, remember=0)
    run(batch, *requests)
    longer = ask(prompt(20), 236)  # with fewer rows than the store has, and more positions
    run(batch, longer)
    for request in (*requests, longer):
        assert (request.written, request.finish) == (alone(model, request), 'length')
    assert batch.slots.lengths == []


def test_an_answer_ends_at_a_stop_at_its_length_and_where_the_window_is_full(model):
    found = alone(model, ask(prompt(250), 20))
    assert len(found) == 7  # at positions 250 to 255, and the token after the last
    stopped = found[:found.index(found[4])]
    for n, stops, expected in ((20, (), (found, 'length')), (3, (), (found[:3], 'length')),
                               (20, {found[4]}, (stopped, 'stop'))):
        request = ask(prompt(250), n, stops=stops)
        run(Batch(model), request)
        assert (request.written, request.finish) == expected


def test_frequency_and_presence_count_the_answer_only(model):
    batch = Batch(model)
    logits = torch.zeros(4)
    logits[2] = 1.0
    for written, expected in (([], True), ([2], True), ([2, 2], False)):
        request = ask([2, 2, 2], 9, frequency_penalty=0.4, presence_penalty=0.3)
        request.written = list(written)
        batch.write(request, logits, 3)
        # 1 - 0.4 - 0.3 > 0, and 1 - 0.8 - 0.3 < 0
        assert (request.written[-1] == 2) == expected
    assert logits[2] == 1  # not changed in place


def test_a_place_is_free_when_a_client_has_gone_and_the_queue_is_limited(model):
    batch = Batch(model, size=1, queue=1)
    worker = Worker([batch])
    gone, never, last = ask(prompt(3), 200), ask(prompt(5), 2), ask(prompt(4), 9)
    assert [worker.submit(batch, one) for one in (gone, never, last)] == [True, True, False]
    run(batch, rounds=3)
    gone.ended = never.ended = True
    run(batch, last)
    assert (len(gone.written), len(never.written), len(last.written)) == (4, 0, 9)


def test_the_next_turn_of_a_chat_reads_only_what_is_new(model):
    batch = Batch(model, remember=2)
    first = ask(prompt(30), 6)
    run(batch, first)
    ids = first.prompt + first.written + prompt(8, 1)
    second, again, other = ask(ids, 6), ask(ids, 6), ask(prompt(9, 2), 1)
    for request in (second, again, other):
        run(batch, request)
    # The last token of an answer is chosen and never read; the last one of a prompt always is.
    assert [request.n_remembered for request in (first, second, again, other)] == [0, 35, 43, 0]
    assert second.written == again.written == alone(model, second)
    assert len(batch.memory) == 2


@pytest.mark.parametrize('at', [KVCache, slots.Slots])  # reading, writing
def test_the_server_goes_on_after_a_step_that_fails(model, monkeypatch, capsys, at):
    batch = Batch(model, size=1)
    worker = Worker([batch])
    ends = []

    def fail_once(*_):
        monkeypatch.undo()
        raise MemoryError

    def deliver(ids, finish):
        if finish:
            ends.append(finish)
        if len(ends) == 2:
            worker.stop()
    monkeypatch.setattr(at, 'step', fail_once)
    for _ in range(2):
        worker.submit(batch, Request(prompt(3), 5, deliver, GREEDY))
    worker.run()
    assert ends == ['error', 'length']
    assert 'MemoryError' in capsys.readouterr().err
