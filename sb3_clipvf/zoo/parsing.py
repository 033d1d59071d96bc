"""How a sub-command's options are parsed: by argparse, whose errors become one line; values as ``1e6``; pairs."""

import difflib
import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: (?P<value>.*) \(choose from (?P<choices>.*)\)")
_MISSING = re.compile(r"expected .*argument.*")
_PAIR = re.compile(r"\w+:.+", re.DOTALL)
_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


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
