"""Observations by key, arrays and tensors alike."""

from collections.abc import Mapping
from typing import Any


def parts_of(observations: Any) -> Mapping[str, Any]:
    """Return the arrays or tensors of observations by key; a single one has the key ""."""
    return observations if isinstance(observations, Mapping) else {"": observations}


def from_parts(parts: Mapping[str, Any]) -> Any:
    """Return observations from their :func:`parts_of`."""
    return parts[""] if parts.keys() == {""} else parts
