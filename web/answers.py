"""The answer to a request: text that grows, sent as it comes or in one piece."""
import asyncio
import json
import random
import time
import uuid

from core import conversation
from core.conversation import AnswerText
from web.api import ApiError, ChatBody
from web.batching import Request


class Answer:
    """The answer to a ChatBody or CompletionBody, while it is written."""

    def __init__(self, body, ids, served, config):
        tokenizer = served.opened.tokenizer
        loop = asyncio.get_running_loop()
        self.body = body
        self.served = served
        self.chat = isinstance(body, ChatBody)
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.reader = AnswerText(tokenizer, served.template if self.chat else None)
        self.text = ''      # as far as it has been sent
        self.finish = None  # why it has ended
        self.events = asyncio.Queue()  # (new ids, finish)

        # Called in the worker's thread.
        def deliver(ids, finish):
            loop.call_soon_threadsafe(self.events.put_nowait, (ids, finish))

        seed = random.getrandbits(62) if body.seed is None else body.seed
        self.request = Request(
            ids, body.longest(config), deliver, body.sampling(config), seed=seed,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            stops=conversation.stop_ids(tokenizer, served.template))

    async def pieces(self):
        """Yield what each token adds, up to a stop string.

        If nobody reads on, the worker stops writing.
        """
        stops = self.body.stop or []
        longest = max(len(stop) for stop in ['.', *stops])
        held = ''  # not yielded yet
        try:
            while not self.finish:
                ids, self.finish = await self.events.get()
                if self.finish == 'error':
                    raise ApiError(503, 'the server is stopping, or its model failed.')
                held += self.reader.add(ids, final=self.finish is not None)
                ends = [held.find(stop) for stop in stops if stop in held]
                if ends:
                    held = held[:min(ends)]
                    self.finish = 'stop'
                # The last characters may be the beginning of a stop string.
                n = len(held)
                if not self.finish:
                    n = max(0, n - longest + 1)
                self.text += held[:n]
                yield held[:n]
                held = held[n:]
        finally:
            self.request.ended = True

    def usage(self):
        n_prompt = len(self.request.prompt)
        n_written = len(self.request.written)
        details = {'cached_tokens': self.request.n_remembered}
        return {'prompt_tokens': n_prompt, 'completion_tokens': n_written,
                'total_tokens': n_prompt + n_written, 'prompt_tokens_details': details}

    def data(self, text, **more):
        """What is sent, in OpenAI's form."""
        kind = 'text_completion'
        choice = {'index': 0, 'finish_reason': self.finish}
        message = {'content': text}
        # In the first piece only: clients join what the pieces say.
        if text == self.text:
            message['role'] = 'assistant'
        if not self.chat:
            choice['text'] = text
        elif self.body.stream:
            kind = 'chat.completion.chunk'
            choice['delta'] = message
        else:
            kind = 'chat.completion'
            choice['message'] = message
        return {'id': self.id, 'object': kind, 'created': self.created,
                'model': self.served.name, 'choices': [choice], **more}

    async def whole(self, http):
        """The answer, or its beginning if the client does not wait."""
        async for _ in self.pieces():
            if await http.is_disconnected():
                break
        return self.data(self.text, usage=self.usage())

    async def stream(self):
        """Yield the answer in pieces, as server-sent events."""
        try:
            async for new in self.pieces():
                if new or self.finish:
                    yield f'data: {json.dumps(self.data(new))}\n\n'
            if (self.body.stream_options or {}).get('include_usage'):
                last = self.data('', choices=[], usage=self.usage())
                yield f'data: {json.dumps(last)}\n\n'
        except ApiError as error:
            # Too late for a status of its own: 200 has been sent.
            yield f'data: {json.dumps(error.body)}\n\n'
        yield 'data: [DONE]\n\n'
