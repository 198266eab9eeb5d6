"""Defaults, then a config file, then --key=value: one frozen, typed configuration. Later wins.

    python train.py config/finetune_oasst.py --batch_size=2 --learning_rate=6e-5

A script declares its keys as a frozen dataclass, one key a line. The type says which values are
allowed, and the comment at the end of the line is the help text:

    batch_size: Count = 4                              # rows in a micro-batch
    loss_on: Literal['response', 'all'] = 'response'   # which tokens are learned

Config files are parsed and never executed. A value is a literal, or arithmetic on literals.
"""
import ast
import dataclasses
import difflib
import inspect
import io
import math
import operator
import os
import re
import sys
import textwrap
import tokenize
import typing
from typing import Annotated, Literal, NamedTuple

REPOSITORY = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A user's mistake. The text says what was found, what was expected and what to do."""


# ---- types of keys ----

class Allowed(NamedTuple):
    """The values that a key may have: a description, and a function that tests one."""
    text: str
    test: typing.Callable


def Range(low, high=math.inf):
    """For Annotated[int, Range(1, 16)]: both ends are allowed."""
    text = f'at least {low:,}'
    if high < math.inf:
        text += f' and at most {high:,}'
    return Allowed(text, lambda value: low <= value <= high)


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2 ** 32 - 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Allowed('above 0', lambda value: value > 0)]
Fraction = Annotated[float, Allowed('at least 0 and below 1', lambda value: 0 <= value < 1)]

EXPECTED = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text in quotes'}


def base_type(kind):
    """int, float, bool or str, whichever a key's type stands for."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return str
    return kind


def limits(kind):
    """What a key's type allows, in words; '' if it allows everything."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[1].text
    if typing.get_origin(kind) is Literal:
        return 'one of ' + ', '.join(choice or "''" for choice in typing.get_args(kind))
    return ''


def accept(value, kind):
    """The value if the key's type allows it (an int is fine for a float), else ValueError."""
    base = base_type(kind)
    if base is float and type(value) is int:
        value = float(value)
    if type(value) is not base:
        raise ValueError(f'found {str(value)[:60]!r}, expected {EXPECTED[base]}')
    if base is float and not math.isfinite(value):
        raise ValueError(f'found {value}, expected a finite number')
    if base is str and '\0' in value:
        raise ValueError('found a NUL character')
    allowed = True
    if typing.get_origin(kind) is Annotated:
        allowed = typing.get_args(kind)[1].test(value)
    elif typing.get_origin(kind) is Literal:
        allowed = value in typing.get_args(kind)
    if not allowed:
        raise ValueError(f'found {value!r}, expected {limits(kind)}')
    return value


# ---- reading values ----

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


def evaluate(node):
    """The value of a literal, or of arithmetic on literals; ValueError for anything else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate_number(operand)
        case ast.BinOp(op=ast.Add(), left=ast.Constant(value=str(left)), right=right):
            return left + str(evaluate(right))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate_number(left), evaluate_number(right))
    if ast.unparse(node) == 'str(time.time())':  # one of nanoGPT's config files names its run so
        return ''
    raise ValueError(f'found {ast.unparse(node)[:60]!r}, expected a literal or arithmetic on literals')


def evaluate_number(node):
    """As evaluate, for numbers only."""
    value = evaluate(node)
    if type(value) not in (int, float):
        raise ValueError(f'found {value!r}, expected a number')
    return value


def parse_flag(text, kind):
    """The value of --key=TEXT: for a text key the text itself, for any other a literal."""
    if base_type(kind) is str:
        return text
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return evaluate(ast.parse(text.strip(), mode='eval').body)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError):
        raise ValueError(f'found {text[:60]!r}, expected {EXPECTED[base_type(kind)]}') from None


def read_config_file(name):
    """Yield (key, syntax tree of its value, where) for each line of a config file."""
    path = name
    if not os.path.isfile(path):
        path = os.path.join(REPOSITORY, name)  # so that the scripts work from any folder
    try:
        with open(path, encoding='utf-8-sig') as file:
            statements = ast.parse(file.read(), path).body
    except FileNotFoundError:
        raise UserError(f'config file {name} not found. The config files are in config/; '
                        'flags are written --key=value.') from None
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        line = getattr(error, 'lineno', None) or 1
        raise UserError(f'{name} line {line}: {type(error).__name__}. '
                        'Expected lines of the form key = value.') from None
    for statement in statements:
        where = f'{name} line {statement.lineno}'
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # the docstring
            case ast.Import(names=[ast.alias(name='time')]):
                pass  # see evaluate
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                yield key, node, where
            case _:
                raise UserError(f'{where}: found {ast.unparse(statement)[:60]!r}, expected '
                                'key = value. A config file is read, never executed.')


def load(keys, argv, defaults=None, check=True):
    """The configuration that argv asks for, as an instance of the frozen dataclass `keys`.

    argv holds config files and --key=value flags. defaults, a dict, overrides the class's own
    defaults. The class may have a method problems() that yields one sentence for each combination
    of values that cannot work; check=False skips it. All mistakes are raised together as one
    UserError, a line each. --help prints every key and exits.
    """
    if '--help' in argv or '-h' in argv:
        print(help_text(keys), flush=True)
        sys.exit(0)
    kinds = typing.get_type_hints(keys, include_extras=True)
    values = {}
    mistakes = []

    def assign(name, read, where):
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f'Did you mean {close[0]!r}?' if close else '--help lists them all.'
            mistakes.append(f'unknown key {name!r} {where}. {hint}')
            return
        try:
            values[name] = accept(read(kinds[name]), kinds[name])
        except (ValueError, ArithmeticError, RecursionError) as error:
            mistakes.append(f'{name} {where}: {error}')

    for name, value in (defaults or {}).items():
        if name in kinds:  # a key that this version no longer has is ignored
            assign(name, lambda kind, value=value: value, 'in the saved configuration')
    for argument in argv:
        if not argument.startswith('--'):
            for name, node, where in read_config_file(argument):
                assign(name, lambda kind, node=node: evaluate(node), f'in {where}')
            continue
        name, equals, text = argument[2:].partition('=')
        if not equals and base_type(kinds.get(name)) is bool:
            text = 'True'
        elif not equals and name in kinds:
            mistakes.append(f'--{name} needs a value: --{name}=VALUE')
            continue
        assign(name, lambda kind, text=text: parse_flag(text, kind), 'on the command line')
    config = None
    if not mistakes:
        config = keys(**values)
        if check and hasattr(config, 'problems'):
            mistakes.extend(config.problems())
    if mistakes:
        raise UserError('\n'.join(mistakes))
    return config


# ---- showing ----

def as_dict(config):
    """The configuration as a plain dict, to save."""
    return dataclasses.asdict(config)


def describe(config):
    """Every key and value in a few lines of text."""
    pairs = [f'{key}={value!r}'.replace(' ', '\0') for key, value in as_dict(config).items()]
    text = textwrap.fill('  '.join(pairs), 100, break_long_words=False, break_on_hyphens=False)
    return text.replace('\0', ' ')


def help_text(keys):
    """The script's docstring, then every key with its default and its comment."""
    source = textwrap.dedent(inspect.getsource(keys))
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
    kinds = typing.get_type_hints(keys, include_extras=True)
    lines = [inspect.getdoc(sys.modules[keys.__module__]) or '', '', 'keys (--key=value):']
    for number, line in enumerate(source.split('\n'), 1):
        name = re.match(r'    (\w+):', line)
        if name and name[1] in kinds:
            default = getattr(keys, name[1])
            text = comments.get(number, '')
            limit = limits(kinds[name[1]])
            if limit:
                text += f' ({limit})'
            lines.append(f'  --{name[1]}={default!r}'.ljust(39) + text)
        elif number in comments and line.strip().startswith('#'):
            lines.append(f'\n  {comments[number]}')
    return '\n'.join(lines)


# ---- running a script ----

def run(main):
    """Call main(sys.argv[1:]). A UserError is printed without a traceback and exits with 2."""
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
    """Print a UserError, once on each machine rather than by each process of torchrun."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(error, file=sys.stderr)
