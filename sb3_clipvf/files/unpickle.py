"""
Unpickling that runs no code: a pickle machine with few instructions, which builds what ``safe_objects`` lists.

Python's own unpickler imports and calls whatever a file names. Here a file may name a class of the list, have a listed
function called with checked arguments, and set the attributes of an object that it made itself. Everything else is
refused, and so is each instruction of the pickle language that is not below. No other unpickler sees the bytes.
"""

import pickle
import pickletools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from sb3_clipvf.files import allowlist
from sb3_clipvf.files.allowlist import Maker, NotAllowedError, full_name
from sb3_clipvf.files.archive import reason_of
from sb3_clipvf.files.trust import TRUST_VARIABLE, Trust, UnsafeFileError


def unpickle(raw: bytes, trust: Trust) -> Any:
    """
    Rebuild what was pickled, by protocol 3 or later: those of Python 3.

    :param raw: The pickle.
    :param trust: What it may use in addition to the list; ``everything`` does not count here.
    :return: The object.
    :raises NotAllowedError: If it needs something that is not on the list.
    :raises Exception: Of any type, if it is damaged, or made for another version of what it names.
    """
    return _Machine(trust.extra).run(raw)


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


class _Machine:
    """One run of the pickle machine."""

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self._extra = extra
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, raw: bytes) -> Any:
        # genops only parses, and reads no more than there is.
        for opcode, argument, _ in pickletools.genops(raw):
            name = opcode.name
            if name == "STOP":
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
            elif name in self._instructions:
                self._instructions[name](self, argument)
            else:
                raise NotAllowedError(f"the pickle instruction {name}")
        raise EOFError("the pickle has no end")

    def _ignore(self, argument: Any) -> None:
        """PROTO and FRAME say how the bytes are laid out."""

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _frozenset(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(frozenset(map(_checked_key, items)))

    # ------------------------------------------------------------------ containers

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        _check_type(self._stack[-1], _LISTS, "appending").extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = _check_type(self._stack[-1], _DICTS, "setting items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _additems(self, _: Any) -> None:
        items = self._since_mark()
        _check_type(self._stack[-1], (set,), "adding items").update(map(_checked_key, items))

    # ------------------------------------------------------------------ classes, functions, objects

    def _global(self, argument: str) -> None:
        # pickletools joins the two lines by a space.
        self._push_named(*argument.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise NotAllowedError("a name that is no text")
        self._push_named(module, name)

    def _push_named(self, module: str, name: str) -> None:
        # The user's own objects stand as they are: nothing is looked up.
        known = self._extra.get(f"{module}.{name}")
        self._stack.append(allowlist.find(module, name) if known is None else known)

    def _reduce(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._called(function, args))

    def _newobj(self, _: Any) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        if isinstance(cls, Maker):
            self._stack.append(self._called(cls, args))
        elif self._is_extra(cls):
            self._stack.append(cls.__new__(cls, *_checked_args(args)))
        else:
            self._stack.append(allowlist.create(cls, _checked_args(args)))

    def _called(self, function: Any, args: Any) -> Any:
        if isinstance(function, Maker):
            return function.make(*_checked_args(args))
        if self._is_extra(function):
            return function(*_checked_args(args))
        raise NotAllowedError(f"a call of {full_name(function)}")

    def _build(self, _: Any) -> None:
        state, instance = self._stack.pop(), self._stack[-1]
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

    _instructions: ClassVar[dict[str, Callable[["_Machine", Any], None]]] = {
        "PROTO": _ignore,
        "FRAME": _ignore,
        "MARK": _mark,
        "POP": _pop,
        "BINPUT": _put,
        "LONG_BINPUT": _put,
        "MEMOIZE": _memoize,
        "BINGET": _get,
        "LONG_BINGET": _get,
        "TUPLE": _tuple,
        "FROZENSET": _frozenset,
        "APPEND": _append,
        "APPENDS": _appends,
        "SETITEM": _setitem,
        "SETITEMS": _setitems,
        "ADDITEMS": _additems,
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "REDUCE": _reduce,
        "NEWOBJ": _newobj,
        "BUILD": _build,
    }


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


TRUST_ADVICE = (
    f"If you trust where it comes from, pass trust_pickle=True or set {TRUST_VARIABLE}=1 (`--trust-pickle` on the "
    "command line); trust_pickle=[...] allows single classes and functions"
)


def rebuilt(raw: bytes, trust: Trust) -> Any:
    """Return what was pickled: by Python's own unpickler only where the file is trusted with everything."""
    return pickle.loads(raw) if trust.everything else unpickle(raw, trust)


@contextmanager
def named_errors(what: str, refused_advice: str = f"{TRUST_ADVICE}.", damaged_advice: str = "") -> Iterator[None]:
    """Say what could not be rebuilt, and the ways out: of a refusal, and of damage."""
    try:
        yield
    except NotAllowedError as refused:
        raise UnsafeFileError(
            f"{what} must be of classes that are known to be safe, got {_described(refused.what)}, which could run any "
            f"code. {refused_advice}"
        ) from None
    except Exception as error:  # damaged bytes, and classes of other versions, fail in any way
        raise ValueError(
            f"{what} could not be read: {reason_of(error)}. The file is damaged, or was saved with other versions of "
            f"its packages.{damaged_advice}"
        ) from error


def _described(what: str) -> str:
    if what.startswith("cloudpickle."):
        return f"code of its own (by {what}; lambdas, and classes of scripts, are saved so)"
    return what
