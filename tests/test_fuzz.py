"""The short form of tests/stress/fuzz.py: nothing is found in the code, planted bugs are."""
import contextlib
import os

import pytest

from stress import fuzz


def test_no_damage_breaks_a_promise_and_a_planted_bug_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)
    data = fuzz.make()
    n_read = sum(fuzz.check(data, number) for number in range(100))
    assert 2 < n_read < 98  # refused are some, and not all
    # Leave out the place where errors become one line.
    monkeypatch.setattr('data.common.reading', lambda *arguments: contextlib.nullcontext())
    with pytest.raises((LookupError, OSError, RuntimeError, TypeError, ValueError, EOFError)):
        for number in range(2000):
            fuzz.check(data, number)
