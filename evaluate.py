"""Measure models side by side: loss on a data set, answers to its prompts, a quiz.

    python evaluate.py --models=gpt2-medium,out/oasst --dataset=oasst
    python evaluate.py --models=out/oasst --quiz=questions.jsonl

The form of a quiz is in formats/quiz.py. A model is asked in its own template, an untuned
one in that of the data set, or in `question` if that has tags.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import configurator
from configurator import Count, Natural


@dataclass(frozen=True)
class Config:
    models: str = 'resume'  # folders, hub names or resume, with commas
    which: Literal['best', 'last'] = 'best'  # checkpoint
    # what to measure
    dataset: str = ''  # in data_dir: the loss, and answers to its prompts
    data_dir: str = 'data'  # looked for here, then beside evaluate.py
    split: Literal['train', 'val', 'test'] = 'val'  # of the data set
    answers: Natural = 20  # prompts of the data set to answer
    quiz: str = ''  # a file of questions
    # how to answer; the likeliest token is taken
    max_new_tokens: Count = 128  # the longest answer
    batch_size: Count = 32  # prompts answered together
    # where
    out_dir: str = 'out/report'  # for report.json and report.html
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'float32'  # of weights

    def problems(self):
        if not self.dataset and not self.quiz:
            yield 'nothing to measure: use --dataset=NAME, --quiz=FILE or both.'


# Find mistakes before torch is imported, which takes seconds.
configurator.precheck(__name__, Config)

import torch

from core import checkpoint, conversation, tokenfile
from core import tokenizer as tokenizers
from core.conversation import TEMPLATES
from core.decoding_weights import prepare
from core.device import keep_freed_memory, pick_device
from core.files import Bar, only_writer, reading, write_whole
from core.generate import Sampling, generate
from core.rows import Rows
from formats import quiz
from formats.page import render


class Answer(NamedTuple):
    text: str
    ids: list  # without the one that ended it
    stopped: bool  # whether one did


def answer_all(opened, template, questions, max_new_tokens=64, batch_size=128):
    """The Answers of a model to `questions`, lists of turns.

    Each is what it would be alone. A prompt that is too long loses its start.
    """
    # At least half of the window is for the prompt.
    window = opened.model.config.block_size
    room = window - min(max_new_tokens, window // 2)
    prompts = []
    for turns in questions:
        with reading(f'the question {turns[-1].text[:60]!r}'):
            prompt = conversation.prompt(turns, opened.tokenizer, template)
        prompts.append(prompt[-room:])

    greedy = Sampling(temperature=0)
    stops = conversation.stop_ids(opened.tokenizer, template)
    # Prompts of similar length are answered together.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start:start + batch_size]
        batch = [prompts[i] for i in group]
        steps = generate(opened.model, batch, max_new_tokens, greedy, stops=stops)
        for tokens in Bar(steps, 'answers', max_new_tokens):
            for i, token in zip(group, tokens):
                # An answer that has ended gets None.
                if token is not None:
                    found[i].append(token)

    answers = []
    for ids in found:
        text = conversation.answer_text(ids, opened.tokenizer, template)
        written = [i for i in ids if i not in stops]
        answers.append(Answer(text, written, stopped=ids[-1] in stops))
    return answers


@torch.no_grad()
def response_loss(model, split):
    """(nats per supervised token, number of tokens) of a split."""
    loss_sum = 0.0
    n_tokens = 0
    rows = Rows(split, model.config.block_size)
    for batch in rows.batches(4, what='loss'):
        loss_sum += model.loss(batch).item()
        n_tokens += len(batch.targets)
    return loss_sum / n_tokens, n_tokens


def measure(name, config, questions, device):
    """What the report says about one model, as a dict of plain values."""
    template = 'question'
    vocabulary = None
    if config.dataset:
        folders = tokenfile.find_folders(config.dataset, config.data_dir)
        meta = tokenfile.read_meta(folders[0])
        tags = TEMPLATES[meta['template']].tags
        if not tags:
            template = meta['template']
        vocabulary = tokenizers.from_state(meta['tokenizer'] | {'tags': tags})
    # The model must have the vocabulary of the data, and gets its tags.
    opened = checkpoint.open_model(name, which=config.which, vocabulary=vocabulary)
    template = opened.template or template
    n_parameters = sum(p.numel() for p in opened.model.parameters())
    result = {'model': name, 'description': opened.description}
    figures = {'parameters': f'{n_parameters:,}', 'asked as': template}
    prepare(opened.model, device, config.dtype)

    # The loss on the data set, and prompts from it.
    parts = {'quiz': questions}
    if config.dataset:
        size = opened.tokenizer.vocab_size
        split = tokenfile.Split(folders, config.split, vocab_size=size)
        loss, n_tokens = response_loss(opened.model, split)
        result |= {'loss': loss, 'tokens': n_tokens}
        figures['loss on responses'] = f'{loss:.4f}'
        figures['perplexity'] = f'{math.exp(min(loss, 700)):.1f}'
        prompts = quiz.from_split(split, opened.tokenizer, meta['template'], config.answers)
        parts = {'answers': prompts, **parts}

    # Answers, and how good they are.
    for title, part in parts.items():
        if not part:
            continue
        turns = [question.turns for question in part]
        answers = answer_all(
            opened, template, turns, config.max_new_tokens, config.batch_size)
        asked = [quiz.grade(*pair) for pair in zip(part, answers)]
        scores = quiz.scores(asked)
        result[title] = {'scores': scores, 'asked': asked}
        for score, value in scores.items():
            form = '{:.1f}' if 'mean' in score else '{:.1%}'
            figures[f'{title}: {score}'] = form.format(value)
    # {name: text}, for tables and for the model card
    result['figures'] = figures
    return result


def main(argv):
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    questions = quiz.read(config.quiz) if config.quiz else []
    results = []
    names = {}
    for name in config.models.split(','):
        result = measure(name.strip(), config, questions, device)
        results.append(result)
        names |= result['figures']

    # A column for each model.
    table = {'': [result['model'] for result in results]}
    for name in names:
        table[name] = [result['figures'].get(name, '–') for result in results]
    width = 2 + max(12, *map(len, table['']))
    for name, cells in table.items():
        print(name.ljust(48) + ''.join(cell.rjust(width) for cell in cells))
    settings = asdict(config)
    page = render('evaluation.html', results=results, names=names, settings=settings)
    with only_writer(config.out_dir):
        with write_whole(os.path.join(config.out_dir, 'report.json')) as file:
            json.dump({'config': settings, 'models': results}, file, indent=1)
        with write_whole(os.path.join(config.out_dir, 'report.html')) as file:
            file.write(page)
    print(f'side by side, with the answers: {config.out_dir}/report.html')


if __name__ == '__main__':
    configurator.run(main)
