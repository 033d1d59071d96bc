"""Compiling functions, and keeping the machine code on disk."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_cases
import numba
import numpy as np
import pytest
from numba.core import caching

from sb3_clipvf.common import jit
from sb3_clipvf.engines.kernels.losses import NOT_CLIPPED, value_loss


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of functions that a test compiles."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    jit._warn_of_disk.cache_clear()
    return tmp_path


def test_without_a_writable_folder_it_warns_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: Path
) -> None:
    monkeypatch.setattr(jit._Cache._impl_class, "_locator_classes", [])
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        double = jit.cached()(lambda x: 2 * x)
    assert double(4) == 8
    assert "cannot be kept on disk (cannot cache function" in caplog.text
    assert caplog.text.rstrip().endswith("Set NUMBA_CACHE_DIR to a writable folder.")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"half"])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_function_is_compiled_again_if_its_file_is_damaged(kept: Path, suffix: str, content: bytes) -> None:
    assert jit.cached()(double)(4) == 8
    (file,) = kept.rglob(f"*{suffix}")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    again = jit.cached()(double)
    assert again(4) == 8
    assert sum(again.stats.cache_misses.values()) == 1
    third = jit.cached()(double)
    assert third(4) == 8
    assert sum(third.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("signatures", [(), (numba.int64(numba.int64),)])
def test_full_disk_costs_compiled_functions_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: Path, signatures: tuple[Any, ...]
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
    with caplog.at_level(logging.WARNING, "sb3_clipvf"):
        functions = [jit.cached(*signatures)(lambda x: 2 * x) for _ in range(2)]
        assert [function(4) for function in functions] == [8, 8]
    assert caplog.text.count("cannot be kept on disk (OSError: [Errno 28] No space left on device)") == 1
    assert functions[0].stats.cache_path is None


@pytest.fixture
def only_home_is_writable(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache folder, when files can be written to no other, as by users without rights in an image."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))

    def forbidding(original: Any, path_of: Any) -> Any:
        def checked(self: Any, *args: Any) -> Any:
            if not Path(path_of(self)).is_relative_to(home):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path_of(self))
            return original(self, *args)

        return checked

    for kind, name, path_of in (
        (caching._CacheLocator, "ensure_cache_path", lambda locator: locator.get_cache_path()),
        (caching.IndexDataCacheFile, "_save_index", lambda files: files._cache_path),
        (caching.IndexDataCacheFile, "_save_data", lambda files: files._cache_path),
    ):
        monkeypatch.setattr(kind, name, forbidding(getattr(kind, name), path_of))
    return home


def hits(function: Any) -> int:
    """Return how many versions of a function are read from disk for the argument 4."""
    assert function(4) == 8
    return sum(function.stats.cache_hits.values())


def double(x: int) -> int:
    return 2 * x


@pytest.fixture
def filled(kept: Path) -> Path:
    assert hits(jit.cached()(double)) == 0
    return kept


def test_filled_folder_is_read_even_if_it_cannot_be_written_to(
    filled: Path, only_home_is_writable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    function = jit.cached()(double)
    assert hits(function) == 1
    assert Path(function.stats.cache_path).is_relative_to(filled)
    assert not caplog.records
    assert not list(only_home_is_writable.rglob("*.nbi"))


@pytest.mark.parametrize("missing", ["index", "code", "all but a damaged index", "other types"])
def test_what_a_folder_without_write_access_lacks_is_kept_in_the_next(
    filled: Path, only_home_is_writable: Path, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in filled.rglob("*.nbc" if missing == "code" else "*.nbi"):
        if missing == "all but a damaged index":
            path.write_bytes(b"")
        elif missing != "other types":
            path.unlink()
    argument = 4.0 if missing == "other types" else 4
    first, second = (jit.cached()(double) for _ in range(2))
    assert (first(argument), second(argument)) == (8, 8)
    assert sum(first.stats.cache_misses.values()) == sum(second.stats.cache_hits.values()) == 1
    assert Path(second.stats.cache_path).is_relative_to(only_home_is_writable)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_filled_folder_is_read_if_no_folder_can_be_written_to(
    filled: Path, only_home_is_writable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert hits(jit.cached()(double)) == 1
    assert not caplog.records
    assert jit.cached()(double)(4.0) == 8
    assert "Compiled functions cannot be kept on disk" in caplog.text
    assert "/dev/null" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPT", 0),
        ("BOUNDSCHECK", 1),
        ("LOOP_VECTORIZE", 0),
        ("SLP_VECTORIZE", 1),
        ("DEBUGINFO_DEFAULT", 1),
        ("USING_SVML", True),
        ("CPU_NAME", "generic"),  # another processor
    ],
)
def test_functions_of_other_settings_and_processors_are_compiled_apart(
    monkeypatch: pytest.MonkeyPatch, filled: Path, name: str, value: Any
) -> None:
    of_first = {path: path.read_bytes() for path in filled.rglob("*.nb?")}
    with monkeypatch.context() as patched:
        patched.setattr(numba.config, name, value)
        assert [hits(jit.cached()(double)) for _ in range(2)] == [0, 1]
    assert len(list(filled.rglob("*.nbi"))) == 2
    assert {path: path.read_bytes() for path in of_first} == of_first


@pytest.mark.parametrize("module", ["numba", "llvmlite"])
def test_functions_of_other_versions_are_compiled_apart(
    monkeypatch: pytest.MonkeyPatch, filled: Path, module: str
) -> None:
    monkeypatch.setattr(f"{module}.__version__", "0.0.0")
    assert [hits(jit.cached()(double)) for _ in range(2)] == [0, 1]
    monkeypatch.undo()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(filled))
    assert hits(jit.cached()(double)) == 1


def test_versions_saved_at_once_by_two_processes_are_both_kept(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    """Both read the index, in which numba numbers the files, before either writes it."""
    save_index, depth = caching.IndexDataCacheFile._save_index, []

    def save_index_late(self: Any, overloads: Any) -> None:
        if not depth:
            depth.append(1)
            jit.cached()(double)(4.0)
        save_index(self, overloads)

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", save_index_late)
    assert jit.cached()(double)(4) == 8
    function = jit.cached()(double)
    assert (function(4), function(4.0)) == (8, 8)
    assert sum(function.stats.cache_hits.values()) == 2


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.EIO])
def test_error_of_the_disk_removes_no_function(monkeypatch: pytest.MonkeyPatch, filled: Path, number: int) -> None:
    def failing(*_args: Any) -> None:
        raise OSError(number, os.strerror(number))

    of_first = {path: path.read_bytes() for path in filled.rglob("*.nb?")}
    with monkeypatch.context() as patched:
        patched.setattr(caching.IndexDataCacheFile, "_load_index", failing)
        patched.setattr(caching.IndexDataCacheFile, "save", failing)
        assert hits(jit.cached()(double)) == 0
    assert {path: path.read_bytes() for path in filled.rglob("*.nb?")} == of_first
    assert hits(jit.cached()(double)) == 1


@pytest.mark.slow
def test_a_change_of_any_kernel_is_noticed(tmp_path: Path) -> None:
    """numba's cache checks one file, but a kernel consists of several."""
    package = Path(jit.__file__).parents[1]
    copied = tmp_path / "sb3_clipvf"
    for source in package.rglob("*.py"):
        target = copied / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    program = (
        "import numpy as np\n"
        "from sb3_clipvf.engines.kernels import entry\n"
        "a = np.ones((2, 1), np.float32)\n"
        "out = np.zeros((2, 1), np.float32)\n"
        "entry.advantages_and_returns(a, a, a, a[0], a[0], 0.5, 1.0, out, out.copy())\n"
        "print(out[0, 0], sum(entry.advantages_and_returns.stats.cache_hits.values()))\n"
    )

    def run() -> list[str]:
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
            timeout=300,
        )
        return result.stdout.split()

    assert run() == ["0.0", "0"]
    assert run() == ["0.0", "1"]
    gae = copied / "engines" / "kernels" / "gae.py"
    source = gae.read_text()
    changed = source.replace("advantage = delta + decay", "advantage = F(7) + delta + decay")
    assert changed != source
    gae.write_text(changed)
    assert run() == ["7.0", "0"]


def linkages(function: Any) -> set[str]:
    """Return how the code of `value_loss` is linked into a caller."""
    assert function(np.ones(3, np.float32)) == 0
    code = function.inspect_llvm(function.signatures[0])
    return set(re.findall(r"^define (?:(linkonce_odr|internal) )?.*value_loss", code, re.MULTILINE))


def test_called_functions_are_not_shared_with_other_kept_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The linker would take the copy of the function that was there first, which may round differently."""
    called = numba.njit(value_loss.py_func)  # type: ignore[attr-defined]

    def caller(x: np.ndarray) -> float:
        return called(x, x, x, NOT_CLIPPED, 0.1, 0.5, x.shape[0], x)[0]

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    # If this fails, numba makes no weak symbols any more, and `cached` needs no library of its own.
    assert linkages(numba.njit(caller)) == {"linkonce_odr"}
    assert linkages(jit.cached()(caller)) == {"internal"}


def test_functions_that_kernels_call_are_callable_from_python_too() -> None:
    called = jit.strict(lambda x: 2 * x)
    caller = jit.cached()(lambda x: 1 + called(x))
    assert (called(3), caller(3), called(3), called(1.5)) == (6, 7, 6, 3.0)


def test_numbers_in_the_code_compile_no_second_version() -> None:
    """numba takes the number 3 as a type of its own by default."""
    for decorator, versions in ((jit.fast, 1), (numba.njit, 2)):
        called = decorator(lambda x: 2 * x)
        caller = jit.cached()(lambda x, called=called: called(x) + called(3))
        assert caller(4) == 14
        assert len(called.overloads) == versions


def test_only_what_python_calls_is_translated_to_machine_code() -> None:
    """numba translates each function by default, which takes most of the time of compilation."""

    def is_translated(function: Any) -> bool:
        (result,) = function.overloads.values()
        return bool(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))

    for decorator, expected in ((jit.fast, False), (jit.fast_alone, False), (numba.njit, True)):
        called = decorator(lambda x: 2 * x)
        caller = jit.cached()(lambda x, called=called: 1 + called(x))
        assert caller(3) == 7
        assert is_translated(caller)
        assert is_translated(called) == expected


def trained(cache: Path, *engines: str) -> dict[str, str]:
    """Return the digests of all trainings, run in a new process that keeps its kernels in this folder."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", kernel_cases.__file__, *engines],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        check=True,
        timeout=3600,
    )
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_compiled_and_kept_kernels_train_the_same_weights(tmp_path: Path) -> None:
    """In a process that compiles all kernels, in one that reads them, and in one that compiles some of them."""

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    by_compiled = trained(tmp_path, "native", "fused")
    of_first = kept()
    assert of_first
    assert trained(tmp_path, "fused", "native") == by_compiled
    assert kept() == of_first
    # As after a first run that was interrupted, or whose policy did not need them.
    missing = [path for path in of_first if "loss_gradients" in path.name]
    for path in missing:
        path.unlink()
    assert trained(tmp_path, "native", "fused") == by_compiled
    assert {path for path, time in kept().items() if of_first[path] != time} == set(missing)
