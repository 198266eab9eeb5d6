"""docs/tour.md: each block of code prints what stands under it."""
import contextlib
import io
import os
import re

from conftest import ROOT


def test_every_block_prints_what_stands_under_it(gpt2):
    with open(os.path.join(ROOT, 'docs', 'tour.md'), encoding='utf-8') as file:
        tour = file.read()
    blocks = re.findall(r'```python\n(.*?)```\n```text\n(.*?)```', tour, re.DOTALL)
    assert len(blocks) == tour.count('```python') >= 7
    names = {}
    for number, (code, expected) in enumerate(blocks, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f'block {number} of docs/tour.md', 'exec'), names)
        assert printed.getvalue() == expected, f'block {number}:\n{printed.getvalue()}'
