"""OpenAI's interface to a model: what a request may say, and its answer, streamed or whole.

    python serve.py --init_from=out/oasst     # which serves it

A parameter that would have no effect here is refused, not passed over.
Source: https://platform.openai.com/docs/api-reference/chat
"""
import asyncio
import json
import random
import time
import uuid
from typing import Annotated, Literal

from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from core import conversation
from web.batching import Request


class ApiError(Exception):
    """An answer in the API's own error form."""

    def __init__(self, status, message, param=None, code=None):
        # what was sent may hold half a surrogate pair, which JSON in UTF-8 cannot
        self.status, self.message, self.param, self.code = status, message.encode('utf-8', 'replace').decode(), param, code


def error_body(message, status, param=None, code=None):
    """The API's error form."""
    kind = 'server_error' if status >= 500 else 'rate_limit_error' if status == 429 else 'invalid_request_error'
    return {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


def error_response(message, status, param=None, code=None, **headers):
    """An HTTP response in that form."""
    return JSONResponse(error_body(message, status, param, code), status, headers=headers)


# Known parameters that have no effect here: the values that ask for none.
NEUTRAL = {'frequency_penalty': (0,), 'presence_penalty': (0,), 'logit_bias': ({},), 'logprobs': (False,),
           'top_logprobs': (0,), 'tools': ([],), 'tool_choice': ('none', 'auto'), 'parallel_tool_calls': (True, False),
           'functions': ([],), 'response_format': ({'type': 'text'},), 'modalities': (['text'],), 'best_of': (1,),
           'suffix': ('',), 'echo': (False,), 'reasoning_effort': ('none',)}
PASSED_OVER = ('user', 'metadata', 'store', 'service_tier', 'prompt_cache_key', 'safety_identifier')  # change no answer

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """What both kinds of request may say. max_tokens, temperature, top_k: the server's own where absent."""
    model_config = ConfigDict(extra='allow', strict=True)
    model: str | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None  # not in OpenAI's, as in other servers
    seed: Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None

    def check(self):
        """ApiError for what would have no effect."""
        for name, value in self.model_extra.items():
            if name not in PASSED_OVER and value is not None and value not in NEUTRAL.get(name, ()):
                why = 'has no effect here; leave it out' if name in NEUTRAL else 'is not known'
                raise ApiError(400, f'the parameter {name} {why}.', name, 'unsupported_parameter')


class Part(BaseModel):
    """A piece of a message's content."""
    type: Literal['text']
    text: str


class Message(BaseModel):
    """A message of a conversation."""
    role: Literal['system', 'developer', 'user', 'assistant']
    content: str | list[Part]
    name: str | None = None


class ChatBody(Body):
    """POST /v1/chat/completions. truncation: 'auto' forgets the oldest exchanges where the window is full."""
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal['auto', 'disabled'] | None = None

    def prompts(self, served, room):
        """[the prompt's ids]; ValueError for a conversation that cannot be."""
        opened, template = served.opened, served.template
        messages = [{'role': 'system' if message.role == 'developer' else message.role,
                     'content': message.content if isinstance(message.content, str) else
                     ''.join(part.text for part in message.content)} for message in self.messages]
        turns = conversation.from_messages(messages)
        if turns[-1].role != 'user':
            raise ValueError('the last message is an assistant\'s, expected a user\'s')
        if self.truncation == 'auto':
            turns = conversation.recent(turns, opened.tokenizer, template, opened.model.config.block_size - room)
        return [conversation.prompt(turns, opened.tokenizer, template)]


class CompletionBody(Body):
    """POST /v1/completions: raw text, or ids."""
    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1, max_length=16)] | \
        Annotated[list[Tokens], Field(min_length=1, max_length=16)]

    def prompts(self, served, room):
        """The ids of each prompt; ValueError for ids that there are not."""
        tokenizer = served.opened.tokenizer
        given = [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt
        found = [tokenizer.encode(one).tolist() if isinstance(one, str) else one for one in given]
        if max(map(max, found)) >= tokenizer.vocab_size:
            raise ValueError(f'the id {max(map(max, found))} is beyond the vocabulary of {tokenizer.vocab_size}')
        return found


# ---- answers ----

class Answer:
    """One choice of a response: its text grows as tokens come, character by whole character."""

    def __init__(self, read, stop_strings):
        self.read, self.stop_strings = read, stop_strings
        self.request = None
        self.text, self.finish = '', None

    def take(self, finish):
        """The text that the last token, or the end, has added."""
        text = self.read(self.request.written)
        if not finish:
            text = text.rstrip('\ufffd')  # half a character: the rest is to come
        ends = [at for at in (text.find(stop) for stop in self.stop_strings) if at >= 0]
        if ends:
            text, finish, self.request.cancelled = text[:min(ends)], 'stop', True
        elif not finish:  # what may be the beginning of a stop string waits
            text = text[:len(text) - max((n for stop in self.stop_strings for n in range(1, len(stop))
                                          if text.endswith(stop[:n])), default=0)]
        new, self.text, self.finish = text[len(self.text):], text, finish
        return new


class Job:
    """A request of the API under way: its answers, and the tokens that come for them."""

    def __init__(self, body, served, config, chat):
        self.served, self.chat, self.config = served, chat, config
        self.id, self.created = f'{"chatcmpl" if chat else "cmpl"}-{uuid.uuid4().hex}', int(time.time())
        self.started, loop, self.events = time.monotonic(), asyncio.get_running_loop(), asyncio.Queue()
        tokenizer, window = served.opened.tokenizer, served.opened.model.config.block_size
        longest = body.max_tokens or chat and body.max_completion_tokens or config.max_new_tokens
        try:
            prompts = body.prompts(served, min(longest, window // 2))
        except ValueError as error:
            raise ApiError(400, f'{error}.', 'messages' if chat else 'prompt') from None
        for prompt in prompts:
            if len(prompt) > window:
                raise ApiError(400, f'the prompt has {len(prompt):,} tokens, the model reads {window:,}: shorten it'
                               f'{", or ask with truncation=auto" if chat and body.truncation != "auto" else ""}.', 'messages' if chat else 'prompt',
                               'context_length_exceeded')
        template = served.template if chat else 'xml'
        read = (lambda ids: conversation.answer_text(ids, tokenizer, template)) if chat else tokenizer.decode
        stop_strings = [body.stop] if isinstance(body.stop, str) else body.stop or []
        seed = random.getrandbits(62) if body.seed is None else body.seed
        given = lambda value, default: default if value is None else value  # noqa: E731
        self.answers = []
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n or 1)):
            deliver = lambda token, finish, i=i: loop.call_soon_threadsafe(self.events.put_nowait, (i, finish))  # noqa: E731
            answer = Answer(read, stop_strings)
            answer.request = Request(prompt, longest, deliver, given(body.temperature, config.temperature),
                                     given(body.top_k, config.top_k), given(body.top_p, 1.0), (seed + i) % 2 ** 63,
                                     conversation.stop_ids(tokenizer, template), self.started + config.timeout_s)
            self.answers.append(answer)
        self.requests = [answer.request for answer in self.answers]

    async def pieces(self):
        """(answer's number, new text, finish) as they come; ApiError where nothing more will."""
        n_open = len(self.answers)
        while n_open:
            i, finish = await self.events.get()
            answer = self.answers[i]
            if answer.finish:  # at a stop string, before the model ended
                continue
            if finish == 'error':
                raise ApiError(500, 'the model failed; the server says why. Try again with a shorter request.')
            if finish == 'time':
                if not answer.request.written:
                    raise ApiError(503, f'no answer within {self.config.timeout_s:g} s: too many others wait.', code='timeout')
                finish = 'length'
            new = answer.take(finish)
            n_open -= answer.finish is not None
            if new or answer.finish:
                yield i, new, answer.finish
        self.log()

    def cancel(self):
        """Leave the places free: nobody waits for more."""
        for request in self.requests:
            request.cancelled = True

    def timings(self):
        """How long the first token took, and tokens per second from then on, of all answers together; not in OpenAI's."""
        written = [request for request in self.requests if request.times]
        if not written:  # all ended at once
            return {'first_token_s': None, 'tokens_per_s': None}
        first, last = min(request.times[0] for request in written), max(request.times[-1] for request in written)
        n = sum(len(request.written) - 1 for request in written)
        return {'first_token_s': first - self.started, 'tokens_per_s': n / (last - first) if last > first else None}

    def log(self):
        """A line for the operator."""
        usage, seconds = self.usage(), time.monotonic() - self.started
        print(f"{self.served.name}: {usage['prompt_tokens']} tokens read ({usage['prompt_tokens_details']['cached_tokens']} "
              f"remembered), {usage['completion_tokens']} written in {seconds:.2f} s", flush=True)

    def usage(self):
        """The API's counts of tokens."""
        n_prompt = sum(map(len, {id(request.prompt): request.prompt for request in self.requests}.values()))
        n_written = sum(len(request.written) for request in self.requests)
        return {'prompt_tokens': n_prompt, 'completion_tokens': n_written, 'total_tokens': n_prompt + n_written,
                'prompt_tokens_details': {'cached_tokens': sum(request.n_remembered for request in self.requests)}}

    def envelope(self, choices, kind=''):
        """The object around choices."""
        name = f'chat.completion{kind}' if self.chat else 'text_completion'
        return {'id': self.id, 'object': name, 'created': self.created, 'model': self.served.name, 'choices': choices}

    async def whole(self):
        """The response in one."""
        async for _ in self.pieces():
            pass
        choices = [{'index': i, 'logprobs': None, 'finish_reason': answer.finish,
                    **({'message': {'role': 'assistant', 'content': answer.text, 'refusal': None}} if self.chat else {'text': answer.text})}
                   for i, answer in enumerate(self.answers)]
        return JSONResponse(self.envelope(choices) | {'usage': self.usage(), 'timings': self.timings()})

    async def stream(self, with_usage):
        """The response as server-sent events."""
        def event(choices, **more):
            return f"data: {json.dumps(self.envelope(choices, '.chunk') | more)}\n\n"

        def choice(i, text, finish, **more):
            content = {'delta': {**more, **({'content': text} if text or not finish else {})}} if self.chat else {'text': text}
            return [{'index': i, **content, 'logprobs': None, 'finish_reason': finish}]
        more = {'usage': None} if with_usage else {}
        try:
            for i in range(len(self.answers) if self.chat else 0):
                yield event(choice(i, '', None, role='assistant'), **more)
            async for i, new, finish in self.pieces():
                if new:
                    yield event(choice(i, new, None), **more)
                if finish:
                    yield event(choice(i, '', finish), **more)
            if with_usage:
                yield event([], usage=self.usage(), timings=self.timings())
            yield 'data: [DONE]\n\n'
        except ApiError as error:  # the status has gone out already
            yield f'data: {json.dumps(error_body(error.message, error.status, error.param, error.code))}\n\n'


class EventStream(StreamingResponse):
    """A job's answers as server-sent events; however that ends, even before it began, the places are free."""

    def __init__(self, job, with_usage):
        super().__init__(job.stream(with_usage), media_type='text/event-stream',
                         headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def whole_unless_gone(job, http):
    """A job's answers in one response, for which nothing is written any more when the client goes away."""
    work = asyncio.ensure_future(job.whole())

    async def watch():
        while (await http.receive())['type'] != 'http.disconnect':
            pass
        work.cancel()
    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        return error_response('the client has gone.', 499)
    finally:
        watcher.cancel()
        job.cancel()
