"""Continuous batching: the answers to several people, written together, each joining when it comes.

    python serve.py --init_from=out/oasst

A step of decoding reads every weight once, for one answer or for eight. So all that are being
written are fed their last tokens in one step; a new prompt is read in pieces between the steps, so
that the others go on, and joins when it is read; whoever is done leaves his place to the next.
Sources: Yu et al. 2022 (Orca), iteration-level scheduling; Agrawal et al. 2023,
https://arxiv.org/abs/2308.16369, prompts read in pieces.
"""
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import Callable

import torch

from core.generate import KVCache, choose

PIECE = 128  # tokens of prompts read between two steps of others
GROWTH = 256  # positions by which the store of keys and values grows


class Full(Exception):
    """As many requests wait as may."""


@dataclass
class Request:
    """An answer to write. deliver(token, finish) is called for each token, by another thread.

    The last call has finish 'stop', 'length', 'time' (the deadline came) or 'error', and token None
    where there is none. The token that stops an answer is not delivered.
    """
    prompt: list
    max_new_tokens: int
    deliver: Callable
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: set = frozenset()
    deadline: float = float('inf')  # on time.monotonic's clock
    cancelled: bool = False  # set by whoever asked and has gone; nothing is delivered from then on
    written: list = field(default_factory=list)  # the tokens of the answer so far
    n_remembered: int = 0  # positions of the prompt that did not have to be read
    times: list = field(default_factory=list)  # of the first and the last token, on time.monotonic's clock


class Slots(KVCache):
    """A KVCache that texts join and leave: those in it stand first in a store, which grows as needed."""

    def __init__(self, model):
        super().__init__(model, 0, 0)
        self.store = self.k, self.v

    def make_room(self, rows, positions):
        """Have a store of at least so many, and show the first `rows` of it."""
        n_layer, had_rows, n_head, had_positions, size = self.store[0].shape
        if rows > had_rows or positions > had_positions:
            shape = (n_layer, max(rows, min(2 * had_rows, rows + 8)), n_head,
                     max(had_positions, -(-positions // GROWTH) * GROWTH), size)
            # zeros: what is masked is multiplied by 0, which must not meet what was in the memory
            grown = tuple(old.new_zeros(shape) for old in self.store)
            for old, new in zip(self.store, grown):
                new[:, :had_rows, :, :had_positions] = old
            self.store = grown
        self.k, self.v = (part[:, :rows] for part in self.store)

    def join(self, part):
        """Take in the one text of another cache, as the last."""
        row, length = len(self.lengths), part.lengths[0]
        self.make_room(row + 1, length)
        self.k[:, row, :, :length], self.v[:, row, :, :length] = part.k[:, 0, :, :length], part.v[:, 0, :, :length]
        self.lengths.append(length)

    def leave(self, row):
        """Take the text out; the last one comes into its place."""
        length = self.lengths[row] = self.lengths[-1]
        if row < len(self.lengths) - 1:
            self.k[:, row, :, :length], self.v[:, row, :, :length] = self.k[:, -1, :, :length], self.v[:, -1, :, :length]
        self.lengths.pop()
        self.make_room(len(self.lengths), 0)

    def step(self, model, idx):
        """KVCache.step, with room for one more position."""
        self.make_room(len(self.lengths), max(self.lengths) + 1)
        return super().step(model, idx)


class Memory:
    """Keys and values of the texts that ended last: a chat's next prompt begins with one of them."""

    def __init__(self, n):
        self.texts = deque(maxlen=n)  # (ids, keys, values), each text's own copy

    def keep(self, ids, cache, row):
        """Remember a text whose ids are in the cache's row, in place of one that it goes on from."""
        if self.texts.maxlen:
            for text in [text for text in self.texts if ids[:len(text[0])] == text[0]]:
                self.texts.remove(text)
            self.texts.append((ids, *(part[:, row, :, :len(ids)].clone() for part in (cache.k, cache.v))))

    def fill(self, cache, prompt):
        """Put what is remembered of the prompt's beginning into an empty cache of one text; how many positions."""
        def common(ids):
            pairs = enumerate(zip(ids, prompt[:-1]))  # not the last: reading it gives the logits
            return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(prompt) - 1))
        n, keys, values = max(((common(ids), keys, values) for ids, keys, values in self.texts),
                              key=lambda found: found[0], default=(0, None, None))
        if n:
            cache.k[:, 0, :, :n], cache.v[:, 0, :, :n] = keys[:, :, :n], values[:, :, :n]
            cache.lengths = [n]
        return n


class Batch:
    """What one model is writing: at most `size` answers at a time, and at most `queue` requests that wait."""

    def __init__(self, model, size=8, queue=64, remember=4):
        self.model, self.size, self.queue, self.remember = model, size, queue, remember
        self.waiting = deque()  # another thread appends to it
        self.reset()

    def reset(self):
        """Begin anew, with nothing being written."""
        self.reading = None  # [Request, its KVCache], whose prompt is being read
        self.requests, self.slots, self.memory = [], Slots(self.model), Memory(self.remember)
        self.generators = []  # a request's own: what it draws does not depend on who else is there

    @property
    def busy(self):
        """How many have a place."""
        return len(self.requests) + bool(self.reading)

    def sweep(self):
        """Drop those that have waited too long, or that nobody waits for."""
        for request in [request for request in self.waiting if self.is_over(request)]:
            self.waiting.remove(request)

    def round(self):
        """Read some of the prompts that wait, then write one token of every answer."""
        for row in reversed(range(len(self.requests))):
            if self.is_over(self.requests[row]):
                self.leave(row)
        budget = PIECE if self.requests else self.model.config.block_size
        while budget > 0 and len(self.requests) < self.size and (self.reading or self.waiting):
            budget -= self.read(budget)
        if self.requests:
            idx = torch.tensor([[request.written[-1]] for request in self.requests], device=self.model.device)
            logits = self.slots.step(self.model, idx)
            for row in reversed(range(len(self.requests))):
                if self.write(self.requests[row], self.generators[row], logits[row], self.slots.lengths[row]):
                    self.leave(row)

    def read(self, n):
        """Read up to n tokens of the prompt whose turn it is; how many."""
        self.reading = self.reading or [self.waiting.popleft(), None]
        request, cache = self.reading
        if self.is_over(request):
            self.reading = None
            return 0
        if not cache:
            cache = self.reading[1] = KVCache(self.model, 1, len(request.prompt))
            request.n_remembered = self.memory.fill(cache, request.prompt)
        piece = request.prompt[cache.lengths[0]:][:n]
        logits = cache.step(self.model, torch.tensor([piece], device=self.model.device))
        if cache.lengths[0] == len(request.prompt):
            generator = torch.Generator(self.model.device).manual_seed(request.seed)
            if self.write(request, generator, logits[0], cache.lengths[0]):
                self.memory.keep(request.prompt, cache, 0)
            else:
                self.slots.join(cache)
                self.requests.append(request)
                self.generators.append(generator)
            self.reading = None  # not before: whatever fails on the way, the request is known
        return len(piece)

    def write(self, request, generator, logits, length):
        """Choose and deliver the next token after `length` positions; whether it was the last."""
        token = choose(logits[None].float(), request.temperature, request.top_k, request.top_p, generator).item()
        if request.cancelled:
            return True
        if token in request.stops:
            request.deliver(None, 'stop')
            return True
        request.written.append(token)
        request.times[1:] = [time.monotonic()]
        full = len(request.written) == request.max_new_tokens or length == self.model.config.block_size
        request.deliver(token, 'length' if full else None)
        return full

    def leave(self, row):
        """Take an answer out, and remember its text; the last one comes into its row."""
        request = self.requests[row]
        ids = request.prompt + request.written
        self.memory.keep(ids[:self.slots.lengths[row]], self.slots, row)
        self.slots.leave(row)
        for of_rows in (self.requests, self.generators):
            of_rows[row] = of_rows[-1]
            of_rows.pop()

    def is_over(self, request):
        """Whether the request is to be dropped: nobody waits for it any more, or its time is up."""
        if not request.cancelled and time.monotonic() > request.deadline:
            request.deliver(None, 'time')
            request.cancelled = True
        return request.cancelled

    def fail(self):
        """End all that is under way: a round of it has failed."""
        for request in {id(request): request for request in (*self.requests, *(self.reading or [])[:1])}.values():
            if not request.cancelled:
                request.deliver(None, 'error')
        self.reset()


class Worker:
    """What does the rounds of all batches in turn: two at once would wait for each other's cores."""

    def __init__(self, batches):
        self.batches, self.news, self.stopped = batches, threading.Condition(), False

    def submit(self, batch, requests):
        """Have the requests answered by the batch, all of them or, if they would not fit, none: Full."""
        with self.news:
            if len(batch.waiting) + len(requests) > batch.queue + max(0, batch.size - batch.busy):
                raise Full
            batch.waiting += requests
            self.news.notify()

    def stop(self):
        """Have run return."""
        with self.news:
            self.stopped = True
            self.news.notify()

    def run(self):
        """Rounds, until stop; where there is nothing to do, wait."""
        with torch.inference_mode():
            while not self.stopped:
                with self.news:
                    self.news.wait_for(lambda: self.stopped or any(batch.busy or batch.waiting for batch in self.batches))
                    for batch in self.batches:
                        batch.sweep()
                for batch in self.batches:
                    if not batch.busy and not batch.waiting:
                        continue
                    try:
                        batch.round()
                    except Exception:  # memory, most likely: those concerned are told, the server goes on
                        traceback.print_exc(file=sys.stderr)
                        batch.fail()
