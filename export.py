"""Export a model as a folder for transformers, TRL, lm-eval and llama.cpp.

    python export.py --init_from=out/oasst --out=my-model
    python export.py --init_from=out/oasst --out=my-model --gguf=True --overwrite=True

The folder holds the weights, the vocabulary, our template as a chat template, the ids that end an
answer, and a model card. apply_chat_template gives the ids of core/conversation.py, and
--init_from=my-model reads it back.
"""
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import configurator
from configurator import UserError


@dataclass(frozen=True)
class Config:
    # which model
    init_from: str = 'resume'  # resume (the last run under out_dir), or a folder
    out_dir: str = 'out'       # where runs are
    which: Literal['best', 'last'] = 'best'  # checkpoint; best has the lowest val_loss
    # where to
    out: str = ''              # the folder to write: whole, or not at all
    overwrite: bool = False    # replace an export that is there already
    # how
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights
    gguf: bool = False         # also write model.gguf; needs requirements-export.txt
    report: str = ''           # report.json of evaluate.py: its scores go into the model card

    def problems(self):
        if not self.out:
            yield 'no folder to write to: use --out=FOLDER.'


# torch takes seconds to import: mistakes on the command line are found before.
configurator.precheck(__name__, Config)

import safetensors

from core import checkpoint
from core.files import flush, flush_folder, only_writer
from formats import card, folder, gguf

FILES = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
         'tokenizer_config.json', 'chat_template.jinja', 'README.md', 'model.gguf'}


def check_free(out, overwrite):
    """UserError if there is something at out that must not be replaced."""
    if not os.path.lexists(out):
        return
    found = set(os.listdir(out)) if os.path.isdir(out) else {out}
    if found and not overwrite:
        raise UserError(f'{out} is there already. Replace it with --overwrite=True, or write '
                        'elsewhere: --out=FOLDER')
    if found - FILES:
        raise UserError(f'{out} holds {min(found - FILES)}, which no export wrote. Only an export '
                        'can be replaced. Write elsewhere: --out=FOLDER')


def export(config, new):
    """Write the export into the folder new, onto the disk; returns the Opened model."""
    opened = checkpoint.open_model(config.init_from, config.out_dir, config.which)
    if not opened.template:
        raise UserError(f'{opened.description} was never tuned here, so there is no template to '
                        'export. Tune it first: python train.py config/finetune_oasst.py')
    texts, weights = folder.contents(opened, config.dtype)
    title = os.path.basename(os.path.abspath(config.out))
    texts['README.md'] = card.card(title, opened, config.dtype, config.report)
    folder.write(new, texts, weights)
    if config.gguf:
        gguf.write(os.path.join(new, 'model.gguf'), opened, texts, weights)
    for name in os.listdir(new):
        with open(os.path.join(new, name), 'rb') as file:
            flush(file)
    return opened


def put_back(old, out):
    """Restore the export that was set aside, if nothing has taken its place."""
    if os.path.isdir(old) and not os.path.lexists(out):
        os.rename(old, out)


def main(argv):
    config = configurator.load(Config, argv)
    out = os.path.normpath(config.out)
    # A folder of ours, so that no name of the user's is in the way.
    partial = f'{out}.partial'
    new = os.path.join(partial, 'new')
    old = os.path.join(partial, 'old')
    with only_writer(partial, option='out'):
        try:
            # A process that was killed may have left these two.
            put_back(old, out)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            check_free(out, config.overwrite)
            opened = export(config, new)
            # A kill between the two renames leaves the last export in old.
            if os.path.isdir(out):
                os.rename(out, old)
            os.rename(new, out)
            flush_folder(os.path.dirname(os.path.abspath(out)))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f'cannot write {out}: {error}. Make room, or use '
                            '--out=FOLDER.') from None
        finally:
            put_back(old, out)
            shutil.rmtree(partial, ignore_errors=True)
    print(f'wrote {out}: {opened.description}, {config.dtype}, template {opened.template}. '
          f'Talk to it: python sample.py --init_from={out} --chat')


if __name__ == '__main__':
    configurator.run(main)
