"""What the documents name exists: files, names in a file, and tests by a part of their name."""
import glob
import os
import pathlib
import re

import pytest

from configurator import REPOSITORY

DOCUMENTS = ['README.md', 'CONTRIBUTING.md', 'data/README.md',
             *glob.glob('docs/*.md', root_dir=REPOSITORY)]
FOLDERS = 'bench|config|core|data|demo|docs|formats|tests|web'
FILE = re.compile(rf'\b(?:{FOLDERS})/[\w/.-]*\w\.(?:py|md|png|html|csv)\b')
LINK = re.compile(r'\]\(([^):#]+)\)')
NAMES = re.compile(r'`(?:\w+\.)?(\w+)` in `(\S+\.py)`')
TESTS = re.compile(r'pytest (tests/\w+\.py) -k "?([a-z_ ]+)')


def read(path):
    return pathlib.Path(REPOSITORY, path).read_text()


@pytest.mark.parametrize('document', DOCUMENTS)
def test_what_a_document_names_exists(document):
    text = read(document)
    names = set(FILE.findall(text)) - {'data/mine/prepare.py'}  # an example
    names |= {os.path.join(os.path.dirname(document), link) for link in LINK.findall(text)}
    missing = [name for name in names if not os.path.exists(os.path.join(REPOSITORY, name))]
    assert not missing
    for name, path in NAMES.findall(text):
        assert re.search(rf'(?m)^ *(def |class )?{name}\b', read(path)), (path, name)
    for path, words in TESTS.findall(text):
        for word in words.split(' or '):
            assert re.search(rf'def test_\w*{word.strip()}', read(path)), (path, word)
