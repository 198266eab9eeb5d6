"""core/files.py: files are read safely and written whole, by one process at a time."""
import io
import os
import signal
import subprocess
import sys

import pytest

from configurator import UserError
from conftest import ROOT, run
from core import tokenfile
from core.files import Bar, only_writer, reading, write_whole

# ---- reading ----


@pytest.mark.parametrize('error, said', [
    (FileNotFoundError(2, 'No such file or directory'), 'not found'),
    (IsADirectoryError(21, 'Is a directory'), 'cannot be read: Is a directory'),
    (KeyError('key'), "cannot be read: KeyError 'key'"),
    (RecursionError('too deep'), 'cannot be read: RecursionError too deep'),
    (ValueError('two\n lines.'), 'cannot be read: ValueError two lines'),
    (ValueError('x' * 1000), f'cannot be read: ValueError {"x" * 139}')])
def test_whatever_a_reader_raises_is_one_line(error, said):
    with pytest.raises(UserError) as found:
        with reading('x.json', 'Expected JSON.'):
            raise error
    assert str(found.value) == f'x.json {said}. Expected JSON.'


@pytest.mark.parametrize('error', [UserError('said already'), KeyboardInterrupt()])
def test_a_line_for_the_user_and_control_c_pass_through_reading(error):
    with pytest.raises(type(error)) as found:
        with reading('x.json'):
            raise error
    assert found.value is error


# ---- writing ----

@pytest.mark.parametrize('mode, content', [('w', 'größe\n\r\n'), ('wb', b'\xff\r\n')])
def test_a_file_appears_whole_at_the_end(tmp_path, mode, content):
    path = tmp_path / 'file'
    path.write_bytes(b'before')
    with write_whole(str(path), mode) as file:
        file.write(content)
        file.flush()
        assert path.read_bytes() == b'before'
    expected = content if mode == 'wb' else content.encode()
    assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ['file']


FULL = OSError(28, 'No space left on device')
HIDDEN = RuntimeError('unexpected pos 704 vs 598')  # torch.save's way to say so
HIDDEN.__context__ = FULL


@pytest.mark.parametrize('error, kind', [
    (FULL, UserError), (HIDDEN, UserError), (RuntimeError('a bug'), RuntimeError),
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_write_that_fails_changes_nothing(tmp_path, error, kind):
    path = tmp_path / 'file'
    path.write_text('before')
    with pytest.raises(kind) as found:
        with write_whole(str(path)) as file:
            file.write('half')
            raise error
    if kind == UserError:
        assert str(found.value).startswith(f'cannot write {path}: No space left on device.')
    assert path.read_text() == 'before' and os.listdir(tmp_path) == ['file']


@pytest.fixture
def operations(monkeypatch):
    """Names of what is flushed and renamed, in order. Folders end in a slash."""
    found = []
    fsync = os.fsync
    replace = os.replace

    def spy_fsync(descriptor):
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        found.append('flush ' + os.path.basename(path) + '/' * os.path.isdir(path))
        fsync(descriptor)

    def spy_replace(source, target):
        found.append('rename to ' + os.path.basename(target))
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', spy_fsync)
    monkeypatch.setattr(os, 'replace', spy_replace)
    return found


needs_proc = pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='/proc is of Linux')


@needs_proc
def test_a_file_is_on_the_disk_before_its_name_and_the_name_at_the_end(tmp_path, operations):
    with write_whole(str(tmp_path / 'file')) as file:
        file.write('text')
    assert operations == ['flush file.tmp', 'rename to file', f'flush {tmp_path.name}/']


@needs_proc
def test_a_data_set_is_on_the_disk_before_its_names_and_meta_comes_last(tmp_path, operations):
    tokenfile.write(str(tmp_path), {'train': [([1, 2], [0, 1])]}, {})
    names = ['meta.json', 'train.bin', 'train.idx.bin', 'train.mask.bin']
    assert sorted(operations[:4]) == [f'flush {name}' for name in names]
    assert sorted(operations[4:8]) == [f'rename to {name}' for name in names]
    assert operations[7:] == ['rename to meta.json', f'flush {tmp_path.name}/']


# ---- one writer ----

HOLD = """
import os, sys, time
from core.files import only_writer
with only_writer(sys.argv[1]):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""
BUSY = 'another process is writing to .*--out_dir=FOLDER'


def hold(folder):
    """A process that writes to the folder for good, and has forked a worker."""
    return subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_a_second_writer_says_so_until_the_first_is_gone_though_its_workers_live(tmp_path):
    folder = tmp_path / 'größe [1] out'
    first = hold(folder)
    worker = int(first.stdout.readline())
    (folder / '.partial').mkdir()
    with pytest.raises(UserError, match=BUSY) as error:
        tokenfile.write(str(folder), {}, {})
    assert '\n' not in str(error.value)
    assert (folder / '.partial').is_dir()  # left as it was
    first.kill()
    first.wait()
    try:
        os.kill(worker, 0)  # it lives
        tokenfile.write(str(folder), {}, {})
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_end_of_an_inner_writer_is_not_that_of_the_outer_one(tmp_path):
    with only_writer(str(tmp_path)):
        with only_writer(str(tmp_path)):
            pass
        _, said = hold(tmp_path).communicate()
        assert 'another process is writing to' in said


# ---- progress ----

class Terminal(io.StringIO):
    """Standard error of a person."""

    def isatty(self):
        return True


@pytest.mark.parametrize('stream, delay, shown', [
    (Terminal, 0, True), (Terminal, None, False), (io.StringIO, 0, False)])
def test_a_bar_is_shown_on_a_terminal_after_two_seconds(monkeypatch, stream, delay, shown):
    monkeypatch.setattr(sys, 'stderr', stream())
    options = {} if delay is None else {'delay': delay}
    assert list(Bar(range(3), 'waiting', mininterval=0, **options)) == [0, 1, 2]
    assert ('waiting: 100%' in sys.stderr.getvalue()) == shown


def test_training_is_shown_below_its_lines(monkeypatch, capsys, data, tmp_path, no_pictures):
    init = Bar.__init__

    def impatient(bar, *arguments, **options):
        init(bar, *arguments, **options, delay=0, mininterval=0)
    monkeypatch.setattr(Bar, '__init__', impatient)
    monkeypatch.setattr(sys, 'stderr', Terminal())
    run(data, tmp_path, max_iters=4, lr_decay_iters=4)
    shown = sys.stderr.getvalue()
    assert 'training:  50%' in shown and '4/4' in shown and 'evaluating: 100%' in shown
    printed = capsys.readouterr().out
    assert 'step 4/4 | loss' in printed and 'training:' not in printed
