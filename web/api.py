"""What a request of OpenAI's API may say, and the prompt that it asks for.

A parameter that would have no effect here is refused, never ignored in silence.
Source: https://platform.openai.com/docs/api-reference/chat
"""
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.responses import JSONResponse

from core import conversation
from core.generate import Sampling
from core.readback import from_messages


class ApiError(Exception):
    """A refusal or a failure, in the form that OpenAI's clients expect."""

    def __init__(self, status, message, param=None, code=None):
        self.status = status
        kind = 'server_error' if status >= 500 else 'invalid_request_error'
        self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}

    def response(self):
        return JSONResponse(self.body, self.status)


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
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=100)]
# A single text counts as a list of one.
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Body(BaseModel, extra='forbid', strict=True):
    """What both kinds of request may say; null counts as absent."""
    model: str | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # the newer name of max_tokens
    seed: Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)] | None = None
    stop: Annotated[list[StopText], Field(max_length=4), OneOrMore] | None = None
    # the fields of core.generate.Sampling
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Natural | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Natural | None = None
    # OpenAI's own
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None

    @model_validator(mode='before')
    def without_neutral(cls, values):
        """Leave out what would change nothing."""
        if not isinstance(values, dict):
            return values  # refused below
        kept = {}
        for name, value in values.items():
            if name not in IGNORED and value not in NEUTRAL.get(name, ()):
                kept[name] = value
        return kept

    def sampling(self, config):
        """How to choose tokens: as the request says, and otherwise as the server does."""
        chosen = {'temperature': config.temperature, 'top_k': config.top_k}
        chosen |= self.model_dump(include=set(Sampling._fields), exclude_none=True)
        return Sampling(**chosen)

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
    content: str | list[Part] | None = None

    def as_dict(self):
        content = self.content
        if isinstance(content, list):
            content = ''.join(part.text for part in content)
        return {'role': self.role, 'content': content}


class ChatBody(Body):
    """POST /v1/chat/completions. truncation: 'auto' leaves out the oldest turns that do not fit."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    truncation: Literal['auto', 'disabled'] | None = None

    def ids(self, served, n_new):
        """The ids of the prompt; ValueError for a conversation that cannot be."""
        tokenizer = served.opened.tokenizer
        turns = from_messages([message.as_dict() for message in self.messages])
        if turns[-1].role != 'user':
            raise ValueError("the last message is the assistant's, expected the user's")
        if self.truncation == 'auto':
            room = served.window - min(n_new, served.window // 2)
            turns = conversation.recent(turns, tokenizer, served.template, room)
        return conversation.prompt(turns, tokenizer, served.template)


class CompletionBody(Body):
    """POST /v1/completions: a prompt of raw text."""
    prompt: Annotated[list[Text], Field(min_length=1, max_length=1), OneOrMore]

    def ids(self, served, n_new):
        """The ids of the prompt."""
        return served.opened.tokenizer.encode(self.prompt[0]).tolist()


def read(kind, raw):
    """The body of a request, a ChatBody or a CompletionBody; ApiError for anything else."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        # A value that may have several types has an error for each: the longest path is meant.
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda one: len(one['loc']))
    path = '.'.join(str(part) for part in first['loc'])
    message = f'{path or "the body"}: {first["msg"]}.'
    if first['type'] == 'extra_forbidden':
        message = f'the parameter {path} is not known, or has no effect here. Leave it out.'
    raise ApiError(400, message, path or None, first['type'])


def encode(body, served, n_new):
    """The ids of a body's prompt, no more than the model's window holds."""
    try:
        ids = body.ids(served, n_new)
    except ValueError as error:
        raise ApiError(400, f'{error}.') from None
    if len(ids) > served.window:
        message = (f'the prompt has {len(ids):,} tokens, the model reads {served.window:,}. '
                   'Shorten it; in a chat, truncation="auto" leaves out the oldest turns.')
        raise ApiError(400, message, code='context_length_exceeded')
    return ids
