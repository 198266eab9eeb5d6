"""The model card of an export: README.md, as the hub shows it.

    python export.py --init_from=out/oasst --out=my-model --report=out/report/report.json

card.md is its form. What it quotes may have been written by anybody: every value becomes one line
of printable characters, escaped where Markdown would read it.
Source: https://huggingface.co/docs/hub/model-cards
"""
import json
import math
import os
import re
import shlex

import jinja2  # comes with torch

from configurator import UserError
from core import conversation
from core.conversation import Turn
from core.files import reading

FOLDER = os.path.dirname(os.path.abspath(__file__))
# The hub's names for licences.
LICENCES = ('apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc0-1.0')
# Base models on the hub that have a short name here.
BASES = {'distilgpt2': 'distilbert/distilgpt2'}
for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
    BASES[name] = f'openai-community/{name}'
# Settings that say where a run was, not how it trained.
NOT_RECIPE = ('init_from', 'out_dir', 'data_dir', 'overwrite', 'eval_only', 'log',
              'wandb_log', 'wandb_project', 'wandb_run_name')
QUESTION = 'What is the capital of France?'


def line(value, longest=200):
    """The value as one line of printable characters."""
    text = str(value)[:longest + 1]
    text = ''.join(c if c.isprintable() else ' ' for c in text)
    if len(text) > longest:
        text = text[:longest - 1] + '…'
    return text


def markdown(value):
    """The value as a line of Markdown that shows it as it is."""
    return re.sub(r'([\\`*_\[\]<>&|~$#])', r'\\\1', line(value))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
ENVIRONMENT.filters |= {'line': line, 'markdown': markdown, 'shell': shlex.quote}


def hub_name(begun):
    """The hub's name of the base model; None if it is not known to be there."""
    if re.fullmatch(r'(openai-community|distilbert|microsoft)/[\w.-]+', begun):
        return begun
    return BASES.get(begun)


def describe_data(origin):
    """[dict] with name, url, licence, sha256 and tokens of each data set."""
    found = []
    for part in origin.get('data') or []:
        source = part.get('source') or {}
        url = source.get('url') or ''
        if not re.fullmatch(r'https?://[\w./%?=:+@,-]+', url):
            url = ''
        found.append({
            'name': source.get('name') or part.get('dataset') or 'a data set without a name',
            'url': url, 'licence': source.get('licence') or 'not stated',
            'sha256': source.get('sha256'), 'tokens': part.get('tokens')})
    return found


def licence_of(data):
    """The licence for the top of the card, None if no data set states one."""
    licences = {part['licence'].lower() for part in data}
    if licences <= {'not stated'}:
        return None
    if len(licences) == 1 and licences <= set(LICENCES):
        return licences.pop()
    return 'other'


def identity(folder, description):
    """What two mentions of the same model have in common, wherever the scripts ran."""
    return os.path.realpath(folder), os.path.basename(description)


def scores_of(opened, report):
    """[(name, value)] of the model: what its checkpoint says, and a report.json of evaluate.py."""
    found = []
    saved = opened.checkpoint
    if saved:
        found.append(('optimizer steps', f'{saved.step:,}'))
        if saved.val_loss is not None and math.isfinite(saved.val_loss):
            found.append(('val_loss, nats per supervised token', f'{saved.val_loss:.4f}'))
    if not report:
        return found
    wanted = identity(opened.folder, opened.description)
    with reading(report, 'Expected the report.json of evaluate.py.'):
        with open(report, encoding='utf-8') as file:
            results = json.load(file)['models']
        for result in results:
            if identity(result['folder'], result['description']) == wanted:
                return found + list(result['figures'].items())
        others = ', '.join(line(result['description']) for result in results)
    raise UserError(f'{report} is about {others}, not about {line(opened.description)}. '
                    f'Run: python evaluate.py --models={opened.folder} --dataset=NAME')


def card(title, opened, dtype, report=''):
    """The text of the card. report: the path of a report.json, or ''."""
    shape = opened.model.config
    config, origin = {}, {}
    if opened.checkpoint:
        config = opened.checkpoint.config
        origin = opened.checkpoint.origin or {}
    # The same example stands in each card, so that templates can be compared.
    example = [Turn('user', QUESTION), Turn('assistant', 'The capital of France is Paris.')]
    ids, mask, _ = conversation.encode(example, opened.tokenizer, opened.template)
    padding = shape.padded_vocab_size - shape.vocab_size
    n_parameters = sum(p.numel() for p in opened.model.parameters()) - padding * shape.n_embd
    scores = scores_of(opened, report)

    # A stranger's checkpoint may hold any types in its origin and config.
    with reading(opened.description, 'What it says about its origin is damaged.'):
        begun = origin.get('init_from') or ''
        if begun == 'resume':
            begun = ''
        data = describe_data(origin)
        on_hub = []
        for part in data:
            match = re.match(r'https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/', part['url'])
            if match and match[1] not in on_hub:
                on_hub.append(match[1])
        return ENVIRONMENT.get_template('card.md').render(
            title=title, shape=shape, dtype=dtype, n_parameters=n_parameters, scores=scores,
            base=hub_name(begun), begun=os.path.basename(begun.rstrip('/')),
            template=opened.template, example=opened.tokenizer.decode(ids),
            learned=opened.tokenizer.decode(ids[mask == 1]).strip(),
            learned_all=config.get('loss_on') == 'all', question=QUESTION,
            data=data, datasets=on_hub, licence=licence_of(data),
            recipe=[(key, repr(value)) for key, value in config.items() if key not in NOT_RECIPE])
