"""Change an argparse parser before it parses: errors become one line, and integer options accept ``1e6``."""

import difflib
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from sb3_clipvf.zoo.patching import patched

_REWORDED = (
    (r"argument (\S+): ", r"`\1` "),
    (r"(.*)invalid choice: (.*) \(choose from (.*)\)", r"\1must be one of \3, got \2"),
    (r"(.*)expected .*argument.*", r"\1must have a value, got none"),
    (r"the following arguments are required: (.*)", r"`\1` must be given, got none"),
)


@contextmanager
def next_parser(
    program: str,
    prepare: Callable[[ArgumentParser], None] | None = None,
    finish: Callable[[Callable[..., Namespace], Namespace], Namespace] | None = None,
) -> Iterator[None]:
    """
    Change the parser that parses next in the context; the RL Zoo builds its parsers inside its own functions.

    :param program: Name of the command, for messages.
    :param prepare: Function that changes the parser before it parses.
    :param finish: Function of the parser's ``parse_args`` and the parsed options, which returns the options to use.
    """
    with ExitStack() as stack:

        def parse(parser: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            stack.close()  # other parsers stay as they are
            if prepare is not None:
                prepare(parser)
            options = strict(parser, program).parse_args(*args, **kwargs)
            if vars(options).pop("trust_pickle", False):  # in full, it was consumed before
                raise ValueError("`--trust-pickle` must be written in full, not abbreviated.")
            return options if finish is None else finish(parser.parse_args, options)

        stack.enter_context(patched(parse_args=parse))
        yield


def strict(parser: ArgumentParser, program: str) -> ArgumentParser:
    """Make a parser raise ``ValueError`` instead of printing its usage, and read whole numbers written as floats."""

    def error(message: str) -> NoReturn:
        raise ValueError(f"{_reworded(parser, message)}. `{program} --help` lists the options.")

    parser.error = error  # type: ignore[method-assign]
    for action in parser._actions:
        if action.type is int:
            action.type = whole_number
    return parser


def _reworded(parser: ArgumentParser, message: str) -> str:
    for pattern, replacement in _REWORDED:
        message = re.sub(f"^{pattern}", replacement, message)
    unknown = re.match(r"unrecognized arguments: ([^ =]+)", message)
    near = difflib.get_close_matches(unknown[1], parser._option_string_actions, n=1) if unknown else []
    return f"{message} (did you mean `{near[0]}`?)" if near else message


def whole_number(text: str) -> int:
    """Convert text to a whole number, also from the form ``1e6``."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise ArgumentTypeError(f"must be a whole number, got {text!r}")


def add_trust_option(parser: ArgumentParser) -> None:
    """Add ``--trust-pickle``."""
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        default=SUPPRESS,
        help="Load models, statistics and settings even if their files can run any code; without this option such "
        "files are refused",
    )


def option_name(name: str) -> str:
    """Return the option that is parsed into ``name``: ``--n-envs`` for ``n_envs``."""
    return f"--{name.replace('_', '-')}"
