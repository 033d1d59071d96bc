"""
Unpickle without running code, by a pickle machine with few instructions that builds only what is on the allowlist.

Python's own unpickler imports and calls whatever a file names. Here a file may name listed classes, call listed
functions with checked arguments, and set attributes of its own objects. Everything else is refused, including each
instruction of the pickle language that has no method below. Python's unpickler reads only fully trusted files.
"""

import pickle
import pickletools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sb3_clipvf.files import allowlist
from sb3_clipvf.files.allowlist import CheckedFunction, NotAllowedError, full_name
from sb3_clipvf.files.archive import BYTES_OF_VALUE, memory_limit, reason_of
from sb3_clipvf.files.trust import TRUST_ADVICE, Trust, UnsafeFileError


def unpickle(raw: bytes, trust: Trust) -> Any:
    """
    Rebuild an object: by Python's own unpickler if the file is fully trusted, else by the machine below.

    The pickle must be of protocol 3 or later. If damaged, or of different package versions, it can raise any exception.
    """
    return pickle.loads(raw) if trust.everything else _Machine(trust.extra).run(raw)


@contextmanager
def named_errors(what: str, refused_advice: str = f"{TRUST_ADVICE}.", damaged_advice: str = "") -> Iterator[None]:
    """Replace errors of :func:`unpickle` with errors that name the object (``what``) and what to do."""
    try:
        yield
    except NotAllowedError as refused:
        needed = str(refused)
        if needed.startswith("cloudpickle."):
            needed = f"code in the file itself (by {needed}: lambdas and classes of scripts are saved that way)"
        raise UnsafeFileError(
            f"{what} must hold only classes that are known to be safe, got {needed}, which could run any code. "
            f"{refused_advice}"
        ) from None
    except Exception as error:  # damaged bytes, or classes of different versions, can raise any exception
        raise ValueError(
            f"{what} could not be read: {reason_of(error)}. The file is damaged, or was saved with other versions of "
            f"its packages.{damaged_advice}"
        ) from error


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES "
    "BINBYTES8 BYTEARRAY8".split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ATOMS = (str, bytes, int, float, type(None), type)
_LISTS = (list, deque)
_DICTS = (dict, OrderedDict)
_MIN_PARTS = 100_000  # parts of a value that are always accepted, shared ones counted at each place


class _Machine:
    """One run of the pickle machine. ``_op_<name>`` is the instruction of that name in pickletools."""

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self._extra = extra
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._n_bytes = 0

    def run(self, raw: bytes) -> Any:
        limit = len(raw) + memory_limit()
        # genops only parses, and never reads beyond the end.
        for opcode, argument, _ in pickletools.genops(raw):
            name = opcode.name
            self._n_bytes += BYTES_OF_VALUE * (2 if name in _EMPTY else 1)
            if self._n_bytes > limit:
                raise ValueError(f"its values take more than {limit / 2**20:,.0f} MiB")
            if name == "STOP":
                _check_sharing(self._stack[-1], _MIN_PARTS + 10 * len(raw))
                return self._stack.pop()
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                items = [self._stack.pop() for _ in range(_TUPLES[name])]
                self._stack.append(tuple(reversed(items)))
            elif operation := getattr(self, f"_op_{name.lower()}", None):
                operation(argument)
            else:
                raise NotAllowedError(f"the pickle instruction {name}")
        raise EOFError("the pickle has no end")

    def _op_proto(self, _: Any) -> None:
        """Ignore the version, and frames: both describe the layout of the bytes only."""

    _op_frame = _op_proto

    def _op_mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _op_binput(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _op_long_binput = _op_binput

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _op_long_binget = _op_binget

    def _op_pop(self, _: Any) -> None:
        self._stack.pop()

    def _op_tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _op_frozenset(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(map(_checked_key, items)))

    def _op_append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        _check_type(self._stack[-1], _LISTS, "appending").extend(items)

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _op_setitems(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = _check_type(self._stack[-1], _DICTS, "setting items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _op_additems(self, _: Any) -> None:
        items = self._since_mark()
        _check_type(self._stack[-1], (set,), "adding items").update(map(_checked_key, items))

    def _op_global(self, argument: str) -> None:
        # pickletools joins module and name by a space.
        self._push_named(*argument.split(" ", 1))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise NotAllowedError("a name that is not text")
        self._push_named(module, name)

    def _push_named(self, module: str, name: str) -> None:
        # What the user allows is pushed as it is, without an import.
        known = self._extra.get(f"{module}.{name}")
        self._stack.append(allowlist.find(module, name) if known is None else known)

    def _op_reduce(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._called(function, args))

    def _op_newobj(self, _: Any) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        if isinstance(cls, CheckedFunction):
            self._stack.append(self._called(cls, args))
        elif self._is_extra(cls):
            self._stack.append(cls.__new__(cls, *_checked_args(args)))
        else:
            self._stack.append(allowlist.create(cls, _checked_args(args)))

    def _count(self, parts: Any) -> None:
        """Count what a call or a state copies: a file may pass the same bytes many times."""
        self._n_bytes += sum(map(sys.getsizeof, parts if type(parts) is tuple else (parts,)))

    def _called(self, function: Any, args: Any) -> Any:
        self._count(args)
        if isinstance(function, CheckedFunction):
            made = function.call(*_checked_args(args))
            # A random generator or a deque takes up to some kB; pickles hold numbers of NumPy in millions.
            self._n_bytes += 0 if type(made).__module__ == "numpy" else 10 * BYTES_OF_VALUE
            return made
        if self._is_extra(function):
            return function(*_checked_args(args))
        raise NotAllowedError(f"a call of {full_name(function)}")

    def _op_build(self, _: Any) -> None:
        state, instance = self._stack.pop(), self._stack[-1]
        self._count(state)
        if not self._is_extra(type(instance)):
            allowlist.restore(instance, state)
        elif hasattr(instance, "__setstate__"):
            instance.__setstate__(state)
        else:
            attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
            vars(instance).update(attributes or {})
            for name, value in (slots or {}).items():
                setattr(instance, name, value)

    def _is_extra(self, value: Any) -> bool:
        return any(value is known for known in self._extra.values())


def _check_sharing(value: Any, limit: int) -> None:
    """Refuse containers that share parts so often that a message or a comparison, which visits each, would not end."""
    n_parts, known, found = 0, set[int](), [value]
    while found:
        item = found.pop()
        if isinstance(item, (dict, list, tuple, deque, set, frozenset)):
            parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            n_parts += len(parts)
        elif not isinstance(item, _ATOMS) and hasattr(item, "__dict__") and id(item) not in known:
            known.add(id(item))
            parts = list(vars(item).values())
        else:
            continue
        if n_parts > limit:
            raise ValueError(f"it has more than {limit:,} parts, since it names the same ones many times")
        found += [part for part in parts if not isinstance(part, _ATOMS)]


def _check_type(value: Any, types: tuple[type, ...], what: str) -> Any:
    # Exactly these: the methods of a subclass might do anything.
    if type(value) not in types:
        raise NotAllowedError(f"{what} to an object of the type {full_name(type(value))}")
    return value


def _checked_args(args: Any) -> tuple[Any, ...]:
    if type(args) is not tuple:
        raise NotAllowedError("a call without a tuple of arguments")
    return args


def _checked_key(key: Any) -> Any:
    """Refuse keys whose hash takes long: nested tuples may share their parts, which doubles the work at each level."""
    members = key if type(key) is tuple else (key,)
    if not all(isinstance(member, _ATOMS) for member in members):
        raise NotAllowedError(f"a key of the type {full_name(type(key))}")
    return key
