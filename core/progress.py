"""Progress bars: on a terminal, of what takes over two seconds; silent in a pipe or a file.

    python -c "import time, progress; [time.sleep(0.1) for _ in progress.Bar(range(50), 'waiting')]"
"""
from tqdm import tqdm

# disable=None: without a terminal; miniters=0: redrawn by the clock alone, whatever the steps are worth
OPTIONS = {'disable': None, 'delay': 2, 'leave': False, 'miniters': 0, 'mininterval': 0.1, 'dynamic_ncols': True}


class Bar(tqdm):
    """tqdm on standard error with these OPTIONS."""

    monitor_interval = 0  # no thread of its own: the processes that prepare data are forked beside it

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**OPTIONS, **options})
