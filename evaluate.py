"""Measure models side by side: loss on a data set, answers to its prompts, a quiz.

    python evaluate.py --models=gpt2-medium,out/oasst --dataset=oasst
    python evaluate.py --models=out/oasst --quiz=questions.jsonl    # see formats/quiz.py

Each model is asked in its own template. A model that was never tuned is asked in the template
`question`, or in that of the data set if that needs no tags. The same seed gives the same report.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import configurator
from configurator import Count, Natural, Positive, Seed, UserError


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
    temperature: Positive = 0.8  # of the sampled answers to the quiz; all others are greedy
    top_k: Natural = 200         # sample from the k most likely tokens; 0: from all
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

# ---- answers ----

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
    """(greedy Answers to the Questions, a dict about each for the report)."""
    turns = [question.turns for question in questions]
    greedy = Sampling(0, repetition_penalty=config.repetition_penalty,
                      no_repeat_ngram_size=config.no_repeat_ngram_size)
    answers = answer_all(opened, template, turns, config.max_new_tokens, greedy,
                         batch_size=config.batch_size, what=what)
    shown = []
    for question, answer in zip(questions, answers):
        prompt = [f'{turn.text}\n\n{turn.context}'.rstrip('\n') for turn in question.turns]
        shown.append({
            'prompt': prompt,
            'group': question.group,
            'expected': question.answer or question.wanted,
            'answer': answer.text,
            'stopped': answer.stopped,
            'right': quiz.is_right(answer, question),
            'exact': quiz.is_exact(answer, question),
        })
    return answers, shown


def measure_dataset(opened, template, folder, meta, config):
    """The loss on the data set, and the answers to its prompts."""
    tokenizer = opened.tokenizer
    if meta['tokenizer']['sha256'] != tokenizer.sha256:
        raise UserError(f'{opened.description} has another vocabulary than {folder}. Prepare the '
                        'data with the vocabulary of the model: --tokenizer=FOLDER')
    split = tokenfile.Split([folder], config.split, vocab_size=tokenizer.vocab_size)
    loss, n_tokens = response_loss(opened.model, split, f'{folder}: loss')
    result = {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'tokens': n_tokens}
    questions = quiz.from_split(split, tokenizer, meta['template'], config.answers)
    if questions:
        answers, shown = ask(opened, template, questions, config, f'{folder}: answers')
        result['form'] = quiz.form(answers, tokenizer)
        result['answers'] = shown
    return result


def measure_quiz(opened, questions, config):
    """The scores of greedy and of sampled answers to the quiz, and the greedy answers."""
    template = opened.template or 'question'
    what = f'{opened.description}: quiz'
    greedy, shown = ask(opened, template, questions, config, what)
    turns = [question.turns for question in questions]
    sampling = Sampling(config.temperature, config.top_k,
                        repetition_penalty=config.repetition_penalty,
                        no_repeat_ngram_size=config.no_repeat_ngram_size)
    sampled = answer_all(opened, template, turns, config.max_new_tokens, sampling, config.seed,
                         config.batch_size, f'{what}, sampled')
    scores = {'greedy': quiz.scores(greedy, questions), 'sampled': quiz.scores(sampled, questions)}
    form = quiz.form(greedy, opened.tokenizer)
    return {'quiz': scores, 'quiz_form': form, 'quiz_answers': shown}


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
    opened = checkpoint.open_model(name, which=config.which, tags=tags)
    template = opened.template or template
    result = {
        'model': name,
        'description': opened.description,
        'folder': opened.folder,
        'template': template,
        'parameters': sum(p.numel() for p in opened.model.parameters()),
    }
    prepare(opened.model, device, config.dtype)
    if config.dataset:
        result |= measure_dataset(opened, template, folder, meta, config)
    if questions:
        result |= measure_quiz(opened, questions, config)
    result['figures'] = figures(result)
    return result


# ---- the report ----

def figures(result):
    """{name: text} of everything that was measured, for tables and for the model card."""
    found = {'parameters': f"{result['parameters'] / 1e6:.1f} M", 'asked as': result['template']}
    if 'loss' in result:
        found['loss on responses'] = f"{result['loss']:.4f}"
        found['perplexity'] = f"{result['perplexity']:.1f}"
    for title, key in (('answers', 'form'), ('quiz', 'quiz_form')):
        for name, value in result.get(key, {}).items():
            found[f'{title}: {name}'] = f'{value:.1f}' if 'mean' in name else f'{value:.1%}'
    for manner, groups in result.get('quiz', {}).items():
        for group, scores in groups.items():
            n = scores['questions']
            for kind in ('right', 'exact'):
                if kind in scores:
                    found[f'quiz, {manner}: {kind}, {group} ({n})'] = f'{scores[kind]:.1%}'
    return found


def remarks(results):
    """Lines on what is wrong with each model's answers, and on what changed from the first one."""
    lines = []
    for result in results:
        form = result.get('form') or result.get('quiz_form') or {}
        if form.get('repeated 4-grams', 0) > 0.2:
            lines.append(f"{result['model']} repeats itself ({form['repeated 4-grams']:.0%} of its "
                         '4-grams): try --repetition_penalty=1.2 or --no_repeat_ngram_size=4')
        if form.get('stops by itself', 1) < 0.5:
            lines.append(f"{result['model']}: {form['stops by itself']:.0%} of the answers end by "
                         'themselves; the others were cut at max_new_tokens')
    first = results[0]
    for result in results[1:]:
        changed = []
        for name, value in result['figures'].items():
            before = first['figures'].get(name)
            if name != 'parameters' and before not in (None, value):
                changed.append(f'{name} {before} -> {value}')
        lines.append(f"from {first['model']} to {result['model']}: {'; '.join(changed[:6])}")
    return lines


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
    for line in remarks(results):
        print(line)
    print(table(names, results))
    settings = asdict(config)
    report = json.dumps({'config': settings, 'models': results}, indent=1, ensure_ascii=False)
    page = render('evaluation.html', results=results, names=names, settings=settings)
    with only_writer(config.out_dir):
        with write_whole(os.path.join(config.out_dir, 'report.json'), 'wb') as file:
            # A path in it need not be Unicode: its bytes are written as JSON's escapes.
            file.write(report.encode('utf-8', 'backslashreplace'))
        with write_whole(os.path.join(config.out_dir, 'report.html'), 'wb') as file:
            file.write(page)
    print(f'side by side, with the answers: {config.out_dir}/report.html')


if __name__ == '__main__':
    configurator.run(main)
