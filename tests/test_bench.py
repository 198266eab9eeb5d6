"""The benchmarks play their rounds; no peer is needed, and no time is looked at."""
import os
import subprocess
import sys

import pytest

from configurator import REPOSITORY


def bench(name, *arguments):
    """The standard output of bench/NAME.py."""
    found = subprocess.run([sys.executable, os.path.join(REPOSITORY, 'bench', name), *arguments], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    return found.stdout


def test_players_take_turns_and_are_compared_by_their_medians():
    sys.path.insert(0, os.path.join(REPOSITORY, 'bench'))
    import contest
    players = []
    for name, seconds in (('one', [1, 2, 100]), ('other', [4, 4, 4])):
        player = contest.Player.__new__(contest.Player)
        player.name, player.rounds = name, [{'tokens': 8, 'seconds': s} for s in seconds]
        players.append(player)
    table = contest.table(players, 'tokens', digits=1)
    assert '| one | 4.0 | 0.1 … 8.0 |  | 2.00 |' in table and '| other | 2.0 | 2.0 … 2.0 | 0.50 |  |' in table


def test_decoding_is_measured():
    out = bench('decoding.py', '--shape=distilgpt2', '--players=ours-float32', '--rounds=1', '--new_tokens=3',
                '--prompt=4')
    assert '| ours-float32 |' in out and 'tokens/s' in out


def test_packing_is_measured():
    out = bench('scaling.py', '--sizes=', '--conversations=1000')
    assert '| 1,000 |' in out and '%' in out


@pytest.mark.parametrize('name', ['training.py', 'decoding.py', 'serving.py'])
def test_an_unknown_player_is_refused(name, script):
    found = script(os.path.join('bench', name), '--players=nobody')
    assert found.returncode == 2 and found.stderr.startswith("players='nobody': expected "), found.stderr
