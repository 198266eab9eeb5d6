"""Defaults, then a config file, then --key=value: one frozen configuration. Later wins.

    python train.py config/finetune_oasst.py --batch_size=2 --learning_rate=6e-5

A script declares its keys as a frozen dataclass, one key a line. The type says which
values are allowed, and the comment at the end of the line is the help text:

    batch_size: Count = 4                              # rows in a micro-batch
    loss_on: Literal['response', 'all'] = 'response'   # which tokens are learned
"""
import ast
import difflib
import inspect
import operator
import os
import signal
import sys
from dataclasses import fields
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

REPOSITORY = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A user's mistake: what was found, what was expected and what to do."""


class Range(NamedTuple):
    """For Annotated[int, Range(1, 16)]: the lowest and the highest value allowed."""
    low: float
    high: float = float('inf')


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2 ** 32 - 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(1e-9)]
Fraction = Annotated[float, Range(0, 0.9999)]
Share = Annotated[float, Range(0, 1)]


def check_value(value, field):
    """The value, if the type and the limits of this field of the dataclass allow it."""
    if type(field.default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(field.default):
        raise ValueError(f'found {value!r}, expected a value like {field.default!r}')
    options = get_args(field.type)
    if get_origin(field.type) is Annotated:
        low, high = options[1]
        if not low <= value <= high:
            raise ValueError(f'found {value!r}, expected {low:,} to {high:,}')
    if get_origin(field.type) is Literal and value not in options:
        words = ', '.join(filter(None, options))
        raise ValueError(f'found {value!r}, expected one of {words}')
    return value


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub,
             ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(node):
    """The value of a literal, or of arithmetic on literals. Nothing is executed."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id='true' | 'false'):
            return node.id == 'true'
        case ast.UnaryOp(op=ast.USub()):
            return -evaluate(node.operand)
        case ast.BinOp() if type(node.op) in OPERATORS:
            calculate = OPERATORS[type(node.op)]
            return calculate(evaluate(node.left), evaluate(node.right))
    found = ast.unparse(node)
    # A config file of nanoGPT names its run so.
    if found == 'str(time.time())':
        return ''
    raise ValueError(f'found {found}, expected a literal, or arithmetic on literals')


def read(argument, keys):
    """Yield key and syntax tree of the value, for --key=value or a config file's lines."""
    try:
        if argument.startswith('--'):
            key, equals, text = argument[2:].partition('=')
            key = key.replace('-', '_')
            # --key alone means True, and a text needs no quotes.
            if not equals:
                text = 'True'
            elif isinstance(getattr(keys, key, None), str):
                text = repr(text)
            source = f'{key} = {text}'
        else:
            # A file of ours is found from any folder.
            found = os.path.exists(argument)
            path = argument if found else os.path.join(REPOSITORY, argument)
            with open(path, 'rb') as file:
                source = file.read()
        lines = ast.parse(source).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f'{argument} cannot be read: {error}. Expected --key=value, or a '
                        'file of such lines: see config/.') from None
    for line in lines:
        match line:
            case ast.Assign(targets=[ast.Name(id=key)]):
                yield key, line.value
            # Docstrings and imports mean nothing here.
            case ast.Expr(value=ast.Constant()) | ast.Import():
                continue
            case _:
                found = ast.unparse(line)[:60]
                raise UserError(f'found {found!r} in {argument}, expected key = value')


def load(keys, argv, defaults=None, check=True):
    """The configuration that argv asks for: an instance of the frozen dataclass keys.

    defaults, a dict, overrides the class's own. check: ask the class's problems(), if any,
    for a sentence about each combination that cannot work.
    """
    if '--help' in argv:
        # The docstring of the script, and the class up to its first empty line.
        print(inspect.getdoc(sys.modules[keys.__module__]))
        print('\nKeys, as in --key=value:')
        print(inspect.getsource(keys).partition(':\n')[2].partition('\n\n')[0].rstrip())
        sys.exit(0)
    known = {field.name: field for field in fields(keys)}
    values = {key: value for key, value in (defaults or {}).items() if key in known}
    mistakes = []
    for argument in argv:
        for key, node in read(argument, keys):
            if key not in known:
                nearest, = difflib.get_close_matches(key, known, n=1, cutoff=0)
                mistakes.append(f'unknown key {key!r} in {argument}. '
                                f'Did you mean {nearest!r}?')
                continue
            try:
                values[key] = check_value(evaluate(node), known[key])
            except (ValueError, TypeError, ArithmeticError) as error:
                mistakes.append(f'{key} in {argument}: {error}')
    # Combinations can only be checked once every single value is right.
    if not mistakes:
        config = keys(**values)
        if check and hasattr(keys, 'problems'):
            mistakes.extend(config.problems())
    if mistakes:
        raise UserError('\n'.join(mistakes))
    return config


def precheck(name, keys, check=True):
    """Find mistakes on the command line before slow imports. name: the script's __name__."""
    if name == '__main__':
        run(lambda argv: load(keys, argv, check=check))


def run(main):
    """Call main(sys.argv[1:]). A UserError is printed without a traceback; exit code 2."""
    # Ctrl-C ends without a traceback, and a terminal may lack a character.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        report(error)
        sys.exit(2)
    # Whoever reads our output (head, less) has seen enough.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error):
    """Print a UserError: once on each machine, not once for each process of torchrun."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(error, file=sys.stderr)
