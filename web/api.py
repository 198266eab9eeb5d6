"""What a request of OpenAI's API may say.

A parameter that would have no effect here is refused, never ignored in silence.
Source: https://platform.openai.com/docs/api-reference/chat
"""
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from core import conversation
from core.generate import Sampling
from core.readback import from_messages


class ApiError(Exception):
    """A refusal or a failure, in the form that OpenAI's clients expect."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        self.status = status
        self.headers = headers
        kind = 'server_error' if status >= 500 else 'invalid_request_error'
        self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}

    def response(self):
        return JSONResponse(self.body, self.status, self.headers)


# Parameters that clients send although they have no effect here, with the values that ask for none.
NEUTRAL = {
    'logit_bias': [{}], 'logprobs': [False, 0], 'top_logprobs': [0], 'typical_p': [1],
    'repeat_penalty': [1], 'n': [1], 'best_of': [1], 'echo': [False], 'suffix': [''],
    'tools': [[]], 'tool_choice': ['none', 'auto'], 'functions': [[]],
    'response_format': [{'type': 'text'}], 'modalities': [['text']], 'reasoning_effort': ['none'],
}
# Parameters that change no answer, whatever their value.
IGNORED = {
    'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key',
    'parallel_tool_calls', 'cache_prompt', 'keep_alive', 'chat_id', 'session_id', 'id',
}

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Natural], Field(min_length=1, fail_fast=True)]


def in_list(value):
    """A text, or ids, as a list of one; anything else as it is."""
    if isinstance(value, str) or isinstance(value, list) and value and isinstance(value[0], int):
        return [value]
    return value


def a_list(kind, **limits):
    """The type of a list, or of a single value that is put into one."""
    return Annotated[list[kind], Field(fail_fast=True, **limits), BeforeValidator(in_list)]


StopText = Annotated[str, Field(min_length=1, max_length=100)]


class Body(BaseModel):
    """What both kinds of request may say; null counts as absent."""
    model_config = ConfigDict(extra='allow', strict=True)
    model: str | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # the newer name of max_tokens
    seed: Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)] | None = None
    stop: a_list(StopText, max_length=4) | None = None
    # the fields of core.generate.Sampling, of which OpenAI has only some
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Natural | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Natural | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    def sampling(self, config):
        """How to choose tokens: as the request says, and otherwise as the server does."""
        chosen = Sampling(temperature=config.temperature, top_k=config.top_k)
        for name in Sampling._fields:
            value = getattr(self, name)
            if value is not None:
                chosen = chosen._replace(**{name: value})
        return chosen

    def longest(self, config):
        """How many tokens the answer may have."""
        return self.max_completion_tokens or self.max_tokens or config.max_new_tokens


class Part(BaseModel):
    """A piece of a message's content."""
    type: Literal['text']
    text: str


class Message(BaseModel):
    """A message of a conversation. Any other fields are ignored."""
    role: Literal['system', 'developer', 'user', 'assistant']
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None

    def text(self):
        if isinstance(self.content, list):
            return ''.join(part.text for part in self.content)
        return self.content or ''


class ChatBody(Body):
    """POST /v1/chat/completions. truncation: 'auto' leaves out the oldest turns that do not fit."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    truncation: Literal['auto', 'disabled'] | None = None

    def ids(self, served, n_new):
        """The ids of the prompt; ValueError for a conversation that cannot be."""
        tokenizer = served.opened.tokenizer
        messages = [{'role': message.role, 'content': message.text()} for message in self.messages]
        turns = from_messages(messages)
        if turns[-1].role != 'user':
            raise ValueError("the last message is the assistant's, expected the user's")
        if self.truncation == 'auto':
            room = served.window - min(n_new, served.window // 2)
            turns = conversation.recent(turns, tokenizer, served.template, room)
        return conversation.prompt(turns, tokenizer, served.template)


class CompletionBody(Body):
    """POST /v1/completions: a prompt of raw text, or of ids."""
    prompt: a_list(Text | Ids, min_length=1, max_length=1)

    def ids(self, served, n_new):
        """The ids of the prompt; ValueError for ids that may not be sent."""
        tokenizer = served.opened.tokenizer
        prompt, = self.prompt
        if isinstance(prompt, str):
            return tokenizer.encode(prompt).tolist()
        # With the ids of tags one could forge a turn.
        special = set(tokenizer.special.values()) - {tokenizer.end_of_text}
        for i in prompt:
            if i in special or i >= tokenizer.vocab_size:
                raise ValueError(f'{i} is not the id of a piece of text, or of <|endoftext|>')
        return prompt


def read(kind, raw):
    """The body of a request as a ChatBody or a CompletionBody; ApiError for anything else."""
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        # A value that may have several types has an error for each: the longest path is meant.
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda one: len(one['loc']))
        path = [str(part) for part in first['loc']]
        param = '.'.join(part for part in path if '[' not in part and not part.endswith('str'))
        message = f'{param or "the body"}: {first["msg"]}.'
        raise ApiError(400, message, param or None, first['type']) from None
    # What is left are parameters that have no effect here.
    for name, value in body.model_extra.items():
        if name in IGNORED or value is None or value in NEUTRAL.get(name, []):
            continue
        why = 'is not known'
        if name in NEUTRAL:
            why = 'has no effect here; leave it out'
        raise ApiError(400, f'the parameter {name} {why}.', name, 'unsupported_parameter')
    return body


def encode(body, served, n_new):
    """The ids of a body's prompt, no more than the model's window holds."""
    field = 'prompt' if isinstance(body, CompletionBody) else 'messages'
    try:
        ids = body.ids(served, n_new)
    except ValueError as error:
        raise ApiError(400, f'{error}.', field) from None
    if len(ids) > served.window:
        message = (f'the prompt has {len(ids):,} tokens, the model reads {served.window:,}. '
                   'Shorten it; in a chat, truncation="auto" leaves out the oldest turns.')
        raise ApiError(400, message, field, 'context_length_exceeded')
    return ids
