"""How kernels are compiled."""

from collections.abc import Callable
from typing import Any, cast

from numba import njit

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

# Division by zero gives infinity or NaN as in torch: the check of it would keep loops from being vectorised.
_COMMON = {"error_model": "numpy", "nogil": True}

fast = cast(Compile, njit(fastmath={"reassoc", "contract", "nsz"}, **_COMMON))
"""Sums may be taken in any order and products fused; NaN and infinities keep their meaning."""

exact = cast(Compile, njit(fastmath={"contract"}, **_COMMON))
"""For functions that lose their accuracy if sums are taken in another order."""

strict = cast(Compile, njit(**_COMMON))
"""Each operation as written, as NumPy does it."""
