"""Ask a model: a prompt in, text out.

    python sample.py --init_from=resume --out_dir=out/oasst --user="What's the capital of France?"
    python sample.py --init_from=resume --chat
    python sample.py --init_from=gpt2-medium --start="What's the capital of France?" --num_samples=3

--user and --chat write the checkpoint's own template around what you say, and take it as plain text.
--start is given to the model as it stands; tags and <|endoftext|> that you write in it count as such.
"""
import codecs
import sys
from dataclasses import dataclass

from core import checkpoint
import configurator
from core import conversation
from configurator import UserError
from core.conversation import Turn
from core.generate import DTYPES, generate, prepare
from core.kernels import keep_freed_memory
from model import pick_device


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = 'resume'  # resume (a checkpoint in out_dir), a hub name, or a folder: a checkpoint's, nanoGPT's or transformers'
    out_dir: str = 'out'       # where the checkpoint is
    which: str = 'best'        # best: by val_loss, where there is one; last: as training left it
    # what to say: one of these three
    start: str = ''            # raw text; FILE:name reads a file, - standard input
    user: str = ''             # a question, put into the template
    chat: bool = False         # several turns, remembered while they fit the window
    template: str = ''         # xml, alpaca, plain or dialogpt; '' is the checkpoint's own
    # how to choose tokens
    num_samples: int = 1       # answers to the same prompt, in one batch
    max_new_tokens: int = 256  # the longest answer
    temperature: float = 0.8   # 0 always takes the likeliest token
    top_k: int = 200           # of so many tokens at most; 0 of all
    top_p: float = 1.0         # of the likeliest that have this much probability together
    trim: str = ''             # sentence: cut the answer after its last full stop, if it has one
    seed: int = 1337           # the same seed gives the same text
    # the machine
    device: str = 'auto'       # auto, cpu, cuda, cuda:1, mps
    dtype: str = 'auto'        # of the weights: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16, int8
    compile: bool = False      # with --dtype=int8: a faster kernel for one answer at a time; needs a C++ compiler

    def problems(self):
        """What cannot work, a sentence each."""
        if sum((bool(self.start), bool(self.user), self.chat)) != 1:
            yield 'give one of --start="TEXT" (raw), --user="TEXT" (in the template) or --chat.'
        if self.template not in ('', *conversation.TEMPLATES):
            yield f'template={self.template!r}: expected one of {", ".join(conversation.TEMPLATES)}.'
        if self.which not in ('best', 'last'):
            yield f'which={self.which!r}: expected best or last.'
        if self.num_samples < 1 or self.max_new_tokens < 1 or self.chat and self.num_samples > 1:
            yield 'num_samples and max_new_tokens must be at least 1, and num_samples is 1 in a chat.'
        if not 0 <= self.temperature < float('inf') or self.top_k < 0 or not 0 < self.top_p <= 1:
            yield 'expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1.'
        if self.dtype not in DTYPES:
            yield f'dtype={self.dtype!r}: expected one of {", ".join(DTYPES)}.'
        if self.trim not in ('', 'sentence'):
            yield f'trim={self.trim!r}: expected sentence.'
        if self.seed < 0:
            yield f'seed={self.seed} must not be negative.'


def answers(opened, prompt, stops, config, seed, show=None):
    """The ids of num_samples answers to a prompt (list of ids), up to what ends each, which is left out.

    show(ids): called with the new ids of a single answer as they come.
    """
    found = [[] for _ in range(config.num_samples)]
    for tokens in generate(opened.model, [prompt], config.max_new_tokens, config.num_samples, config.temperature,
                           config.top_k, config.top_p, seed, stops):
        for answer, token in zip(found, tokens):
            if token is not None and token not in stops:
                answer.append(token)
                if show:
                    show([token])
    return found


def streamer(tokenizer):
    """A function that prints ids as they come, each character once it is whole."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def show(ids):
        print(decoder.decode(tokenizer.decode_bytes(ids)), end='', flush=True)
    return show


def read_start(start):
    """The raw prompt: the text itself, a file's, or standard input's."""
    if start == '-':
        return sys.stdin.read()
    if not start.startswith('FILE:'):
        return start
    try:
        with open(start[5:], encoding='utf-8') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--start={start}: {error}. Expected a text file in UTF-8.') from None


def encode_prompt(encode, text, opened):
    """The ids of a prompt, which must be text and leave room for an answer."""
    try:
        ids = [int(i) for i in encode(text)]
    except ValueError as error:
        raise UserError(f'the prompt cannot be used: {error}.') from None
    window = opened.model.config.block_size
    if not 0 < len(ids) <= window:
        raise UserError(f'the prompt has {len(ids):,} tokens; the model reads 1 to {window:,}. '
                        f'{"Shorten it." if ids else "Write something."}')
    return ids


def ask_once(config, opened, template):
    """--start and --user: print num_samples answers."""
    tokenizer = opened.tokenizer
    if config.user:
        ids = encode_prompt(lambda text: conversation.prompt([Turn('user', text)], tokenizer, template),
                            config.user, opened)
        before, stops = '', conversation.stop_ids(tokenizer, template)
    else:
        before = read_start(config.start)
        ids = encode_prompt(tokenizer.encode_with_tags, before, opened)
        stops = conversation.stop_ids(tokenizer, 'xml')
    streams = config.num_samples == 1 and not config.trim and sys.stdout.isatty()
    if streams:
        print(before, end='', flush=True)
    found = answers(opened, ids, stops, config, config.seed, streamer(tokenizer) if streams else None)
    for answer in found:
        if not streams:
            text = conversation.answer_text(answer, tokenizer, template) if config.user else tokenizer.decode(answer)
            if config.trim and '.' in text:
                text = text[:text.rindex('.') + 1]
            print(before + text, end='')
        print('\n---------------' if config.num_samples > 1 else '')


def chat(config, opened, template):
    """--chat: read turns from the terminal until it ends, and answer each."""
    tokenizer, window = opened.tokenizer, opened.model.config.block_size
    stops, turns, seed = conversation.stop_ids(tokenizer, template), [], config.seed
    room = min(config.max_new_tokens, window // 2)  # kept free for the answer
    print('An empty line ends the chat.', file=sys.stderr)
    while True:
        try:
            text = input('you> ')
        except EOFError:
            break
        if not text.strip():
            break
        turns.append(Turn('user', text))
        try:
            ids = encode_prompt(lambda turns: conversation.prompt(turns, tokenizer, template), turns[-1:], opened)
            turns = conversation.recent(turns, tokenizer, template, window - room)
            ids = conversation.prompt(turns, tokenizer, template)
        except UserError as error:
            print(error, file=sys.stderr)
            turns.pop()
            continue
        answer = answers(opened, ids, stops, config, seed, streamer(tokenizer))[0]
        print()
        turns.append(Turn('assistant', conversation.answer_text(answer, tokenizer, template)))
        seed += 1


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    opened = checkpoint.open_model(config.init_from, config.out_dir, config.which, tags=config.template == 'xml')
    dtype = prepare(opened.model, device, config.dtype, config.compile)
    template = config.template or opened.template
    if not template and not config.start:
        raise UserError(f'{opened.description} was never tuned here and has no template of its own. '
                        'Use --start, or choose one: --template=xml')
    if template and conversation.TEMPLATES[template].tags and not opened.tokenizer.tags:
        raise UserError(f'{opened.description} was tuned without the tags that the template {template!r} needs. '
                        f'Its own is {opened.template!r}.')
    print(f'{opened.description}, on {device} in {dtype}', file=sys.stderr)
    (chat if config.chat else ask_once)(config, opened, template)


if __name__ == '__main__':
    configurator.run(main)
