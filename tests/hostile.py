"""Pickles that would run code, for the tests of safe loading, and helpers that put them into files of models."""

import base64
import builtins
import functools
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch as th


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


def touch(path: Path) -> str:
    return f"touch {path}"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def os_system(mark: Path) -> bytes:
    return pickle.dumps(Call(os.system, touch(mark)))


def builtins_exec(mark: Path) -> bytes:
    return pickle.dumps(Call(builtins.exec, f"open({str(mark)!r}, 'w').close()"))


def lambda_of_cloudpickle(mark: Path) -> bytes:
    return cloudpickle.dumps(Call(lambda: mark.write_text("")))


def in_an_ordered_dict(mark: Path) -> bytes:
    return pickle.dumps(OrderedDict(net_arch=[4], deep={"er": (1, [Call(os.system, touch(mark))])}))


def in_a_set(mark: Path) -> bytes:
    return pickle.dumps({1, Call(os.system, touch(mark))})


def dotted_name(mark: Path) -> bytes:
    """A dotted name that leads from an allowed module to another one."""
    return b"\x80\x04" + named("stable_baselines3.common.save_util", "os.system") + call(touch(mark))


def dotted_name_in_an_allowed_module(mark: Path) -> bytes:
    return b"\x80\x04" + named("stable_baselines3.common.policies", "warnings.sys.modules") + b"."


def dotted_global(mark: Path) -> bytes:
    return b"\x80\x04cstable_baselines3.common.save_util\nos.system\n" + call(touch(mark))


def call(argument: str) -> bytes:
    return text(argument) + b"\x85R."


def imported_by_an_allowed_module(mark: Path) -> bytes:
    return b"\x80\x04" + named("stable_baselines3.common.buffers", "np") + b"."


def instruction_inst(mark: Path) -> bytes:
    return b"\x80\x02(" + text(touch(mark)) + b"ios\nsystem\n."


def instruction_obj(mark: Path) -> bytes:
    return b"\x80\x02(cos\nsystem\n" + text(touch(mark)) + b"o."


def call_of_an_allowed_class(mark: Path) -> bytes:
    """Named classes may not be called: constructors do more than make objects."""
    return b"\x80\x04" + named("builtins", "list") + b")R."


def patch_of_a_class(mark: Path) -> bytes:
    """The instruction BUILD would set attributes of the class itself."""
    cls = named("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize")
    return b"\x80\x04" + cls + b"N}" + text("step_wait") + b"Ns\x86b."


def array_of_objects(mark: Path) -> bytes:
    return pickle.dumps(np.array([Call(os.system, touch(mark))], dtype=object))


def torch_in_torch(mark: Path) -> bytes:
    inner = io.BytesIO()
    th.save(Call(os.system, touch(mark)), inner)
    return pickle.dumps(Call(th.storage._load_from_bytes, inner.getvalue()))


def partial(mark: Path) -> bytes:
    return pickle.dumps(functools.partial(os.system, touch(mark)))


def attribute_of_a_module(mark: Path) -> bytes:
    return pickle.dumps(Call(getattr, Call(__import__, "os"), "system"))


RUNNING = [os_system, builtins_exec, lambda_of_cloudpickle, in_an_ordered_dict, array_of_objects, dotted_name]
"""Pickles that run code where they are trusted."""

REFUSED = [
    *RUNNING,
    in_a_set,
    dotted_global,
    dotted_name_in_an_allowed_module,
    imported_by_an_allowed_module,
    instruction_inst,
    instruction_obj,
    call_of_an_allowed_class,
    patch_of_a_class,
    torch_in_torch,
    partial,
    attribute_of_a_module,
]


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, entries: dict[str, bytes], **kwargs: Any) -> Path:
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def with_data(path: Path, **changes: Any) -> Path:
    """Change attributes in the zip of a model; bytes become a pickle."""
    entries = entries_of(path)
    data = json.loads(entries["data"])
    for key, value in changes.items():
        is_pickle = isinstance(value, bytes)
        data[key] = {":type:": "x", ":serialized:": base64.b64encode(value).decode()} if is_pickle else value
    return pack(path, {**entries, "data": json.dumps(data).encode()})
