"""Downloads of pinned files: shown, resumed, retried, and checked by size and sha256.

A file under its own name is whole and right; what is still arriving is called NAME.part.
"""
import hashlib
import os
import sys
import time

import requests

from core.claim import claimed
from configurator import UserError
from core.progress import Bar

BLOCK = 1 << 14  # bytes that are written at a time: what an incomplete one held is lost when a connection breaks
ATTEMPTS, PAUSE_S = 5, 1.0  # waits of 1, 2, 4 and 8 seconds between the attempts
SILENCE_S = 30  # without a byte for so long, the connection counts as broken
HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')  # a mirror, as for transformers


def download(url, path, n_bytes, sha256):
    """Make sure that `path` holds the file at `url` with this size and hash; returns path.

    n_bytes is None where a file's page gives its hash and no exact size: the hash alone decides.
    """
    if os.path.exists(path):
        _verify(path, path, url, n_bytes, sha256)
        return path
    with claimed(os.path.dirname(os.path.abspath(path))):  # two would write into the same .part
        return _arrive(url, path, n_bytes, sha256)


def _arrive(url, path, n_bytes, sha256):
    part = path + '.part'
    problem = None
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f'{problem}; trying again ({attempt + 1} of {ATTEMPTS})', file=sys.stderr)
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            _fetch(url, part, n_bytes)
            break
        except requests.HTTPError as error:
            problem = f'the server answered {error.response.status_code} {error.response.reason}'
            if error.response.status_code < 500 and error.response.status_code != 429:
                raise UserError(_by_hand(url, path, problem)) from None
        except (ValueError, requests.TooManyRedirects) as error:  # sent on to file://, to no address, in circles
            raise UserError(_by_hand(url, path, f'it leads to no file ({type(error).__name__})')) from None
        except requests.RequestException as error:
            problem = f'the connection failed ({type(error).__name__})'
        except OSError as error:  # none of requests' own
            raise UserError(f'cannot write {part}: {error.strerror}.') from None
    else:
        raise UserError(_by_hand(url, path, f'{problem}, {ATTEMPTS} times'))
    _verify(part, path, url, n_bytes, sha256)
    os.replace(part, path)
    return path


def _by_hand(url, path, problem):
    return f'could not download {url}: {problem}. Put the file at {path} yourself, or use --input=FILE.'


def _fetch(url, part, n_bytes):
    """One attempt to bring `part` to n_bytes, or the size the server gives, from where it stands."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    if have == n_bytes:
        return
    if n_bytes is not None and have > n_bytes:
        os.remove(part)
        have = 0
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=SILENCE_S) as response:
        if response.status_code == 416:  # the file there is shorter than what we have
            os.remove(part)
            raise requests.ConnectionError
        response.raise_for_status()
        if response.status_code != 206 or \
                not response.headers.get('Content-Range', '').startswith(f'bytes {have}-'):
            have = 0  # no ranges here: from the start
        size = response.headers.get('Content-Length')
        size = have + int(size) if size and size.isdigit() else n_bytes
        if size is None:
            raise UserError(_by_hand(url, part[:-5], 'the server does not say how long it is'))
        n_bytes = size if n_bytes is None else n_bytes
        if size != n_bytes:
            raise UserError(f'{url} is {size:,} bytes there, expected {n_bytes:,}: not the '
                            'pinned file, so nothing was downloaded.')
        name = os.path.basename(part)[:-5]
        with open(part, 'r+b' if have else 'wb') as file, \
                Bar(total=n_bytes, initial=have, desc=name, unit='B', unit_scale=True) as bar:
            file.seek(have)
            file.truncate()
            for block in response.iter_content(BLOCK):
                file.write(block)
                have += len(block)
                bar.update(len(block))
                if have > n_bytes:
                    break
    if have < n_bytes:
        raise requests.ConnectionError  # it broke off: go on from here


def _verify(part, path, url, n_bytes, sha256):
    """UserError, and no such .part any more, where size or hash are not the pinned ones."""
    found = os.path.getsize(part)
    digest = hashlib.sha256()
    if n_bytes in (None, found):
        with open(part, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() == sha256:
            return
    what = f'{found:,} bytes, expected {n_bytes:,}' if n_bytes not in (None, found) else \
        f'sha256 {digest.hexdigest()}, expected {sha256}'
    if part != path:
        os.remove(part)
        raise UserError(f'{url} gave a wrong file ({what}); it was deleted. Try again later.')
    raise UserError(f'{path} is not the pinned file: {what}. Delete it and run this again.')
