"""Chat with a model in the browser, or through OpenAI's API.

    pip install -r requirements-serve.txt
    python serve.py --init_from=out/oasst   # open http://127.0.0.1:8000/
    python serve.py --init_from=out/oasst --compare=gpt2-medium

Serves POST /v1/chat/completions and /v1/completions, streamed or whole, /v1/models and
/health. What is sent is ordinary text: nobody can forge a turn. If the environment has
GPT2_API_KEY, clients must send it.
"""
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

try:
    import uvicorn

    from web.app import make_app
except ImportError as error:
    print(f'serve.py needs Starlette and uvicorn ({error}). '
          'Install them: pip install -r requirements-serve.txt', file=sys.stderr)
    sys.exit(2)

import configurator
from configurator import Count, Natural, Range, UserError
from core import checkpoint, tokenfile
from core.conversation import TEMPLATES
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from formats import quiz
from web.batching import Batch, Worker

CLOSING_S = 3  # how long answers may go on after Ctrl-C
# What the page offers to ask, if the model's own data is gone.
EXAMPLES = ["What's the capital of France?", 'Why is the sky blue?', 'Write a haiku.']


@dataclass(frozen=True)
class Config:
    # the models
    init_from: str = 'resume'  # the run saved last, a folder, or a hub name
    out_dir: str = 'out'  # where runs are
    which: Literal['best', 'last'] = 'best'  # checkpoint
    compare: str = ''  # a second model, to show beside the first
    template: Literal['', *TEMPLATES] = ''  # '' is the model's own, or question
    # what a request gets unless it asks for something else
    max_new_tokens: Count = 256  # the longest answer
    temperature: Annotated[float, Range(0, 2)] = 0.8  # 0 takes the likeliest token
    top_k: Natural = 200  # keep the k most likely tokens; 0 keeps all
    # limits
    batch_size: Count = 8  # answers that a model writes at the same time
    queue: Natural = 64  # requests that may wait; more are refused
    remember: Natural = 4  # texts kept in memory, for a chat's next turn
    # who may ask
    host: str = '127.0.0.1'  # 0.0.0.0 lets in all who reach this machine
    port: Annotated[int, Range(0, 65535)] = 8000  # 0 takes any free one
    allow_host: str = ''  # more names of this machine, with commas
    # the machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'  # of weights


class Served(NamedTuple):
    name: str  # what clients call it
    opened: checkpoint.Opened
    template: str
    window: int  # positions
    batch: Batch
    entry: dict  # for /v1/models


def open_served(config, init_from, role, template=''):
    """Open a model. role: tuned or compare. template: '' for its own."""
    device = pick_device(config.device)
    tags = bool(template) and TEMPLATES[template].tags
    opened = checkpoint.open_model(init_from, config.out_dir, config.which, tags=tags)
    template = template or opened.template or 'question'
    dtype = prepare(opened.model, device, config.dtype)
    name = opened.folder if init_from == 'resume' else os.path.normpath(init_from)
    about = f'{opened.description}, on {device} in {dtype}, template {template}'
    print(f'{name}: {about}', flush=True)
    window = opened.model.config.block_size
    batch = Batch(opened.model, config.batch_size, config.queue, config.remember)
    defaults = {'temperature': config.temperature, 'max_tokens': config.max_new_tokens}
    entry = {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'local', 'role': role,
             'description': opened.description, 'template': template, 'window': window,
             'examples': examples(opened), 'defaults': defaults}
    return Served(name, opened, template, window, batch, entry)


def examples(opened):
    """Three short questions of the model's validation data, if it is still there."""
    if not opened.checkpoint:
        return EXAMPLES
    config = opened.checkpoint.config
    found = []
    # That it is gone is no reason to refuse the model.
    with contextlib.suppress(UserError, LookupError):
        folder = tokenfile.find_folders(config['dataset'], config['data_dir'])[0]
        template = tokenfile.read_meta(folder)['template']
        split = tokenfile.Split([folder], 'val', vocab_size=opened.tokenizer.vocab_size)
        for question in quiz.from_split(split, opened.tokenizer, template, 50):
            first = question.turns[0]
            if len(first.text) < 80 and not first.context:
                found.append(first.text)
    return [*found, *EXAMPLES][:3]


def allow_connections():
    """Allow as many open files, one for each client, as we may have."""
    # Windows has no such limit, and a Mac may refuse it.
    with contextlib.suppress(ImportError, ValueError):
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host, port):
    """A socket that listens there; UserError if it cannot."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(f'cannot listen on {host}:{port}: {error.strerror}. Use --port=N; '
                        '0 takes any that is free.') from None


def make_server(config):
    """Open the models. Returns uvicorn's server and the Worker."""
    models = [open_served(config, config.init_from, 'tuned', config.template)]
    if config.compare:
        models.append(open_served(config, config.compare, 'compare'))
    worker = Worker([model.batch for model in models])
    settings = uvicorn.Config(
        make_app(config, models, worker), lifespan='off', ws='none', log_level='error',
        timeout_graceful_shutdown=CLOSING_S + 2)
    return uvicorn.Server(settings), worker


def serve(server, worker, listening):
    """Answer until the server is told to exit."""
    def answer():
        server.run(sockets=[listening])
        worker.stop()

    # Compute in this thread, which has loaded the models: another thread has its own
    # team of OpenMP threads, and two teams would wait for each other.
    threading.Thread(target=answer, daemon=True).start()
    worker.run()


def main(argv):
    config = configurator.load(Config, argv)
    keep_freed_memory()
    allow_connections()
    # The port first: loading a model takes longer.
    with listen(config.host, config.port) as listening:
        server, worker = make_server(config)

        def stop(number, frame):
            logging.disable()  # about clients that are cut off now
            server.should_exit = True
            timer = threading.Timer(CLOSING_S, worker.end_all)
            timer.daemon = True
            timer.start()

        # Ctrl-C, and what service managers send
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        address = f'http://{config.host}:{listening.getsockname()[1]}'
        print(f'chat: {address}/   API: {address}/v1   Ctrl-C stops', flush=True)
        serve(server, worker, listening)


if __name__ == '__main__':
    configurator.run(main)
