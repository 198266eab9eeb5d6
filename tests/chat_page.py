"""For the tests of the page: headless Chromium."""
import contextlib
import shutil

import pytest

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']


@contextlib.contextmanager
def chromium():
    """A headless browser; the test is skipped if there is none."""
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    path = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chrome')
    if not path:
        pytest.skip('no Chromium is installed')
    playwright.expect.set_options(timeout=30_000)  # for machines with other things to do
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=path, args=FLAGS)


def say(page, text):
    """Type it and press Enter."""
    page.get_by_label('Message').fill(text)
    page.get_by_label('Message').press('Enter')
