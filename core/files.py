"""Reading files safely, writing them whole or not at all, one writer at a time."""
import contextlib
import os

import filelock  # comes with torch
from tqdm import tqdm

from configurator import UserError


@contextlib.contextmanager
def reading(path, expected=''):
    """Turn what goes wrong while the block reads the file at path into a UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f'{path} not found. {expected}'.rstrip()) from None
    except Exception as error:  # a damaged file can make a reader raise anything
        reason = ' '.join(f'{type(error).__name__} {error}'.split())[:150]
        raise UserError(f'{path} cannot be read: {reason}. {expected}'.rstrip()) from None


@contextlib.contextmanager
def write_whole(path, mode='w'):
    """Yield a file that appears at path, all at once, if the block ends well."""
    temporary = f'{path}.tmp'
    text = {} if 'b' in mode else {'encoding': 'utf-8', 'newline': ''}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            flush(file)
        # Renaming is atomic: a reader sees the old file or the new one.
        os.replace(temporary, path)
        flush_folder(os.path.dirname(os.path.abspath(path)))
    # torch.save hides the OSError of a full disk behind a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = error.__context__ or error
        raise UserError(f'cannot write {path}: {reason}. Make room or choose another '
                        'folder. What was there before is unchanged.') from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # only there if something failed


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
def only_writer(folder):
    """Make the folder, and be its only writer."""
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, '.lock')
        # The system drops the lock when the process ends, however it ends.
        lock = filelock.FileLock(path, timeout=0, is_singleton=True).acquire()
    except OSError as error:
        reason = error.strerror or 'another process is writing to it'
        raise UserError(f'cannot write to {folder}: {reason}. Use --out_dir=FOLDER.') from None
    with lock:
        yield


class Bar(tqdm):
    """A progress bar, on a terminal only, for what takes over 2 s."""

    def __init__(self, *arguments, **options):
        look = {'disable': None, 'delay': 2, 'leave': False, 'miniters': 0}
        super().__init__(*arguments, **look | options, dynamic_ncols=True)
