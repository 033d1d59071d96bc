"""Options of the sub-commands: completed, then parsed by argparse, whose errors become one line."""

import difflib
import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: (?P<value>.*) \(choose from (?P<choices>.*)\)")
_MISSING = re.compile(r"expected .*argument.*")
_PAIR = re.compile(r"\w+:.+", re.DOTALL)
_SCHEDULE_PARAMETER = re.compile(r"(?P<key>\w+):(?P<schedule>(?:lin|cos|exp|const)_[\d.eE+-]+)")
_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


@dataclass(frozen=True)
class Default:
    """
    An option to put in where the user gave none.

    :param short: Its short name, as ``-f``, or None.
    :param long: Its long name, as ``--folder``.
    :param value: Its value; None for an option without one.
    """

    short: str | None
    long: str
    value: str | None


def option_value(arguments: Sequence[str], short: str | None, long: str, least: int = len("--x")) -> str | None:
    """
    Find an option as argparse would: short or long, abbreviated, joined to its value or not.

    :param arguments: Command line.
    :param short: Short name or None.
    :param long: Long name.
    :param least: Characters from which on an abbreviation of the long name means it.
    :return: Its value, "" where it has none, None if it is not there; the last one of several.
    """
    found = None
    for index, token in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        name, joined, value = token.partition("=")
        if token.startswith("--"):
            if len(name) >= least and long.startswith(name):
                found = value if joined else following
        elif short is not None and token.startswith(short):
            found = token[len(short) :].removeprefix("=") or following
    return found


def without_option(arguments: Sequence[str], long: str, least: int) -> list[str]:
    """
    Take an option with a value out of a command line.

    :param arguments: Command line.
    :param long: Its long name.
    :param least: Characters from which on an abbreviation means it.
    :return: The rest.
    """
    rest: list[str] = []
    skip = False
    for token in arguments:
        name, joined, _ = token.partition("=")
        if skip:
            skip = False
        elif len(name) >= least and long.startswith(name):
            skip = not joined
        else:
            rest.append(token)
    return rest


def with_defaults(arguments: Sequence[str], defaults: Iterable[Default]) -> list[str]:
    """
    Complete a command line.

    :param arguments: What the user gave.
    :param defaults: Options to put in front of it, each only if it is not there.
    :return: The completed command line.
    """
    added: list[str] = []
    for default in defaults:
        if option_value(arguments, default.short, default.long) is None:
            added += [default.long] if default.value is None else [default.long, default.value]
    return [*added, *arguments]


def quote_schedules(arguments: Sequence[str]) -> list[str]:
    """
    Put quotes around schedule strings of ``-params``, since the RL Zoo evaluates each value as Python.

    :param arguments: Command line, perhaps with tokens as ``clip_range:lin_0.2``.
    :return: The same with ``clip_range:'lin_0.2'``.
    """
    quoted = []
    for token in arguments:
        match = _SCHEDULE_PARAMETER.fullmatch(token)
        quoted.append(f"{match['key']}:{match['schedule']!r}" if match else token)
    return quoted


def whole_number(text: str) -> int:
    """
    Read a whole number, also in the form ``1e6``.

    :param text: Text on the command line.
    :return: The number.
    :raises ArgumentTypeError: If it is not a whole number.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():
        raise ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(number)


def option_name(name: str) -> str:
    """
    Return an option as it is typed.

    :param name: Its name among parsed options, as ``n_envs``.
    :return: ``--n-envs``.
    """
    return f"--{name.replace('_', '-')}"


@contextmanager
def checked_parsing(
    program: str,
    check: Callable[[Namespace], None] | None = None,
    types: dict[str, Callable[[str], Any]] | None = None,
) -> Iterator[None]:
    """
    Make the next parser strict, see :func:`strict`. The RL Zoo builds its parsers inside its own functions.

    :param program: Name of the command, for messages.
    :param check: Function that gets the parsed options, and may change them.
    :param types: Functions that read the text of options, by the options' names.
    """
    parse_args = ArgumentParser.parse_args

    def parse_checked(parser: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
        options = parse_args(strict(parser, program, types), *args, **kwargs)
        if check is not None:
            check(options)
        return options

    ArgumentParser.parse_args = parse_checked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


def strict(
    parser: ArgumentParser, program: str, types: dict[str, Callable[[str], Any]] | None = None
) -> ArgumentParser:
    """
    Make a parser raise ``ValueError`` where argparse prints the usage and exits, and read whole numbers as ``1e6`` too.

    :param parser: Parser to change.
    :param program: Name of the command, for messages.
    :param types: Functions that read the text of options, by the options' names.
    :return: The same parser.
    """

    def error(message: str) -> NoReturn:
        raise ValueError(f"{_rule(parser, message)}. `{program} --help` lists the options.")

    parser.error = error  # type: ignore[method-assign]
    for action in parser._actions:
        if action.type is int:
            action.type = whole_number
        if types is not None and action.dest in types:
            action.type = types[action.dest]
    return parser


def _rule(parser: ArgumentParser, message: str) -> str:
    """Reword an error of argparse."""
    message = re.sub(r"^argument (\S+): ", r"`\1` ", message)
    message = _CHOICE.sub(r"must be one of \g<choices>, got \g<value>", message)
    message = _MISSING.sub("must have a value, got none", message)
    unknown = re.match(r"unrecognized arguments: ([^ =]+)", message)
    near = difflib.get_close_matches(unknown[1], parser._option_string_actions, n=1) if unknown else []
    return f"{message} (did you mean `{near[0]}`?)" if near else message


def store_pairs(
    action: Action,
    parser: ArgumentParser,
    namespace: Namespace,
    values: Sequence[str],
    option_string: str | None = None,
) -> None:
    """
    Store pairs ``key:value``, whose values are Python: the RL Zoo's ``StoreDict``, with errors that name the pair, and
    where an option is repeated, with the pairs of all of them.

    :param action: Option that takes them.
    :param parser: Its parser.
    :param namespace: Parsed options.
    :param values: Texts of the pairs.
    :param option_string: Option as it was written.
    :raises ValueError: If a text is no pair, or its value no Python.
    """
    from rl_zoo3 import utils

    option = option_string or action.option_strings[-1]
    pairs = dict(getattr(namespace, action.dest) or {})
    for text in values:
        key, _, value = text.partition(":")
        if not _PAIR.fullmatch(text):
            way_out = f"Write `{text.replace('=', ':', 1)}`." if re.match(r"\w+=.", text) else "Write `key:value`."
            raise ValueError(f"`{option}` must be pairs of key and value with a colon, got {text!r}. {way_out}")
        try:
            pairs[key] = eval(value, dict(vars(utils)))  # as the Zoo does, with what it has imported
        except Exception as error:
            raise ValueError(
                f"`{option}` must have Python as values, got {text!r}: {type(error).__name__}: {error}. "
                f"{_way_to_write(key, value)}"
            ) from error
    setattr(namespace, action.dest, pairs)


def _way_to_write(key: str, value: str) -> str:
    if value.lower() in _WORDS:
        return f"Write `{key}:{_WORDS[value.lower()]}`."
    return f"Text needs quotes of its own, inside those of the shell: \"{key}:'{value}'\"."
