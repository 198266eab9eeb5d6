"""What a run says of itself: lines for a person, log.csv for programs, loss.png to look at.

    python -c "import runlog; runlog.plot('out')"
    python train.py config/finetune_oasst.py --log=tensorboard     # then: tensorboard --logdir=out/oasst

log.csv has a row each log_interval steps and at each evaluation. All columns but the last two are
the same, bit for bit, in a run that was stopped and resumed. --log=tensorboard, wandb or both gives the
same numbers at the same steps to them, a run that is resumed included.
"""
import csv
import glob
import json
import os
import sys
from importlib import util

import configurator
from configurator import UserError
from core.progress import Bar

COLUMNS = ('step', 'epoch', 'loss', 'learning_rate', 'grad_norm', 'val_loss', 'tokens_per_s', 'seconds')


def wanted(config):
    """The names of the programs that get the numbers too; wandb_log is nanoGPT's way to say wandb."""
    names = [name.strip() for name in config.log.split(',') if name.strip()]
    return list(dict.fromkeys(names + ['wandb'] * config.wandb_log))


def check(config):
    """UserError where the numbers are to go to a program that is unknown or not installed."""
    for name in wanted(config):
        if name not in TRACKERS:
            raise UserError(f'log={config.log!r}: expected tensorboard, wandb or both with a comma.')
        found = util.find_spec(name)
        if not found or not found.origin:  # a mere folder of that name is found, too: wandb leaves one
            raise UserError(f'log={name} needs a package that is not installed: pip install {name}. Or go without: '
                            f'{"--wandb_log=False" if config.wandb_log else "--log="}; log.csv is written anyway.')


class RunLog:
    """Prints, and writes log.csv and config.json; a silent one (any process but the first) does nothing.

    A run that is resumed goes on behind the rows of its step and of its last evaluation.
    UserError where out_dir is not writable.
    """

    def __init__(self, config, step, evaluated_at, silent):
        self.out_dir, self.last_step, self.silent = config.out_dir, config.max_iters, silent
        self.path, self.trackers = os.path.join(self.out_dir, 'log.csv'), []
        self.bar = Bar(total=config.max_iters, initial=step, desc='training', unit=' steps',
                       disable=silent or config.eval_only or None)
        if silent or config.eval_only:
            return
        rows = read(self.out_dir) if step else []
        try:
            with open(os.path.join(self.out_dir, 'config.json'), 'w', encoding='utf-8') as file:
                json.dump(configurator.as_dict(config), file, indent=1)
            with open(f'{self.path}.tmp', 'w', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                rows = [row for row in rows if int(row['step']) <= (evaluated_at if row['val_loss'] else step)]
                writer.writerows(rows)
                _flush(file)
            os.replace(f'{self.path}.tmp', self.path)
            self.trackers = [TRACKERS[name](config, rows) for name in wanted(config)]
        except OSError as error:
            raise UserError(f'cannot write to {self.out_dir}: {error.strerror}. Use --out_dir=FOLDER.') from None

    def say(self, text):
        """A line for a person."""
        if not self.silent:
            Bar.write(text)  # above a bar that is shown
            sys.stdout.flush()

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
            for tracker in self.trackers:
                tracker.write(row)
                tracker.flush()
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

    def finish(self):
        """Draw loss.png; nothing is written any more."""
        self.bar.close()
        if not self.silent and (path := plot(self.out_dir)):
            self.say(f'the curve is in {path}, the numbers in {self.path}')
        for tracker in self.trackers:
            tracker.close()

    def _at(self, step):
        return f'step {step:>{len(str(self.last_step))}}/{self.last_step}'


def numbers(row):
    """{column: number} of a row; of an evaluation the val_loss alone, the rest stands in other rows of its step."""
    names = ['val_loss'] if row.get('val_loss') else [name for name in COLUMNS if name != 'step' and row.get(name)]
    return {name: float(row[name]) for name in names}


class TensorBoard:
    """Event files in out_dir/tensorboard. A run that is resumed writes them anew, from the rows of log.csv."""

    def __init__(self, config, rows):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed where asked for
        folder = os.path.join(config.out_dir, 'tensorboard')
        for path in glob.glob(os.path.join(glob.escape(folder), 'events.out.tfevents.*')):
            os.remove(path)
        self.writer = SummaryWriter(folder, purge_step=0)  # one that is looking on forgets what it has read, too
        for row in rows:
            self.write(row)
        self.flush()

    def write(self, row):
        """A row of log.csv."""
        for name, number in numbers(row).items():
            self.writer.add_scalar(name, number, int(row['step']))

    def flush(self):
        """Let a reader see it."""
        self.writer.flush()

    def close(self):
        """The end of the run."""
        self.writer.close()


class WeightsAndBiases:
    """A run there, in out_dir/wandb; WANDB_MODE=offline keeps it there, to be synced later.

    A run that is resumed goes on in the same one, known by out_dir/wandb-id, behind the last step that is
    there; offline it begins a new folder, with all rows of log.csv.
    """

    def __init__(self, config, rows):
        import wandb
        path = os.path.join(config.out_dir, 'wandb-id')
        name = None
        if rows and os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                name = file.read().strip()
        try:
            self.run = wandb.init(project=config.wandb_project or None, name=config.wandb_run_name or None, id=name or None,
                                  resume='allow', dir=config.out_dir, config=configurator.as_dict(config))
        except Exception as error:  # no account, no network, whatever its service meets
            raise UserError(f'log=wandb could not start: {type(error).__name__} {" ".join(str(error).split())[:200]} '
                            'With WANDB_MODE=offline it needs neither a network nor an account.') from None
        with open(path, 'w', encoding='utf-8') as file:
            file.write(self.run.id)
        for row in rows:
            if int(row['step']) >= self.run.starting_step:
                self.write(row)

    def write(self, row):
        """A row of log.csv."""
        self.run.log(numbers(row), step=int(row['step']))

    def flush(self):
        """It sends what it has by itself."""

    def close(self):
        """The end of the run."""
        self.run.finish()


TRACKERS = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases}


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
