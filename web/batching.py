"""Continuous batching: the answers to several people are written together.

    python serve.py --init_from=out/oasst

A decoding step reads every weight once, whether it is for one answer or for eight. So the last
tokens of all answers go through the model together. An answer that ends frees its place for the
next one, which joins the others after its prompt has been read.
Source: Yu et al. 2022 (Orca), iteration-level scheduling.
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


@dataclass(eq=False)
class Request:
    """An answer to write.

    The worker's thread calls deliver([id], None) for each new token, and at the end
    deliver([], finish), where finish is 'stop', 'length', or 'error' if the model failed or the
    server stops. The token that stops an answer is not delivered.
    """
    prompt: list                       # ids
    max_new_tokens: int
    deliver: Callable
    sampling: Sampling
    frequency_penalty: float = 0.0     # subtracted for each time a token was written
    presence_penalty: float = 0.0      # subtracted once if it was written
    seed: int = 0
    stops: set = frozenset()           # ids that end the answer
    ended: bool = False                # or the client has gone
    written: list = field(default_factory=list)  # ids of the answer so far
    n_remembered: int = 0              # tokens of the prompt that did not have to be read
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
        self.writing = []  # the requests that are answered, in the rows of the slots
        self.slots = Slots(self.model)
        self.memory = Memory(self.remember)

    @property
    def busy(self):
        """How many places are taken."""
        return len(self.writing)

    def round(self):
        """Read the prompts for which there is a place, then write one token of every answer."""
        while self.waiting and self.busy < self.size:
            self.read(self.waiting[0])
            self.waiting.popleft()
        # Free the places of answers that have ended, and of clients that have gone. Backwards,
        # because the last answer moves into the row of one that leaves.
        for row in reversed(range(len(self.writing))):
            if self.writing[row].ended:
                self.leave(row)
        if not self.writing:
            return
        # One step of the model for all answers, each of which then chooses its own token.
        self.slots.make_room(len(self.writing), max(self.slots.lengths) + 1)
        last = [[request.written[-1]] for request in self.writing]
        logits = self.slots.step(self.model, last)
        for row, request in enumerate(self.writing):
            self.write(request, logits[row], self.slots.lengths[row])

    def read(self, request):
        """Read a prompt, as far as it is not remembered, and write the first token after it."""
        if request.ended:
            return
        cache = KVCache(self.model, 1, len(request.prompt))
        self.memory.fill(cache, request.prompt)
        request.n_remembered = cache.lengths[0]
        request.generator = torch.Generator(self.model.device).manual_seed(request.seed)
        unread = request.prompt[request.n_remembered:]
        logits = cache.step(self.model, [unread])
        self.write(request, logits[0], len(request.prompt))
        self.slots.join(cache)
        self.writing.append(request)

    def write(self, request, logits, length):
        """Choose and deliver the token that follows `length` positions."""
        text = request.prompt + request.written
        logits = logits.float()
        if request.frequency_penalty or request.presence_penalty:
            # As OpenAI defines them: by how often each token was written.
            written = torch.tensor(request.written, dtype=torch.int64)
            counts = written.bincount(minlength=len(logits)).to(logits.device)
            logits = logits - request.frequency_penalty * counts
            logits -= request.presence_penalty * (counts > 0)
        token = choose(logits[None], request.sampling, request.generator, [text]).item()
        if request.ended:  # meanwhile: nobody may be there to take it
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
        """End every answer where it is."""
        for request in [*self.waiting, *self.writing]:
            request.end('error')


class Worker:
    """Does the rounds of all batches in turn: two models at once would fight for the cores."""

    def __init__(self, batches):
        self.batches = batches
        self.news = threading.Condition()
        self.stopped = False

    def submit(self, batch, request):
        """Have the batch answer the request; raises Full if too many wait."""
        with self.news:
            if len(batch.waiting) >= batch.queue + batch.size - batch.busy:
                raise Full
            batch.waiting.append(request)
            self.news.notify()

    def end_all(self):
        """End every answer where it is."""
        for batch in self.batches:
            batch.fail()

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
                    # Most likely out of memory. Who waits is told, and the server goes on.
                    traceback.print_exc()
                    batch.fail()
                    batch.reset()
