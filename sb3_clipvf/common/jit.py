"""Decorators that compile functions by numba. Importing this imports numba, which takes half a second."""

from collections.abc import Callable
from typing import Any, cast

from llvmlite.binding import Linkage
from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from sb3_clipvf.common.messages import log

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

# Division by zero gives infinity or NaN as in torch. A check for it would keep loops from being vectorised.
_COMMON: dict[str, Any] = {"error_model": "numpy", "nogil": True}

fast = cast(Compile, njit(fastmath={"reassoc", "contract", "nsz"}, **_COMMON))
"""Compile with sums in any order and fused products; NaN and infinities keep their meaning."""

exact = cast(Compile, njit(fastmath={"contract"}, **_COMMON))
"""Compile with fused products alone, for functions that lose accuracy if sums are taken in another order."""

strict = cast(Compile, njit(**_COMMON))
"""Compile each operation as written, as NumPy does it."""


class _Library(JITCodeLibrary):
    """
    Machine code that calls its own copies of the functions linked into it, so that its results do not vary.

    numba links the functions that a function calls into its module, optimises them again there, and leaves them as weak
    symbols. The linker keeps the first weak symbol of a name in a process. In a process that compiles kernels, that is
    each called function as optimised alone. In one that reads them from disk, it is the copy in the caller read first.
    These copies round differently. Internal symbols, which this class makes of them, are not replaced.

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


def cached(*signatures: Any) -> Compile:
    """
    Compile a function that Python calls, and keep the machine code beside the package or in the user's cache folder.

    With numba's types of result and arguments it is compiled at once, without them when it is called. Where neither
    folder can be written to, each process compiles it. It gives the same bits compiled here or read from disk.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        compiler = cast(Any, njit)
        types = [list(signatures)] if signatures else []
        try:
            return cast(Compile, compiler(*types, cache=True, pipeline_class=_Compiler, **_COMMON))(function)
        except RuntimeError as error:
            log.warning("Compiled functions cannot be kept on disk (%s). Point NUMBA_CACHE_DIR to a folder.", error)
            return cast(Compile, compiler(*types, pipeline_class=_Compiler, **_COMMON))(function)

    return compile_function
