"""The short form of tests/stress/fuzz.py: nothing is found in the code, planted bugs are."""
import contextlib
import os

import pytest

from stress import fuzz


@pytest.mark.parametrize('target, place', [
    ('oasst', 'data.common'), ('checkpoint', 'core.checkpoint')])
def test_no_damage_breaks_a_promise_and_a_planted_bug_is_found(
        target, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)
    data = fuzz.make(target)
    n_read = sum(fuzz.check(target, data, number) for number in range(100))
    assert 2 < n_read < 98  # refused are some, and not all
    # Leave out the place where errors become one line.
    monkeypatch.setattr(f'{place}.reading', lambda *arguments: contextlib.nullcontext())
    with pytest.raises((LookupError, OSError, RuntimeError, TypeError, ValueError, EOFError)):
        for number in range(2000):
            fuzz.check(target, data, number)
