"""Infos that hold only numbers: processes send them as bytes, and their keys and types once."""

import struct
from itertools import chain
from typing import Any

import numpy as np

Infos = list[dict[str, Any]]

# Types that a format of `struct` keeps to the last bit.
_FORMATS: dict[type, str] = {bool: "?", int: "q", float: "d"}
_FORMATS |= {np.bool_: "?", np.int32: "q", np.int64: "q", np.float32: "d", np.float64: "d"}


class InfoRows:
    """
    One end's record of the keys and types of infos; the other end has the same record.

    Infos of numbers that match the record are sent as bytes, and others as they are. ``version`` counts changes of the
    record: an end that has missed a change gets no bytes.
    """

    def __init__(self) -> None:
        self.version = 0
        self._layout = _Layout([])

    def pack(self, infos: Infos, version: int) -> bytes | Infos:
        """Return what to send to an end whose record has this version."""
        if version != self.version:
            self.version, self._layout = version, _Layout([])
        packed = self._layout.pack(infos)
        if packed is None:
            self._record(infos)
            return infos
        return packed

    def unpack(self, sent: bytes | Infos) -> Infos:
        """Return the infos that the other end has sent."""
        if isinstance(sent, bytes):
            return self._layout.unpack(sent)
        self._record(sent)
        return sent

    def _record(self, infos: Infos) -> None:
        if _hold_only_numbers(infos):
            self._layout = _Layout(infos)
            self.version += 1


class _Layout:
    """Keys and types of infos that hold only numbers."""

    def __init__(self, infos: Infos) -> None:
        self._keys_of_each = list(map(tuple, infos))
        self._sizes = list(map(len, infos))
        self._keys = list(chain(*infos))
        values = list(chain(*(info.values() for info in infos)))
        kinds = list(map(type, values))
        self._types = list(map(type, chain(infos, self._keys, values)))
        self._numpy = [(place, kind) for place, kind in enumerate(kinds) if issubclass(kind, np.generic)]
        self._struct = struct.Struct("=" + "".join(_FORMATS[kind] for kind in kinds))

    def pack(self, infos: Infos) -> bytes | None:
        """Return the values, or None if the infos have a different layout or an integer beyond 64 bits."""
        keys: list[str] = []
        values: list[Any] = []
        for info in infos:
            keys += info
            values += info.values()
        types = list(map(type, chain(infos, keys, values)))
        if keys != self._keys or types != self._types or list(map(len, infos)) != self._sizes:
            return None
        try:
            return self._struct.pack(*values)
        except struct.error:
            return None

    def unpack(self, packed: bytes) -> Infos:
        """Return the infos of these values."""
        values: list[Any] = list(self._struct.unpack(packed))
        for place, kind in self._numpy:
            values[place] = kind(values[place])
        rest = iter(values)
        return [dict(zip(keys, rest)) for keys in self._keys_of_each]  # noqa: B905 (the keys end it)


def _hold_only_numbers(infos: Infos) -> bool:
    """Return whether infos are plain dicts of numbers, with strings as keys."""
    return all(
        type(info) is dict and all(type(key) is str and type(value) in _FORMATS for key, value in info.items())
        for info in infos
    )
