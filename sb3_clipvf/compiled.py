"""How kernels are compiled by numba. Importing this imports numba, which takes half a second."""

from collections.abc import Callable
from typing import Any, cast

from numba import njit

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


def cached(*signatures: Any) -> Compile:
    """
    Compile a function that Python calls, and keep the result on disk, beside the package or in the user's cache folder.

    Where no such folder can be written to, it is compiled anew in each process.

    :param signatures: Numba's types of its arguments and its result, compiled at once; none: compiled when called.
    :return: A decorator.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        compiler = cast(Any, njit)
        types = [list(signatures)] if signatures else []
        try:
            return cast(Compile, compiler(*types, cache=True, **_COMMON))(function)
        except RuntimeError as error:
            log.warning("Compiled functions cannot be kept on disk (%s). Point NUMBA_CACHE_DIR to a folder.", error)
            return cast(Compile, compiler(*types, **_COMMON))(function)

    return compile_function
