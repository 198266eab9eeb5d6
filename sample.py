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
from configurator import Count, Natural, NonNegative, Seed, UserError
from core import checkpoint, conversation
from core.conversation import TEMPLATES, AnswerText, Turn
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from core.files import reading
from core.generate import generate


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
    top_p: NonNegative = 1.0   # keep the most likely tokens that together have this probability
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


class Speaker:
    """A model, its template and the settings by which it answers."""

    def __init__(self, opened, template, config):
        self.model = opened.model
        self.tokenizer = opened.tokenizer
        self.template = template  # None for raw text
        self.config = config
        # Raw text ends where any template's answer would.
        self.stops = conversation.stop_ids(self.tokenizer, template or 'xml')

    def encode(self, write, what):
        """write(what), the ids of a prompt, which must leave room for an answer."""
        try:
            ids = [int(i) for i in write(what)]
        except ValueError as error:
            raise UserError(f'the prompt cannot be used: {error}.') from None
        window = self.model.config.block_size
        if not 0 < len(ids) <= window:
            raise UserError(f'the prompt has {len(ids):,} tokens; expected 1 to {window:,}.')
        return ids

    def encode_turns(self, turns):
        """The ids after which the model answers these turns."""
        def write(turns):
            return conversation.prompt(turns, self.tokenizer, self.template)
        return self.encode(write, turns)

    def answers(self, prompt, seed, show=None):
        """The texts of num_samples answers. show is called with each new piece of a single one."""
        config = self.config
        texts = [''] * config.num_samples
        readers = [AnswerText(self.tokenizer, self.template) for _ in texts]
        for tokens in generate(self.model, [prompt], config.max_new_tokens, config.num_samples,
                               config.temperature, config.top_k, config.top_p, seed, self.stops):
            for i, token in enumerate(tokens):
                if token is not None and token not in self.stops:
                    new = readers[i].add([token])
                    texts[i] += new
                    if show:
                        show(new)
        for i, reader in enumerate(readers):
            end = reader.add([], final=True)
            texts[i] += end
            if show:
                show(end)
        return texts


def show(text):
    """Print at once, without a line end."""
    print(text, end='', flush=True)


def read_start(start):
    """The raw prompt: the text itself, or that of a file."""
    if not start.startswith('FILE:'):
        return start
    with reading(start[5:], 'Expected a text file in UTF-8.'):
        with open(start[5:], encoding='utf-8') as file:
            return file.read()


def ask_once(config, speaker):
    """--start and --user: print num_samples answers."""
    before = ''
    if config.user:
        prompt = speaker.encode_turns([Turn('user', config.user)])
    else:
        before = read_start(config.start)
        prompt = speaker.encode(speaker.tokenizer.encode_with_tags, before)
    streams = config.num_samples == 1 and not config.trim
    if streams:
        show(before)
    answers = speaker.answers(prompt, config.seed, show if streams else None)
    if streams:
        print()
        return
    for answer in answers:
        if config.trim and '.' in answer:
            answer = answer[:answer.rindex('.') + 1]
        print(before + answer)
        if len(answers) > 1:
            print('---------------')


def chat(speaker):
    """--chat: read turns from the terminal until an empty line, and answer each."""
    window = speaker.model.config.block_size
    room = min(speaker.config.max_new_tokens, window // 2)  # kept free for the answer
    turns = []
    seed = speaker.config.seed
    print('An empty line ends the chat.', file=sys.stderr)
    while True:
        try:
            text = input('you> ')
        except EOFError:
            return
        if not text.strip():
            return
        asked = [*turns, Turn('user', text)]
        try:
            speaker.encode_turns(asked[-1:])  # the last turn must fit by itself
            asked = conversation.recent(asked, speaker.tokenizer, speaker.template, window - room)
            prompt = speaker.encode_turns(asked)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        answer, = speaker.answers(prompt, seed, show)
        print()
        turns = [*asked, Turn('assistant', answer)]
        seed += 1


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
    speaker = Speaker(opened, None if config.start else template, config)
    if config.chat:
        chat(speaker)
    else:
        ask_once(config, speaker)


if __name__ == '__main__':
    configurator.run(main)
