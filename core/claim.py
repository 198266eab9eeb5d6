"""A folder that one process at a time writes to.

    with claim.claimed('out/oasst', '*.pt.*.tmp'):
        ...

The claim is the operating system's lock on FOLDER/.lock. It goes with the process, however that ends,
so that a kill leaves nothing to clear away by hand; the processes that the holder forks do not hold it.
"""
import contextlib
import glob
import os
import shutil
import socket

from configurator import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

_held = set()  # (process, folder): within a claim the same process may claim the folder again


@contextlib.contextmanager
def claimed(folder, leftovers=None, option='out_dir'):
    """Keep the folder, made if need be, to this process until the block ends.

    leftovers: the pattern of names that a killed process leaves half-written; they are removed, as nobody
    can be writing them now. option: the key that names another folder. UserError where another process has
    this one, or it cannot be written to.
    """
    key = os.getpid(), os.path.realpath(folder)
    if key in _held:
        yield
        return
    path, new = os.path.join(folder, '.lock'), not os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = _lock(path, option) if fcntl else None
        for left in glob.glob(os.path.join(glob.escape(folder), leftovers)) if lock and leftovers else ():
            shutil.rmtree(left) if os.path.isdir(left) else os.remove(left)
    except OSError as error:
        raise UserError(f'cannot write to {folder}: {error.strerror}. Use --{option}=FOLDER.') from None
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        if lock:
            os.remove(path)  # ours as long as the file is open
            lock.close()
        if new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # if nothing came of it


def _lock(path, option):
    """The open, locked file at path. UserError where another process has it."""
    while True:
        lock = open(path, 'a+', encoding='utf-8')
        try:
            # lockf, not flock: a flock would be inherited by forked workers, which may outlive us for a while.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise UserError(f'{os.path.dirname(path)} is being written to by another process ({lock.read(100) or "starting"}). '
                            f'Wait until it ends, or write elsewhere: --{option}=FOLDER') from None
        if os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            lock.truncate(0)
            lock.write(f'{os.getpid()} on {socket.gethostname()}')
            lock.flush()
            return lock
        lock.close()  # its holder removed it after we had opened it: try the new one
