"""The web application: which address leads to what."""
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from queue import Full

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from configurator import REPOSITORY
from web.answers import Job
from web.api import ApiError, ChatBody, CompletionBody, encode, read
from web.guard import Guard

MAX_BODY = 1_000_000  # bytes of a request
# The page is one file: it may load nothing, and talk to this server alone.
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
               "frame-ancestors 'none'")


def make_app(config, models, worker):
    """The Starlette application that serves the models, a list of Served."""
    readers = ThreadPoolExecutor(1)  # one thread: the other cores are the model's
    with open(os.path.join(REPOSITORY, 'web', 'chat.html'), encoding='utf-8') as file:
        html = file.read()

    def find(name):
        """The model of that name; without a name, the first."""
        for model in models:
            if name in (None, model.name):
                return model
        names = ', '.join(model.name for model in models)
        raise ApiError(404, f'there is no model {name!r} here; there is {names}.',
                       'model', 'model_not_found')

    def read_request(kind, raw):
        body = read(kind, raw)
        served = find(body.model)
        ids = encode(body, served, body.longest(config))
        return body, ids, served

    async def answer(http, kind):
        """The Job that answers a request, which is on its way in."""
        # uvicorn does not limit the size of a body.
        raw = bytearray()
        async for chunk in http.stream():
            raw += chunk
            if len(raw) > MAX_BODY:
                raise ApiError(413, f'the request has more than {MAX_BODY:,} bytes.',
                               code='request_too_large', headers={'Connection': 'close'})
        # A long request takes long to parse and to encode. The event loop must not wait for it, or
        # nobody would be answered meanwhile.
        loop = asyncio.get_running_loop()
        body, ids, served = await loop.run_in_executor(readers, read_request, kind, bytes(raw))
        job = Job(body, ids, served, config)
        try:
            worker.submit(served.batch, job.request)
        except Full:
            message = (f'all {config.batch_size} places are taken, and {config.queue} requests '
                       'wait already. Try again in a moment.')
            raise ApiError(429, message, code='queue_full', headers={'Retry-After': '1'}) from None
        return job

    async def chat_completions(http):
        return await answer(http, ChatBody)

    async def completions(http):
        return await answer(http, CompletionBody)

    async def list_models(http):
        entries = [model.entry(config) for model in models]
        return JSONResponse({'object': 'list', 'data': entries})

    async def one_model(http):
        return JSONResponse(find(http.path_params['name']).entry(config))

    async def health(http):
        return JSONResponse({
            'status': 'ok',
            'writing': sum(model.batch.busy for model in models),
            'waiting': sum(len(model.batch.waiting) for model in models),
            'places': config.batch_size * len(models),
        })

    async def page(http):
        headers = {'Content-Security-Policy': PAGE_POLICY, 'Cache-Control': 'no-cache'}
        return HTMLResponse(html, headers=headers)

    return Starlette(
        routes=[
            Route('/', page),
            Route('/health', health),
            Route('/v1/models', list_models),
            Route('/v1/models/{name:path}', one_model),
            Route('/v1/chat/completions', chat_completions, methods=['POST']),
            Route('/v1/completions', completions, methods=['POST']),
        ],
        middleware=[Middleware(Guard, config.allow_host, os.environ.get('GPT2_API_KEY', ''))],
        exception_handlers={ApiError: refuse, HTTPException: refuse_path, ClientDisconnect: drop},
    )


def refuse(http, error):
    return error.response()


def refuse_path(http, error):
    """Answer for a path or a method that there is not."""
    message = f'{http.method} {http.url.path}: {error.detail}.'
    return ApiError(error.status_code, message).response()


def drop(http, error):
    """Nobody is there to read an answer."""
    return Response(status_code=499)
