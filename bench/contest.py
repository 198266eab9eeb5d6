"""Compare programs on a noisy machine: players in processes of their own play rounds in turn.

    python bench/decoding.py --players=ours-int8,other-ours-int8 --other=FOLDER

Two players never work at the same time, so whatever slows the machine down slows all of them.
Medians over the rounds are compared. The player other-NAME is the player NAME of another checkout
of this repository, in FOLDER: for example of the commit before. It runs that checkout's own script.
"""
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LOGS = os.environ.get('BENCH_LOGS')  # a folder for what the players print
OTHER = 'other-'  # names the players of the other checkout

# (n_layer, n_head, n_embd)
SHAPES = {'distilgpt2': (6, 12, 768), 'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024),
          'small': (4, 4, 256),  # learns something in minutes
          'tiny': (2, 2, 64)}  # to see whether a script works


def problems(players, other, pattern, expected):
    """Yield a sentence for each player that cannot play. pattern: a regular expression of names."""
    for name in players.split(','):
        if not re.fullmatch(pattern, name.removeprefix(OTHER)):
            yield f'players={name!r}: expected {expected}.'
        elif name.startswith(OTHER) and not (other and os.path.isdir(os.path.join(other, 'bench'))):
            yield (f'players={name!r}: {other!r} is not a checkout of this repository. '
                   'Name one: --other=FOLDER')


# ---- players that wait for their rounds ----

class Stage:
    """The player's side: one line of JSON at a time to the referee, who answers 'go'."""

    def __init__(self):
        # Only we write to the real standard output. What a library prints goes to the log.
        self.referee = os.fdopen(os.dup(1), 'w')
        os.dup2(2, 1)

    def say(self, **facts):
        """Send one line to the referee."""
        print(json.dumps(facts), file=self.referee, flush=True)

    def wait(self):
        """Whether there is a next round; returns when it begins."""
        return sys.stdin.readline().strip() == 'go'

    def play(self, a_round):
        """Play round after round: a_round() returns the work done, such as {'tokens': 128}."""
        self.say(ready=True)
        while self.wait():
            started = time.perf_counter()
            facts = a_round()
            self.say(seconds=time.perf_counter() - started, **facts)


class Player:
    """The referee's side of one process. rounds: what it said about each round, a list of dicts."""

    def __init__(self, name, command):
        self.name = name
        self.rounds = []
        log = subprocess.DEVNULL
        if LOGS:
            path = os.path.join(LOGS, f'{name}.log')
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def hear(self):
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'{self.name} stopped. To see why: set BENCH_LOGS=FOLDER, start this again '
                     f'and look at FOLDER/{self.name}.log')
        return json.loads(line)

    def play(self):
        """Play one round."""
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        self.rounds.append(self.hear())

    def rates(self, unit):
        """unit per second, of each round."""
        return [facts[unit] / facts['seconds'] for facts in self.rounds]


def contest(names, argv, rounds, other=''):
    """The Players after their rounds. Each runs this script with argv and --player=NAME."""
    shared = [flag for flag in argv if not flag.startswith(('--players=', '--other='))]
    commands = {}
    for name in names:
        script = sys.argv[0]
        if name.startswith(OTHER):
            script = os.path.join(other, 'bench', os.path.basename(script))
        player = name.removeprefix(OTHER)
        commands[name] = [sys.executable, script, *shared, f'--player={player}']
    return play(commands, rounds)


def play(commands, rounds):
    """The Players after their rounds. commands: {name: what starts it}."""
    players = []
    for name, command in commands.items():
        started = time.perf_counter()
        player = Player(name, command)
        player.hear()
        players.append(player)
        print(f'{name} is ready after {time.perf_counter() - started:.0f} s', file=sys.stderr)
    for i in range(rounds):
        for player in in_turn(players, i):
            player.play()
        seconds = [f"{player.name} {player.rounds[-1]['seconds']:.2f} s" for player in players]
        print(f'round {i + 1} of {rounds}: {", ".join(seconds)}', file=sys.stderr)
    for player in players:
        player.process.stdin.close()
        player.process.wait()
    return players


# ---- whole commands ----

def take_times(names, rounds, measure):
    """{name: [measure(name, i) of each round i]}: seconds that whole commands take, in turn."""
    seconds = {name: [] for name in names}
    for i in range(rounds):
        for name in in_turn(list(names), i):
            seconds[name].append(measure(name, i))
            print(f'{name}: {seconds[name][-1]:.2f} s', file=sys.stderr)
    return seconds


def in_turn(players, i):
    """The order of round i. Every other round is played backwards."""
    return players if i % 2 == 0 else players[::-1]


# ---- what a person reads ----

def table(players, unit, digits=0):
    """Markdown: the rates of the Players, see compare."""
    rates = {player.name: player.rates(unit) for player in players}
    return compare(rates, f'{unit}/s', digits)


def compare(values, heading, digits=0):
    """Markdown: median and spread of each list in {name: values}, and each median / the others."""
    medians = {name: statistics.median(found) for name, found in values.items()}
    cells = ['', heading, 'least … most'] + [f'÷ {name}' for name in medians]
    lines = ['| ' + ' | '.join(cells) + ' |', '|---' * len(cells) + '|']
    for name, found in values.items():
        spread = f'{min(found):,.{digits}f} … {max(found):,.{digits}f}'
        cells = [name, f'{medians[name]:,.{digits}f}', spread]
        for against in medians:
            ratio = f'{medians[name] / medians[against]:.2f}'
            cells.append('' if against == name else ratio)
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def versions(*packages):
    """One line: the machine, and the versions of the packages that are installed."""
    found = [platform.machine(), f'{os.cpu_count()} cores', f'Python {platform.python_version()}']
    for package in packages:
        try:
            found.append(f'{package} {metadata.version(package)}')
        except metadata.PackageNotFoundError:
            found.append(f'no {package}')
    return ', '.join(found)
