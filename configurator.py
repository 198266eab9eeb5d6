"""Defaults, then a config file, then --key=value: one frozen, typed configuration. Later wins.

    python train.py config/finetune_oasst.py --batch_size=2 --learning_rate=6e-5

A script declares its keys as a frozen dataclass, one key a line. The type says which values are
allowed, and the comment at the end of the line is the help text:

    batch_size: Count = 4                              # rows in a micro-batch
    loss_on: Literal['response', 'all'] = 'response'   # which tokens are learned

Config files are parsed and never executed. A value is a literal, or arithmetic on literals.
"""
import ast
import difflib
import inspect
import io
import math
import operator
import os
import signal
import sys
import textwrap
import tokenize
import typing
from typing import Annotated, Literal, NamedTuple

REPOSITORY = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A user's mistake. The text says what was found, what was expected and what to do."""


# ---- types of keys ----

class Range(NamedTuple):
    """For Annotated[int, Range(1, 16)]: the lowest and the highest value allowed."""
    low: float
    high: float = math.inf
    below: float = math.inf  # values must be smaller than this

    def __str__(self):
        text = f'at least {self.low:,}'
        if self.high < math.inf:
            text += f', at most {self.high:,}'
        if self.below < math.inf:
            text += f', below {self.below:,}'
        return text


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2 ** 32 - 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(1e-9)]
Fraction = Annotated[float, Range(0, below=1)]
Share = Annotated[float, Range(0, 1)]

EXPECTED = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text',
            dict: 'a table', list: 'a list', tuple: 'a tuple'}
LARGEST = 10 ** 11  # of whole numbers: larger ones overflow as floats and times


def base_type(kind):
    """int, float, bool or str, whichever a key's type stands for."""
    if typing.get_origin(kind) is Literal:
        return str
    return getattr(kind, '__origin__', kind)


def limits(kind):
    """What a key's type allows, in words; '' if it allows everything."""
    if typing.get_origin(kind) is Literal:
        return 'one of ' + ', '.join(choice or "''" for choice in typing.get_args(kind))
    return ''.join(map(str, getattr(kind, '__metadata__', ())))


def accept(value, kind):
    """The value if the key's type allows it (an int is fine for a float), else ValueError."""
    if type(None) in typing.get_args(kind):  # as in float | None
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    base = base_type(kind)
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f'found a number that is too large, expected at most {LARGEST:,}')
    if base is float and type(value) is int:
        value = float(value)
    fits = isinstance(value, base) and isinstance(value, bool) == (base is bool)
    if not fits or value != value or value == math.inf or base is str and '\0' in value:
        raise ValueError(f'found {str(value)[:60]!r}, expected {EXPECTED[base]}')
    if typing.get_origin(kind) is Literal:
        allowed = value in typing.get_args(kind)
    else:
        ranges = getattr(kind, '__metadata__', ())
        allowed = all(r.low <= value <= r.high and value < r.below for r in ranges)
    if not allowed:
        raise ValueError(f'found {value!r}, expected {limits(kind)}')
    return value


def checked(keys, values):
    """An instance of the dataclass `keys` with these values. ValueError if its types forbid one."""
    kinds = typing.get_type_hints(keys, include_extras=True)
    accepted = {}
    for name, value in values.items():
        try:
            accepted[name] = accept(value, kinds[name])
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None
    return keys(**accepted)


# ---- reading values ----

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


def evaluate(node):
    """The value of a literal, or of arithmetic on literals; ValueError for anything else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            values = [evaluate(left), evaluate(right)]
            texts = [isinstance(value, str) for value in values]
            if not any(texts) or (all(texts) and isinstance(op, ast.Add)):
                return OPERATORS[type(op)](*values)
    if ast.unparse(node) == 'str(time.time())':  # one of nanoGPT's config files names its run so
        return ''
    raise ValueError(f'found {ast.unparse(node)[:60]!r}, expected a literal, '
                     'or arithmetic on literals')


def parse_flag(text, kind):
    """The value of --key=TEXT: for a text key the text itself, for any other a literal."""
    if base_type(kind) is str:
        return text
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return evaluate(ast.parse(text.strip(), mode='eval').body)
    except SyntaxError:
        raise ValueError(f'found {text[:60]!r}, expected {EXPECTED[base_type(kind)]}') from None


def read_config_file(name):
    """Yield (key, syntax tree of its value, line number) for each line of a config file."""
    path = name
    if not os.path.isfile(path):
        path = os.path.join(REPOSITORY, name)  # so that the scripts work from any folder
    if not os.path.isfile(path):
        raise UserError(f'config file {name} not found. The config files are in config/; '
                        'flags are written --key=value.')
    try:
        with open(path, encoding='utf-8-sig') as file:
            text = file.read()
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        line = getattr(error, 'lineno', None) or 1
        raise UserError(f'{name} line {line}: {type(error).__name__}. '
                        'Expected lines of the form key = value.') from None
    for statement in statements:
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # the docstring
            case ast.Import(names=[ast.alias(name='time')]):
                pass  # see evaluate
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                yield key, node, statement.lineno
            case _:
                line = text.split('\n')[statement.lineno - 1].strip()
                raise UserError(f'{name} line {statement.lineno}: found {line[:60]!r}, expected '
                                'key = value. A config file is read, never executed.')


def load(keys, argv, defaults=None, check=True):
    """The configuration that argv asks for, as an instance of the frozen dataclass `keys`.

    argv holds config files and --key=value flags. defaults, a dict, overrides the class's own. The
    class may have a method problems() that yields a sentence for each combination of values that
    cannot work; check=False skips it. All mistakes are raised together as one UserError, a line
    each. --help prints every key and exits.
    """
    if '--help' in argv or '-h' in argv:
        print(help_text(keys), flush=True)
        sys.exit(0)
    kinds = typing.get_type_hints(keys, include_extras=True)
    values = {}
    mistakes = []

    def assign(name, where, read, source):
        """Set the key to read(source)."""
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f'Did you mean {close[0]!r}?' if close else '--help lists them all.'
            mistakes.append(f'unknown key {name!r} {where}. {hint}')
            return
        try:
            values[name] = accept(read(source), kinds[name])
        except (ValueError, ArithmeticError, RecursionError, MemoryError) as error:
            mistakes.append(f'{name} {where}: {error}')

    # A key that was saved and is no longer known is ignored.
    for name in kinds.keys() & (defaults or {}).keys():
        assign(name, 'in the saved configuration', defaults.get, name)
    # Config files and flags in the order they are given: later wins.
    for argument in argv:
        if not argument.startswith('--'):
            for name, node, line in read_config_file(argument):
                assign(name, f'in {argument} line {line}', evaluate, node)
            continue
        name, equals, text = argument[2:].partition('=')
        kind = kinds.get(name, str)
        if not equals and kind is bool:
            text = 'True'
        elif not equals and name in kinds:
            mistakes.append(f'--{name} needs a value: --{name}=VALUE')
            continue
        assign(name, 'on the command line', lambda text, kind=kind: parse_flag(text, kind), text)
    # problems() may only be asked once every single value is right.
    if not mistakes:
        config = keys(**values)
        if check and hasattr(config, 'problems'):
            mistakes.extend(config.problems())
    if mistakes:
        raise UserError('\n'.join(mistakes))
    return config


def help_text(keys):
    """The script's docstring, then every key with its default, its comment and its limits."""
    # The help is in the comments of the source, by line number.
    source = textwrap.dedent(inspect.getsource(keys))
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
    kinds = typing.get_type_hints(keys, include_extras=True)
    lines = [inspect.getdoc(sys.modules[keys.__module__]) or '', '', 'keys (--key=value):']
    for number, line in enumerate(source.split('\n'), 1):
        name = line.strip().partition(':')[0]
        text = comments.get(number, '')
        if name in kinds:
            if limits(kinds[name]):
                text += f' ({limits(kinds[name])})'
            lines.append(f'  --{name}={getattr(keys, name)!r} '.ljust(39) + text)
        elif line.strip().startswith('#'):
            lines.append(f'\n  {text}')
    return '\n'.join(lines)


# ---- running a script ----

def precheck(name, keys, check=True):
    """Find mistakes on the command line before a script's slow imports. name: its __name__."""
    if name == '__main__':
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run: Ctrl-C ends without a traceback
        run(lambda argv: load(keys, argv, check=check))
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main):
    """Call main(sys.argv[1:]). A UserError is printed without a traceback and exits with 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors='backslashreplace')  # for terminals that lack a character
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        report(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


def report(error):
    """Print a UserError: once on each machine, not once for each process of torchrun."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(error, file=sys.stderr)
