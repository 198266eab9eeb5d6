"""Generate text from a model.

    python sample.py --init_from=resume --user="What's the capital of France?"
    python sample.py --init_from=resume --chat
    python sample.py --init_from=gpt2-medium --start="What's the capital of France?"

--user and --chat put what you say into the model's own template, as plain text. --start
goes to the model as it is: tags and <|endoftext|> in it count as such.
"""
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import configurator
from configurator import Count, Natural, NonNegative, Positive, Seed, Share, UserError
from core.conversation import TEMPLATES, AnswerText, Turn


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = 'resume'  # resume (the run saved last), a folder, or a hub name
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
    top_p: Share = 1.0         # keep the likeliest tokens that have this probability together
    min_p: Share = 0.0         # drop tokens less likely than this, relative to the likeliest
    repetition_penalty: Positive = 1.0  # over 1: tokens of the text become less likely
    no_repeat_ngram_size: Natural = 0  # n: no n tokens stand in the text twice
    trim: Literal['', 'sentence'] = ''  # cut answers after their last full stop
    seed: Seed = 1337          # the same seed gives the same text
    # the machine
    device: str = 'auto'       # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'  # of the weights

    def problems(self):
        if bool(self.start) + bool(self.user) + self.chat != 1:
            yield 'give one of --start="TEXT" (raw), --user="TEXT" (a question) or --chat.'


# torch takes seconds to import: mistakes on the command line are found before.
configurator.precheck(__name__, Config)

from core import checkpoint, conversation
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from core.files import reading
from core.generate import Sampling, generate


def answer(config, opened, template, prompt, seed, before=''):
    """Print the answers to the prompt (ids), a single one as it comes; return the last."""
    window = opened.model.config.block_size
    if not 0 < len(prompt) <= window:
        raise UserError(f'the prompt has {len(prompt):,} tokens; expected 1 to {window:,}.')
    # Raw text, which has no template, may hold tags: it ends where an answer in xml would.
    stops = conversation.stop_ids(opened.tokenizer, template or 'xml')
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p,
                        config.repetition_penalty, config.no_repeat_ngram_size)
    n = config.num_samples
    readers = [AnswerText(opened.tokenizer, template) for _ in range(n)]
    texts = [''] * n
    streamed = n == 1 and not config.trim
    if streamed:
        print(before, end='', flush=True)
    steps = generate(opened.model, [prompt], config.max_new_tokens, sampling, n, seed, stops)
    for tokens in steps:
        for i, token in enumerate(tokens):
            if token is not None and token not in stops:
                new = readers[i].add([token])
                texts[i] += new
                if streamed:
                    print(new, end='', flush=True)
    if streamed:
        print()
        return texts[0]
    for text in texts:
        if config.trim and '.' in text:
            text = text[:text.rindex('.') + 1]
        print(before + text)
        if n > 1:
            print('---------------')
    return text


def ask_once(config, opened, template):
    """Answer --user or continue --start."""
    start = config.start
    if start.startswith('FILE:'):
        path = start.removeprefix('FILE:')
        with reading(path, 'Expected a text file in UTF-8.'):
            start = Path(path).read_text('utf-8')
    with reading('the prompt'):
        if config.user:
            turns = [Turn('user', config.user)]
            prompt = conversation.prompt(turns, opened.tokenizer, template)
        else:
            template = None
            prompt = opened.tokenizer.encode_with_tags(start).tolist()
    answer(config, opened, template, prompt, config.seed, start)


def chat(config, opened, template):
    """Read turns from the terminal until an empty line, and answer each."""
    window = opened.model.config.block_size
    room = window - min(config.max_new_tokens, window // 2)  # the rest is for the answer
    turns = []
    print('An empty line ends the chat.', file=sys.stderr)
    while (text := input('you> ')).strip():
        try:
            asked = [*turns, Turn('user', text)]
            asked = conversation.recent(asked, opened.tokenizer, template, room)
            prompt = conversation.prompt(asked, opened.tokenizer, template)
            reply = answer(config, opened, template, prompt, config.seed + len(turns) // 2)
            turns = [*asked, Turn('assistant', reply)]
        except (UserError, ValueError) as error:
            print(error, file=sys.stderr)


def main(argv):
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    tags = config.template and TEMPLATES[config.template].tags
    opened = checkpoint.open_model(config.init_from, config.out_dir, config.which, tags=tags)
    template = config.template or opened.template
    if not template and not config.start:
        raise UserError(f'{opened.description} was never tuned here and has no template. Use '
                        '--start, or choose one: --template=question')
    dtype = prepare(opened.model, device, config.dtype)
    print(f'{opened.description}, on {device} in {dtype}', file=sys.stderr)
    if config.chat:
        with contextlib.suppress(EOFError):
            chat(config, opened, template)
    else:
        ask_once(config, opened, template)


if __name__ == '__main__':
    configurator.run(main)
