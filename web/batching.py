"""Continuous batching: the answers to several people are written together.

    python serve.py --init_from=out/oasst

A decoding step reads every weight once, whether it is for one answer or for eight. So the last
tokens of all answers go through the model together. A new prompt is read in pieces between these
steps, so that the others need not wait for it. An answer that ends frees its place for the next.
Sources: Yu et al. 2022 (Orca), iteration-level scheduling; Agrawal et al. 2023,
https://arxiv.org/abs/2308.16369, prompts read in pieces.
"""
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Full

import torch

from core.generate import KVCache, Sampling, choose
from web.slots import Memory, Slots

PIECE = 128  # prompt tokens that are read between two steps of the others


@dataclass(eq=False)
class Request:
    """An answer to write.

    The worker's thread calls deliver(ids, finish) for each new token, with its id in a list.
    finish is None until the last call: then 'stop', 'length', 'error', or 'closing' when the
    server stops. The token that stops an answer is not delivered.
    """
    prompt: list                       # ids
    max_new_tokens: int
    deliver: Callable
    sampling: Sampling
    seed: int = 0
    stops: set = frozenset()           # ids that end the answer
    ended: bool = False                # or the client has gone: deliver is not called any more
    written: list = field(default_factory=list)  # ids of the answer so far
    n_remembered: int = 0              # tokens of the prompt that did not have to be read
    cache: KVCache = None              # while the prompt is being read
    generator: torch.Generator = None  # what one answer draws does not depend on the others

    def end(self, finish):
        """Deliver why the answer ends, unless it has ended before."""
        if not self.ended:
            self.ended = True
            self.deliver([], finish)


class Batch:
    """The answers that one model writes, `size` at a time, and up to `queue` that wait."""

    def __init__(self, model, size=8, queue=64, remember=4):
        self.model = model
        self.size = size
        self.queue = queue
        self.remember = remember
        self.waiting = deque()  # Worker.submit, in another thread, appends to it
        self.reset()

    def reset(self):
        """Forget every answer."""
        self.reading = None  # the request whose prompt is being read
        self.writing = []    # those whose answers are being written, in the rows of the slots
        self.slots = Slots(self.model)
        self.memory = Memory(self.remember)

    @property
    def busy(self):
        """How many places are taken."""
        return len(self.writing) + (self.reading is not None)

    def round(self):
        """Read a piece of the next prompt, then write one token of every answer."""
        # Free the places of clients that have gone. Backwards, because the last answer moves into
        # the row of one that leaves.
        for row in reversed(range(len(self.writing))):
            if self.writing[row].ended:
                self.leave(row)
        # Read new prompts: a piece if others wait for their next token, or else a whole window.
        budget = PIECE if self.writing else self.model.config.block_size
        while budget > 0 and len(self.writing) < self.size and (self.reading or self.waiting):
            budget -= self.read(budget)
        if not self.writing:
            return
        # One step of the model for all answers, each of which then chooses its own token.
        self.slots.make_room(len(self.writing), max(self.slots.lengths) + 1)
        last = [[request.written[-1]] for request in self.writing]
        logits = self.slots.step(self.model, torch.tensor(last, device=self.model.device))
        for row in reversed(range(len(self.writing))):
            self.write(self.writing[row], logits[row], self.slots.lengths[row])
            if self.writing[row].ended:
                self.leave(row)

    def read(self, n):
        """Read up to n tokens of a prompt; return how many."""
        if not self.reading:
            self.reading = self.waiting.popleft()
        request = self.reading
        if request.ended:
            self.reading = None
            return 0
        if not request.cache:
            # It is its turn: start with what is remembered of its text.
            request.cache = KVCache(self.model, 1, len(request.prompt))
            request.n_remembered = self.memory.fill(request.cache, request.prompt)
            request.generator = torch.Generator(self.model.device).manual_seed(request.seed)
        start = request.cache.lengths[0]
        piece = request.prompt[start:start + n]
        logits = request.cache.step(self.model, torch.tensor([piece], device=self.model.device))
        # After the last piece comes the first token of the answer, which then joins the others.
        if start + len(piece) == len(request.prompt):
            self.write(request, logits[0], len(request.prompt))
            if request.ended:
                self.memory.keep(request.prompt, request.cache, 0)
            else:
                self.slots.join(request.cache)
                self.writing.append(request)
            self.reading = request.cache = None
        return len(piece)

    def write(self, request, logits, length):
        """Choose and deliver the token that follows `length` positions."""
        text = (request.prompt, request.written)
        try:
            token = choose(logits[None].float(), request.sampling, request.generator, [text]).item()
        except RuntimeError:
            # No token can be drawn from these logits. The other answers go on.
            traceback.print_exc()
            request.end('error')
        if request.ended:
            return
        if token in request.stops:
            request.end('stop')
            return
        request.written.append(token)
        request.deliver([token], None)
        if len(request.written) == request.max_new_tokens or length == self.model.config.block_size:
            request.end('length')

    def leave(self, row):
        """Free an answer's row and remember its text. The last answer moves into the row."""
        request = self.writing[row]
        text = request.prompt + request.written
        self.memory.keep(text[:self.slots.lengths[row]], self.slots, row)
        self.slots.leave(row)
        self.writing[row] = self.writing[-1]
        self.writing.pop()

    def fail(self):
        """End every answer that has a place, after a step of all of them has failed."""
        for request in [*self.writing, self.reading]:
            if request:
                request.end('error')
        self.reset()


class Worker:
    """Does the rounds of all batches in turn: two models at once would fight for the cores."""

    def __init__(self, batches):
        self.batches = batches
        self.news = threading.Condition()
        self.stopped = False

    def submit(self, batch, request):
        """Have the batch answer the request; raises Full if too many wait."""
        with self.news:
            if len(batch.waiting) >= batch.queue + max(0, batch.size - batch.busy):
                raise Full
            batch.waiting.append(request)
            self.news.notify()

    def end_all(self):
        """End every answer where it is."""
        for batch in self.batches:
            for request in [*batch.waiting, *batch.writing, batch.reading]:
                if request:
                    request.end('closing')

    def stop(self):
        """Let run return."""
        with self.news:
            self.stopped = True
            self.news.notify()

    @torch.inference_mode()
    def run(self):
        """Do rounds until stop is called."""
        while not self.stopped:
            # Wait for something to do, and let go of waiting clients that have gone.
            with self.news:
                self.news.wait_for(lambda: self.stopped or any(
                    batch.busy or batch.waiting for batch in self.batches))
                for batch in self.batches:
                    batch.waiting = deque(one for one in batch.waiting if not one.ended)
            for batch in self.batches:
                try:
                    batch.round()
                except Exception:
                    # Most likely out of memory. Who is concerned is told, and the server goes on.
                    traceback.print_exc()
                    batch.fail()
