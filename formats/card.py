"""The model card of an export: README.md, as the hub shows it.

    python export.py --init_from=out/oasst --out=my-model

Its form is card.md. Source: https://huggingface.co/docs/hub/model-cards
"""
import json
import os
import re

from configurator import UserError
from core import conversation
from core.conversation import Turn
from core.files import reading
from formats.page import render

# The hub's names for licences.
LICENCES = ('apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-4.0', 'cc0-1.0')
# Base models that are on the hub.
OWNERS = '(openai-community|distilbert|microsoft)'
ON_HUB = rf'gpt2(-medium|-large|-xl)?|distilgpt2|{OWNERS}/[\w.-]+'
# A data set's page, in the address of a file.
DATASET = r'https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/'
# Settings that say where a run was, not how it trained.
NOT_RECIPE = ('init_from', 'out_dir', 'data_dir', 'overwrite', 'eval_only', 'log',
              'tensorboard', 'wandb_log', 'wandb_project', 'wandb_run_name')
# The same example stands in each card, to compare templates.
EXAMPLE = [Turn('user', 'What is the capital of France?'),
           Turn('assistant', 'The capital of France is Paris.')]


def licence_of(data):
    """The licence for the top of the card, None if none is stated."""
    licences = {source.get('licence') or '' for source in data}
    if licences <= {''}:
        return None
    licence = licences.pop().lower()
    if licences or licence not in LICENCES:
        return 'other'
    return licence


def scores_of(opened, report):
    """{name: text} from the checkpoint, and from a report.json of evaluate.py."""
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
    name = opened.description
    if name not in figures:
        command = f'python evaluate.py --models={opened.folder} --dataset=NAME'
        raise UserError(
            f'{report} is about {", ".join(figures)}, not about {name}. Run: {command}')
    return found | figures[name]


def card(title, opened, dtype, report=''):
    """The text of the card. report: the path of a report.json, or ''."""
    shape = opened.model.config
    tokenizer = opened.tokenizer
    saved = opened.checkpoint
    # What the checkpoint says about its run.
    config = saved.config if saved else {}
    origin = saved and saved.origin or {}
    begun = origin.get('init_from') or ''
    data = [(part, part.get('source') or {}) for part in origin.get('data') or []]
    sources = [source for _, source in data]
    urls = ' '.join(source.get('url') or '' for source in sources)
    names = [key for key in config if key not in NOT_RECIPE]
    recipe = [(key, repr(config[key])) for key in names]
    ids, mask, _ = conversation.encode(EXAMPLE, tokenizer, opened.template)
    # Without the padding of the vocabulary.
    n_parameters = sum(p.numel() for p in opened.model.parameters())
    n_parameters -= (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd
    return render(
        'card.md', title=title, shape=shape, dtype=dtype, n_parameters=n_parameters,
        template=opened.template, example=tokenizer.decode(ids),
        learned=tokenizer.decode(ids[mask == 1]).strip(),
        learned_all=config.get('loss_on') == 'all', question=EXAMPLE[0].text,
        base=begun if re.fullmatch(ON_HUB, begun) else None,
        begun=os.path.basename(begun.rstrip('/')), scores=scores_of(opened, report),
        data=data, datasets=sorted(set(re.findall(DATASET, urls))),
        licence=licence_of(sources), recipe=recipe)
