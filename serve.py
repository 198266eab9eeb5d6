"""A chat in the browser, and OpenAI's interface to it, of any model that sample.py opens.

    pip install -r requirements-serve.txt
    python serve.py --init_from=out/oasst                           # then open http://127.0.0.1:8000/
    python serve.py --init_from=out/oasst --compare=gpt2-medium     # the untuned model beside it

POST /v1/chat/completions and /v1/completions, streamed and whole; GET /v1/models and /health.
What is sent is always ordinary text: nobody can write a tag and forge a turn.
"""
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from core import checkpoint
import configurator
from core import conversation
from web.batching import Batch, Full, Worker
from configurator import REPOSITORY, UserError
from core.generate import DTYPES, prepare
from core.kernels import keep_freed_memory
from model import pick_device

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse
    from starlette.exceptions import HTTPException

    from web.api import ApiError, ChatBody, CompletionBody, EventStream, Job, error_response, whole_unless_gone
except ImportError as error:
    print(f'serve.py needs FastAPI and uvicorn ({error}). Install them: pip install -r requirements-serve.txt', file=sys.stderr)
    sys.exit(2)

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
CSP = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = 'resume'  # resume (a checkpoint in out_dir), a folder, or a hub name
    out_dir: str = 'out'       # where the checkpoint is
    which: str = 'best'        # best: by val_loss, where there is one; last: as training left it
    compare: str = ''          # a second model, shown beside the first: a folder or a hub name
    template: str = ''         # xml, alpaca, plain, question or dialogpt; '' is the checkpoint's own, question without one
    # what a request that does not say gets
    max_new_tokens: int = 256  # the longest answer
    temperature: float = 0.8   # 0 always takes the likeliest token
    top_k: int = 200           # of so many tokens at most; 0 of all
    # limits
    batch_size: int = 8        # answers written at a time, of each model
    queue: int = 64            # requests that may wait for a place; more are refused
    timeout_s: float = 600.0   # an answer that takes longer, waiting included, ends where it is
    max_body: int = 1_000_000  # bytes of a request
    remember: int = 4          # texts whose keys and values are kept for the next turn of the chat
    # the machine
    host: str = '127.0.0.1'    # where to listen; 0.0.0.0 lets everybody in who can reach this machine
    port: int = 8000           # 0 takes a free one
    device: str = 'auto'       # auto, cpu, cuda, cuda:1, mps
    dtype: str = 'auto'        # of the weights: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16, int8
    compile: bool = False      # with --dtype=int8: a faster kernel for one answer at a time; needs a C++ compiler

    def problems(self):
        """What cannot work, a sentence each."""
        if self.template not in ('', *conversation.TEMPLATES):
            yield f'template={self.template!r}: expected one of {", ".join(conversation.TEMPLATES)}.'
        if self.which not in ('best', 'last'):
            yield f'which={self.which!r}: expected best or last.'
        if self.dtype not in DTYPES:
            yield f'dtype={self.dtype!r}: expected one of {", ".join(DTYPES)}.'
        if min(self.max_new_tokens, self.batch_size, self.max_body) < 1 or not 0 < self.timeout_s < float('inf'):
            yield 'max_new_tokens, batch_size and max_body must be at least 1, timeout_s above 0.'
        if min(self.queue, self.remember, self.top_k) < 0 or not 0 <= self.temperature <= 2:
            yield 'queue, remember and top_k must not be negative, temperature between 0 and 2.'
        if not 0 <= self.port < 65536:
            yield f'port={self.port}: expected 0 to 65535.'


class Served(NamedTuple):
    """A model that answers, under a name."""
    name: str
    role: str  # tuned, or compare
    opened: checkpoint.Opened
    template: str
    batch: Batch
    defaults: dict  # what the page begins with

    def entry(self):
        """What /v1/models says of it."""
        return {'id': self.name, 'object': 'model', 'created': STARTED, 'owned_by': 'local', 'role': self.role,
                'description': self.opened.description, 'template': self.template,
                'window': self.opened.model.config.block_size, 'defaults': self.defaults}


STARTED = int(time.time())


def open_served(config, name, role, device):
    """The Served model of a name."""
    opened = checkpoint.open_model(name, config.out_dir, config.which, tags=role == 'tuned' and config.template == 'xml')
    template = (config.template if role == 'tuned' else '') or opened.template or 'question'
    if conversation.TEMPLATES[template].tags and not opened.tokenizer.tags:
        raise UserError(f'{opened.description} was tuned without the tags that the template {template!r} needs. '
                        f'Its own is {opened.template!r}.')
    dtype = prepare(opened.model, device, config.dtype, config.compile)
    name = os.path.normpath(config.out_dir if name == 'resume' else name)
    print(f'{name}: {opened.description}, on {device} in {dtype}, template {template}', flush=True)
    return Served(name, role, opened, template, Batch(opened.model, config.batch_size, config.queue, config.remember),
                  {'temperature': config.temperature, 'max_tokens': config.max_new_tokens})


# ---- the server ----

class Guard:
    """ASGI middleware: a body of at most so many bytes, and no requests from pages of other places."""

    def __init__(self, app, config):
        self.app, self.max_body, self.local = app, config.max_body, config.host in LOOPBACK

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        headers = {name: value.decode('latin-1') for name, value in scope['headers']}
        host, origin = headers.get(b'host', ''), headers.get(b'origin')
        name = host.rsplit(':', 1)[0] if not host.endswith(']') else host
        if self.local and name.strip('[]') not in LOOPBACK or origin and origin.split('://')[-1] != host:
            refusal = error_response('this server answers its own page and programs of this machine only.', 403, code='forbidden')
            return await refusal(scope, receive, send)
        body, more = b'', scope['method'] == 'POST'
        while more and len(body) <= self.max_body:
            message = await receive()
            if message['type'] == 'http.disconnect':
                return
            body, more = body + message.get('body', b''), message.get('more_body', False)
        if len(body) > self.max_body:
            refusal = error_response(f'the request has more than {self.max_body:,} bytes.', 413, code='request_too_large',
                                     Connection='close')
            return await refusal(scope, receive, send)
        given = False

        async def receive_again():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {'type': 'http.request', 'body': body, 'more_body': False}
        await self.app(scope, receive_again, send)


def make_app(config, models, worker):
    """The FastAPI application that serves the models, a list of Served."""
    app = FastAPI(title='chat with a GPT-2', docs_url=None, redoc_url=None)  # those pages load scripts from outside
    app.add_middleware(Guard, config=config)
    by_name = {model.name: model for model in models}

    def find(name):
        if name is not None and name not in by_name:
            raise ApiError(404, f'there is no model {name!r} here; there is {", ".join(by_name)}.', 'model', 'model_not_found')
        return by_name[name] if name is not None else models[0]

    async def answer(body, http, chat):
        body.check()
        served = find(body.model)
        job = Job(body, served, config, chat)
        try:
            worker.submit(served.batch, job.requests)
        except Full:
            return error_response(f'all {config.batch_size} places are taken, and {len(served.batch.waiting)} requests wait already. '
                                  'Try again in a moment.', 429, code='queue_full', **{'Retry-After': '1'})
        if body.stream:
            return EventStream(job, bool((body.stream_options or {}).get('include_usage')))
        return await whole_unless_gone(job, http)

    @app.get('/', include_in_schema=False)
    async def page():
        return FileResponse(os.path.join(REPOSITORY, 'web', 'chat.html'), headers={'Content-Security-Policy': CSP, 'Cache-Control': 'no-cache'})

    @app.get('/health')
    async def health():
        return {'status': 'ok', 'writing': sum(m.batch.busy for m in models), 'waiting': sum(len(m.batch.waiting) for m in models),
                'places': config.batch_size * len(models)}

    @app.get('/v1/models')
    async def list_models():
        return {'object': 'list', 'data': [model.entry() for model in models]}

    @app.get('/v1/models/{name:path}')
    async def one_model(name: str):
        return find(name).entry()

    @app.post('/v1/chat/completions')
    async def chat_completions(body: ChatBody, http: Request):
        return await answer(body, http, chat=True)

    @app.post('/v1/completions')
    async def completions(body: CompletionBody, http: Request):
        return await answer(body, http, chat=False)

    @app.exception_handler(ApiError)
    async def refused(http, error):
        return error_response(error.message, error.status, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(http, error):
        first = max(error.errors(), key=lambda one: len(one['loc']))  # of a value of several types, the one that was meant
        # in between stand the names of the types that a value might have been of, such as list[constrained-str]
        param = '.'.join(str(part) for part in first['loc'][1:] if isinstance(part, int) or part.isidentifier() and part != 'str')
        if first['type'] == 'json_invalid':
            return error_response(f"the body is not JSON: {first['ctx']['error']}.", 400)
        return error_response(f"{param or 'the body'}: {first['msg']}.", 400, param or None, first['type'])

    @app.exception_handler(HTTPException)
    async def not_here(http, error):
        return error_response(f'{http.method} {http.url.path}: {error.detail}.', error.status_code)

    @app.exception_handler(Exception)
    async def failed(http, error):
        return error_response('the server failed; its terminal says why.', 500)
    return app


def listen(host, port):
    """A socket that listens there; UserError where it cannot."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET, backlog=2048)
    except OSError as error:
        raise UserError(f'cannot listen on {host}:{port}: {error.strerror}. Choose another with --port=N, or 0 for any that is free.') from None


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    with listen(config.host, config.port) as listening:
        models = [open_served(config, config.init_from, 'tuned', device)]
        if config.compare:
            models.append(open_served(config, config.compare, 'compare', device))
            if models[0].name == models[1].name:
                raise UserError(f'compare={config.compare!r} is the model itself. Name another, such as gpt2-medium.')
        worker = Worker([model.batch for model in models])
        address = f'http://{f"[{config.host}]" if ":" in config.host else config.host}:{listening.getsockname()[1]}'
        print(f'chat: {address}/   interface: {address}/v1   Ctrl-C stops', flush=True)
        server = uvicorn.Server(uvicorn.Config(make_app(config, models, worker), log_level='warning', server_header=False,
                                               timeout_graceful_shutdown=2))

        def answer():
            try:
                server.run(sockets=[listening])
            finally:
                worker.stop()
        # The models compute in this thread, which has loaded them: OpenMP has a team of threads for each one that
        # computes, and two teams on the same cores wait for each other.
        answering = threading.Thread(target=answer)
        answering.start()
        try:
            worker.run()
        finally:
            server.should_exit = True
            answering.join()


if __name__ == '__main__':
    configurator.run(main)
