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
# The page is one file: it may load nothing, and talk to this server alone.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
               "frame-ancestors 'none'")


def make_app(config, models, worker):
    """The Starlette application that serves the models, a list of Served."""
    # Names of this machine that a request may use.
    names = {'localhost', *config.allow_host.lower().replace(',', ' ').split()}
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


# ---- who may ask ----

def guard(app, names, key):
    """ASGI middleware that refuses other sites' pages, and whoever lacks the API key."""
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
    given = http.headers.get('authorization', '').removeprefix('Bearer ').encode('latin-1')
    if not is_ours(host, names):
        raise ApiError(403, f'this server does not answer to the name {host!r}. '
                            'To allow a name, start it with --allow_host=NAME.')
    if origin and origin.split('://')[-1] != host:
        raise ApiError(403, f'pages of {origin!r} may not use this server.')
    needs_key = key and http.url.path.startswith('/v1')
    if needs_key and not hmac.compare_digest(given, key.encode()):
        message = 'missing or wrong API key. Expected the value of GPT2_API_KEY.'
        raise ApiError(401, message, code='invalid_api_key')


def is_ours(host, names):
    """Whether a Host header names this server: by an address, localhost or an allowed name.

    A site can point a name of its own at this machine (DNS rebinding), and then its pages
    would count as ours.
    """
    try:
        name = urlsplit(f'//{host}').hostname or ''
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:  # neither a name of ours nor an address
        return False


# ---- what there is ----

async def answer(kind, http):
    """Have a model answer a request that is on its way in."""
    state = http.app.state
    # uvicorn does not limit the size of a body.
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise ApiError(413, f'the request has more than {MAX_BODY:,} bytes.')
    # Others are answered while a long request is parsed and encoded.
    body, model, ids = await run_in_threadpool(
        understand, kind, bytes(raw), state.models, state.config)
    written = Answer(body, ids, model, state.config)
    if not state.worker.submit(model.batch, written.request):
        raise ApiError(429, 'all places are taken, and as many requests wait as may. '
                       'Try again in a moment.', code='queue_full')
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
