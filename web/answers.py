"""The answer to a request: text that grows token by token, sent as it comes or in one piece."""
import asyncio
import json
import random
import time
import uuid

from starlette.requests import ClientDisconnect

from core import conversation
from core.conversation import AnswerText
from web.api import ApiError, ChatBody
from web.batching import Request


class Text:
    """The text of an answer up to its first stop string, if it has one."""

    def __init__(self, tokenizer, template, stop_strings):
        self.reader = AnswerText(tokenizer, template)
        self.stop_strings = stop_strings
        self.text = ''
        self.held = ''  # not in the text yet, because it may be the beginning of a stop string
        self.finish = None

    def add(self, ids, finish):
        """Append the text of these ids and return what is new."""
        new = self.held + self.reader.add(ids, final=finish is not None)
        self.held = ''
        ends = [new.find(stop) for stop in self.stop_strings if stop in new]
        if ends:
            new = new[:min(ends)]
            finish = 'stop'
        if self.stop_strings and not finish:
            # All of a stop string but its last character may stand at the end.
            longest = max(len(stop) for stop in self.stop_strings)
            released = max(0, len(new) - longest + 1)
            self.held = new[released:]
            new = new[:released]
        self.text += new
        self.finish = finish
        return new


class Answer:
    """The answer to a ChatBody or a CompletionBody, while the worker writes it."""

    def __init__(self, body, ids, served, config):
        tokenizer = served.opened.tokenizer
        self.body = body
        self.served = served
        self.chat = isinstance(body, ChatBody)
        self.id = f'{"chatcmpl" if self.chat else "cmpl"}-{uuid.uuid4().hex}'
        self.started = time.time()
        self.text = Text(tokenizer, served.template if self.chat else None, body.stop or [])
        loop = asyncio.get_running_loop()
        self.events = asyncio.Queue()  # (new ids, finish)

        def deliver(ids, finish):
            """Take a new token from the worker's thread."""
            loop.call_soon_threadsafe(self.events.put_nowait, (ids, finish))

        self.request = Request(
            prompt=ids,
            max_new_tokens=body.longest(config),
            deliver=deliver,
            sampling=body.sampling(config),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            seed=random.getrandbits(62) if body.seed is None else body.seed,
            stops=conversation.stop_ids(tokenizer, served.template),
        )

    async def pieces(self):
        """Yield what each token adds to the text. If nobody reads on, the worker stops writing."""
        request = self.request
        try:
            while not self.text.finish:
                ids, finish = await self.events.get()
                if finish == 'error':
                    raise ApiError(503, 'the server is stopping, or its model failed; '
                                   'the terminal of serve.py says why.')
                yield self.text.add(ids, finish)
        finally:
            request.ended = True
            print(f'{self.served.name}: {len(request.prompt)} tokens read, '
                  f'{request.n_remembered} of them remembered, {len(request.written)} '
                  f'written in {time.time() - self.started:.2f} s', flush=True)

    def usage(self):
        n_prompt = len(self.request.prompt)
        n_written = len(self.request.written)
        return {
            'prompt_tokens': n_prompt,
            'completion_tokens': n_written,
            'total_tokens': n_prompt + n_written,
            'prompt_tokens_details': {'cached_tokens': self.request.n_remembered},
        }

    def data(self, text, **more):
        """What is sent, in OpenAI's form."""
        kind = 'text_completion'
        choice = {'index': 0, 'logprobs': None, 'finish_reason': self.text.finish, 'text': text}
        if self.chat:
            kind = 'chat.completion.chunk' if self.body.stream else 'chat.completion'
            content = {'content': choice.pop('text')}
            if text == self.text.text:  # the whole answer, or the first piece
                content['role'] = 'assistant'
            choice['delta' if self.body.stream else 'message'] = content
        return {'id': self.id, 'object': kind, 'created': int(self.started),
                'model': self.served.name, 'choices': [choice], **more}

    async def whole(self, http):
        """The whole answer; ClientDisconnect if the client does not wait for it."""
        leaving = asyncio.create_task(http.receive())  # nothing else can come any more
        async for _ in self.pieces():
            if leaving.done():
                raise ClientDisconnect
        leaving.cancel()
        return self.data(self.text.text, usage=self.usage())

    async def stream(self):
        """Yield the answer in pieces, as server-sent events."""
        try:
            async for new in self.pieces():
                if new or self.text.finish:
                    yield f'data: {json.dumps(self.data(new))}\n\n'
            if (self.body.stream_options or {}).get('include_usage'):
                last = self.data('', choices=[], usage=self.usage())
                yield f'data: {json.dumps(last)}\n\n'
            yield 'data: [DONE]\n\n'
        except ApiError as error:
            # Too late for a status of its own: 200 has been sent.
            yield f'data: {json.dumps(error.body)}\n\n'
