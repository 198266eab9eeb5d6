"""What a run reports: lines for a person, log.csv for programs, loss.png to look at.

    python -c "from core import runlog; runlog.plot('out/oasst')"

log.csv has a row for each step and for each evaluation. A run that was stopped and resumed has
the same rows, bit for bit, but for tokens_per_s.
"""
import csv
import os
import sys
from dataclasses import asdict

from configurator import UserError
from core.files import Bar, reading, write_whole

COLUMNS = ('step', 'epoch', 'loss', 'learning_rate', 'grad_norm', 'val_loss', 'tokens_per_s')


class RunLog:
    """Prints lines and writes log.csv. A silent one, of any process but the first, does nothing."""

    def __init__(self, config, state, silent):
        self.silent = silent
        self.out_dir = config.out_dir
        self.path = os.path.join(config.out_dir, 'log.csv')
        self.trackers = []  # functions of (numbers, step)
        self.bar = Bar(total=config.max_iters, initial=state.step, desc='training', unit=' steps',
                       disable=silent or None)
        if silent:
            return
        # A run that goes on keeps the rows up to its checkpoint; a new one has none.
        rows = []
        for row in read(config.out_dir) if state.step else []:
            repeated = row['val_loss'] and state.val_loss is None
            last = state.step - 1 if repeated else state.step
            if int(row['step']) <= last:
                rows.append(row)
        with write_whole(self.path) as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(rows)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            # What was written after the checkpoint is dropped.
            folder = os.path.join(config.out_dir, 'tensorboard')
            writer = SummaryWriter(folder, purge_step=state.step + 1)

            def track(numbers, step):
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
            self.trackers.append(track)
        if config.wandb_log:
            import wandb
            run = wandb.init(dir=config.out_dir, config=asdict(config), resume='auto',
                             project=config.wandb_project or None,
                             name=config.wandb_run_name or None)
            self.trackers.append(run.log)

    def say(self, text):
        """Print a line, above the progress bar if there is one."""
        if not self.silent:
            Bar.write(text)
            sys.stdout.flush()

    def write(self, step, **numbers):
        """Append a row to log.csv; columns that are absent stay empty."""
        if self.silent:
            return
        try:
            with open(self.path, 'a', newline='', encoding='utf-8') as file:
                csv.DictWriter(file, COLUMNS).writerow({'step': step, **numbers})
        except OSError as error:
            raise UserError(f'cannot write {self.path}: {error.strerror}. Make room, then go on '
                            'from the last checkpoint: --init_from=resume') from None
        for track in self.trackers:
            track(numbers, step=step)

    def draw(self):
        """Draw loss.png. A run goes on without it."""
        if self.silent:
            return
        try:
            plot(self.out_dir)
        except Exception as error:  # matplotlib's, too
            self.say(f'{self.out_dir}/loss.png could not be drawn: {error}')


def read(out_dir):
    """The rows of log.csv, dicts of text, without one that was cut short; [] if there is none."""
    path = os.path.join(out_dir, 'log.csv')
    if not os.path.exists(path):
        return []
    with reading(path), open(path, newline='', encoding='utf-8') as file:
        return [row for row in csv.DictReader(file) if row['tokens_per_s'] is not None]


def plot(out_dir):
    """Draw loss.png from log.csv."""
    import matplotlib  # slow to import
    matplotlib.use('Agg')
    from matplotlib import pyplot
    rows = read(out_dir)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for name, marker in (('loss', ''), ('val_loss', 'o')):
        points = [(int(row['step']), float(row[name])) for row in rows if row[name]]
        if points:
            label = f'{name} (last {points[-1][1]:.3f})'
            axes.plot(*zip(*points), marker=marker, markersize=4, label=label)
            axes.legend()
    axes.set(xlabel='step', ylabel='nats per supervised token')
    axes.grid(alpha=0.3)
    with write_whole(os.path.join(out_dir, 'loss.png'), 'wb') as file:
        figure.savefig(file, dpi=120)
    pyplot.close(figure)
