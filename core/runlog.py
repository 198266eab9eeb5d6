"""What a run reports: lines for a person, log.csv for programs, loss.png to look at.

    python -c "from core import runlog; runlog.plot('out/oasst')"

log.csv has a row every log_interval steps and at each evaluation. A run that was stopped and
resumed has the same rows, bit for bit, but for tokens_per_s and seconds.
"""
import csv
import json
import os
import sys
from dataclasses import asdict

from configurator import UserError
from core.files import Bar, flush, reading, write_whole

COLUMNS = ('step', 'epoch', 'loss', 'learning_rate', 'grad_norm', 'val_loss', 'tokens_per_s',
           'seconds')


class RunLog:
    """Prints lines and writes log.csv. A silent one, of any process but the first, does nothing."""

    def __init__(self, config, state, silent):
        self.silent = silent
        self.out_dir = config.out_dir
        self.path = os.path.join(config.out_dir, 'log.csv')
        self.trackers = []
        self.bar = Bar(total=config.max_iters, initial=state.step, desc='training', unit=' steps',
                       disable=silent or None)
        if silent:
            return
        # The log begins with the rows up to the checkpoint, and goes on from there.
        rows = []
        for row in read(config.out_dir):
            # Of a run that goes on: the rows up to its checkpoint.
            last = (state.evaluated_at or 0) if row['val_loss'] else state.step
            if state.step and row['step'] <= last:
                rows.append(row)
        with write_whole(self.path) as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(rows)
        with write_whole(os.path.join(config.out_dir, 'config.json')) as file:
            json.dump(asdict(config), file, indent=1)
        # wandb_log is nanoGPT's way to say --log=wandb.
        names = config.log.split(',') + ['wandb'] * config.wandb_log
        self.trackers = [open_tracker(name, config, state.step) for name in names if name]

    def say(self, text):
        """Print a line, above the progress bar if there is one."""
        if not self.silent:
            Bar.write(text)
            sys.stdout.flush()

    def write(self, **row):
        """Append a row to log.csv; columns that are absent stay empty."""
        if self.silent:
            return
        try:
            with open(self.path, 'a', newline='', encoding='utf-8') as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
                flush(file)
        except OSError as error:
            raise UserError(f'cannot write {self.path}: {error.strerror}. Make room, then go on '
                            'from the last checkpoint: --init_from=resume') from None
        numbers = {name: float(value) for name, value in row.items() if name != 'step'}
        for track in self.trackers:
            track(numbers, row['step'])

    def draw(self):
        """Draw loss.png. A run goes on without it."""
        if self.silent:
            return
        try:
            plot(self.out_dir)
        except Exception as error:  # matplotlib's, too
            self.say(f'{self.out_dir}/loss.png could not be drawn: {error}')

    def finish(self):
        """Say where the curve is."""
        self.bar.close()
        self.say(f'the curve is in {self.out_dir}/loss.png, the numbers are in {self.path}')


def open_tracker(name, config, step):
    """A function (numbers, step) that sends numbers to TensorBoard or Weights & Biases."""
    try:
        if name == 'tensorboard':
            from torch.utils.tensorboard import SummaryWriter
            folder = os.path.join(config.out_dir, 'tensorboard')
            # On resuming, what was written after the checkpoint is dropped.
            writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=10)

            def track(numbers, step):
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
            return track
        if name == 'wandb':
            import wandb
            run = wandb.init(dir=config.out_dir, config=asdict(config), resume='auto',
                             project=config.wandb_project or None,
                             name=config.wandb_run_name or None)
            return lambda numbers, step: run.log(numbers, step=step)
    except ImportError:
        raise UserError(f'log={name} needs a package: pip install {name}. log.csv is written '
                        'without it.') from None
    except Exception as error:  # no account, no network, whatever the service meets
        reason = ' '.join(str(error).split())[:150]
        raise UserError(f'log={name} could not start: {type(error).__name__} {reason}. log.csv is '
                        'written without it.') from None
    raise AssertionError(name)


def read(out_dir):
    """The rows of log.csv, dicts of text, without one that was cut short; [] if there is none."""
    path = os.path.join(out_dir, 'log.csv')
    if not os.path.exists(path):
        return []
    with reading(path, 'Move it away, and the run goes on without its rows.'):
        with open(path, newline='', encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if row['seconds']]  # else it was cut short
        for row in rows:
            row['step'] = int(row['step'])
            for name in COLUMNS:
                float(row[name] or 0)  # an error, unless all of them are numbers
    return rows


def plot(out_dir):
    """Draw loss.png from log.csv."""
    rows = read(out_dir)
    if not rows:
        return
    import matplotlib  # slow to import
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for name, marker in (('loss', ''), ('val_loss', 'o')):
        points = [(row['step'], float(row[name])) for row in rows if row[name]]
        if points:
            label = f'{name} (last {points[-1][1]:.3f})'
            axes.plot(*zip(*points), marker=marker, markersize=4, label=label)
    title = os.path.basename(os.path.abspath(out_dir))
    axes.set(xlabel='step', ylabel='nats per supervised token')
    axes.set_title(title, parse_math=False)  # a dollar sign is nothing but one
    axes.grid(alpha=0.3)
    axes.legend()
    with write_whole(os.path.join(out_dir, 'loss.png'), 'wb') as file:
        figure.savefig(file, dpi=120)
    pyplot.close(figure)
