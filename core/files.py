"""Reading files safely, writing them whole or not at all, and one writer at a time.

    with write_whole('out/log.csv') as file:
        file.write(text)
"""
import contextlib
import os

import filelock  # comes with torch
from tqdm import tqdm

from configurator import UserError


@contextlib.contextmanager
def reading(path, expected=''):
    """Turn whatever goes wrong inside the block, which reads the file at path, into a UserError.

    expected: a sentence that says what the file should be, or what to do. A pipe or a device, such
    as /dev/zero, is refused at once: it may never end.
    """
    # A file may name another one: keep control characters off the terminal.
    shown = ''.join(c if c.isprintable() else '?' for c in str(path))
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f'{shown} is a pipe or a device. {expected}'.rstrip())
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f'{shown} not found. {expected}'.rstrip()) from None
    except Exception as error:  # a damaged or hostile file can make a reader raise anything
        reason = getattr(error, 'strerror', None) or f'{type(error).__name__} {error}'
        reason = ' '.join(reason.split())[:150].rstrip('.')
        raise UserError(f'{shown} cannot be read: {reason}. {expected}'.rstrip()) from None


@contextlib.contextmanager
def write_whole(path, mode='w'):
    """Yield a file whose content appears at path, all at once, when the block ends.

    If the block fails or the process is killed, path is as it was before. A full disk or a
    missing permission is a UserError.
    """
    temporary = f'{path}.tmp'
    encoding = None if 'b' in mode else 'utf-8'
    try:
        try:
            with open(temporary, mode, encoding=encoding, newline='' if encoding else None) as file:
                yield file
                flush(file)
            # Renaming is atomic: a reader sees the old file or the new one.
            os.replace(temporary, path)
            flush_folder(os.path.dirname(os.path.abspath(path)))
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError of a full disk behind a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f'cannot write {path}: {cause.strerror}. Make room or choose another '
                        'folder; what was there before is unchanged.') from None


def flush(file):
    """Bring what was written to the disk, so that it survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder):
    """The same for the names in a folder, after files in it were renamed."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(folder, option='out_dir'):
    """Keep other processes from writing to the folder, which is made if need be.

    The operating system drops the lock when the process ends, however it ends.
    option: the key that names another folder, for the error.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = filelock.FileLock(os.path.join(folder, '.lock'), timeout=0, is_singleton=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f'another process is writing to {folder}. Wait until it ends, or use '
                        f'--{option}=FOLDER.') from None
    except OSError as error:
        raise UserError(f'cannot write to {folder}: {error.strerror}. '
                        f'Use --{option}=FOLDER.') from None
    try:
        yield
    finally:
        lock.release()


class Bar(tqdm):
    """A progress bar on standard error, only on a terminal and only for what takes over 2 s."""

    # No thread of its own: prepare.py forks its workers beside it.
    monitor_interval = 0

    def __init__(self, *arguments, **options):
        look = {'disable': None, 'delay': 2, 'leave': False, 'miniters': 0, 'mininterval': 0.1,
                'dynamic_ncols': True}
        super().__init__(*arguments, **{**look, **options})
