"""Entries of the settings that name classes: one or a list of them, each with or without arguments."""

from typing import Any


def items(value: Any) -> list[Any]:
    """
    Make a list of an entry.

    :param value: A list, None or a single item.
    :return: The list itself, none, or that item.
    """
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def with_arguments(value: Any) -> list[tuple[Any, Any]]:
    """
    Take an entry apart.

    :param value: A name or class, a dict of one name and its arguments, a list of these, or None.
    :return: Names or classes, each with its arguments; None as the name of an empty dict.
    """
    return [next(iter(item.items()), (None, {})) if isinstance(item, dict) else (item, {}) for item in items(value)]
