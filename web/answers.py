"""The answer to a request: text that grows token by token, sent as it comes or in one piece."""
import asyncio
import json
import random
import time
import uuid

from starlette.responses import JSONResponse, StreamingResponse

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
        # What was held back is searched again; what has been released cannot begin a stop string.
        ends = [new.find(stop) for stop in self.stop_strings if stop in new]
        if ends:
            new = new[:min(ends)]
            finish = 'stop'
        if not finish:
            # Hold back the longest end that may be the beginning of a stop string.
            for stop in self.stop_strings:
                for n in range(len(self.held) + 1, len(stop)):
                    if new.endswith(stop[:n]):
                        self.held = stop[:n]
            new = new.removesuffix(self.held)
        self.text += new
        self.finish = finish
        return new


class Job:
    """A request of the API and its answer; an ASGI application that sends the answer."""

    def __init__(self, body, ids, served, config):
        self.served = served
        self.stream = body.stream
        self.with_usage = (body.stream_options or {}).get('include_usage')
        self.chat = isinstance(body, ChatBody)
        self.id = f'{"chatcmpl" if self.chat else "cmpl"}-{uuid.uuid4().hex}'
        self.started = time.time()
        self.loop = asyncio.get_running_loop()
        self.events = asyncio.Queue()  # (new ids, finish)
        tokenizer = served.opened.tokenizer
        template = served.template if self.chat else None
        self.text = Text(tokenizer, template, body.stop or [])
        self.request = Request(
            prompt=ids,
            max_new_tokens=body.longest(config),
            deliver=self.deliver,
            sampling=body.sampling(config),
            seed=random.getrandbits(62) if body.seed is None else body.seed,
            stops=conversation.stop_ids(tokenizer, served.template),
        )

    def deliver(self, ids, finish):
        """Take a new token from the worker's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, (ids, finish))

    async def pieces(self):
        """Yield the text in pieces, as it comes, until the answer has ended."""
        while not self.text.finish:
            ids, finish = await self.events.get()
            if finish == 'error':
                raise ApiError(500, 'the model failed; the terminal of serve.py says why.')
            if finish == 'closing':
                # End where it is, with a reason that clients know.
                if not self.text.text:
                    raise ApiError(503, 'the server is stopping.')
                finish = 'length'
            new = self.text.add(ids, finish)
            if new or self.text.finish:
                yield new

    def usage(self):
        n_prompt = len(self.request.prompt)
        n_written = len(self.request.written)
        return {
            'prompt_tokens': n_prompt,
            'completion_tokens': n_written,
            'total_tokens': n_prompt + n_written,
            'prompt_tokens_details': {'cached_tokens': self.request.n_remembered},
        }

    def envelope(self, **more):
        kind = 'text_completion'
        if self.chat:
            kind = 'chat.completion.chunk' if self.stream else 'chat.completion'
        return {'id': self.id, 'object': kind, 'created': int(self.started),
                'model': self.served.name, **more}

    def choices(self, **content):
        choice = {'index': 0, 'logprobs': None, 'finish_reason': self.text.finish}
        return [choice | content]

    async def whole(self):
        """The answer in one piece."""
        async for _ in self.pieces():
            pass
        choices = self.choices(text=self.text.text)
        if self.chat:
            choices = self.choices(message={'role': 'assistant', 'content': self.text.text})
        return self.envelope(choices=choices, usage=self.usage())

    async def chunks(self):
        """Yield the answer in pieces."""
        if self.chat:
            delta = {'role': 'assistant', 'content': ''}
            yield self.envelope(choices=self.choices(delta=delta))
        async for new in self.pieces():
            choices = self.choices(text=new)
            if self.chat:
                choices = self.choices(delta={'content': new})
            yield self.envelope(choices=choices)
        if self.with_usage:
            yield self.envelope(choices=[], usage=self.usage())

    async def lines(self):
        """Yield the answer as server-sent events."""
        try:
            async for chunk in self.chunks():
                yield f'data: {json.dumps(chunk)}\n\n'
            yield 'data: [DONE]\n\n'
        except ApiError as error:
            # Too late for a status of its own: 200 has been sent.
            yield f'data: {json.dumps(error.body)}\n\n'

    async def send(self, scope, receive, send):
        if self.stream:
            headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
            response = StreamingResponse(self.lines(), 200, headers, 'text/event-stream')
            await response.stream_response(send)
        else:
            response = JSONResponse(await self.whole())
            await response(scope, receive, send)

    async def __call__(self, scope, receive, send):
        """Send the answer, unless the client goes away; its place is free afterwards."""
        sending = asyncio.create_task(self.send(scope, receive, send))
        leaving = asyncio.create_task(disconnected(receive))
        # Whichever ends first: the answer, or the client's interest in it.
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            self.request.ended = True
        print(f'{self.served.name}: {len(self.request.prompt)} tokens read, '
              f'{self.request.n_remembered} of them remembered, {len(self.request.written)} '
              f'written in {time.time() - self.started:.2f} s', flush=True)


async def disconnected(receive):
    """Return when the client has gone."""
    while (await receive())['type'] != 'http.disconnect':
        pass
