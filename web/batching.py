"""Continuous batching: the answers to several people are written together.

    python serve.py --init_from=out/oasst

A step reads every weight once, for one answer or for eight. So the last tokens of all
answers go through the model together, and new answers join as others end.
Source: Yu et al. 2022 (Orca), iteration-level scheduling.
"""
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import commonprefix  # of any lists

import torch

from core.generate import KVCache, Sampling, choose
from web.slots import Slots


@dataclass(eq=False)
class Request:
    """An answer to write.

    The worker's thread calls deliver([id], None) for each token, but not the one that stops
    the answer, and at the end deliver([], 'stop'), 'length' or 'error'.
    """
    prompt: list  # ids
    max_new_tokens: int
    deliver: Callable
    sampling: Sampling
    frequency_penalty: float = 0.0  # for each time a token was written
    presence_penalty: float = 0.0  # once, if it was written
    seed: int = 0
    stops: set = frozenset()  # ids that end the answer
    ended: bool = False  # or the client has gone
    written: list = field(default_factory=list)  # ids of the answer so far
    n_remembered: int = 0  # tokens of the prompt that were not read again
    generator: torch.Generator = None  # its own, so that other requests change nothing

    def end(self, finish):
        if not self.ended:
            self.ended = True
            self.deliver([], finish)


class Batch:
    """The answers of one model: `size` are written, up to `queue` wait."""

    def __init__(self, model, size=8, queue=64, remember=4):
        self.model = model
        self.size = size
        self.queue = queue
        self.waiting = deque()
        # (ids, keys, values): a chat's next prompt begins with such a text.
        self.memory = deque(maxlen=remember)
        self.reset()

    def reset(self):
        self.memory.clear()
        self.writing = []  # the requests that are answered, in the rows of the slots
        self.slots = Slots(self.model)

    @property
    def busy(self):
        """How many places are taken."""
        return len(self.writing)

    def round(self):
        """Read the prompts for which there is a place; write a token of every answer."""
        while self.waiting and self.busy < self.size:
            request = self.waiting.popleft()
            if not request.ended:
                self.writing.append(request)
                self.read(request)
        # Backwards, because the last answer moves into the row of one that leaves.
        for row in reversed(range(self.busy)):
            if self.writing[row].ended:
                self.leave(row)
        if not self.writing:
            return
        # One step for all answers, each of which then chooses its token.
        self.slots.make_room(self.busy, max(self.slots.lengths) + 1)
        last = [[request.written[-1]] for request in self.writing]
        logits = self.slots.step(self.model, last)
        for row, request in enumerate(self.writing):
            self.write(request, logits[row], self.slots.lengths[row])

    def read(self, request):
        """Read what is not remembered of a prompt, and write the first token."""
        prompt = request.prompt
        cache = KVCache(self.model, 1, len(prompt))
        for ids, keys, values in self.memory:
            # The last token is always read: its logits give the answer's first.
            n = len(commonprefix([ids, prompt[:-1]]))
            if n > cache.lengths[0]:
                cache.lengths = [n]
                cache.k[:, 0, :, :n] = keys[:, :, :n]
                cache.v[:, 0, :, :n] = values[:, :, :n]
        request.n_remembered = cache.lengths[0]
        request.generator = torch.Generator(self.model.device).manual_seed(request.seed)
        logits = cache.step(self.model, [prompt[request.n_remembered:]])
        self.slots.join(cache)
        self.write(request, logits[0], len(prompt))

    def write(self, request, logits, length):
        """Choose and deliver the token that follows `length` positions."""
        text = request.prompt + request.written
        logits = logits.float()
        if request.frequency_penalty or request.presence_penalty:
            # By how often each token was written, as OpenAI has it.
            written = torch.tensor(request.written, dtype=torch.int64)
            counts = written.bincount(minlength=len(logits)).to(logits.device)
            logits = logits - request.frequency_penalty * counts
            logits -= request.presence_penalty * (counts > 0)
        token = choose(logits[None], request.sampling, request.generator, [text]).item()
        # The client may have gone meanwhile.
        if request.ended:
            return
        if token in request.stops:
            request.end('stop')
            return
        request.written.append(token)
        request.deliver([token], None)
        is_full = length == self.model.config.block_size
        if is_full or len(request.written) == request.max_new_tokens:
            request.end('length')

    def leave(self, row):
        """Free an answer's row, for the last answer, and remember its text."""
        request = self.writing[row]
        # The last token has been chosen, but not read.
        n = self.slots.lengths[row]
        ids = (request.prompt + request.written)[:n]
        keys = self.slots.k[:, row, :, :n].clone()
        values = self.slots.v[:, row, :, :n].clone()
        self.memory.append((ids, keys, values))
        self.slots.leave(row)
        self.writing[row] = self.writing[-1]
        self.writing.pop()


class Worker:
    """Does the rounds of all batches in turn, so that none fight for the cores."""

    def __init__(self, batches):
        self.batches = batches
        self.news = threading.Event()
        self.stopped = False

    def submit(self, batch, request):
        """Have the batch answer the request; False if too many wait."""
        if len(batch.waiting) >= batch.queue + batch.size - batch.busy:
            return False
        batch.waiting.append(request)
        self.news.set()
        return True

    def end_all(self):
        """End every answer where it is."""
        for batch in self.batches:
            for request in [*batch.waiting, *batch.writing]:
                request.end('error')

    def stop(self):
        self.stopped = True
        self.news.set()

    @torch.inference_mode()
    def run(self):
        """Do rounds until stop is called."""
        while not self.stopped:
            for batch in self.batches:
                try:
                    batch.round()
                except Exception:
                    # Most likely out of memory. The server goes on.
                    traceback.print_exc()
                    for request in batch.writing:
                        request.end('error')
                    batch.reset()
            if not any(batch.busy or batch.waiting for batch in self.batches):
                self.news.wait()
                self.news.clear()
