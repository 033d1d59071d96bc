"""How far the user trusts a file: ``trust_pickle`` and its environment variable."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRUST_VARIABLE = "SB3_CLIPVF_TRUST_PICKLE"
"""Environment variable that makes all files trusted if it is "1"."""

TRUST_ADVICE = (
    f"If you trust where it comes from, pass trust_pickle=True or set {TRUST_VARIABLE}=1 (`--trust-pickle` on the "
    "command line); trust_pickle=[...] allows single classes and functions"
)

TrustPickle = bool | Iterable[Callable[..., Any]] | None
"""Values of ``trust_pickle``: True, False, classes and functions to allow besides ``allowlist``'s, or None."""


class UnsafeFileError(ValueError):
    """Raised if loading would run code that a file contains or names, and the user did not trust the file."""


@dataclass(frozen=True)
class Trust:
    """
    How far a file is trusted.

    :param everything: Whether it may run any code.
    :param extra: Classes and functions that it may use besides those of ``allowlist``, by their full names.
    """

    everything: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def trust_of(trust_pickle: TrustPickle) -> Trust:
    """Check ``trust_pickle`` and return it as a :class:`Trust`. For None, :data:`TRUST_VARIABLE` decides."""
    if isinstance(trust_pickle, bool):
        return Trust(trust_pickle)
    if trust_pickle is None:
        value = os.environ.get(TRUST_VARIABLE, "")
        if value not in ("", "0", "1"):
            raise ValueError(f"`{TRUST_VARIABLE}` must be 0 or 1, got {value!r}. 1 trusts every file that is loaded.")
        return Trust(value == "1")
    if isinstance(trust_pickle, str | bytes) or not isinstance(trust_pickle, Iterable):
        raise TypeError(
            f"`trust_pickle` must be True, False, None or some classes and functions, got {trust_pickle!r}. True lets "
            "the file run any code."
        )
    extra = {}
    for item in trust_pickle:
        name = getattr(item, "__qualname__", None)
        if not callable(item) or name is None:
            raise TypeError(
                f"`trust_pickle` must hold classes and functions, got {item!r}. Pass those that the error names."
            )
        if item.__module__ == "__main__" or "<" in name:
            raise ValueError(
                f"`trust_pickle` must hold classes and functions that can be imported, got {item!r}: the file holds "
                "its code, not its name. Move it to a module and save again, replace what needs it with "
                "`custom_objects`, or pass True."
            )
        extra[f"{item.__module__}.{name}"] = item
    return Trust(extra=extra)
