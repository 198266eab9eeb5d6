"""The web application: which address leads to what."""
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Full

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from configurator import REPOSITORY
from web.answers import Answer
from web.api import ApiError, ChatBody, CompletionBody, encode, read
from web.guard import Guard

MAX_BODY = 1_000_000  # bytes of a request
READER = ThreadPoolExecutor(1)  # of requests; one thread, because the other cores are the model's
PAGE = os.path.join(REPOSITORY, 'web', 'chat.html')
# The page is one file: it may load nothing, and talk to this server alone.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
               "frame-ancestors 'none'")


def make_app(config, models, worker):
    """The Starlette application that serves the models, a list of Served."""
    app = Starlette(
        routes=[
            Route('/', page),
            Route('/health', health),
            Route('/v1/models', list_models),
            Route('/v1/chat/completions', partial(answer, ChatBody), methods=['POST']),
            Route('/v1/completions', partial(answer, CompletionBody), methods=['POST']),
        ],
        middleware=[Middleware(Guard, config.allow_host, os.environ.get('GPT2_API_KEY', ''))],
        exception_handlers={ApiError: refuse, ClientDisconnect: drop},
    )
    app.state.config = config
    app.state.models = models
    app.state.worker = worker
    return app


# ---- answers ----

async def answer(kind, http):
    """Have a model answer a request that is on its way in."""
    state = http.app.state
    # uvicorn does not limit the size of a body.
    raw = bytearray()
    async for chunk in http.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            raise ApiError(413, f'the request has more than {MAX_BODY:,} bytes.',
                           code='request_too_large')
    # Others are answered while a long request is parsed and encoded.
    loop = asyncio.get_running_loop()
    body, model, ids = await loop.run_in_executor(READER, understand, kind, bytes(raw), state)
    written = Answer(body, ids, model, state.config)
    try:
        state.worker.submit(model.batch, written.request)
    except Full:
        raise ApiError(429, 'all places are taken, and as many requests wait as may. '
                       'Try again in a moment.', code='queue_full') from None
    if not body.stream:
        return JSONResponse(await written.whole(http))
    headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
    return StreamingResponse(written.stream(), 200, headers, 'text/event-stream')


def understand(kind, raw, state):
    """The body of a request, the model that is asked, and the ids of the prompt."""
    body = read(kind, raw)
    for model in state.models:
        if body.model in (None, model.name):
            return body, model, encode(body, model, body.longest(state.config))
    names = ', '.join(model.name for model in state.models)
    raise ApiError(404, f'there is no model {body.model!r} here; there is {names}.',
                   'model', 'model_not_found')


# ---- what there is ----

async def list_models(http):
    entries = [model.entry for model in http.app.state.models]
    return JSONResponse({'object': 'list', 'data': entries})


async def health(http):
    state = http.app.state
    return JSONResponse({
        'status': 'ok',
        'writing': sum(model.batch.busy for model in state.models),
        'waiting': sum(len(model.batch.waiting) for model in state.models),
        'places': state.config.batch_size * len(state.models),
    })


async def page(http):
    headers = {'Content-Security-Policy': PAGE_POLICY, 'Cache-Control': 'no-cache'}
    return FileResponse(PAGE, headers=headers)


# ---- refusals ----

def refuse(http, error):
    return error.response()


def drop(http, error):
    """Nobody is there to read an answer."""
    return Response(status_code=499)
