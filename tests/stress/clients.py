"""Clients of serve.py that time out and go away. After them, every place must be free.

    python serve.py --init_from=out/demo
    python tests/stress/clients.py http://127.0.0.1:8000

It prints how the requests ended, and the slowest answer of /health meanwhile.
"""
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import requests

URL = sys.argv[1]
LARGE = 'word ' * 190_000


def ask(seed):
    """One request of a client who may go away; how it ended."""
    rng = random.Random(seed)
    text = LARGE if rng.random() < 0.05 else 'x' * rng.randrange(1, 700)
    body = {'messages': [{'role': 'user', 'content': text}],
            'max_tokens': rng.randrange(1, 300), 'stream': rng.random() < 0.7}
    n_lines = rng.choice([0, 9, 10_000])
    timeout = (5, rng.choice([0.05, 0.3, 60]))
    try:
        with requests.post(f'{URL}/v1/chat/completions', json=body, stream=True,
                           timeout=timeout) as response:
            for i, _ in enumerate(response.iter_lines()):
                if i == n_lines:
                    return 'left while it was written'
            return f'status {response.status_code}'
    except (requests.Timeout, requests.ConnectionError):
        return 'timed out'


def watch(times):
    """Ask for /health all the time."""
    while True:
        started = time.monotonic()
        requests.get(f'{URL}/health', timeout=60).raise_for_status()
        times.append(time.monotonic() - started)


def main():
    times = []
    threading.Thread(target=watch, args=(times,), daemon=True).start()
    with ThreadPoolExecutor(24) as pool:
        ends = Counter(pool.map(ask, range(600)))
    time.sleep(1)
    left = requests.get(f'{URL}/health', timeout=10).json()
    print(f'{dict(ends)}; then {left}; /health took at most {max(times):.2f} s')
    if left['writing'] or left['waiting'] or 'status 500' in ends:
        sys.exit('places are lost, or the server failed.')


if __name__ == '__main__':
    main()
