"""The axes of the growth benchmark: rows of the speed benchmark that differ in one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.speed_rows import SpeedRow


@dataclass(frozen=True)
class Axis:
    """
    One size that grows, while everything else stays.

    :param name: start of the names of its rows, which end in ``-<value>``
    :param title: what grows, for the table
    :param label: the same for the figure, which has little room
    :param values: the sizes
    :param make: function that makes the row of a name, a title and a size
    """

    name: str
    title: str
    label: str
    values: Sequence[int]
    make: Callable[[str, str, int], SpeedRow]

    def rows(self) -> dict[int, SpeedRow]:
        """Return the row of each size."""
        return {value: self.make(f"{self.name}-{value}", f"{self.title}: {value:,}", value) for value in self.values}


_ROLLOUT = 4096
# One thread: the second core of a machine with two is shared with its other programs, and the native engine would
# try both numbers at each point.
_COMMON: dict[str, Any] = {"peers": ("clipppo", "sb3"), "threads": 1}


def _environments(env_id: str, **other: Any) -> Callable[[str, str, int], SpeedRow]:
    def make(name: str, title: str, n_envs: int) -> SpeedRow:
        settings = {"n_steps": _ROLLOUT // n_envs, "batch_size": 256}
        return SpeedRow(name, title, 1, env_id, n_envs, 4, settings, **_COMMON, **other)

    return make


def _free(name: str, title: str, n_envs: int, iterations: int, settings: dict[str, Any], **other: Any) -> SpeedRow:
    kinds: dict[str, Any] = {"env": "free", "peer_env": "free"}
    return SpeedRow(name, title, 1, "17 -> 6", n_envs, iterations, settings, **kinds, **_COMMON, **other)


def _width(name: str, title: str, width: int) -> SpeedRow:
    settings = {"n_steps": 256, "batch_size": 256, "n_epochs": 4, "policy_kwargs": {"net_arch": [width, width]}}
    return _free(name, title, 8, max(3, 2048 // width), settings, phase="update")


def _batch(name: str, title: str, batch_size: int) -> SpeedRow:
    settings = {"n_steps": 256, "batch_size": batch_size, "n_epochs": 4}
    return _free(name, title, 64, 4, settings, phase="update")


def _rollout(name: str, title: str, n_transitions: int) -> SpeedRow:
    settings = {"n_steps": n_transitions // 64, "batch_size": 1024, "n_epochs": 1}
    return _free(name, title, 64, max(1, 2**18 // n_transitions), settings)


AXES = (
    Axis(
        "cartpole-envs",
        "Environments, CartPole-v1 in Gymnasium's vectorised class",
        "environments\n(CartPole-v1)",
        (1, 8, 64, 512),
        _environments("CartPole-v1", env="vector"),
    ),
    Axis(
        "halfcheetah-envs",
        "Environments, HalfCheetah-v5 in EnvPool",
        "environments\n(HalfCheetah-v5)",
        (1, 8, 64, 512),
        _environments("HalfCheetah-v5", env="envpool", normalize=True),
    ),
    Axis("width", "Width of two layers", "width of two layers", (64, 128, 256, 512, 1024), _width),
    Axis("batch", "Batch size", "batch size", (64, 256, 1024, 4096, 16_384), _batch),
    Axis("rollout", "Transitions of a rollout", "transitions of a rollout", (2**11, 2**14, 2**17, 2**20), _rollout),
)
"""
What grows. Environments share 4096 transitions of a rollout. The other axes have dummy environments, with the spaces
of HalfCheetah-v5, and SB3's networks; widths and batches time updates alone.
"""
