"""core/files.py: files are written whole, by one process at a time."""
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, one_line
from core import tokenfile
from core.files import only_writer, write_whole


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
    with write_whole(str(tmp_path / 'file')) as file:
        file.write('größe\n\r\n')
    assert (tmp_path / 'file').read_bytes() == 'größe\n\r\n'.encode()
    expected = []
    for name in ('train.bin', 'train.mask.bin', 'train.idx.bin', 'meta.json', 'file'):
        expected += [f'flush {name}.tmp', f'rename to {name}', f'flush {tmp_path.name}']
    assert found == expected


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
