"""The short form of tests/stress/fuzz.py: nothing is found in the code, planted bugs are."""
import contextlib
import zlib

import pytest

from stress import fuzz


@pytest.fixture
def target(request, tmp_path, monkeypatch):
    """A target of the fuzzer; a test's parameter is its name."""
    monkeypatch.chdir(tmp_path)  # a target changes it, the monkeypatch changes it back
    found = fuzz.Target(request.param)
    yield found
    found.folder.cleanup()


@pytest.mark.parametrize('target', fuzz.TARGETS, indirect=True)
def test_no_damage_breaks_a_promise(target):
    for data in fuzz.inputs(200, seed=5):
        target.check(data)
    assert 2 < target.n_read < 198  # refused are some, and not all


def leave_out(*arguments):
    return contextlib.nullcontext()


@pytest.mark.parametrize('target, name, planted', [
    ('config', 'configurator.accept', lambda value, kind: value),
    ('vocabulary', 'core.tokenizer.reading', leave_out),
    ('oasst', 'data.common.reading', leave_out),
    ('data', 'core.tokenfile.reading', leave_out)], indirect=['target'])
def test_a_check_that_is_left_out_is_found(target, name, planted, monkeypatch):
    monkeypatch.setattr(name, planted)
    with pytest.raises((AssertionError, EOFError, LookupError, TypeError, ValueError,
                        zlib.error)):
        for data in fuzz.inputs(2000, seed=5):
            target.check(data)
