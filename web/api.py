"""What a request of OpenAI's API may say, and its prompt.

A parameter that asks for what is not there is refused.
Source: https://platform.openai.com/docs/api-reference/chat
"""
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from core import conversation
from core.generate import Sampling
from core.readback import from_messages


class ApiError(Exception):
    """A refusal or a failure, in OpenAI's form."""

    def __init__(self, status, message, param=None, code=None):
        self.status = status
        kind = 'server_error' if status >= 500 else 'invalid_request_error'
        error = {'message': message, 'type': kind, 'param': param, 'code': code}
        self.body = {'error': error}


# Parameters without effect, and the values that ask for none.
NEUTRAL = {
    'n': [1], 'best_of': [1], 'echo': [False], 'suffix': [''],
    'logprobs': [False, 0], 'top_logprobs': [0], 'logit_bias': [{}],
    'typical_p': [1], 'repeat_penalty': [1], 'reasoning_effort': ['none'],
    'tools': [[]], 'tool_choice': ['none', 'auto'], 'functions': [[]],
    'modalities': [['text']], 'response_format': [{'type': 'text'}],
}
# Parameters that change no answer.
IGNORED = {
    'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'id',
    'prompt_cache_key', 'parallel_tool_calls', 'cache_prompt', 'keep_alive',
    'chat_id', 'session_id',
}
Text = Annotated[str, Field(min_length=1)]
# A single text counts as a list of one.
OneOrMore = BeforeValidator(lambda one: [one] if isinstance(one, str) else one)


class Body(BaseModel, extra='forbid', strict=True):
    """What all requests may say. null counts as absent."""
    model: str | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # newer
    seed: int | None = Field(None, ge=-2 ** 63, lt=2 ** 63)
    stop: Annotated[list[Text] | None, OneOrMore] = Field(None, max_length=4)
    # the fields of core.generate.Sampling
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    # OpenAI's own
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)

    @model_validator(mode='before')
    def without_neutral(cls, values):
        """Leave out what would change nothing."""
        if not isinstance(values, dict):
            return values  # refused below
        kept = {}
        for name, value in values.items():
            neutral = [None, *NEUTRAL.get(name, [])]
            if name not in IGNORED and value not in neutral:
                kept[name] = value
        return kept

    def sampling(self, config):
        """How to choose tokens: as the request says, else the server."""
        names = set(Sampling._fields)
        chosen = {'temperature': config.temperature, 'top_k': config.top_k}
        chosen |= self.model_dump(include=names, exclude_none=True)
        return Sampling(**chosen)

    def longest(self, config):
        """How many tokens the answer may have."""
        return self.max_completion_tokens or self.max_tokens or config.max_new_tokens


class Part(BaseModel):
    type: Literal['text']
    text: str


class Message(BaseModel):
    # Other fields are ignored.
    role: Literal['system', 'developer', 'user', 'assistant']
    content: str | list[Part] | None = None

    def as_dict(self):
        content = self.content
        if isinstance(content, list):
            content = ''.join(part.text for part in content)
        return {'role': self.role, 'content': content}


class ChatBody(Body):
    """POST /v1/chat/completions. truncation='auto' leaves out old turns."""
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    truncation: Literal['auto', 'disabled'] | None = None

    def ids(self, served, n_new):
        """The prompt; ValueError for a conversation that cannot be."""
        tokenizer = served.opened.tokenizer
        messages = [message.as_dict() for message in self.messages]
        turns = from_messages(messages)
        if turns[-1].role != 'user':
            raise ValueError("the last message is not the user's")
        if self.truncation == 'auto':
            room = served.window - min(n_new, served.window // 2)
            turns = conversation.recent(turns, tokenizer, served.template, room)
        return conversation.prompt(turns, tokenizer, served.template)


class CompletionBody(Body):
    """POST /v1/completions: a prompt of raw text."""
    prompt: Annotated[list[Text], OneOrMore] = Field(min_length=1, max_length=1)

    def ids(self, served, n_new):
        return served.opened.tokenizer.encode(self.prompt[0]).tolist()


def understand(kind, raw, models, config):
    """Read a request: (ChatBody or CompletionBody, the Served, ids)."""
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        # Each type that a value may have gives an error: the longest path is meant.
        first = max(error.errors(), key=lambda one: len(one['loc']))
        path = '.'.join(map(str, first['loc']))
        message = f'{path or "the body"}: {first["msg"]}.'
        if first['type'] == 'extra_forbidden':
            message = f'the parameter {path} is not known, or has no effect here.'
        raise ApiError(400, message, path or None) from None

    # Without a name, the tuned model is meant.
    names = [model.name for model in models]
    name = body.model or names[0]
    if name not in names:
        message = f'there is no model {name!r} here; there is {", ".join(names)}.'
        raise ApiError(404, message, 'model', 'model_not_found')
    served = models[names.index(name)]

    # The prompt must be one, and fit.
    try:
        ids = body.ids(served, body.longest(config))
    except ValueError as error:
        raise ApiError(400, f'{error}.') from None
    if not 0 < len(ids) <= served.window:
        message = (f'the prompt has {len(ids):,} tokens, the model reads 1 to '
                   f'{served.window:,}. In a chat, truncation="auto" makes it fit.')
        raise ApiError(400, message, code='context_length_exceeded')
    return body, served, ids
