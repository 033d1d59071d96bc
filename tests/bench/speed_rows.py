"""The rows of the speed benchmark: each is one configuration, the same for every peer, with its goal."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

PEERS = {
    "clipppo": "ClipPPO",
    "sb3": "SB3",
    "sb3_compiled": "SB3 compiled",
    "sbx": "SBX",
    "clipppo_on_cpu": "ClipPPO on the CPU",
    "clipppo_on_gpu": "ClipPPO on the GPU",
    "clipppo_autograd": "ClipPPO on autograd",
    "clipppo_bf16": "ClipPPO in bfloat16",
}
"""
What is compared. SB3 compiled is SB3 with ``torch.compile``, if there is a C++ compiler. SBX is SB3's algorithms in
JAX, if it is installed.
"""

DEVICES = ("cpu", "auto", "cuda")
"""Devices for ``--device``."""

BOUNDS = {"bound_clipppo": "clipppo", "bound_sb3": "sb3"}
"""Name of a measurement of environments alone under random actions -> the peer that has these environments."""

# What a row's environments need: start of the id, or kind of the environments -> module, extra.
_REQUIREMENTS = {
    "HalfCheetah": ("mujoco", "mujoco"),
    "LunarLander": ("Box2D", "box2d"),
    "Breakout": ("ale_py", "atari"),
    "atari": ("cv2", "atari"),
    "envpool": ("envpool", "envpool"),
}


_ALL = ("clipppo", "sb3", "sb3_compiled", "sbx")
_DEVICE_OF_PEER = {"clipppo_on_cpu": "cpu", "clipppo_on_gpu": "cuda"}
_PEERS_ON = {
    "auto": ("clipppo", *_DEVICE_OF_PEER, "sb3"),
    "cuda": ("clipppo", "clipppo_autograd", "clipppo_bf16", "sb3"),
}
_BF16_ROWS = ("breakout-8-ale", "breakout-64-ale", "large-4096")  # whose networks are large

GPU_ROWS = ("breakout-8-ale", "breakout-64-ale", "wide-256", "large-4096", "tensor-pendulum")
"""Rows that ``--device cuda`` measures, unless ``--only`` names others."""


def absent_peers() -> dict[str, str]:
    """Return the peers that cannot run on this machine, with what they need."""
    absent = {}
    if find_spec("sbx") is None:
        absent["sbx"] = "needs sbx: pip install 'sb3_clipvf[sbx]'"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        absent["sb3_compiled"] = "needs a C++ compiler: g++, or the one that CXX names"
    return absent


def _trial_updates() -> int:
    """Return the number of updates after which the native engine has chosen its number of threads."""
    from sb3_clipvf.common.resources import usable_cores
    from sb3_clipvf.engines.threads import TRIALS  # imports torch

    n_numbers = 1 + (usable_cores() - 1).bit_length()  # powers of two, and all cores
    return 1 + TRIALS * n_numbers  # the first update compiles


def is_clipppo(peer: str) -> bool:
    """Return whether a peer is ClipPPO, on any device."""
    return peer.startswith("clipppo")


@dataclass(frozen=True)
class SpeedRow:
    """
    One configuration: environments and arguments, the same ones for every peer.

    :param name: name for ``--rows`` and the file
    :param title: name in the table
    :param goal: ratio of ClipPPO's steps per second to SB3's that is to be reached
    :param env_id: id of the environments; of the kind "free", "<size of an observation> -> <size of an action>"
    :param n_envs: number of environments
    :param iterations: rollouts and updates that are measured
    :param settings: arguments of the algorithm that are not SB3's defaults; activation functions by torch's names
    :param warmup: rollouts and updates before these, in which code is compiled
    :param policy: alias of the policy
    :param env: kind of ClipPPO's environments, a key of ``ENVIRONMENTS`` in ``speed_models``
    :param peer_env: the same for SB3 and SBX
    :param normalize: whether running statistics normalise observations and rewards
    :param custom_extractor: whether the policy has a features extractor of the user's
    :param peers: keys of ``PEERS`` that are measured, in this order
    :param phase: "all", or "update": only the update's seconds count
    :param threads: number of threads that every peer runs on; None: the faster of one and the default, per peer
    :param cold_start: whether ClipPPO's first trial starts without compiled code, to measure how long compiling
        takes; rows with the same kernels take the same time
    :param device: the argument ``device`` of ClipPPO and SB3
    """

    name: str
    title: str
    goal: float
    env_id: str
    n_envs: int
    iterations: int
    settings: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1
    policy: str = "MlpPolicy"
    env: str = "gym"
    peer_env: str = "gym"
    normalize: bool = False
    custom_extractor: bool = False
    peers: tuple[str, ...] = ("clipppo", "sb3", "sbx")
    phase: str = "all"
    threads: int | None = None
    cold_start: bool = False
    device: str = "cpu"

    @property
    def n_steps(self) -> int:
        """Steps of each environment in a rollout."""
        return int(self.settings.get("n_steps", 2048))

    def kind(self, peer: str) -> str:
        """Return the kind of a peer's environments."""
        return self.env if is_clipppo(peer) else self.peer_env

    def device_of(self, peer: str) -> str:
        """Return a peer's argument ``device``."""
        return _DEVICE_OF_PEER.get(peer, self.device)

    def is_native(self, peer: str) -> bool:
        """Return whether the native engine, which chooses its number of threads itself, may run a peer's policy."""
        is_plain = self.policy == "MlpPolicy" and not self.custom_extractor
        return is_clipppo(peer) and is_plain and self.device_of(peer) != "cuda"

    def has_default_threads(self, peer: str) -> bool:
        """Return whether no trial chooses a peer's number of threads."""
        return self.is_native(peer) or self.device_of(peer) != "cpu"

    def warmup_of(self, peer: str) -> int:
        """Return a peer's warm-up, in which the native engine must choose its number of threads."""
        return max(self.warmup, _trial_updates()) if self.is_native(peer) and self.threads != 1 else self.warmup

    def measured(self) -> tuple[str, ...]:
        """Return the keys of ``PEERS`` and ``BOUNDS`` to measure here, in the order of the first round."""
        absent = absent_peers()
        peers = [peer for peer in self.peers if peer not in absent]
        has_none = self.phase == "update" or self.env in ("free", "tensor") or self.device == "cuda"
        bounds = [] if has_none else ["bound_clipppo"]
        if bounds and self.env != self.peer_env:
            bounds.append("bound_sb3")
        return (*peers, *bounds)

    def missing(self) -> str | None:
        """Return "needs ..." with the command that installs what is missing, or None."""
        for start, (module, extra) in _REQUIREMENTS.items():
            needed = self.env_id.startswith(start) or start in (self.env, self.peer_env)
            if needed and find_spec(module) is None:
                return f"needs {module}: pip install 'sb3_clipvf[{extra}]'"
        return None

    def on(self, device: str) -> SpeedRow:
        """Return the row for a value of ``--device``; "auto" adds ClipPPO on the CPU and on the GPU."""
        if device == "cpu":
            return self
        peers = tuple(peer for peer in _PEERS_ON[device] if peer != "clipppo_bf16" or self.name in _BF16_ROWS)
        return replace(self, device=device, peers=peers, cold_start=False)

    def quick(self) -> SpeedRow:
        """Return the row with few and short rollouts, only to check that it runs."""
        n_envs = min(64, self.n_envs)
        sizes = {"n_steps": min(self.n_steps, max(2, 64 // n_envs)), "batch_size": 64, "n_epochs": 2}
        return replace(self, n_envs=n_envs, settings=self.settings | sizes, warmup=1, iterations=2, cold_start=False)


# Settings of the RL Zoo's ppo.yml, rl_zoo3 2.9.2; rows without settings have SB3's defaults.
_CARTPOLE: dict[str, Any] = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20}
_CARTPOLE |= {"ent_coef": 0.0, "learning_rate": "lin_0.001", "clip_range": "lin_0.2"}
_LUNAR: dict[str, Any] = {"n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4}
_LUNAR |= {"ent_coef": 0.01}
_ATARI: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01}
_ATARI |= {"learning_rate": "lin_2.5e-4", "clip_range": "lin_0.1"}
# Eight minibatches of 256 transitions in each of ten epochs, with the spaces of HalfCheetah-v5.
_WIDE: dict[str, Any] = {"n_steps": 256, "batch_size": 256, "policy_kwargs": {"net_arch": [256, 256]}}
# The same with cheap environments: 131,072 transitions in four minibatches, for four epochs.
_TENSORS: dict[str, Any] = {"n_steps": 32, "batch_size": 32_768, "n_epochs": 4}
# Massively parallel simulation: 98,304 transitions in four minibatches, for two epochs.
_LARGE: dict[str, Any] = {"n_steps": 24, "batch_size": 24_576, "n_epochs": 2}
_LARGE |= {"policy_kwargs": {"net_arch": [512, 256, 128], "activation_fn": "ELU"}}


def _cartpole(name: str, title: str, goal: float, n_envs: int, iterations: int, **other: Any) -> SpeedRow:
    return SpeedRow(name, title, goal, "CartPole-v1", n_envs, iterations, **other)


def _halfcheetah(name: str, title: str, goal: float, n_envs: int, iterations: int, **other: Any) -> SpeedRow:
    return SpeedRow(name, title, goal, "HalfCheetah-v5", n_envs, iterations, normalize=True, **other)


def _wide(name: str, title: str, **other: Any) -> SpeedRow:
    return SpeedRow(name, title, 3, "17 -> 6", 8, 15, _WIDE, env="free", peer_env="free", phase="update", **other)


def _large(name: str, title: str, **other: Any) -> SpeedRow:
    return SpeedRow(name, title, 1.3, "48 -> 12", 4096, 2, _LARGE, env="free", peer_env="free", phase="update", **other)


# Numbers of iterations: SB3 takes about 10 to 30 seconds for each row on a machine with two cores.
# fmt: off
ROWS: tuple[SpeedRow, ...] = (
    # name, title, goal, (id of the environments,) number of environments, iterations
    _cartpole("update-64", "update alone, SB3 defaults (CartPole-v1)", 15, 1, 10, peers=_ALL, phase="update",
              cold_start=True),
    _cartpole("update-256", "update alone, Zoo settings of CartPole-v1", 8, 8, 200,
              settings=_CARTPOLE, warmup=4, phase="update"),
    _cartpole("cartpole", "CartPole-v1, Zoo settings", 8, 8, 200, settings=_CARTPOLE, warmup=4, peers=_ALL),
    _halfcheetah("halfcheetah-1", "HalfCheetah-v5, 1 environment", 5, 1, 6, peers=_ALL, cold_start=True),
    _halfcheetah("halfcheetah-1-sb3", "HalfCheetah-v5, 1 environment, SB3's own VecEnvs", 5, 1, 6,
                 env="sb3"),
    _halfcheetah("halfcheetah-8", "HalfCheetah-v5, 8 environments", 5, 8, 2),
    _halfcheetah("halfcheetah-8-envpool", "HalfCheetah-v5, 8 EnvPool environments", 10, 8, 2, env="envpool"),
    SpeedRow("lunarlander-envpool", "LunarLander-v3, Zoo settings, 16 EnvPool environments", 10, "LunarLander-v3", 16,
             3, settings=_LUNAR, env="envpool"),
    _cartpole("cartpole-64-vector", "CartPole-v1, Zoo settings, 64 vectorised environments of Gymnasium", 12, 64, 30,
              settings=_CARTPOLE, warmup=2, env="vector"),
    SpeedRow("breakout-8-ale", "Breakout, Zoo settings, CnnPolicy, 8 vectorised environments of ALE", 2,
             "BreakoutNoFrameskip-v4", 8, 3, settings=_ATARI, policy="CnnPolicy", env="ale", peer_env="atari",
             peers=_ALL),
    SpeedRow("breakout-64-ale", "Breakout, Zoo settings, CnnPolicy, 64 vectorised environments of ALE", 2,
             "BreakoutNoFrameskip-v4", 64, 1, settings=_ATARI, policy="CnnPolicy", env="ale", peer_env="atari",
             peers=("clipppo", "sb3")),
    _cartpole("custom-extractor", "CartPole-v1, SB3 defaults, custom features extractor", 1.7, 1, 8,
              custom_extractor=True, peers=("clipppo", "sb3")),  # SBX has no such extractors
    _wide("wide-256", "update alone, networks 256-256, batch 256", peers=_ALL),
    _wide("wide-256-1t", "update alone, networks 256-256, batch 256, 1 thread", threads=1),
    _large("large-4096", "update alone, 4096 environments, networks 512-256-128, batch 24,576",
           peers=_ALL),
    SpeedRow("tensor-pendulum", "4096 pendulums as tensors, networks 64-64, batch 32,768", 3, "Pendulum-v1", 4096, 8,
             _TENSORS, env="tensor", peer_env="tensor", peers=("clipppo", "sb3")),
    _large("large-4096-1t", "update alone, 4096 environments, networks 512-256-128, batch 24,576, 1 thread", threads=1),
)
# fmt: on
