"""Export a model as a folder for transformers, TRL, lm-eval and llama.cpp.

    python export.py --init_from=out/oasst --out=my-model
    python export.py --init_from=out/oasst --out=my-model --gguf=True
"""
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import configurator
from configurator import UserError


@dataclass(frozen=True)
class Config:
    init_from: str = 'resume'  # the last run under out_dir, or a folder
    out_dir: str = 'out'  # where runs are
    which: Literal['best', 'last'] = 'best'  # checkpoint
    out: str = ''  # the folder to write: whole, or not at all
    overwrite: bool = False  # replace an export
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights
    gguf: bool = False  # also model.gguf; needs requirements-export.txt
    report: str = ''  # report.json of evaluate.py, for the model card

    def problems(self):
        if not self.out:
            yield 'no folder to write to: use --out=FOLDER.'


# Find mistakes before torch is imported, which takes seconds.
configurator.precheck(__name__, Config)

import safetensors

from core import checkpoint
from core.files import flush, flush_folder
from formats import card, folder, gguf

FILES = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
         'tokenizer_config.json', 'chat_template.jinja', 'README.md', 'model.gguf'}


def export(config, opened, new):
    """Write an Opened model into the folder new, onto the disk."""
    files, weights = folder.contents(opened, config.dtype)
    title = os.path.basename(os.path.abspath(config.out))
    files['README.md'] = card.card(title, opened, config.dtype, config.report)
    folder.write(new, files, weights)
    if config.gguf:
        gguf.write(os.path.join(new, 'model.gguf'), opened, files, weights)
    for name in os.listdir(new):
        with open(os.path.join(new, name), 'rb') as file:
            flush(file)


def main(argv):
    config = configurator.load(Config, argv)
    out = os.path.normpath(config.out)
    new = f'{out}.partial'
    old = f'{out}.old'
    opened = checkpoint.open_model(config.init_from, config.out_dir, config.which)
    if not opened.template:
        raise UserError(f'{opened.description} was never tuned here: it has no template. '
                        'Tune it: see config/.')
    try:
        found = set(os.listdir(out)) if os.path.lexists(out) else set()
        others = found - FILES
        if others or found and not config.overwrite:
            names = ', '.join(others or found)
            raise UserError(f'{out} holds {names}. Only an export is replaced, with '
                            '--overwrite=True. Use another --out=FOLDER.')
        # A process that was killed may have left one.
        shutil.rmtree(new, ignore_errors=True)
        export(config, opened, new)
        # The old one goes when the new one is in its place.
        if found:
            os.rename(out, old)
        os.rename(new, out)
        flush_folder(os.path.dirname(os.path.abspath(out)))
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        message = f'cannot write {out}: {error}. Make room, or use --out=FOLDER.'
        raise UserError(message) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f'wrote {out}: {opened.description}, template {opened.template}. '
          f'Talk to it: python sample.py --init_from={out} --chat')


if __name__ == '__main__':
    configurator.run(main)
