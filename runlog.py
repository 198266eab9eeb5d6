"""What a run says of itself: lines for a person, log.csv for programs, loss.png to look at.

    python -c "import runlog; runlog.plot('out')"

log.csv has a row each log_interval steps and at each evaluation. All columns but the last two are
the same, bit for bit, in a run that was stopped and resumed.
"""
import csv
import json
import os

import configurator
from configurator import UserError

COLUMNS = ('step', 'epoch', 'loss', 'learning_rate', 'grad_norm', 'val_loss', 'tokens_per_s', 'seconds')


class RunLog:
    """Prints, and writes log.csv and config.json; a silent one (any process but the first) does nothing.

    A run that is resumed goes on behind the rows of its step and of its last evaluation.
    UserError where out_dir is not writable.
    """

    def __init__(self, config, step, evaluated_at, silent):
        self.out_dir, self.last_step, self.silent = config.out_dir, config.max_iters, silent
        self.path = os.path.join(self.out_dir, 'log.csv')
        if silent or config.eval_only:
            return
        rows = read(self.out_dir) if step else []
        try:
            with open(os.path.join(self.out_dir, 'config.json'), 'w', encoding='utf-8') as file:
                json.dump(configurator.as_dict(config), file, indent=1)
            with open(f'{self.path}.tmp', 'w', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(row for row in rows if int(row['step']) <= (evaluated_at if row['val_loss'] else step))
                _flush(file)
            os.replace(f'{self.path}.tmp', self.path)
        except OSError as error:
            raise UserError(f'cannot write to {self.out_dir}: {error.strerror}. Use --out_dir=FOLDER.') from None

    def say(self, text):
        """A line for a person."""
        if not self.silent:
            print(text, flush=True)

    def data(self, rows):
        """A line for the tokenfile.Rows of a split, and one for what is left out of them."""
        split, usable = rows.split, rows.usable
        positions = (split.lengths[usable] - 1).sum()
        self.say(f'{split.name}: {len(usable):,} conversations, {split.lengths[usable].sum():,} tokens, '
                 f'{split.n_supervised[usable].sum():,} supervised, in {rows.n_rows:,} rows of {rows.block_size} '
                 f'({positions / rows.n_rows / rows.block_size:.1%} full)')
        if rows.n_too_long:
            self.say(f'{split.name}: left out {rows.n_too_long:,} conversations longer than block_size={rows.block_size}')

    def write(self, **row):
        """Append a row to log.csv; absent columns are empty. UserError where it cannot be written."""
        if self.silent:
            return
        try:
            with open(self.path, 'a', newline='', encoding='utf-8') as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
                _flush(file)
        except OSError as error:
            raise UserError(f'could not write {self.path}: {error.strerror}. Go on from the last checkpoint with '
                            '--init_from=resume') from None

    def training(self, step, epoch, loss, lr, grad_norm, tokens_per_s, seconds, seconds_left):
        """The last log_interval steps: loss in nats per supervised token."""
        self.write(step=step, epoch=f'{epoch:.4f}', loss=repr(loss), learning_rate=repr(lr), grad_norm=repr(grad_norm),
                   tokens_per_s=f'{tokens_per_s:.1f}', seconds=f'{seconds:.2f}')
        self.say(f'{self._at(step)} | loss {loss:7.4f} | lr {lr:.2e} | {tokens_per_s:7,.0f} supervised tokens/s | '
                 f'{duration(seconds_left)} left')

    def evaluation(self, step, val_loss, better, saved):
        """An evaluation, whose row is written, and the files that were saved with it."""
        self.say(f'{self._at(step)} | val_loss {val_loss:.4f}{" (best)" if better and step else ""}'
                 f'{" | saved " + ", ".join(saved) if saved else ""}')

    def plot(self):
        """Draw loss.png."""
        if not self.silent and (path := plot(self.out_dir)):
            self.say(f'the curve is in {path}, the numbers in {self.path}')

    def _at(self, step):
        return f'step {step:>{len(str(self.last_step))}}/{self.last_step}'


def read(out_dir):
    """The rows of log.csv as dicts of text, without one that was cut short; [] where there is none."""
    try:
        with open(os.path.join(out_dir, 'log.csv'), newline='', encoding='utf-8') as file:
            return [row for row in csv.DictReader(file) if (row.get('step') or '').isdigit() and row.get('seconds')]
    except FileNotFoundError:
        return []


def _flush(file):
    file.flush()
    os.fsync(file.fileno())  # a checkpoint is, too: after a power cut the log has the rows up to its step


def duration(seconds):
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def plot(out_dir):
    """Draw loss.png from log.csv; returns its path, or None where there is nothing to draw."""
    series = {}
    for name in ('loss', 'val_loss'):
        points = [(int(row['step']), float(row[name])) for row in read(out_dir) if row[name]]
        if points:
            series[name] = tuple(zip(*points))
    if not series:
        return None
    import matplotlib  # slow to import, and needed at the end of a run alone
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for name, (steps, losses) in series.items():
        style = dict(marker='o', markersize=4, linewidth=2) if name == 'val_loss' else dict(linewidth=1, alpha=0.8)
        axes.plot(steps, losses, label=f'{name} (last {losses[-1]:.3f})', **style)
    axes.set(xlabel='step', ylabel='nats per supervised token', title=os.path.basename(os.path.abspath(out_dir)))
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(out_dir, 'loss.png')
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
