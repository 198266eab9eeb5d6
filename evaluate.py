"""Measure models side by side: loss on a data set, answers to its prompts, a quiz.

    python evaluate.py --models=gpt2-medium,out/oasst --dataset=oasst
    python evaluate.py --models=out/oasst --quiz=questions.jsonl    # see formats/quiz.py

Each model is asked in its own template. One that was never tuned is asked in the template
`question`, or in that of the data set if that needs no tags. The same seed gives the same report.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import configurator
from configurator import Count, Natural, NonNegative, Positive, Seed, UserError


@dataclass(frozen=True)
class Config:
    models: str = 'resume'       # folders, hub names, or resume (the last run); commas between
    which: Literal['best', 'last'] = 'best'  # of a run's checkpoints; best has the lowest val_loss
    # what to measure
    dataset: str = ''            # a prepared folder in data_dir: loss, and answers to its prompts
    data_dir: str = 'data'       # looked for here, then beside evaluate.py
    split: Literal['train', 'val', 'test'] = 'val'  # of the data set
    answers: Natural = 20        # how many prompts of the data set to answer
    quiz: str = ''               # a JSONL file of questions
    quiz_size: Natural = 200     # how many of them to ask, drawn by the seed; 0 asks all
    # how to answer
    max_new_tokens: Count = 128  # the longest answer
    temperature: NonNegative = 0.0  # 0 always takes the likeliest token
    top_k: Natural = 200         # else keep the k most likely tokens; 0 keeps all
    repetition_penalty: Positive = 1.0  # over 1: tokens that are in the text become less likely
    no_repeat_ngram_size: Natural = 0  # n: no n tokens stand in the text twice
    seed: Seed = 1337            # for sampling and for drawing questions
    batch_size: Count = 32       # prompts answered together
    # where
    out_dir: str = 'out/report'  # for report.json and report.html
    device: str = 'auto'         # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'float32'  # of weights

    def problems(self):
        if not self.dataset and not self.quiz:
            yield 'nothing to measure: use --dataset=NAME, --quiz=FILE or both.'


# torch takes seconds to import: mistakes on the command line are found before.
configurator.precheck(__name__, Config)

import torch

from core import checkpoint, conversation, tokenfile
from core.conversation import TEMPLATES
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from core.files import Bar, only_writer, reading, write_whole
from core.generate import Sampling, generate
from core.rows import Rows
from formats import quiz
from formats.page import render

GREEDY = Sampling(temperature=0)


class Answer(NamedTuple):
    """What a model wrote: the text, its ids without the one that ended it, and whether one did."""
    text: str
    ids: list
    stopped: bool


def answer_all(opened, template, questions, max_new_tokens=64, sampling=GREEDY, seed=1337,
               batch_size=128, what=''):
    """The Answers of a model to `questions`, a list of lists of turns, in their order.

    Prompts of similar length are answered together; a greedy answer is what it would be alone.
    Too long a prompt loses its oldest tokens. what: the name of a progress bar; '' for none.
    """
    # As in a chat, at least half of the window belongs to the prompt.
    window = opened.model.config.block_size
    room = window - min(max_new_tokens, window // 2)
    prompts = []
    for turns in questions:
        with reading(f'the question {turns[-1].text[:60]!r}'):
            prompts.append(conversation.prompt(turns, opened.tokenizer, template)[-room:])

    stops = conversation.stop_ids(opened.tokenizer, template)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start:start + batch_size]
        steps = generate(opened.model, [prompts[i] for i in group], max_new_tokens, sampling,
                         seed=seed + start, stops=stops)
        name = f'{what}, {len(order) - start} answers left'
        for tokens in Bar(steps, name, max_new_tokens, disable=not what or None):
            for i, token in zip(group, tokens):
                # Else this answer has ended.
                if token is not None:
                    found[i].append(token)

    answers = []
    for ids in found:
        text = conversation.answer_text(ids, opened.tokenizer, template)
        written = [i for i in ids if i not in stops]
        answers.append(Answer(text, written, stopped=ids[-1] in stops))
    return answers


# ---- what is measured ----

@torch.no_grad()
def response_loss(model, split, what=''):
    """(nats per supervised token, number of tokens) of the conversations that fit the model."""
    loss_sum = 0.0
    n_tokens = 0
    for batch in Rows(split, model.config.block_size).batches(4, what=what):
        loss_sum += model.loss(batch).item()
        n_tokens += len(batch.targets)
    return loss_sum / n_tokens, n_tokens


def ask(opened, template, questions, config, what):
    """The answers to the Questions and their scores, for the report."""
    turns = [question.turns for question in questions]
    sampling = Sampling(config.temperature, config.top_k,
                        repetition_penalty=config.repetition_penalty,
                        no_repeat_ngram_size=config.no_repeat_ngram_size)
    answers = answer_all(opened, template, turns, config.max_new_tokens, sampling, config.seed,
                         config.batch_size, f'{opened.description}: {what}')
    asked = []
    for question, answer in zip(questions, answers):
        asked.append({
            'prompt': [f'{turn.text}\n\n{turn.context}'.strip() for turn in question.turns],
            'group': question.group,
            'expected': question.answer or question.wanted,
            'answer': answer.text,
            'stopped': answer.stopped,
            'right': quiz.is_right(answer, question),
            'exact': quiz.is_exact(answer, question),
        })
    return {'scores': quiz.scores(answers, questions, opened.tokenizer), 'asked': asked}


def measure(name, config, questions, device):
    """Everything that the report says about one model, as a dict of plain values."""
    # For a model that was never tuned.
    template = 'question'
    tags = False
    if config.dataset:
        folder = tokenfile.find_folders(config.dataset, config.data_dir)[0]
        meta = tokenfile.read_meta(folder)
        tags = TEMPLATES[meta['template']].tags
        if not tags:
            template = meta['template']
    # A model that was tuned here has its own template.
    opened = checkpoint.open_model(name, which=config.which, tags=tags)
    template = opened.template or template
    prepare(opened.model, device, config.dtype)
    result = {
        'model': name,
        'description': opened.description,
        'folder': opened.folder,
        'template': template,
        'parameters': sum(p.numel() for p in opened.model.parameters()),
    }
    if config.dataset:
        tokenizer = opened.tokenizer
        if meta['tokenizer']['sha256'] != tokenizer.sha256:
            raise UserError(f'{opened.description} has another vocabulary than {folder}. Prepare '
                            'the data with the vocabulary of the model: --tokenizer=FOLDER')
        split = tokenfile.Split([folder], config.split, vocab_size=tokenizer.vocab_size)
        result['loss'], result['tokens'] = response_loss(opened.model, split, f'{folder}: loss')
        prompts = quiz.from_split(split, tokenizer, meta['template'], config.answers)
        if prompts:
            result['answers'] = ask(opened, template, prompts, config, 'answers')
    if questions:
        result['quiz'] = ask(opened, template, questions, config, 'quiz')
    result['figures'] = figures(result)
    return result


# ---- the report ----

def figures(result):
    """{name: text} of everything that was measured, for tables and for the model card."""
    found = {'parameters': f"{result['parameters'] / 1e6:.1f} M", 'asked as': result['template']}
    if 'loss' in result:
        found['loss on responses'] = f"{result['loss']:.4f}"
        found['perplexity'] = f"{math.exp(min(result['loss'], 700)):.1f}"
    for title in ('answers', 'quiz'):
        if title in result:
            for name, value in result[title]['scores'].items():
                text = f'{value:.1f}' if 'mean' in name else f'{value:.1%}'
                found[f'{title}: {name}'] = text
    return found


def table(names, results):
    """The figures of all models side by side, as text."""
    left = max(len(name) for name in names) + 2
    lines = [' ' * left] + [f'{name:<{left}}' for name in names]
    for result in results:
        cells = [result['model']] + [result['figures'].get(name, '–') for name in names]
        width = max(12, max(len(cell) for cell in cells) + 2)
        lines = [line + f'{cell:>{width}}' for line, cell in zip(lines, cells)]
    return '\n'.join(lines)


def main(argv):
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    questions = []
    if config.quiz:
        questions = quiz.draw(quiz.read(config.quiz), config.quiz_size, config.seed)
    results = []
    for name in config.models.split(','):
        results.append(measure(name.strip(), config, questions, device))

    names = {}
    for result in results:
        names |= result['figures']
    print(table(names, results))
    settings = asdict(config)
    page = render('evaluation.html', results=results, names=names, settings=settings)
    with only_writer(config.out_dir):
        with write_whole(os.path.join(config.out_dir, 'report.json')) as file:
            json.dump({'config': settings, 'models': results}, file, indent=1)
        with write_whole(os.path.join(config.out_dir, 'report.html'), 'wb') as file:
            file.write(page)
    print(f'side by side, with the answers: {config.out_dir}/report.html')


if __name__ == '__main__':
    configurator.run(main)
