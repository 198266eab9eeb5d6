"""Chat with a model in the browser, or through OpenAI's API.

    pip install -r requirements-serve.txt
    python serve.py --init_from=out/oasst                         # open http://127.0.0.1:8000/
    python serve.py --init_from=out/oasst --compare=gpt2-medium   # with the untuned model beside it

Serves whatever sample.py opens: POST /v1/chat/completions and /v1/completions, streamed or whole,
GET /v1/models and /health. What is sent counts as ordinary text: nobody can write a tag and forge
a turn. If the environment variable GPT2_API_KEY is set, clients must send it as their API key.
"""
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

try:
    import uvicorn

    from web.app import make_app
    from web.guard import MAX_WAITING, Connection
except ImportError as error:
    print(f'serve.py needs Starlette and uvicorn ({error}). '
          'Install them: pip install -r requirements-serve.txt', file=sys.stderr)
    sys.exit(2)

import configurator
from configurator import Count, Natural, Range, UserError
from core import checkpoint, readback, tokenfile
from core.conversation import TEMPLATES
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from web.batching import Batch, Worker

CLOSING_S = 3  # how long answers may go on after Ctrl-C or SIGTERM
STARTED = int(time.time())


@dataclass(frozen=True)
class Config:
    # the models
    init_from: str = 'resume'  # resume (the run saved last under out_dir), a folder, or a hub name
    out_dir: str = 'out'       # where runs are
    which: Literal['best', 'last'] = 'best'  # checkpoint: lowest val_loss, or last of the run
    compare: str = ''          # a second model to show beside the first: a folder or a hub name
    template: Literal['', *TEMPLATES] = ''  # '' is the model's own, or question if it has none
    # what a request gets unless it asks for something else
    max_new_tokens: Count = 256  # the longest answer
    temperature: Annotated[float, Range(0, 2)] = 0.8  # 0 always takes the likeliest token
    top_k: Natural = 200       # keep the k most likely tokens; 0 keeps all
    # limits
    batch_size: Count = 8      # answers that each model writes at the same time
    queue: Natural = 64        # requests that may wait for a place; more are refused
    remember: Natural = 4      # texts whose keys and values are kept for the next turn of a chat
    # who may ask
    host: str = '127.0.0.1'    # where to listen; 0.0.0.0 lets in everybody who reaches this machine
    port: Annotated[int, Range(0, 65535)] = 8000  # 0 takes any free one
    allow_host: str = ''       # names of this machine beside localhost, separated by commas
    # the machine
    device: str = 'auto'       # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'  # of the weights
    compile: bool = False      # with int8: a faster kernel, which needs a C++ compiler


class Served(NamedTuple):
    """A model that can be asked by its name."""
    name: str
    role: str  # tuned or compare
    opened: checkpoint.Opened
    template: str
    batch: Batch
    examples: list  # questions to try, of its own data

    @property
    def window(self):
        return self.opened.model.config.block_size

    def entry(self, config):
        """What /v1/models says about the model."""
        return {
            'id': self.name,
            'object': 'model',
            'created': STARTED,
            'owned_by': 'local',
            'role': self.role,
            'description': self.opened.description,
            'template': self.template,
            'window': self.window,
            'examples': self.examples,
            'defaults': {'temperature': config.temperature, 'max_tokens': config.max_new_tokens},
        }


def open_served(config, init_from, role, device):
    """Open a model. --template is for the tuned one."""
    template = config.template if role == 'tuned' else ''
    tags = bool(template) and TEMPLATES[template].tags
    opened = checkpoint.open_model(init_from, config.out_dir, config.which, tags=tags)
    template = template or opened.template or 'question'
    dtype = prepare(opened.model, device, config.dtype, config.compile)
    name = opened.folder if init_from == 'resume' else os.path.normpath(init_from)
    print(f'{name}: {opened.description}, on {device} in {dtype}, template {template}', flush=True)
    batch = Batch(opened.model, config.batch_size, config.queue, config.remember)
    return Served(name, role, opened, template, batch, examples(opened))


def examples(opened):
    """The first short questions of the data that the model was tuned on, three at most."""
    found = []
    if not opened.checkpoint:
        return found
    config = opened.checkpoint.config
    try:
        folder = tokenfile.find_folders(config['dataset'], config['data_dir'])[0]
        template = tokenfile.read_meta(folder)['template']
        split = tokenfile.Split([folder], 'val', 'response', opened.tokenizer.vocab_size)
        for i in range(min(len(split), 200)):
            text = readback.decode(*split[i], opened.tokenizer, template)[0].text
            if len(text) < 80 and text not in found:
                found.append(text)
            if len(found) == 3:
                break
    except (UserError, ValueError, KeyError):
        pass  # the data is no longer there, or is not of conversations: the page has its own
    return found


def open_all(config):
    """The tuned model, and the one to compare it with."""
    device = pick_device(config.device)
    models = [open_served(config, config.init_from, 'tuned', device)]
    if config.compare:
        models.append(open_served(config, config.compare, 'compare', device))
        if models[0].name == models[1].name:
            raise UserError(f'compare={config.compare!r} is the model itself. '
                            'Name another one, such as gpt2-medium.')
    return models


class Server(uvicorn.Server):
    async def startup(self, sockets):
        """Accept 128 connections at a time (asyncio's backlog), but let more of them wait."""
        await super().startup(sockets)
        for listening in sockets:
            listening.listen(2048)


def make_server(config, models, worker):
    """uvicorn's server around the application."""
    places = len(models) * (config.batch_size + config.queue)
    return Server(uvicorn.Config(
        make_app(config, models, worker),
        http=Connection,
        ws='none',
        lifespan='off',
        log_level='error',
        access_log=False,
        server_header=False,
        # asyncio accepts as many connections as this at a time, see Server.
        backlog=128,
        h11_max_incomplete_event_size=16_384,
        limit_concurrency=2 * MAX_WAITING + places,
        timeout_graceful_shutdown=CLOSING_S + 2,
    ))


def listen(host, port):
    """A socket that listens there; UserError if it cannot."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f'cannot listen on {host}:{port}: {error.strerror}. '
                        'Choose another port with --port=N; 0 takes any that is free.') from None


def stop_on_signals(server, worker):
    """On Ctrl-C or SIGTERM, let the answers end that are being written, and then the process."""
    def stop(number, frame):
        # The second signal ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        server.should_exit = True
        timer = threading.Timer(CLOSING_S, worker.end_all)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def serve(server, worker, listening):
    """Answer until the server is told to exit."""
    def answer():
        try:
            server.run(sockets=[listening])
        finally:
            worker.stop()

    # The models compute in this thread, which has loaded them: each thread that computes has a
    # team of OpenMP threads, and two teams would wait for each other.
    answering = threading.Thread(target=answer)
    answering.start()
    try:
        worker.run()
    finally:
        server.should_exit = True
        answering.join()


def main(argv):
    config = configurator.load(Config, argv)
    keep_freed_memory()
    # The port first: a mistake there should not wait for a model to load.
    with listen(config.host, config.port) as listening:
        models = open_all(config)
        worker = Worker([model.batch for model in models])
        server = make_server(config, models, worker)
        stop_on_signals(server, worker)
        host = f'[{config.host}]' if ':' in config.host else config.host
        address = f'http://{host}:{listening.getsockname()[1]}'
        print(f'chat: {address}/   API: {address}/v1   Ctrl-C stops', flush=True)
        serve(server, worker, listening)


if __name__ == '__main__':
    configurator.run(main)
