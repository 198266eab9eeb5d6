"""core/files.py: files are read safely and written whole, by one process at a time."""
import functools
import io
import os
import signal
import subprocess
import sys

import pytest

from configurator import UserError
from conftest import ROOT, one_line, run
from core import tokenfile
from core.files import Bar, only_writer, reading, write_whole


@pytest.mark.parametrize('error, said', [
    (FileNotFoundError(2, 'No such file or directory'), 'x.json not found. Expected JSON.'),
    (KeyError('key'), "x.json cannot be read: KeyError 'key'. Expected JSON."),
    (ValueError('two\n lines'), 'x.json cannot be read: ValueError two lines. Expected JSON.'),
    (UserError('said already'), 'said already'), (KeyboardInterrupt(), '')])
def test_whatever_a_reader_raises_is_one_line(error, said):
    with pytest.raises((UserError, KeyboardInterrupt)) as found:
        with reading('x.json', 'Expected JSON.'):
            raise error
    assert str(found.value) == said


FULL = OSError(28, 'No space left on device')
HIDDEN = RuntimeError('unexpected pos 704 vs 598')  # torch.save's way to say so
HIDDEN.__context__ = FULL


@pytest.mark.parametrize('error, kind, said', [
    (FULL, UserError, 'cannot write .*/file: .*No space left on device.'),
    (HIDDEN, UserError, 'cannot write .*/file: .*No space left on device.'),
    (KeyboardInterrupt('Ctrl-C'), KeyboardInterrupt, 'Ctrl-C')])
def test_a_write_that_fails_changes_nothing(tmp_path, error, kind, said):
    path = tmp_path / 'file'
    path.write_text('before')
    with pytest.raises(kind, match=said):
        with write_whole(str(path)) as file:
            file.write('half')
            raise error
    assert path.read_text() == 'before' and os.listdir(tmp_path) == ['file']


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='/proc is of Linux')
def test_files_are_on_the_disk_before_their_names_and_meta_comes_last(tmp_path, monkeypatch):
    found = []
    replace = os.replace

    def spy_fsync(descriptor):
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        found.append('flush ' + os.path.basename(path))

    def spy_replace(source, target):
        found.append('rename to ' + os.path.basename(target))
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', spy_fsync)
    monkeypatch.setattr(os, 'replace', spy_replace)
    tokenfile.write(str(tmp_path), {'train': [([1, 2], [0, 1])]}, {})
    names = ['train.bin', 'train.mask.bin', 'train.idx.bin', 'meta.json']
    expected = []
    for name in names:
        expected += [f'flush {name}.tmp', f'rename to {name}', f'flush {tmp_path.name}']
    assert found == expected
    found.clear()
    with write_whole(str(tmp_path / 'file')) as file:
        file.write('größe\n\r\n')
    assert (tmp_path / 'file').read_bytes() == 'größe\n\r\n'.encode()
    assert found == ['flush file.tmp', 'rename to file', f'flush {tmp_path.name}']


HOLD = """
import os, sys, time
from core.files import only_writer
with only_writer(sys.argv[1]):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""
BUSY = 'another process is writing to it. Use --out_dir=FOLDER'


def test_a_second_writer_says_so_until_the_first_is_gone_though_its_workers_live(tmp_path):
    folder = str(tmp_path / 'größe [1] out')
    hold = [sys.executable, '-c', HOLD, folder]
    first = subprocess.Popen(hold, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    worker = int(first.stdout.readline())
    try:
        with one_line(BUSY):
            tokenfile.write(folder, {}, {})
        assert os.listdir(folder) == ['.lock']
        first.kill()
        first.wait()
        os.kill(worker, 0)  # it lives
        with only_writer(folder):
            tokenfile.write(folder, {}, {})
            # The end of this inner writer is not that of the outer one.
            done = subprocess.run(hold, cwd=ROOT, text=True, stderr=subprocess.PIPE)
            assert BUSY in done.stderr
    finally:
        os.kill(worker, signal.SIGKILL)


def test_training_is_shown_below_its_lines(monkeypatch, capsys, data, tmp_path, no_pictures):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    impatient = functools.partialmethod(Bar.__init__, delay=0, mininterval=0)
    monkeypatch.setattr(Bar, '__init__', impatient)
    monkeypatch.setattr(sys, 'stderr', terminal)
    run(data, tmp_path, max_iters=4, lr_decay_iters=4)
    shown = terminal.getvalue()
    assert 'training:  50%' in shown and 'evaluating: 100%' in shown
    printed = capsys.readouterr().out
    assert 'step 4/4 | loss' in printed and 'training:' not in printed
