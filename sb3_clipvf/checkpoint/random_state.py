"""The state of random generators: Python's, NumPy's, torch's, and those of environments and spaces."""

import random
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_clipvf.checkpoint.state_attributes import check_names

# NumPy's own: a name in a file must not select another class.
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")

# Places in a generator's numbers, where it reads on. NumPy does not check them.
_LARGEST = {"pos": 624, "buffer_pos": 4}

_SPACES = ("action_space", "observation_space")


def global_states() -> dict[str, Any]:
    """Return the states of the generators that a whole process shares."""
    version, numbers, gauss_next = random.getstate()
    states: dict[str, Any] = {
        "python": (version, np.array(numbers, np.uint32), gauss_next),
        "numpy": np.random.get_state(legacy=True),
        "torch": th.get_rng_state(),
    }
    if th.cuda.is_available() and th.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = th.cuda.get_rng_state_all()
    return states


def set_global_states(states: dict[str, Any]) -> None:
    """Restore the states from :func:`global_states`."""
    version, numbers, gauss_next = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss_next))
    _, key, pos, *_ = states["numpy"]
    _check_parts({"key": key, "pos": pos}, dict(np.random.MT19937().state["state"]))
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    # Without the same devices, a resume is not exact in any case.
    if "cuda" in states and th.cuda.is_available() and th.cuda.device_count() == len(states["cuda"]):
        th.cuda.set_rng_state_all(states["cuda"])


def generator_state(generator: np.random.Generator | None) -> dict[str, Any] | None:
    """Return the state of one of NumPy's generators, None for None."""
    return None if generator is None else dict(generator.bit_generator.state)


def generator_from(state: dict[str, Any] | None) -> np.random.Generator | None:
    """Create a generator in a state from :func:`generator_state`, None for None."""
    if state is None:
        return None
    if state["bit_generator"] not in _BIT_GENERATORS:
        raise ValueError(
            f"`bit_generator` must be one of {', '.join(_BIT_GENERATORS)}, got {state['bit_generator']!r}. "
            "Use one of these."
        )
    bit_generator = getattr(np.random, state["bit_generator"])()
    _check_parts(state, bit_generator.state)
    bit_generator.state = state
    return np.random.Generator(bit_generator)


def _check_parts(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare a state from a file with that of a new generator: NumPy would read beyond the end of its numbers."""
    for name, part in own.items():
        value = state[name]
        if isinstance(part, dict):
            _check_parts(value, part)
            continue
        if isinstance(part, np.ndarray):
            is_usual = isinstance(value, np.ndarray) and (value.shape, value.dtype) == (part.shape, part.dtype)
            rule = f"{part.size} numbers of the type {part.dtype}"
        else:
            is_usual = name not in _LARGEST or (isinstance(value, int) and 0 <= value <= _LARGEST[name])
            rule = f"a whole number in [0, {_LARGEST.get(name)}]"
        if not is_usual:
            raise ValueError(
                f"`{name}` of a random generator in the checkpoint must be {rule}, got {str(value)[:100]}. Use "
                "another checkpoint."
            )


def space_states(owner: Any) -> dict[str, list[dict[str, Any] | None]]:
    """
    Return the generator states of both spaces of a model or an environment, and of all spaces in them, by name.

    The state is None for a space that nothing was drawn from. If only wrappers of an environment have a space, its name
    is omitted.
    """
    owned = {name: getattr(owner, name, None) for name in _SPACES}
    return {
        name: [generator_state(part._np_random) for part in _parts(space)]
        for name, space in owned.items()
        if space is not None
    }


def set_space_states(owner: Any, states: dict[str, list[dict[str, Any] | None]]) -> None:
    """Restore the states from :func:`space_states`."""
    check_names(states, _SPACES, "spaces")
    for name, saved in states.items():
        for part, state in zip(_parts(getattr(owner, name)), saved, strict=True):
            part._np_random = generator_from(state)


def _parts(space: spaces.Space[Any]) -> list[Any]:
    inner = getattr(space, "spaces", ())
    named = (getattr(space, name, None) for name in ("feature_space", "node_space", "edge_space"))
    children = [*(inner.values() if isinstance(inner, dict) else inner), *named]
    return [space, *(part for child in children if isinstance(child, spaces.Space) for part in _parts(child))]
