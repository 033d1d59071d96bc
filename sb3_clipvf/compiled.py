"""How kernels are compiled by numba. Importing this imports numba, which takes half a second."""

from collections.abc import Callable
from typing import Any, cast

from llvmlite.binding import Linkage
from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from sb3_clipvf.messages import log

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

# Division by zero gives infinity or NaN as in torch: the check of it would keep loops from being vectorised.
_COMMON: dict[str, Any] = {"error_model": "numpy", "nogil": True}

fast = cast(Compile, njit(fastmath={"reassoc", "contract", "nsz"}, **_COMMON))
"""Sums may be taken in any order and products fused; NaN and infinities keep their meaning."""

exact = cast(Compile, njit(fastmath={"contract"}, **_COMMON))
"""For functions that lose their accuracy if sums are taken in another order."""

strict = cast(Compile, njit(**_COMMON))
"""Each operation as written, as NumPy does it."""


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """
    Machine code in which a function calls its own copies of the functions that it calls.

    numba links these into the module of their caller, optimises all of it again, and leaves them as weak symbols. Of
    equal weak symbols the linker keeps the first in the process: in one that compiles, each function as it was
    optimised by itself; in one that reads from disk, the copy in whichever caller was read first. They differ in
    rounding. Internal symbols stay as they are.

    Made for numba 0.61 to 0.68, whose ``_get_module_for_linking`` makes them weak.
    """

    def _finalize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal
        super()._finalize_final_module()


class _Compiler(Compiler):  # type: ignore[misc]
    """Numba's compiler, which puts the code into a :class:`_Library`."""

    def define_pipelines(self) -> Any:
        self.state.library = _Library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        return super().define_pipelines()


def cached(*signatures: Any) -> Compile:
    """
    Compile a function that Python calls, and keep the result on disk, beside the package or in the user's cache folder.

    Where no such folder can be written to, it is compiled anew in each process. Its results are the same, to the last
    bit, whether it was compiled or read from disk.

    :param signatures: Numba's types of its arguments and its result, compiled at once; none: compiled when called.
    :return: A decorator.
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
