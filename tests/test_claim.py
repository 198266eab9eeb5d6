"""One process at a time writes to a folder, and a killed one leaves it free and clean."""
import os
import signal
import subprocess
import sys

import pytest

from core.claim import claimed
from configurator import UserError
from conftest import ROOT

pytest.importorskip('fcntl')
HOLD = ('import sys, time; from claim import claimed\n'
        'with claimed(sys.argv[1], ".partial-*"):\n'
        '    print("held", flush=True); time.sleep(600)')
WRITE = 'import sys, tokenfile\nwith tokenfile.Writer(sys.argv[1], ("train",)):\n    print("written")'


def python(code, folder):
    return subprocess.Popen([sys.executable, '-c', code, str(folder)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_second_says_so_and_changes_nothing(tmp_path):
    folder = tmp_path / 'größe [1] out'
    first = python(HOLD, folder)
    try:
        assert first.stdout.readline() == 'held\n'
        (folder / '.partial-x').mkdir()
        with pytest.raises(UserError, match=f'being written to by another process .{first.pid} on .*--out_dir') as error:
            with claimed(str(folder), '.partial-*'):
                pass
        assert '\n' not in str(error.value)
        _, said = python(WRITE, folder).communicate()
        assert 'being written to by another process' in said, said
        assert (folder / '.partial-x').is_dir()
    finally:
        first.kill()
        first.wait()
    with claimed(str(folder), '.partial-*'):
        assert not (folder / '.partial-x').exists()  # what the killed one left
        with claimed(str(folder)):  # the same process, again
            pass
        _, said = python(WRITE, folder).communicate()
        assert 'being written to' in said, said  # the inner claim's end was not the end of the outer one
    assert python(WRITE, folder).communicate()[0] == 'written\n'


def test_forked_workers_of_a_killed_process_do_not_keep_the_claim(tmp_path):
    code = ('import os, sys, time; from claim import claimed\n'
            'with claimed(sys.argv[1]):\n'
            '    worker = os.fork()\n'
            '    if worker:\n'
            '        print(worker, flush=True)\n'
            '    time.sleep(600)')
    process = python(code, tmp_path)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)  # it lives
        with claimed(str(tmp_path)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_of_many_that_come_and_go_one_at_a_time_is_in(tmp_path):
    """The lock file is removed at the end of each claim: no two may hold different ones."""
    code = ('import os, sys, time; from claim import claimed; from configurator import UserError\n'
            'inside, n, end = os.path.join(sys.argv[1], "inside"), 0, time.monotonic() + 1.5\n'
            'while time.monotonic() < end:\n'
            '    try:\n'
            '        with claimed(sys.argv[1]):\n'
            '            os.close(os.open(inside, os.O_CREAT | os.O_EXCL)); os.remove(inside); n += 1\n'
            '    except UserError:\n'
            '        pass\n'
            'print(n)')
    processes = [python(code, tmp_path) for _ in range(4)]
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0 and int(out) > 0, (out, errors)
    assert os.listdir(tmp_path) == []


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with claimed(str(tmp_path / 'a')):
        pass
    with claimed(str(tmp_path / 'b')):
        (tmp_path / 'b' / 'file').touch()
    assert os.listdir(tmp_path) == ['b'] and os.listdir(tmp_path / 'b') == ['file']


def test_the_workers_of_a_killed_prepare_end_with_it(tmp_path):
    code = ('import time; from data import pipeline\n'
            'Tokens = type("Tokens", (), {"remember": lambda self: None})\n'
            'def units(block):\n'
            '    print("at work", flush=True); time.sleep(600)\n'
            'list(pipeline.encoded_blocks("ab", pipeline.Job(units, Tokens(), "xml", 9)))')
    process = python(code, tmp_path)
    assert process.stdout.readline() == 'at work\n'
    process.kill()
    process.communicate(timeout=120)  # the workers hold the pipe's other end: it closes when the last of them is gone
