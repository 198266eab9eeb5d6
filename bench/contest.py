"""Side by side on a noisy machine: players that wait in processes of their own and play rounds in turn.

A script of this folder starts itself once for each player (`--player=NAME`). A player sets itself up,
warms up, says so, and then plays one round each time it is told to: never two at once, so that
whatever slows the machine down slows all of them. Compared are medians over the rounds.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FOLDER = os.environ.get('BENCH_LOGS', '')  # where the players' own output goes; '' nowhere


class Stage:
    """The player's side: what it says to the referee goes through the real standard output alone."""

    def __init__(self):
        self.say_to = os.fdopen(os.dup(1), 'w')
        os.dup2(2, 1)  # whatever a library prints goes to the log

    def say(self, **facts):
        """One line to the referee."""
        print(json.dumps(facts), file=self.say_to, flush=True)

    def wait(self):
        """Until the referee wants a round; the process ends when it wants no more."""
        if sys.stdin.readline().strip() != 'go':
            os._exit(0)

    def play(self, a_round):
        """a_round() -> dict with the work done, such as tokens=…; its time is taken here."""
        self.say(ready=True)
        while True:
            self.wait()
            started = time.perf_counter()
            facts = a_round()
            self.say(seconds=time.perf_counter() - started, **facts)


class Player:
    """The referee's side of one process."""

    def __init__(self, name, argv):
        self.name, self.rounds = name, []
        log = open(os.path.join(FOLDER, name + '.log'), 'w') if FOLDER else subprocess.DEVNULL
        self.process = subprocess.Popen([sys.executable, sys.argv[0], *argv, f'--player={name}'], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def hear(self):
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'{self.name} stopped. Set BENCH_LOGS=FOLDER and look at FOLDER/{self.name}.log')
        return json.loads(line)

    def play(self):
        """One round."""
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        self.rounds.append(self.hear())

    def rates(self, unit):
        """unit per second, of each round."""
        return [facts[unit] / facts['seconds'] for facts in self.rounds]


def contest(names, argv, rounds):
    """Players that have played `rounds` rounds in turn, set up one after another."""
    players = []
    for name in names:
        started = time.perf_counter()
        players.append(Player(name, argv))
        players[-1].hear()
        print(f'{name} is ready after {time.perf_counter() - started:.0f} s', file=sys.stderr)
    for i in range(rounds):
        for player in players if i % 2 == 0 else reversed(players):
            player.play()
        print(f'round {i + 1} of {rounds}: ' + ', '.join(f"{player.name} {player.rounds[-1]['seconds']:.2f} s" for player in players),
              file=sys.stderr)
    for player in players:
        player.process.stdin.close()
        player.process.wait()
    return players


def table(players, unit, digits=0):
    """Markdown: each player's median rate, its spread, and how many times the rate of each other it is."""
    medians = {player.name: statistics.median(player.rates(unit)) for player in players}
    lines = [f'| | {unit}/s | least … most | ' + ' | '.join(f'÷ {name}' for name in medians) + ' |',
             '|---|---|---|' + '---|' * len(medians)]
    for player in players:
        rates, own = player.rates(unit), medians[player.name]
        ratios = ' | '.join('' if name == player.name else f'{own / other:.2f}' for name, other in medians.items())
        lines.append(f'| {player.name} | {own:,.{digits}f} | {min(rates):,.{digits}f} … {max(rates):,.{digits}f} | {ratios} |')
    return '\n'.join(lines)


def versions(*packages):
    """One line: the machine and the versions that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f'{package} {metadata.version(package)}')
        except metadata.PackageNotFoundError:
            pass
    return (f'{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, '
            + ', '.join(found))
