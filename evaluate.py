"""Scores and answers of any number of models, side by side: a table, a JSON and an HTML page.

    python evaluate.py --models=out/oasst,gpt2-medium --dataset=oasst --quiz=capitals
    python evaluate.py --models=out/capitals --quiz=capitals --quiz_size=0

Each model is asked in its own template, one that was never tuned as "Question: … Answer:" (or, about
a data set whose template needs no tags of its own, in that). The same seed gives the same report.
"""
import html
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from core import checkpoint
import configurator
from core import conversation
from core import tokenfile
from configurator import UserError
from core.conversation import Turn
from data.report import document
from core.generate import DTYPES, generate, prepare
from core.kernels import keep_freed_memory
from model import pick_device
from core.progress import Bar


@dataclass(frozen=True)
class Config:
    models: str = 'out'        # comma list: folders with a checkpoint, hub names, folders of transformers
    which: str = 'best'        # of the checkpoints: best, by val_loss, where there is one; or last
    # what to measure
    dataset: str = ''          # a prepared folder in data_dir: loss on it, and answers to its prompts
    data_dir: str = 'data'     # looked for here, then beside evaluate.py
    split: str = 'val'         # val, test or train
    answers: int = 20          # prompts of the data set to answer; 0 none
    quiz: str = ''             # capitals: asks for capitals, and for countries by their capitals
    quiz_size: int = 200       # questions of the quiz, drawn by seed; 0 all
    # how to answer
    max_new_tokens: int = 128  # the longest answer
    temperature: float = 0.8   # of the sampled answers; the others are greedy
    top_k: int = 200           # of so many tokens at most; 0 of all
    seed: int = 1337           # of the sampling and of the questions drawn
    batch_size: int = 32       # prompts answered together
    # where
    out_dir: str = 'out/report'  # for report.json and report.html
    device: str = 'auto'       # auto, cpu, cuda, cuda:1, mps
    dtype: str = 'float32'     # of the weights: float32, bfloat16, float16, int8, auto

    def problems(self):
        """What cannot work, a sentence each."""
        if not self.dataset and not self.quiz:
            yield 'nothing to measure: give --dataset=NAME, --quiz=capitals or both.'
        if self.quiz not in ('', 'capitals'):
            yield f'quiz={self.quiz!r}: expected capitals.'
        if self.which not in ('best', 'last') or self.split not in ('train', 'val', 'test'):
            yield f'which={self.which!r} must be best or last, split={self.split!r} train, val or test.'
        if min(self.answers, self.quiz_size, self.top_k, self.seed) < 0 or min(self.max_new_tokens, self.batch_size) < 1:
            yield 'answers, quiz_size, top_k and seed must not be negative, max_new_tokens and batch_size at least 1.'
        if not 0 < self.temperature < math.inf:
            yield f'temperature={self.temperature} must be above 0: greedy answers are given anyway.'


class Answer(NamedTuple):
    """What a model wrote: its text, its ids without the one that ended it, and whether one did."""
    text: str
    ids: list
    stopped: bool


def answer_all(opened, template, questions, max_new_tokens=64, temperature=0.0, top_k=0, seed=1337, batch_size=128, what=''):
    """The Answers of a model to each list of turns in questions, in their order.

    Prompts of similar length are answered together; greedy answers are what they would be alone.
    A prompt that leaves no room for that loses its oldest tokens. what: names the work on a terminal.
    """
    tokenizer, window = opened.tokenizer, opened.model.config.block_size
    stops = conversation.stop_ids(tokenizer, template)
    room = window - min(max_new_tokens, window // 2)  # at least half of the window is the prompt's, as in a chat
    prompts = [conversation.prompt(turns, tokenizer, template)[-room:] for turns in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found, bar = [[] for _ in prompts], Bar(total=len(order) * max_new_tokens, desc=f'{what}, {len(order)} answers',
                                          bar_format='{l_bar}{bar}| [{elapsed}<{remaining}]', disable=not what or None)
    for start in range(0, len(order), batch_size):
        group = order[start:start + batch_size]
        for tokens in generate(opened.model, [prompts[i] for i in group], max_new_tokens, 1, temperature, top_k,
                               seed=seed + start, stops=stops):
            for i, token in zip(group, tokens):
                if token is not None:
                    found[i].append(token)
            bar.update(len(group))
        bar.update(min(start + batch_size, len(order)) * max_new_tokens - bar.n)
    bar.close()
    return [Answer(conversation.answer_text(ids, tokenizer, template), ids[:-1] if ids[-1] in stops else ids,
                   ids[-1] in stops) for ids in found]


# ---- scores ----

@torch.no_grad()
def response_loss(model, split, what=''):
    """(nats per supervised token, how many tokens) of a tokenfile.Split; conversations beyond the window left out."""
    rows = tokenfile.Rows(split, model.config.block_size)
    loss_sum, n_tokens = 0.0, 0
    for batch in rows.batches(4, what=what):
        loss_sum += model.loss(batch).item()
        n_tokens += len(batch.targets)
    return loss_sum / n_tokens, n_tokens


def first_sentence(text):
    """The text up to its first line's end, or to a sign that ends a sentence before a capital letter."""
    line = text.strip().split('\n')[0]
    # "St. John's" and "Washington, D.C." are no ends: what stands before the dot is short.
    end = re.search(r'(?<!\bSt)(?<![.\s]\w)[.!?](?=\s+["\'“(]?[A-ZÀ-Þ]|\s*$)', line)
    return line[:end.end()] if end else line


def names(text):
    """The text as its words in small letters, between spaces, to look for a name in."""
    return ' ' + ' '.join(re.findall(r'\w+', text.casefold())) + ' '


def is_right(answer, question):
    """Whether the name asked for stands in the answer's first sentence."""
    wanted = question['capital' if question['direction'] == 'forward' else 'country']
    return names(wanted) in names(first_sentence(answer.text))


def is_exact(answer, question):
    """Whether the answer is the expected one, character for character, and ended by itself."""
    return answer.stopped and answer.text == question['answer']


def form(answers, tokenizer):
    """How the answers are made, as shares from 0 to 1 and one mean."""
    specials = set(tokenizer.special.values())

    def repeated(ids):
        grams = Counter(zip(*(ids[i:] for i in range(4))))
        return 1 - len(grams) / grams.total() if grams else 0.0
    n = len(answers)
    return {'stops by itself': sum(a.stopped for a in answers) / n,
            'mean length in tokens': sum(len(a.ids) for a in answers) / n,
            'repeated 4-grams': sum(repeated(a.ids) for a in answers) / n,
            'no stray tags': sum(not specials & set(a.ids) for a in answers) / n}


def quiz_questions(config):
    """The quiz of data/capitals, or a part of it drawn by seed: dicts, see its prepare.py."""
    from demo import prepare as capitals
    questions = capitals.quiz(capitals.Config())
    if config.quiz_size and config.quiz_size < len(questions):
        chosen = np.random.default_rng(config.seed).choice(len(questions), config.quiz_size, replace=False)
        questions = [questions[i] for i in sorted(chosen)]
    return questions


def turns_of(question):
    """A question of the quiz, with the exchange before it if there is one, as turns."""
    roles = ('user', 'assistant')
    return [Turn(roles[i % 2], text) for i, text in enumerate((*question['before'], question['question']))]


def quiz_scores(answers, questions):
    """{name: share} of exact and of right answers, all together and by direction and kind."""
    scores = {}
    groups = {'all': questions} | {f'{q["direction"]}, {q["kind"]}': None for q in questions}
    for group in groups:
        of = [(a, q) for a, q in zip(answers, questions) if group in ('all', f'{q["direction"]}, {q["kind"]}')]
        scores[group] = {'questions': len(of), 'exact': sum(is_exact(a, q) for a, q in of) / len(of),
                         'right': sum(is_right(a, q) for a, q in of) / len(of)}
    return scores


# ---- one model ----

def prompts_of(split, tokenizer, template, n):
    """The first n conversations of a split: [(turns up to the last answer, that answer)]."""
    found = []
    for i in range(min(n, len(split))):
        try:
            turns = conversation.decode(*split[i], tokenizer, template)
        except ValueError as error:
            raise UserError(f'conversation {i} of split {split.name!r} is {error}. Prepare the folder again.') from None
        last = max((k for k, turn in enumerate(turns) if turn.role == 'assistant'), default=0)
        if last:
            found.append((turns[:last], turns[last].text))
    return found


def measure(name, config, folder, questions, device):
    """Everything the report says of one model, as a dict of plain values."""
    meta = tokenfile.read_meta(folder) if folder else {}
    if folder and meta['template'] not in conversation.TEMPLATES:
        raise UserError(f"{folder} is of the template {meta['template']!r}; known are {', '.join(conversation.TEMPLATES)}.")
    needs_tags = bool(folder) and conversation.TEMPLATES[meta['template']].tags
    opened = checkpoint.open_model(name, which=config.which, tags=needs_tags)
    n_parameters = sum(p.numel() for p in opened.model.parameters())
    prepare(opened.model, device, config.dtype)
    tuned = opened.template
    in_data = tuned or ('question' if needs_tags or not folder else meta['template'])  # asked the data set's prompts
    result = {'model': name, 'description': opened.description, 'template': in_data,
              'parameters': n_parameters}
    how = dict(max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    sampled = dict(temperature=config.temperature, top_k=config.top_k, seed=config.seed)
    if folder:
        if meta['tokenizer']['sha256'] != opened.tokenizer.sha256:
            raise UserError(f'{name} has another vocabulary than {folder}: {opened.tokenizer.name}, not {meta["tokenizer"]["name"]}.')
        split = tokenfile.Split([folder], config.split, vocab_size=opened.tokenizer.vocab_size)
        loss, n_tokens = response_loss(opened.model, split, f'{name}: loss')
        result |= {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'tokens': n_tokens}
        pairs = prompts_of(split, opened.tokenizer, meta['template'], config.answers)
        if pairs:
            given = answer_all(opened, in_data, [turns for turns, _ in pairs], **how, what=f'{name}: answers')
            result['form'] = form(given, opened.tokenizer)
            result['answers'] = [{'prompt': [t.text + (f'\n\n{t.context}' if t.context else '') for t in turns], 'expected': expected,
                                  'answer': a.text, 'stopped': a.stopped} for (turns, expected), a in zip(pairs, given)]
    if questions:
        result['quiz'] = {}
        for manner, more in (('greedy', {}), ('sampled', sampled)):
            given = answer_all(opened, tuned or 'question', [turns_of(q) for q in questions], **how, **more,
                               what=f'{name}: quiz, {manner}')
            result['quiz'][manner] = quiz_scores(given, questions)
            if manner == 'greedy':
                result['quiz_form'] = form(given, opened.tokenizer)
                result['quiz_answers'] = [{'question': [*q['before'], q['question']], 'kind': q['kind'], 'expected': q['answer'],
                                           'answer': a.text, 'exact': is_exact(a, q), 'right': is_right(a, q)} for a, q in zip(given, questions)]
    return result


# ---- the report ----

def rows_of(result):
    """[(name of a figure, its text)] of a model's result, for the table."""
    share = lambda x: f'{100 * x:.1f} %'  # noqa: E731
    rows = [('parameters', f"{result['parameters'] / 1e6:.1f} M"), ('asked as', result['template'])]
    if 'loss' in result:
        rows += [('loss on responses', f"{result['loss']:.4f}"), ('perplexity', f"{result['perplexity']:.1f}")]
    for title, key in (('answers', 'form'), ('quiz', 'quiz_form')):
        for name, value in result.get(key, {}).items():
            rows.append((f'{title}: {name}', f'{value:.1f}' if 'mean' in name else share(value)))
    for manner, scores in result.get('quiz', {}).items():
        for group, found in scores.items():
            for kind in ('right', 'exact'):
                rows.append((f'quiz, {manner}: {kind}, {group} ({found["questions"]})', share(found[kind])))
    return rows


def table(results):
    """The figures of all models side by side, as text."""
    columns = [dict(rows_of(result)) for result in results]
    names_of_rows = list(dict.fromkeys(name for column in columns for name in column))
    width = max(map(len, names_of_rows)) + 2
    widths = [max(12, len(result['model']) + 2, *(len(text) + 2 for text in column.values())) for result, column in zip(results, columns)]
    lines = [' ' * width + ''.join(f"{result['model']:>{w}}" for result, w in zip(results, widths))]
    lines += [f'{name:<{width}}' + ''.join(f"{column.get(name, '–'):>{w}}" for column, w in zip(columns, widths)) for name in names_of_rows]
    return '\n'.join(lines)


STYLE = """
section { border-top: 1px solid var(--line); padding: 1rem 0 } .prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .8rem; margin-top: .6rem }
.side > div { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0 }
.side b { display: block; font-size: .8rem; opacity: .7; font-weight: 600 } .ok { color: light-dark(#067647, #5fd39a) } .no { color: light-dark(#b42318, #ff9c92) }
"""


def page(results, config, questions):
    """The report as one HTML page that needs nothing from outside."""
    e = html.escape
    columns = [dict(rows_of(result)) for result in results]
    head = ''.join(f'<th>{e(result["model"])}</th>' for result in results)
    body = ''.join(f'<tr><td>{e(name)}</td>' + ''.join(f'<td>{e(column.get(name, "–"))}</td>' for column in columns) + '</tr>'
                   for name in dict.fromkeys(name for column in columns for name in column))
    parts = [f'<h1>{e(" beside ".join(result["model"] for result in results))}</h1>',
             ''.join(f'<p class="note">{e(result["model"])}: {e(result["description"])}</p>' for result in results),
             f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>']

    def side(prompt, boxes):
        return (f'<section><div class="prompt">{e(prompt)}</div><div class="side">' + ''.join(
            f'<div><b>{e(title)}</b>{e(text) or "<i>nothing</i>"}{mark}</div>' for title, text, mark in boxes) + '</div></section>')

    if any('answers' in result for result in results):
        parts.append(f'<h2>Answers to prompts of {e(config.dataset)}, {e(config.split)}, greedy</h2>')
        with_answers = [result for result in results if 'answers' in result]
        for i, first in enumerate(with_answers[0]['answers']):
            boxes = [('expected', first['expected'], '')]
            boxes += [(result['model'], result['answers'][i]['answer'], '' if result['answers'][i]['stopped'] else ' …') for result in with_answers]
            parts.append(side('\n\n'.join(first['prompt']), boxes))
    if questions:
        parts.append('<h2>Quiz, greedy</h2>')
        for i, question in enumerate(results[0]['quiz_answers'][:60]):
            mark = lambda a: '<span class="ok"> ✓</span>' if a['right'] else '<span class="no"> ✗</span>'  # noqa: E731
            boxes = [('expected', question['expected'], '')]
            boxes += [(result['model'], result['quiz_answers'][i]['answer'], mark(result['quiz_answers'][i])) for result in results]
            parts.append(side(' → '.join(question['question']), boxes))
        if len(questions) > 60:
            parts.append(f'<p class="note">{len(questions) - 60} more are in report.json.</p>')
    settings = ', '.join(f'{key}={value!r}' for key, value in configurator.as_dict(config).items())
    return document('Report', [*parts, f'<footer><p>{e(settings)}</p></footer>'], STYLE)


def main(argv):
    """The script."""
    config = configurator.load(Config, argv)
    keep_freed_memory()
    device = pick_device(config.device)
    folder = tokenfile.find_folders(config.dataset, config.data_dir)[0] if config.dataset else None
    questions = quiz_questions(config) if config.quiz else []
    results = [measure(name.strip(), config, folder, questions, device) for name in config.models.split(',')]
    print(table(results))
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        with open(os.path.join(config.out_dir, 'report.json'), 'w', encoding='utf-8') as file:
            json.dump({'config': configurator.as_dict(config), 'models': results}, file, indent=1, ensure_ascii=False)
        with open(os.path.join(config.out_dir, 'report.html'), 'w', encoding='utf-8') as file:
            file.write(page(results, config, questions))
    except OSError as error:
        raise UserError(f'cannot write to {config.out_dir}: {error.strerror}. Use --out_dir=FOLDER.') from None
    print(f'side by side, with the answers: {config.out_dir}/report.html')


if __name__ == '__main__':
    configurator.run(main)
