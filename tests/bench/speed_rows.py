"""The speed benchmark's rows: configurations with their goals, and how each peer's environments and model are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

PEERS = {"clipppo": "ClipPPO", "sb3": "SB3", "sbx": "SBX"}
"""What is compared. SBX, SB3's algorithms in JAX, takes part where it is installed."""

BOUNDS = {"bound_clipppo": "clipppo", "bound_sb3": "sb3"}
"""Environments alone under random actions, as each of these peers has them."""

TRIAL_UPDATES = 7
"""Updates after which the native engine has chosen its number of threads."""

# What a row's environments need: start of the id, or kind of the environments -> module, extra.
_REQUIREMENTS = {
    "HalfCheetah": ("mujoco", "mujoco"),
    "LunarLander": ("Box2D", "box2d"),
    "Breakout": ("ale_py", "atari"),
    "atari": ("cv2", "atari"),
    "envpool": ("envpool", "envpool"),
}


@dataclass(frozen=True)
class SpeedRow:
    """
    One configuration: environments and arguments, the same ones for every peer.

    :param name: name for ``--rows`` and the file
    :param title: name in the table
    :param goal: ratio of ClipPPO's steps a second to SB3's that is to be reached
    :param env_id: the environments' id
    :param n_envs: number of environments
    :param iterations: rollouts and updates that are measured
    :param settings: arguments of the algorithm that are not SB3's defaults
    :param warmup: rollouts and updates before, in which compilers work
    :param policy: the policy's alias
    :param env: kind of ClipPPO's environments, a key of ``ENVIRONMENTS``
    :param peer_env: the same for SB3 and SBX
    :param normalize: whether observations and rewards are normalised by running statistics
    :param custom_extractor: whether the policy has a features extractor of the user's
    :param phase: "all", or "update": only the update's seconds count
    :param compile_anew: whether ClipPPO's first trial starts without compiled code, to tell how long compiling takes;
        rows with the same kernels take the same time
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
    phase: str = "all"
    compile_anew: bool = False

    @property
    def n_steps(self) -> int:
        """Steps of each environment in a rollout."""
        return int(self.settings.get("n_steps", 2048))

    def kind(self, peer: str) -> str:
        """
        Name the kind of a peer's environments.

        :param peer: key of ``PEERS``
        :return: key of ``ENVIRONMENTS``
        """
        return self.env if peer == "clipppo" else self.peer_env

    def is_native(self, peer: str) -> bool:
        """
        Tell whether the native engine runs a peer's policy: it chooses its number of threads itself.

        :param peer: key of ``PEERS``
        :return: whether it does
        """
        return peer == "clipppo" and self.policy == "MlpPolicy" and not self.custom_extractor

    def warmup_of(self, peer: str) -> int:
        """
        Say how many rollouts and updates of a peer come before those that are measured.

        :param peer: key of ``PEERS``
        :return: the row's own, or more where the native engine still tries one thread and two
        """
        return max(self.warmup, TRIAL_UPDATES) if self.is_native(peer) else self.warmup

    def measured(self) -> tuple[str, ...]:
        """
        List what is measured for this row.

        :return: keys of ``PEERS`` and ``BOUNDS``, in the order of the first alternation
        """
        peers = ["clipppo", "sb3"]
        if not self.custom_extractor and find_spec("sbx") is not None:  # SBX has no such extractors
            peers.append("sbx")
        bounds = [] if self.phase == "update" else ["bound_clipppo"]
        if bounds and self.env != self.peer_env:
            bounds.append("bound_sb3")
        return (*peers, *bounds)

    def missing(self) -> str | None:
        """
        Say what is not installed that the row needs.

        :return: "needs ..." with the command that installs it, None where all is there
        """
        for start, (module, extra) in _REQUIREMENTS.items():
            needed = self.env_id.startswith(start) or start in (self.env, self.peer_env)
            if needed and find_spec(module) is None:
                return f"needs {module}: pip install 'sb3_clipvf[{extra}]'"
        return None

    def quick(self) -> SpeedRow:
        """
        Make a row of a moment, whose numbers mean nothing.

        :return: the same row with short rollouts and few of them
        """
        sizes = {"n_steps": min(self.n_steps, max(2, 64 // self.n_envs)), "batch_size": 64, "n_epochs": 2}
        return replace(self, settings=self.settings | sizes, warmup=1, iterations=2, compile_anew=False)


# Settings of the RL Zoo's ppo.yml, rl_zoo3 2.9.2; a row without is SB3's defaults.
_CARTPOLE: dict[str, Any] = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20}
_CARTPOLE |= {"ent_coef": 0.0, "learning_rate": "lin_0.001", "clip_range": "lin_0.2"}
_LUNAR: dict[str, Any] = {"n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4}
_LUNAR |= {"ent_coef": 0.01}
_ATARI: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01}
_ATARI |= {"learning_rate": "lin_2.5e-4", "clip_range": "lin_0.1"}


def _cartpole(name: str, title: str, goal: float, n_envs: int, iterations: int, **other: Any) -> SpeedRow:
    return SpeedRow(name, title, goal, "CartPole-v1", n_envs, iterations, **other)


def _halfcheetah(name: str, title: str, goal: float, n_envs: int, iterations: int, **other: Any) -> SpeedRow:
    return SpeedRow(name, title, goal, "HalfCheetah-v5", n_envs, iterations, normalize=True, **other)


# Numbers of iterations: SB3 takes about 10 to 30 seconds for each row on a machine with two cores.
ROWS: tuple[SpeedRow, ...] = (
    _cartpole("update-64", "update alone, SB3 defaults (CartPole-v1)", 15, 1, 10, phase="update", compile_anew=True),
    _cartpole(
        "update-256",
        "update alone, Zoo settings of CartPole-v1",
        8,
        8,
        200,
        settings=_CARTPOLE,
        warmup=4,
        phase="update",
    ),
    _cartpole("cartpole", "CartPole-v1, Zoo settings", 8, 8, 200, settings=_CARTPOLE, warmup=4),
    _halfcheetah("halfcheetah-1", "HalfCheetah-v5, 1 environment", 5, 1, 6, compile_anew=True),
    _halfcheetah("halfcheetah-8", "HalfCheetah-v5, 8 environments", 5, 8, 2),
    _halfcheetah("halfcheetah-8-envpool", "HalfCheetah-v5, 8 EnvPool environments", 10, 8, 2, env="envpool"),
    SpeedRow(
        "lunarlander-envpool",
        "LunarLander-v3, Zoo settings, 16 EnvPool environments",
        10,
        "LunarLander-v3",
        16,
        3,
        _LUNAR,
        env="envpool",
    ),
    _cartpole(
        "cartpole-64-vector",
        "CartPole-v1, Zoo settings, 64 environments of Gymnasium's vector kind",
        12,
        64,
        30,
        settings=_CARTPOLE,
        warmup=2,
        env="vector",
    ),
    SpeedRow(
        "breakout-8-ale",
        "Breakout, Zoo settings, CnnPolicy, 8 environments of ALE's vector kind",
        2,
        "BreakoutNoFrameskip-v4",
        8,
        3,
        _ATARI,
        policy="CnnPolicy",
        env="ale",
        peer_env="atari",
    ),
    _cartpole(
        "custom-extractor",
        "CartPole-v1, SB3 defaults, features extractor of one's own",
        1.7,
        1,
        8,
        custom_extractor=True,
    ),
)


# ---------------------------------------------------------------------- environments: each kind, once for a peer
# (a VecEnv), once alone (:class:`Simulators`)


def _gym(row: SpeedRow, peer: str, seed: int) -> Any:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_clipvf.envs import FastDummyVecEnv

    vec_env_cls = FastDummyVecEnv if peer == "clipppo" else DummyVecEnv
    return make_vec_env(row.env_id, row.n_envs, seed=seed, vec_env_cls=vec_env_cls)


def _atari(row: SpeedRow, peer: str, seed: int) -> Any:
    import ale_py
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    return VecFrameStack(make_atari_env(row.env_id, row.n_envs, seed=seed), 4)


def raw_vector(row: SpeedRow, seed: int, spares: bool = False) -> Any:
    """
    Make the environments that step as one.

    :param row: a row with ``env`` of "vector", "envpool" or "ale"
    :param seed: seed of those whose constructor takes one
    :param spares: give an EnvPool two environments a row
    :return: Gymnasium's, EnvPool's or ALE's vector environment
    """
    if row.env == "vector":
        import gymnasium as gym

        return gym.make_vec(row.env_id, row.n_envs)
    if row.env == "envpool":
        import envpool

        return envpool.make_gymnasium(row.env_id, num_envs=row.n_envs * (1 + spares), seed=seed)
    from ale_py.vector_env import AtariVectorEnv

    # As SB3's AtariWrapper: each life is an episode, and rewards are clipped, by the adapter, after they are summed.
    game = row.env_id.partition("NoFrameskip")[0].lower()
    return AtariVectorEnv(game, row.n_envs, autoreset_mode="SameStep", life_loss_info=True, reward_clipping=False)


def _adapted(row: SpeedRow, peer: str, seed: int) -> Any:
    from sb3_clipvf.envs import as_vec_env

    spares = row.env == "envpool"
    env = as_vec_env(raw_vector(row, seed, spares), clip_rewards=row.env == "ale", spares=spares)
    if not spares:  # an EnvPool takes its seed when it is made
        env.seed(seed)
    return env


ENVIRONMENTS: dict[str, Callable[[SpeedRow, str, int], Any]] = {
    "gym": _gym,
    "atari": _atari,
    "vector": _adapted,
    "envpool": _adapted,
    "ale": _adapted,
}
"""
Kinds of environments, and how a peer's VecEnv of them is made, with ``Monitor``'s episode statistics. Of kind "gym",
ClipPPO has a FastDummyVecEnv, as its command ``train`` does, and the others SB3's DummyVecEnv.
"""


def make_env(row: SpeedRow, peer: str, seed: int) -> Any:
    """
    Make a peer's environments.

    :param row: the row
    :param peer: key of ``PEERS``
    :param seed: seed of the environments
    :return: a VecEnv
    """
    env = ENVIRONMENTS[row.kind(peer)](row, peer, seed)
    if not row.normalize:
        return env
    if peer == "clipppo":
        from sb3_clipvf.envs import FastVecNormalize

        return FastVecNormalize(env)
    from stable_baselines3.common.vec_env import VecNormalize

    return VecNormalize(env)


# ---------------------------------------------------------------------- models


def _extractor_class() -> type[Any]:
    import torch as th
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class TwoLayers(BaseFeaturesExtractor):
        """Layers before the policy's own, which only autograd can differentiate."""

        def __init__(self, observation_space: Any, features_dim: int = 64) -> None:
            super().__init__(observation_space, features_dim)
            n_inputs = observation_space.shape[0]
            layers = (th.nn.Linear(n_inputs, features_dim), th.nn.LayerNorm(features_dim), th.nn.ReLU())
            self.layers = th.nn.Sequential(*layers)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            """
            Compute features.

            :param observations: shape ``(n, n_inputs)``
            :return: shape ``(n, features_dim)``
            """
            return th.as_tensor(self.layers(observations))

    return TwoLayers


def make_model(row: SpeedRow, peer: str, seed: int) -> Any:
    """
    Build a peer's algorithm with the row's settings; ClipPPO with SB3's objective and the engine it picks itself.

    :param row: the row
    :param peer: key of ``PEERS``
    :param seed: seed of the model and its environments
    :return: the model, which logs nothing
    """
    from sb3_clipvf.schedules import make_schedule

    arguments = dict(row.settings)
    for name in ("learning_rate", "clip_range"):
        if isinstance(arguments.get(name), str):  # SB3 takes no such text
            arguments[name] = make_schedule(arguments[name], name)
    if row.custom_extractor:
        arguments["policy_kwargs"] = {"features_extractor_class": _extractor_class()}
    if peer == "clipppo":
        from sb3_clipvf import SB3_EQUIVALENT, ClipPPO

        algorithm: Any = ClipPPO
        arguments = SB3_EQUIVALENT | {"engine": "auto"} | arguments
    else:
        algorithm = import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[peer]).PPO
    return algorithm(row.policy, make_env(row, peer, seed), seed=seed, device="cpu", verbose=0, **arguments)
