"""The fuzzer's targets on a few hundred inputs each, drawn without it; tests/stress/fuzz.py is the long form."""
import random

import pytest

from stress import fuzz
from stress.targets import Choices, change_bytes

N = 400


@pytest.mark.parametrize('name', fuzz.SHARES)
def test_no_input_breaks_a_promise(name):
    target, rng = fuzz.make(name), random.Random(N)
    try:
        for i in range(N):
            data = rng.choice(target.seeds) if rng.random() < 0.6 else bytes([rng.randrange(8)]) + rng.randbytes(rng.randrange(90))
            if i >= len(target.seeds):
                data = data[:1] + change_bytes(data[1:], Choices(rng.randbytes(30)))
            target.check(data)
        assert target.accepted > N / 80  # a target that refuses everything would test nothing
    finally:
        target.close()


@pytest.mark.parametrize('name, module, broken', [
    ('oasst', 'data.pipeline', 'parse_lines'), ('tokenfile', 'tokenfile', '_open_split'), ('checkpoint', 'checkpoint', 'from_contents'),
    ('conversation', 'conversation', '_text'), ('configurator', 'configurator', '_evaluate'), ('tokenizer', 'tokenizer', 'to_bytes')])
def test_a_broken_promise_is_found(name, module, broken, monkeypatch):
    """Where a function of the reader fails as it should not, the target says so."""
    target = fuzz.make(name)
    monkeypatch.setattr(f'{module}.{broken}', lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            for seed in target.seeds:
                target.check(seed)
    finally:
        target.close()
