"""The short form of tests/stress/fuzz.py: nothing is found in the code, planted bugs are."""
import contextlib
import os

import pytest

from stress import fuzz

PLACES = {'oasst': 'data.common', 'vocabulary': 'core.tokenizer', 'checkpoint': 'core.checkpoint',
          'data': 'core.tokenfile'}


@pytest.mark.parametrize('target', fuzz.TARGETS)
def test_no_damage_breaks_a_promise_and_a_planted_bug_is_found(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)
    files = fuzz.make(target)
    n_read = sum(fuzz.check(target, files, number) for number in range(100))
    assert 2 < n_read < 98  # refused are some, and not all
    # Leave out the place where errors become one line.
    monkeypatch.setattr(f'{PLACES[target]}.reading', lambda *arguments: contextlib.nullcontext())
    with pytest.raises((EOFError, LookupError, OSError, RuntimeError, ValueError)):
        for number in range(2000):
            fuzz.check(target, files, number)
