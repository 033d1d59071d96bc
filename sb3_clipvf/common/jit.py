"""Decorators that compile functions by numba. Importing this imports numba, which takes half a second."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, cached_property
from itertools import takewhile
from typing import Any, cast

import llvmlite
import numba
from llvmlite.binding import Linkage
from numba import config, jit, njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher
from numba.core.typeinfer import register_dispatcher
from numba.core.types import unliteral

from sb3_clipvf.common.messages import log

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

# Division by zero gives infinity or NaN as in torch. A check for it would keep loops from being vectorised.
_COMMON: dict[str, Any] = {"error_model": "numpy", "nogil": True}


class _LinkedLibrary(JITCodeLibrary):
    """Code of a function for its callers. It is neither optimised nor translated to machine code by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()  # type: ignore[no-untyped-call]
        self._verify_declare_only_symbols()  # type: ignore[no-untyped-call]
        self._finalized = True


class _OptimizedLibrary(_LinkedLibrary):
    """The same, but optimised."""

    _optimize_final_module = JITCodeLibrary._optimize_final_module


class _LinkedCompiler(Compiler):
    """numba's compiler, without what calls from Python need."""

    library_class = _LinkedLibrary

    def define_pipelines(self) -> Any:
        state = self.state
        state.flags.no_compile = state.flags.no_cpython_wrapper = state.flags.no_cfunc_wrapper = True
        codegen, name = state.targetctx.codegen(), state.func_id.func_qualname
        state.library = self.library_class(codegen, name)  # type: ignore[no-untyped-call]
        return super().define_pipelines()  # type: ignore[no-untyped-call]


class _OptimizingCompiler(_LinkedCompiler):
    library_class = _OptimizedLibrary


class _LinkedFunction(CPUDispatcher):
    """
    A function that compiled functions call. An entry point is linked with all of these and optimised as a whole.

    numba optimises each function, translates it to machine code, and optimises it again in each of its callers. With
    calls several levels deep, that takes three times as long as the entry points alone. Tests call these functions
    from Python; numba then compiles them as it does by itself.

    Made for numba 0.61 to 0.68.
    """

    def add_overload(self, result: Any) -> None:
        # Callers find the code by this key. For numba it is the function that Python calls, which does not exist here.
        key, context = object(), cast(Any, self.targetctx)
        context.insert_user_function(key, result.fndesc, [result.library])
        self.overloads[tuple(result.signature.args)] = result._replace(entry_point=key)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        # numba would compile `f(x, 0)` separately from `f(x, i)`, since literals have types of their own.
        general = [unliteral(arg) for arg in args]  # type: ignore[no-untyped-call]
        return super().get_call_template(general, kws)

    def _compile_for_args(self, *args: Any, **kwargs: Any) -> Any:
        return self._for_python

    @cached_property
    def _for_python(self) -> Any:
        return jit(**self.targetoptions)(self.py_func)


def _linked(compiler: type[_LinkedCompiler] = _LinkedCompiler, **options: Any) -> Compile:
    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        return cast(
            Callable[..., Any],
            _LinkedFunction(function, {}, {"nopython": True, "boundscheck": None, **_COMMON, **options}, compiler),
        )

    return compile_function


_FAST = {"reassoc", "contract", "nsz"}

fast = _linked(fastmath=_FAST)
"""Compile with sums in any order and fused products; NaN and infinities keep their meaning."""

fast_alone = _linked(_OptimizingCompiler, fastmath=_FAST)
"""Compile as :data:`fast`, but choose the order of sums before the function is linked into its callers."""

exact = _linked(fastmath={"contract"})
"""Compile with fused products alone, for functions that lose accuracy if sums are taken in a different order."""

strict = _linked()
"""Compile each operation as written, as NumPy does it."""


class _Library(JITCodeLibrary):
    """
    Machine code that calls its own copies of the functions linked into it, so that its results do not vary.

    numba links the functions that a function calls into its module, optimises them there, and leaves them as weak
    symbols. The linker keeps the first weak symbol of a name in a process, which is that of the entry point compiled or
    read first. The copies round differently. This class makes them internal symbols, which are not replaced.

    Made for numba 0.61 to 0.68, where ``CPUCodeLibrary._get_module_for_linking`` makes the symbols weak.
    """

    def _finalize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal
        super()._finalize_final_module()  # type: ignore[no-untyped-call]


class _Compiler(Compiler):
    """numba's compiler, with the machine code in a :class:`_Library`."""

    def define_pipelines(self) -> Any:
        codegen, name = self.state.targetctx.codegen(), self.state.func_id.func_qualname
        self.state.library = _Library(codegen, name)  # type: ignore[no-untyped-call]
        self.state.library.enable_object_caching()
        return super().define_pipelines()  # type: ignore[no-untyped-call]


class _AnyFolder:
    """Base class that makes one of numba's locators accept a folder that cannot be written to."""

    def ensure_cache_path(self) -> None:
        pass


_WRITABLE = CompileResultCacheImpl._locator_classes
_ANY: list[Any] = [type(locator.__name__, (_AnyFolder, locator), {}) for locator in _WRITABLE]


class _Folders(CompileResultCacheImpl):
    """Choice of the folder to write to: the first that can be written to, as in numba, or else the last."""

    _locator_classes = [*_WRITABLE, *reversed(_ANY)]


_SETTINGS = ("OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "USING_SVML")
"""numba's settings that change the machine code."""


class _Cache(FunctionCache):
    """
    numba's cache on disk, which also reads folders that cannot be written to, as in a container image.

    If none of the files can be read, a function is compiled again. Each version of a function has its own index, for
    its types of arguments, kind of processor, numba and numba's settings. numba has one index for all versions and does
    not lock it, so that processes that compile at once can store the code of one version as that of another.

    Made for numba 0.61 to 0.68.
    """

    _impl_class = _Folders

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        locators = (locator.from_function(function, inspect.getfile(function)) for locator in _ANY)
        folders = (locator.get_cache_path() for locator in locators if locator is not None)
        self._folders = [*takewhile(lambda folder: folder != self._cache_path, folders), self._cache_path]
        self._stamp = self._impl.locator.get_source_stamp()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        for folder, files in self._files(sig, target_context.codegen()):
            self._cache_path, self._cache_file = folder, files
            try:
                found = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
            except Exception as error:  # which of them depends on what is left of a damaged file
                log.info("Compiled functions in %s cannot be read (%s)", folder, _described(error))
                if not isinstance(error, OSError):  # which does not mean that the content is damaged
                    with suppress(OSError):
                        files.flush()  # type: ignore[no-untyped-call]
            else:
                if found is not None:
                    return found
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            *_, (self._cache_path, self._cache_file) = self._files(sig, data.codegen)
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except Exception as error:
            _warn_of_disk(_described(error))
            self._cache_path = None

    def _files(self, sig: Any, codegen: Any) -> Iterator[tuple[str, IndexDataCacheFile]]:
        """Yield the folders that may have a version, and its files there. The last folder is the one to write to."""
        # numba's key has the types, the processor, and the function with its closure.
        key = self._index_key(sig, codegen)  # type: ignore[no-untyped-call]
        compiler = (numba.__version__, llvmlite.__version__, [getattr(config, name) for name in _SETTINGS])
        name = f"{self._impl.filename_base}-{hashlib.sha256(repr((key, compiler)).encode()).hexdigest()[:16]}"
        for folder in self._folders:
            yield folder, IndexDataCacheFile(folder, name, self._stamp)  # type: ignore[no-untyped-call]


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@cache
def _warn_of_disk(reason: str) -> None:
    log.warning("Compiled functions cannot be kept on disk (%s). Set NUMBA_CACHE_DIR to a writable folder.", reason)


def cached(*signatures: Any) -> Compile:
    """
    Compile a function that Python calls, and keep the machine code beside the package or in the user's cache folder.

    With numba's types of result and arguments it is compiled at once, without them when it is called. If neither
    folder holds it or can be written to, each process compiles it. It gives the same bits compiled here or read from
    disk.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Any = njit(pipeline_class=_Compiler, **_COMMON)(function)
        if compiled is not function:  # as it is with NUMBA_DISABLE_JIT
            _keep_on_disk(compiled)
            if signatures:
                with register_dispatcher(compiled):  # by which recursive functions find themselves
                    for signature in signatures:
                        compiled.compile(signature)
                compiled.disable_compile()
        return cast(Callable[..., Any], compiled)

    return compile_function


def _keep_on_disk(compiled: Any) -> None:
    try:
        compiled._cache = _Cache(compiled.py_func)
    except RuntimeError as error:  # it has no file
        _warn_of_disk(str(error))
