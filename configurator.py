"""Defaults, then a config file, then --key=value: one frozen configuration. Later wins.

    python train.py config/finetune_oasst.py --batch_size=2 --learning_rate=6e-5

A script declares its keys as a frozen dataclass, one key a line. The type says which values are
allowed, and the comment at the end of the line is the help text:

    batch_size: Count = 4                              # rows in a micro-batch
    loss_on: Literal['response', 'all'] = 'response'   # which tokens are learned
"""
import ast
import contextlib
import difflib
import inspect
import math
import operator
import os
import signal
import sys
from dataclasses import fields
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

REPOSITORY = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A user's mistake. The text says what was found, what was expected and what to do."""


# ---- types of keys ----

class Range(NamedTuple):
    """For Annotated[int, Range(1, 16)]: the lowest and the highest value allowed."""
    low: float
    high: float = math.inf


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
    if get_origin(field.type) is Annotated:
        low, high = get_args(field.type)[1]
        if value < low:
            raise ValueError(f'found {value!r}, expected at least {low:,}')
        if value > high:
            raise ValueError(f'found {value!r}, expected at most {high:,}')
    choices = get_args(field.type)
    if get_origin(field.type) is Literal and value not in choices:
        words = ', '.join(filter(None, choices))
        raise ValueError(f'found {value!r}, expected one of {words}')
    return value


# ---- reading values: nothing is executed ----

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


def evaluate(node):
    """The value of a literal, or of arithmetic on literals; ValueError for anything else."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id='true' | 'false'):
            return node.id == 'true'
        case ast.UnaryOp(op=ast.USub()):
            return -evaluate(node.operand)
        case ast.BinOp() if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    if ast.unparse(node) == 'str(time.time())':  # a config file of nanoGPT names its run so
        return ''
    raise ValueError(f'found {ast.unparse(node)}, expected a literal, or arithmetic on literals')


def read_config_file(name):
    """Yield (key, syntax tree of its value, where it is) for each line key = value."""
    # A file beside the scripts is found from any folder.
    path = name if os.path.isfile(name) else os.path.join(REPOSITORY, name)
    try:
        with open(path, 'rb') as file:
            lines = ast.parse(file.read(), name).body
    except (OSError, SyntaxError) as error:
        raise UserError(f'config file {name} cannot be read: {error}. The config files are in '
                        'config/; flags are written --key=value.') from None
    for line in lines:
        where = f'in {name} line {line.lineno}'
        match line:
            case ast.Expr(value=ast.Constant()) | ast.Import(names=[ast.alias(name='time')]):
                continue  # the docstring; see evaluate
            case ast.Assign(targets=[ast.Name(id=key)]):
                yield key, line.value, where
            case _:
                raise UserError(f'found {ast.unparse(line)[:60]!r} {where}, expected key = value. '
                                'A config file is read, never executed.')


def read_flag(flag, keys):
    """The same for --key=value. A text needs no quotes, and --key alone means True."""
    key, equals, text = flag[2:].partition('=')
    node = ast.Constant(text if equals else True)
    if equals and not isinstance(getattr(keys, key, ''), str):
        with contextlib.suppress(SyntaxError):  # it stays a text, which check_value refuses
            node = ast.parse(text.strip(), mode='eval').body
    return key, node, 'on the command line'


def load(keys, argv, defaults=None, check=True):
    """The configuration that argv asks for, as an instance of the frozen dataclass `keys`.

    defaults: a dict that overrides the class's own. The class may have a method problems(), which
    yields a sentence for each combination that cannot work; check=False skips it.
    """
    if '--help' in argv or '-h' in argv:
        # The docstring of the script, and the lines of the class up to the first empty one.
        lines = inspect.getsource(keys).partition(':\n')[2].partition('\n\n')[0]
        docstring = inspect.getdoc(sys.modules[keys.__module__])
        print(f'{docstring}\n\nKeys, as in --key=value:\n{lines.rstrip()}', flush=True)
        sys.exit(0)
    known = {field.name: field for field in fields(keys)}
    # A key that was saved and is no longer known is ignored.
    values = {key: value for key, value in (defaults or {}).items() if key in known}
    mistakes = []
    # Config files and flags in the order they are given: later wins.
    for argument in argv:
        if argument.startswith('--'):
            entries = [read_flag(argument, keys)]
        else:
            entries = read_config_file(argument)
        for key, node, where in entries:
            if key not in known:
                nearest, = difflib.get_close_matches(key, known, n=1, cutoff=0)
                mistakes.append(f'unknown key {key!r} {where}. Did you mean {nearest!r}?')
                continue
            try:
                values[key] = check_value(evaluate(node), known[key])
            except (ValueError, TypeError, ArithmeticError) as error:
                mistakes.append(f'{key} {where}: {error}')
    # problems() may only be asked once every single value is right.
    if not mistakes:
        config = keys(**values)
        if check and hasattr(keys, 'problems'):
            mistakes.extend(config.problems())
    if mistakes:
        raise UserError('\n'.join(mistakes))
    return config


# ---- running a script ----

def precheck(name, keys, check=True):
    """Find mistakes on the command line before a script's slow imports. name: its __name__."""
    if name == '__main__':
        run(lambda argv: load(keys, argv, check=check))


def run(main):
    """Call main(sys.argv[1:]). A UserError is printed without a traceback and exits with 2."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback
    sys.stdout.reconfigure(errors='backslashreplace')  # for terminals that lack a character
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        report(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error):
    """Print a UserError: once on each machine, not once for each process of torchrun."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(error, file=sys.stderr)
