"""The model card of an export: README.md, as the hub shows it.

    python export.py --init_from=out/oasst --out=my-model --report=out/report/report.json

card.md is its form. Source: https://huggingface.co/docs/hub/model-cards
"""
import json
import os
import re

import jinja2  # comes with torch

from configurator import UserError
from core import conversation
from core.conversation import Turn
from core.files import reading

# The hub's names for licences.
LICENCES = ('apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc0-1.0')
# Names of base models that are on the hub.
ON_HUB = r'gpt2(-medium|-large|-xl)?|distilgpt2|(openai-community|distilbert|microsoft)/[\w.-]+'
# A data set's page, in the address of a file.
DATASET = r'https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/'
# Settings that say where a run was, not how it trained.
NOT_RECIPE = ('init_from', 'out_dir', 'data_dir', 'overwrite', 'eval_only', 'log', 'tensorboard',
              'wandb_log', 'wandb_project', 'wandb_run_name')
# The same example stands in each card, so that templates can be compared.
EXAMPLE = [Turn('user', 'What is the capital of France?'),
           Turn('assistant', 'The capital of France is Paris.')]


def markdown(value):
    """The value as Markdown that shows it as it is."""
    return re.sub(r'([\\`*_\[\]<>&|~$#])', r'\\\1', str(value))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)), undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
ENVIRONMENT.filters['markdown'] = markdown


def describe_data(origin):
    """[dict] with name, url, licence, sha256 and tokens of each data set."""
    found = []
    for part in origin.get('data') or []:
        source = part.get('source') or {}
        found.append({
            'name': source.get('name') or part.get('dataset') or 'a data set without a name',
            'url': source.get('url') or '',
            'licence': source.get('licence') or 'not stated',
            'sha256': source.get('sha256'),
            'tokens': part.get('tokens')})
    return found


def licence_of(data):
    """The licence for the top of the card, None if no data set states one."""
    licences = {part['licence'].lower() for part in data}
    if licences <= {'not stated'}:
        return None
    if len(licences) == 1 and licences <= set(LICENCES):
        return licences.pop()
    return 'other'


def scores_of(opened, report):
    """{name: text}: what the checkpoint says, and a report.json of evaluate.py."""
    found = {}
    saved = opened.checkpoint
    if saved:
        found['optimizer steps'] = f'{saved.step:,}'
    if saved and saved.val_loss is not None:
        found['val_loss, nats per supervised token'] = f'{saved.val_loss:.4f}'
    if not report:
        return found
    with reading(report, 'Expected the report.json of evaluate.py.'):
        with open(report, encoding='utf-8') as file:
            results = json.load(file)['models']
        figures = {result['description']: result['figures'] for result in results}
    if opened.description not in figures:
        raise UserError(f'{report} is about {", ".join(figures)}, not about {opened.description}. '
                        f'Run: python evaluate.py --models={opened.folder} --dataset=NAME')
    return found | figures[opened.description]


def card(title, opened, dtype, report=''):
    """The text of the card. report: the path of a report.json, or ''."""
    shape = opened.model.config
    saved = opened.checkpoint
    config = {}
    origin = {}
    if saved:
        config = saved.config
        origin = saved.origin or {}
    begun = origin.get('init_from') or ''
    data = describe_data(origin)
    urls = ' '.join(part['url'] for part in data)
    datasets = sorted(set(re.findall(DATASET, urls)))
    recipe = [(key, repr(value)) for key, value in config.items() if key not in NOT_RECIPE]
    ids, mask, _ = conversation.encode(EXAMPLE, opened.tokenizer, opened.template)
    padding = shape.padded_vocab_size - shape.vocab_size
    n_parameters = sum(p.numel() for p in opened.model.parameters())
    n_parameters -= padding * shape.n_embd
    return ENVIRONMENT.get_template('card.md').render(
        title=title, shape=shape, dtype=dtype, n_parameters=n_parameters,
        scores=scores_of(opened, report),
        base=begun if re.fullmatch(ON_HUB, begun) else None,
        begun=os.path.basename(begun.rstrip('/')),
        template=opened.template, example=opened.tokenizer.decode(ids),
        learned=opened.tokenizer.decode(ids[mask == 1]).strip(),
        learned_all=config.get('loss_on') == 'all', question=EXAMPLE[0].text,
        data=data, datasets=datasets, licence=licence_of(data), recipe=recipe)
