"""The web application: which address leads to what, and who may ask."""
import hmac
import ipaddress
import os
from functools import partial
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from configurator import REPOSITORY
from web.answers import Answer
from web.api import ApiError, ChatBody, CompletionBody, understand

MAX_BODY = 1_000_000  # bytes of a request
PAGE = os.path.join(REPOSITORY, 'web', 'chat.html')
# The page may load nothing, and talk to this server alone.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
               "frame-ancestors 'none'")


def make_app(config, models, worker):
    """The Starlette application for the models, a list of Served."""
    allowed = config.allow_host.lower().replace(',', ' ')
    names = {'localhost', *allowed.split()}
    app = Starlette(
        routes=[
            Route('/', page),
            Route('/health', health),
            Route('/v1/models', list_models),
            Route('/v1/chat/completions', partial(answer, ChatBody), methods=['POST']),
            Route('/v1/completions', partial(answer, CompletionBody), methods=['POST']),
        ],
        middleware=[Middleware(guard, names, os.environ.get('GPT2_API_KEY', ''))],
        # A client that has disconnected reads no answer.
        exception_handlers={ApiError: refuse, ClientDisconnect: lambda *_: Response()},
    )
    app.state.config = config
    app.state.models = models
    app.state.worker = worker
    return app


def refuse(http, error):
    return JSONResponse(error.body, error.status)


def guard(app, names, key):
    """ASGI middleware that refuses other sites and a wrong API key."""
    async def guarded(scope, receive, send):
        http = Request(scope)
        try:
            check(http, names, key)
            await app(scope, receive, send)
        except ApiError as error:
            await refuse(http, error)(scope, receive, send)

    return guarded


def check(http, names, key):
    """Raise ApiError for a request that is refused."""
    host = http.headers.get('host', '')
    origin = http.headers.get('origin')
    given = http.headers.get('authorization', '').removeprefix('Bearer ')
    if not is_ours(host, names):
        raise ApiError(403, f'the name {host!r} is not allowed: see --allow_host.')
    if origin and origin.split('://')[-1] != host:
        raise ApiError(403, f'pages of {origin!r} may not use this server.')
    is_right = hmac.compare_digest(given.encode('latin-1'), key.encode())
    if key and http.url.path.startswith('/v1') and not is_right:
        message = 'missing or wrong API key: expected that of GPT2_API_KEY.'
        raise ApiError(401, message, code='invalid_api_key')


def is_ours(host, names):
    """Whether a Host header names this server.

    A site can give this machine a name of its own (DNS rebinding).
    """
    try:
        name = urlsplit(f'//{host}').hostname or ''
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def answer(kind, http):
    """Have a model answer a request."""
    state = http.app.state
    # uvicorn does not limit the size of a body.
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise ApiError(413, f'the request has more than {MAX_BODY:,} bytes.')
    # In a thread: others are answered while a long request is read.
    body, model, ids = await run_in_threadpool(
        understand, kind, bytes(raw), state.models, state.config)
    written = Answer(body, ids, model, state.config)
    if not state.worker.submit(model.batch, written.request):
        raise ApiError(429, 'too many requests are waiting. Try again.', code='queue_full')
    if not body.stream:
        return JSONResponse(await written.whole(http))
    headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
    return StreamingResponse(written.stream(), 200, headers, 'text/event-stream')


async def list_models(http):
    entries = [model.entry for model in http.app.state.models]
    return JSONResponse({'object': 'list', 'data': entries})


async def health(http):
    batches = [model.batch for model in http.app.state.models]
    writing = sum(batch.busy for batch in batches)
    waiting = sum(len(batch.waiting) for batch in batches)
    return JSONResponse({'status': 'ok', 'writing': writing, 'waiting': waiting})


async def page(http):
    headers = {'Content-Security-Policy': PAGE_POLICY, 'Cache-Control': 'no-cache'}
    return FileResponse(PAGE, headers=headers)
