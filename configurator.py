"""Defaults, then a config file, then --key=value: one frozen, typed configuration; later wins.

    python train.py config/finetune_oasst.py --batch_size=2 --learning_rate=6e-5

A script declares its keys as a frozen dataclass, one key a line, and the comment at the end of that
line is its help text. An optional method problems() of the class returns one sentence for each
combination of values that cannot work.

Values are Python literals and arithmetic on them and on earlier keys. They are read from the syntax
tree and never executed; what is no literal is plain text for a text key and a mistake for any other.
"""
import ast
import dataclasses
import difflib
import inspect
import io
import operator
import os
import re
import sys
import textwrap
import tokenize

REPOSITORY = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A person's mistake. Its text says what was found, what was expected and what to do."""


def run(main):
    """Call main(sys.argv[1:]) as a script: a UserError is printed without a traceback and exits 2."""
    sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that lacks a character is no reason to stop
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        report(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


def report(error):
    """Print a UserError, once on each machine and not by each process of torchrun."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(error, file=sys.stderr)


def load(keys, argv, defaults=None, check=True):
    """The configuration that argv asks for, as an instance of the frozen dataclass `keys`.

    argv holds config files and --key=value flags in any order. defaults: {key: value} that come
    before argv and after those of the class; keys that the class has no more are passed over.
    check: whether the class's problems() alone are a mistake, too.
    All mistakes are collected and raised as one UserError, a line each. --help prints every key
    and exits.
    """
    if '--help' in argv or '-h' in argv:
        print(help_text(keys), flush=True)
        sys.exit(0)
    types = {field.name: field.type for field in dataclasses.fields(keys)}
    values = {field.name: (defaults or {}).get(field.name, field.default) for field in dataclasses.fields(keys)}
    mistakes = [f'{name}={str(value)[:60]!r} was saved: expected {_EXPECTED[types[name]]}'
                for name, value in (defaults or {}).items() if name in types and type(value) is not types[name]]
    if mistakes:  # of a checkpoint that somebody else has made
        raise UserError('\n'.join(mistakes))
    unread = set()

    def assign(name, read, where):
        if name not in types:
            mistakes.append(f'unknown key {name!r} {where}.{_suggestion(name, types)}')
            return
        try:
            values[name] = read(types[name])
        except ValueError as error:
            mistakes.append(f'{name} {where}: {error}')
            unread.add(name)

    for argument in argv:
        if not argument.startswith('--'):
            _read_file(argument, values, assign, mistakes)
            continue
        name, equals, text = argument[2:].partition('=')
        if not equals and types.get(name) is not bool:
            known = name in types
            mistakes.append(f'--{name} needs a value: --{name}=VALUE' if known else
                            f'unknown key {name!r} on the command line.{_suggestion(name, types)}')
            continue
        text = text if equals else 'True'
        assign(name, lambda kind: _from_text(text, kind, values), 'on the command line')
    config = keys(**values)
    # What rests on a value that could not be read would be a false alarm.
    mistakes += [problem for problem in (getattr(config, 'problems', list)() if check or mistakes else ())
                 if not unread & set(re.findall(r'\w+', problem))]
    if mistakes:
        raise UserError('\n'.join(mistakes))
    return config


def _read_file(name, values, assign, mistakes):
    """Assign the keys of a config file, looked for here and then beside the scripts."""
    path = next((p for p in (name, os.path.join(REPOSITORY, name)) if os.path.isfile(p)), None)
    if path is None:
        mistakes.append(f'config file {name} not found. Flags are written --key=value; '
                        'the config files are in config/.')
        return
    try:
        with open(path, encoding='utf-8-sig') as file:
            statements = ast.parse(file.read(), path).body
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        line = getattr(error, 'lineno', None)
        at = f' line {line}' if line else ''
        mistakes.append(f'{name}{at} is not a config file of lines "key = value": '
                        f'{getattr(error, "msg", None) or str(error) or "nested too deeply"}')
        return
    for statement in statements:
        where = f'{name} line {statement.lineno}'
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # the docstring
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                assign(key, lambda kind: _value(node, kind, values), f'in {where}')
            case _:
                mistakes.append(f'{where}: found {_source(statement)!r}, expected key = value. '
                                'A config file is read, never executed.')


def _from_text(text, kind, values):
    """The value of a flag: a literal or arithmetic, or, for a text key, the text as it stands."""
    if kind is bool and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        node = ast.parse(text.strip(), mode='eval').body
        if isinstance(node, ast.Name) and (kind is str or node.id not in values):
            raise SyntaxError  # a word, even where it is a key's name too: --user=seed asks for "seed"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if kind is str:
            return text
        raise ValueError(f'found {text[:60]!r}, expected {_EXPECTED[kind]}') from None
    try:
        return _value(node, kind, values)
    except ValueError:
        if kind is str:
            return text
        raise


_EXPECTED = {int: 'a whole number', float: 'a number', bool: 'True or False', str: "text in quotes"}


def _value(node, kind, values):
    """What the node stands for, if it is of the key's type (an int is fine for a float); else ValueError."""
    try:
        value = _evaluate(node, values)
    except RecursionError:
        raise ValueError('nested too deeply') from None
    if type(value) is int and abs(value) >= _LARGEST:
        raise ValueError(f'{_source(node)!r} is too large')
    if type(value) is int and kind is float:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f'found {_source(node)}, expected {_EXPECTED[kind]}')
    return value


def _source(node):
    """The node as source text, in short."""
    try:
        return ast.unparse(node).split('\n')[0][:60]
    except RecursionError:
        return '…'


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
              ast.Pow: operator.pow, ast.UAdd: operator.pos, ast.USub: operator.neg}
_LARGEST = 2 ** 63  # of any number on the way, so that 9**9**9 is refused before it is computed


def _evaluate(node, values):
    """The value of a literal or of arithmetic on literals and earlier keys; ValueError otherwise."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            return node.value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            operands = [_evaluate(operand, values)]
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            operands = [_evaluate(left, values), _evaluate(right, values)]
            if isinstance(op, ast.Add) and all(isinstance(x, str) for x in operands):
                if len(operands[0]) + len(operands[1]) > 10_000:
                    raise ValueError(f'{_source(node)!r} is too long')
                return operands[0] + operands[1]
        case _:
            raise ValueError(f'found {_source(node)!r}, expected a literal or arithmetic on '
                             'literals and earlier keys (nothing in a config is executed)')
    if not all(type(x) in (int, float) and abs(x) <= _LARGEST for x in operands):
        raise ValueError(f'cannot compute {_source(node)!r}')
    if isinstance(op, ast.Pow) and abs(operands[1]) > 64:
        raise ValueError(f'the exponent in {_source(node)!r} is too large')
    try:
        result = _OPERATORS[type(op)](*operands)
    except ArithmeticError as error:
        raise ValueError(f'cannot compute {_source(node)!r}: {error}') from None
    if type(result) not in (int, float) or abs(result) > _LARGEST:
        raise ValueError(f'{_source(node)!r} is too large, or no real number')
    return result


def _suggestion(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f' Did you mean {close[0]!r}?' if close else ' --help lists them all.'


def as_dict(config):
    """The configuration as a plain dict, to print and to save."""
    return dataclasses.asdict(config)


def describe(config):
    """Every key and value, in as few lines as they take."""
    pairs = '  '.join(f'{key}={value!r}'.replace(' ', '\0') for key, value in as_dict(config).items())
    return textwrap.fill(pairs, 100, break_long_words=False, break_on_hyphens=False).replace('\0', ' ')


def help_text(keys):
    """The script's docstring, then every key with its default and the comment behind it."""
    source = textwrap.dedent(inspect.getsource(keys))
    comments = {token.start[0]: token.string.lstrip('# ') for token in
                tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    fields = {field.name: field for field in dataclasses.fields(keys)}
    lines = [inspect.getdoc(sys.modules[keys.__module__]) or '', '', 'keys (--key=value):' if fields else 'no keys']
    for number, line in enumerate(source.split('\n'), 1):
        name = re.match(r'    (\w+):', line)
        if name and name[1] in fields:
            default = f'--{name[1]}={fields[name[1]].default!r}'.replace(REPOSITORY + os.sep, '')
            lines.append(f'  {default:<36} {comments.get(number, "")}'.rstrip())
        elif number in comments and line.strip().startswith('#'):
            lines.append(f'\n  {comments[number]}')
    return '\n'.join(lines)
