"""Generate text from a model.

    python sample.py --init_from=resume --user="What's the capital of France?"
    python sample.py --init_from=resume --chat
    python sample.py --init_from=gpt2-medium --start="What's the capital of France?"

--user and --chat put what you say into the model's own template, as plain text. --start goes to the
model as it is: tags and <|endoftext|> in it count as such.
"""
import sys
from dataclasses import dataclass
from typing import Literal

import configurator
from configurator import Count, Natural, NonNegative, Positive, Seed, Share, UserError
from core.conversation import TEMPLATES, AnswerText, Turn


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = 'resume'  # resume (the run saved last under out_dir), a folder, or a hub name
    out_dir: str = 'out'       # where runs are
    which: Literal['best', 'last'] = 'best'  # checkpoint: lowest val_loss, or last of the run
    # what to say: one of these three
    start: str = ''            # raw text; FILE:name reads a file
    user: str = ''             # a question, put into the template
    chat: bool = False         # several turns, remembered while they fit the window
    template: Literal['', *TEMPLATES] = ''  # '' is the checkpoint's own
    # how to choose tokens
    num_samples: Count = 1     # answers to the same prompt
    max_new_tokens: Count = 256  # the longest answer
    temperature: NonNegative = 0.8  # 0 always takes the likeliest token
    top_k: Natural = 200       # keep the k most likely tokens; 0 keeps all
    top_p: Share = 1.0         # keep the most likely tokens that together have this probability
    min_p: Share = 0.0         # drop tokens less likely than this, relative to the likeliest
    repetition_penalty: Positive = 1.0  # over 1: tokens that are in the text become less likely
    no_repeat_ngram_size: Natural = 0  # n: no n tokens stand in the text twice
    trim: Literal['', 'sentence'] = ''  # cut the answer after its last full stop
    seed: Seed = 1337          # the same seed gives the same text
    # the machine
    device: str = 'auto'       # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'  # of the weights
    compile: bool = False      # with int8: a faster kernel, which needs a C++ compiler

    def problems(self):
        """Combinations that cannot work."""
        if bool(self.start) + bool(self.user) + self.chat != 1:
            yield 'give one of --start="TEXT" (raw), --user="TEXT" (in the template) or --chat.'
        if self.chat and self.num_samples > 1:
            yield 'a chat has one answer: leave out num_samples.'


# torch takes seconds to import: mistakes on the command line are found before.
configurator.precheck(__name__, Config)

from core import checkpoint, conversation
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from core.files import reading
from core.generate import Sampling, generate


def answer(opened, template, ids, config, seed, show=None):
    """The texts of num_samples answers to the prompt `ids`, up to what ends each.

    template: None for raw text. show is called with each new piece of text, if there is one answer.
    """
    window = opened.model.config.block_size
    if not 0 < len(ids) <= window:
        raise UserError(f'the prompt has {len(ids):,} tokens; expected 1 to {window:,}.')
    # Raw text may hold tags, so it ends where an answer in xml would.
    stops = conversation.stop_ids(opened.tokenizer, template or 'xml')
    readers = [AnswerText(opened.tokenizer, template) for _ in range(config.num_samples)]
    texts = [''] * config.num_samples

    def add(i, ids, final=False):
        new = readers[i].add(ids, final)
        texts[i] += new
        if show:
            show(new)

    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p,
                        config.repetition_penalty, config.no_repeat_ngram_size)
    for tokens in generate(opened.model, [ids], config.max_new_tokens, sampling,
                           config.num_samples, seed, stops):
        for i, token in enumerate(tokens):
            if token is not None and token not in stops:
                add(i, [token])
    for i in range(config.num_samples):
        add(i, [], final=True)
    return texts


def show(text):
    """Print without a line end, at once."""
    print(text, end='', flush=True)


def read_start(start):
    """The raw prompt: the text itself, or that of a file."""
    path = start.removeprefix('FILE:')
    if path == start:
        return start
    with reading(path, 'Expected a text file in UTF-8.'), open(path, encoding='utf-8') as file:
        return file.read()


def ask_once(config, opened, template):
    """--start and --user: print num_samples answers."""
    before = ''
    try:
        if config.user:
            turns = [Turn('user', config.user)]
            ids = conversation.prompt(turns, opened.tokenizer, template)
        else:
            template = None
            before = read_start(config.start)
            ids = opened.tokenizer.encode_with_tags(before).tolist()
    except ValueError as error:
        raise UserError(f'the prompt cannot be used: {error}.') from None
    if config.num_samples == 1 and not config.trim:
        show(before)
        answer(opened, template, ids, config, config.seed, show)
        print()
        return
    for text in answer(opened, template, ids, config, config.seed):
        if config.trim and '.' in text:
            text = text[:text.rindex('.') + 1]
        print(before + text)
        if config.num_samples > 1:
            print('---------------')


def chat(config, opened, template):
    """--chat: read turns from the terminal until an empty line, and answer each."""
    window = opened.model.config.block_size
    # Kept free for the answer.
    room = min(config.max_new_tokens, window // 2)
    turns = []
    print('An empty line ends the chat.', file=sys.stderr)
    while True:
        try:
            text = input('you> ')
        except EOFError:
            return
        if not text.strip():
            return
        try:
            asked = [*turns, Turn('user', text)]
            asked = conversation.recent(asked, opened.tokenizer, template, window - room)
            ids = conversation.prompt(asked, opened.tokenizer, template)
            seed = config.seed + len(turns) // 2
            reply, = answer(opened, template, ids, config, seed, show)
        except (UserError, ValueError) as error:
            print(error, file=sys.stderr)
            continue
        print()
        turns = [*asked, Turn('assistant', reply)]


def main(argv):
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    wants_tags = bool(config.template) and TEMPLATES[config.template].tags
    opened = checkpoint.open_model(config.init_from, config.out_dir, config.which, tags=wants_tags)
    template = config.template or opened.template
    if not template and not config.start:
        raise UserError(f'{opened.description} was never tuned here and has no template. Use '
                        '--start, or choose one: --template=question')
    dtype = prepare(opened.model, device, config.dtype, config.compile)
    print(f'{opened.description}, on {device} in {dtype}', file=sys.stderr)
    if config.chat:
        chat(config, opened, template)
    else:
        ask_once(config, opened, template)


if __name__ == '__main__':
    configurator.run(main)
