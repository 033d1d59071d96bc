"""Decorators that compile functions by numba. Importing this imports numba, which takes half a second."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, cast

from llvmlite.binding import Linkage
from numba import jit, njit
from numba.core.caching import FunctionCache
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


class _Cache(FunctionCache):
    """numba's cache on disk, without whose files a function is compiled again."""

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)  # type: ignore[no-untyped-call]
        except Exception as error:  # which of them depends on what is left of a damaged file
            log.info("Compiled functions in %s cannot be read (%s)", self.cache_path, _described(error))
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, *args: Any) -> None:
        try:
            super().save_overload(*args)  # type: ignore[no-untyped-call]
        except Exception as error:
            _warn_of_disk(_described(error))
            self._cache_path = None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@cache
def _warn_of_disk(reason: str) -> None:
    log.warning("Compiled functions cannot be kept on disk (%s). Set NUMBA_CACHE_DIR to a writable folder.", reason)


def cached(*signatures: Any) -> Compile:
    """
    Compile a function that Python calls, and keep the machine code beside the package or in the user's cache folder.

    With numba's types of result and arguments it is compiled at once, without them when it is called. If neither
    folder can be written to, each process compiles it. It gives the same bits compiled here or read from disk.
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
        compiled._cache = _Cache(compiled.py_func)  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # no folder can be written to
        _warn_of_disk(str(error))
