"""The model card of an export: README.md as the hub shows it, all of it taken from the checkpoint and the run.

    python export.py --init_from=out/oasst --out=my-model --report=out/report/report.json

What it quotes comes from files that somebody else may have written, so every value is one line of
printable characters, written as JSON where YAML reads it and escaped where Markdown does.
Source: https://huggingface.co/docs/hub/model-cards
"""
import contextlib
import json
import math
import os
import re
import shlex
import textwrap

from core import conversation
import evaluate
from core import runlog
from core.checkpoint import HUB_NAMES
from configurator import UserError
from core.conversation import Turn
from core.tokenizer import GPT2_SHA256

LICENCES = ('apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc0-1.0')  # the hub's names for them
OWNERS = {'distilgpt2': 'distilbert/'} | {name: 'openai-community/' for name in HUB_NAMES if name.startswith('gpt2')}
NOT_RECIPE = ('init_from', 'out_dir', 'data_dir', 'overwrite', 'eval_only', 'wandb_log', 'wandb_project', 'wandb_run_name')


def line(value, longest=200):
    """The value as one line of printable characters; of what is neither text nor number its kind."""
    text = str(value) if isinstance(value, (str, int, float)) else type(value).__name__
    text = ''.join(c if c.isprintable() else ' ' for c in text[:longest + 1])
    return text if len(text) <= longest else text[:longest - 1] + '…'


def escaped(value):
    """The value as a line of Markdown that shows it as it is."""
    return re.sub(r'([\\`*_\[\]<>&|~$#])', r'\\\1', line(value))


def code(text):
    """The text as a block of code."""
    return textwrap.indent(text, '    ', lambda _: True)


def scores(opened, report, folder):
    """[(name, value)] of a report.json of evaluate.py, of this model alone; UserError where it has none of it."""
    try:
        with open(report, encoding='utf-8') as file:
            results = json.load(file)['models']
        found = [result for result in results if os.path.realpath(result['model']) == os.path.realpath(folder)]
        rows = [row for row in (evaluate.rows_of(found[0]) if found else ()) if row[0] not in ('parameters', 'asked as')]
        there = [line(result['description']) for result in found or results]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{report} is not a report.json of evaluate.py that can be read: {type(error).__name__} {line(error, 100)}') from None
    wanted = line(opened.description)
    if not found or os.path.basename(there[0]) != os.path.basename(wanted):
        raise UserError(f'{report} is about {", ".join(there)}, not about {wanted}. '
                        f'Run: python evaluate.py --models={folder} --dataset=NAME')
    return rows


def card(title, opened, folder, dtype, report=''):
    """The text of the card. folder: where the checkpoint is; report: the path of a report.json, or ''."""
    contents, shape = opened.contents, opened.model.config
    run = contents.get('config', {})
    origin = contents.get('origin')
    origin = origin if isinstance(origin, dict) else {}
    begun, data = origin.get('init_from'), origin.get('data')
    begun = begun if isinstance(begun, str) else None
    base = OWNERS.get(begun, '') + begun if begun in HUB_NAMES else None
    data = [part for part in (data if isinstance(data, list) else []) if isinstance(part, dict)]
    sources = [part['source'] if isinstance(part.get('source'), dict) else {} for part in data]
    urls = [url if isinstance(url := source.get('url'), str) and re.fullmatch(r'https?://[\w./%?=:+@,-]+', url) else None
            for source in sources]
    licences = {line(source.get('licence') or '') for source in sources}
    on_hub = [found[1] for url in urls if url and (found := re.match(r'https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/', url))]
    licence = next(iter(licences)).lower() if len(licences) == 1 else 'other'  # several, or one that is not known
    front = {'library_name': 'transformers', 'pipeline_tag': 'text-generation',
             'license': (licence if licence in LICENCES else 'other') if any(licences) else None,
             'base_model': base, 'datasets': list(dict.fromkeys(on_hub)), 'tags': ['gpt2', 'conversational', 'sft']}
    n_parameters = sum(p.numel() for p in opened.model.parameters()) - (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd
    start = (f'It began with the weights of [{base}](https://huggingface.co/{base}).' if base else
             'It was trained from scratch.' if begun == 'scratch' else 'The checkpoint does not say which weights it began with.'
             if begun in (None, 'resume') else f'It began with the weights of {escaped(os.path.basename(os.path.normpath(begun)))}.')
    example = [Turn('user', 'What is the capital of France?'), Turn('assistant', 'The capital of France is Paris.')]
    ids, mask, _ = conversation.encode(example, opened.tokenizer, opened.template)
    parts = [
        '---\n' + ''.join(f'{key}: {json.dumps(value, ensure_ascii=False)}\n' for key, value in front.items() if value) + '---',
        f'# {escaped(title)}',
        f"A model of GPT-2's architecture, tuned on conversations: {n_parameters / 1e6:.1f} M parameters, {shape.n_layer} layers, "
        f'{shape.n_head} heads, width {shape.n_embd}, {shape.block_size} positions, {shape.vocab_size:,} tokens, '
        f'weights in {dtype}. {start}',
        '## How it is spoken to',
        f'The template is `{opened.template}`, which `apply_chat_template` writes. A conversation of two turns:',
        code(opened.tokenizer.decode(ids.tolist())),
        'All of it was learned.' if run.get('loss_on') == 'all' else
        f'Of it, this was learned: `{opened.tokenizer.decode(ids[mask == 1].tolist()).strip()}`.',
        'A system message has no place of its own: it becomes the beginning of the first question. A tag that somebody types is ordinary text and ends nothing.']

    parts.append('## Data')
    for part, source, url in zip(data, sources, urls):
        at, tokens = f', <{url}>' if url else '', part.get('tokens')
        parts.append(f"- {escaped(source.get('name') or part.get('dataset') or 'a data set without a name')}{at}; licence: "
                     f"{escaped(source.get('licence') or 'not stated')}{f'; {tokens:,} tokens' if type(tokens) is int else ''}"
                     f"{'; sha256 ' + escaped(source['sha256']) if source.get('sha256') else ''}")
    parts.append('The weights follow from this data: its licence, and that of the weights they began with, decide what they may be used for.'
                 if data else 'The checkpoint does not say what it was trained on.')

    recipe = {key: value for key, value in run.items() if isinstance(key, str) and key not in NOT_RECIPE}
    settings = '\n'.join(f'{line(key)} = {line(repr(value) if isinstance(value, str) else value)}' for key, value in recipe.items())
    parts += ['## Recipe', code(settings) if recipe else 'The checkpoint does not say how it was trained.']

    rows = []
    if contents:
        rows.append(('optimizer steps', f"{contents['step']:,}"))
        if contents['val_loss'] is not None and math.isfinite(contents['val_loss']):
            rows.append(('val_loss at that step, nats per supervised token', f"{contents['val_loss']:.4f}"))
        for column, name in (('loss', 'training loss'), ('val_loss', 'val_loss')):
            last = next((row for row in reversed(runlog.read(folder)) if row.get(column)), None)
            with contextlib.suppress(ValueError, TypeError):
                rows.append((f"{name}, last in the run's log, step {last['step']}", f'{float(last[column]):.4f}'))
    rows += scores(opened, report, folder) if report else []
    parts += ['## Scores', '\n'.join(['| what | value |', '|---|---|', *(f'| {escaped(name)} | {escaped(value)} |' for name, value in rows)])
              if rows else 'None were given.']

    where, question = line(title), 'What is the capital of France?'
    python = ['from transformers import pipeline', f'ask = pipeline("text-generation", {json.dumps(where)})',
              f'print(ask([{{"role": "user", "content": "{question}"}}])[0]["generated_text"][-1]["content"])']
    own = opened.tokenizer.sha256 != GPT2_SHA256  # llama.cpp's converter knows vocabularies by a hash of its own
    gguf = (f'python export.py --init_from={shlex.quote(where)} --out=FOLDER --gguf=True   # there; FOLDER/model.gguf is for llama.cpp' if own else
            f'python convert_hf_to_gguf.py {shlex.quote(where)} --outfile model.gguf   # in the sources of llama.cpp')
    shell = [f'python sample.py --init_from={shlex.quote(where)} --temperature=0 --user="{question}"   # in the repository that trained it', gguf]
    parts += ['## Use', code('\n'.join(python)), code('\n'.join(shell))]
    parts += ['## Limits',
              'A GPT-2 of this size speaks in the form of an assistant and is often wrong. Nothing was done to make it safe: it repeats '
              f'what its data says. It reads and writes {shape.block_size} tokens in all; an answer ends where these do. '
              'U+FDD0 and U+FDD1, which Unicode keeps from texts, are refused in messages.']
    return '\n\n'.join(parts) + '\n'
