"""
``python -m tests.bench pitfalls``: train with common faults of hand-written PPOs, and without.

docs/value_clipping.md explains the faults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import sum_independent_dims
from stable_baselines3.common.env_util import make_vec_env

from sb3_clipvf import ClipPPO
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.envs import FastDummyVecEnv
from sb3_clipvf.policies import SquashedActorCriticPolicy, SquashedGaussianDistribution
from tests.bench.command import InProcessBenchmark
from tests.bench.results import digest, machines_text, markdown_table

ENV_ID = "Pendulum-v1"
N_ENVS = 16
N_TIMESTEPS = 100_000
LAST_EPISODES = 100
AT_BOUND = 0.99
"""Absolute value of an action in [-1, 1] from which it counts as one at a bound."""

# The Zoo's gamma and learning rate for this environment; batches of 256 since the reference engine is slow.
_SETTINGS: dict[str, Any] = {
    "n_steps": 256,
    "batch_size": 256,
    "gamma": 0.9,
    "learning_rate": 1e-3,
    "engine": "autograd",  # it runs any policy
    "device": "cpu",
}


class _EntropyWithoutJacobian(SquashedGaussianDistribution):
    def entropy(self) -> th.Tensor:
        return sum_independent_dims(self.distribution.entropy())  # type: ignore[no-untyped-call]


class _DensityAtSquashed(SquashedGaussianDistribution):
    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return sum_independent_dims(self.distribution.log_prob(actions))  # type: ignore[no-untyped-call]


class EntropyWithoutJacobian(SquashedActorCriticPolicy):
    """Fault: the entropy is that of the Gaussian before squashing."""

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        super()._build(lr_schedule)
        self.action_dist = _EntropyWithoutJacobian(self.action_dist.action_dim)


class DensityAtSquashed(SquashedActorCriticPolicy):
    """Fault: the log-probability is the Gaussian's at the squashed action, ``log N(tanh(u))``."""

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        super()._build(lr_schedule)
        self.action_dist = _DensityAtSquashed(self.action_dist.action_dim)


class DrawnAgain(SquashedActorCriticPolicy):
    """Fault: the update evaluates new actions instead of the rollout's."""

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Return values, log-probabilities and entropies, of new actions."""
        return super().evaluate_actions(obs, self.get_distribution(obs).get_actions().detach())


@dataclass(frozen=True)
class Row:
    """
    A policy that is trained with each seed.

    :param name: name for ``--only`` and the results file
    :param title: name in the table
    :param policy: policy class, with a fault or without
    :param ent_coef: weight of the entropy
    """

    name: str
    title: str
    policy: type[SquashedActorCriticPolicy]
    ent_coef: float = 0.0

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by, with a digest of all settings."""
        constants = {"env_id": ENV_ID, "n_envs": N_ENVS, "last_episodes": LAST_EPISODES, "at_bound": AT_BOUND}
        settings = {**constants, **_SETTINGS, "policy": self.policy.__name__, "ent_coef": self.ent_coef}
        return {"name": self.name, "seed": seed, "n_timesteps": N_TIMESTEPS, "digest": digest(settings)}


ROWS = (
    Row("correct", "correct", SquashedActorCriticPolicy),
    Row("drawn-again", "actions drawn again in the update", DrawnAgain),
    Row("density", "Gaussian density at tanh(u)", DensityAtSquashed),
    Row("correct-bonus", "correct", SquashedActorCriticPolicy, ent_coef=0.1),
    Row("entropy", "entropy without the Jacobian", EntropyWithoutJacobian, ent_coef=0.1),
)

_NOTES = (
    f"{ENV_ID}, {N_TIMESTEPS:,} steps, squashed Gaussian. *std*: mean standard deviation before squashing, in the "
    f"states of the last rollout. *at the bounds*: share of its actions beyond {AT_BOUND} of the range. *ended early*: "
    f"runs that ended with an infinite ratio. *return*: mean of the last {LAST_EPISODES} training episodes. Cells "
    "are means over the seeds, with the smallest and the largest value."
)


class PitfallsBenchmark(InProcessBenchmark[Row]):
    """Trains each row with each seed in this process, and tabulates returns and actions."""

    name = "pitfalls"
    description = "Train with common PPO bugs, and without."
    log_folder = "logs/bench/pitfalls"
    default_seeds = (1000, 1001, 1002, 1003, 1004)

    def listed(self, row: Row) -> str:
        """Return the settings, and the seeds that are done."""
        return f"{row.title}, ent_coef={row.ent_coef:g}  {self.done(row)}"

    def train(self, row: Row, seed: int) -> dict[str, Any]:
        """Train a row with a seed, and return its returns and the spread of its actions."""
        return train(row, seed)

    def summary(self, result: dict[str, Any]) -> str:
        """Return the last return."""
        return f"return {result['last_return']:.1f}"

    def render(self) -> str:
        """Return the table of returns and actions."""
        runs = {row: self.runs_of(row) for row in self.rows}
        all_runs = [run for made in runs.values() for run in made]
        header = ["update", "`ent_coef`", "return", "std", "at the bounds", "ended early"]
        table = markdown_table(header, "lrrrrr", [_cells(row, made) for row, made in runs.items()])
        how = f"{len(self.seeds)} seeds from {min(self.seeds)}, one thread"
        first = [run["first_return"] for run in all_runs]
        untrained = f" The mean return of untrained policies is {np.mean(first):.0f}." if first else ""
        return f"{table}\n\n{_NOTES}{untrained}\n\n{machines_text(all_runs, lambda _: how)}"


def train(row: Row, seed: int) -> dict[str, float]:
    """Train a row with a seed, and return its mean returns and the spread of its last actions."""
    env = make_vec_env(ENV_ID, n_envs=N_ENVS, seed=seed, vec_env_cls=FastDummyVecEnv)
    # All episodes are kept.
    model = ClipPPO(row.policy, env, ent_coef=row.ent_coef, seed=seed, stats_window_size=N_TIMESTEPS, **_SETTINGS)
    with contextlib.suppress(NonFiniteError):  # an effect of a fault
        model.learn(N_TIMESTEPS)
    returns = [episode["r"] for episode in model.ep_info_buffer or ()]
    observations = th.as_tensor(model.rollout_buffer.observations).flatten(0, 1)
    with th.no_grad():
        gaussian: Any = model.policy.get_distribution(observations).distribution
    return {
        "num_timesteps": model.num_timesteps,
        "first_return": round(float(np.mean(returns[:N_ENVS])), 2),
        "last_return": round(float(np.mean(returns[-LAST_EPISODES:])), 2),
        "std": round(float(gaussian.stddev.mean()), 4),
        "at_bounds": round(float(np.mean(np.abs(model.rollout_buffer.actions) > AT_BOUND)), 4),
    }


def _cells(row: Row, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not runs:
        return [row.title, f"{row.ent_coef:g}", "not run", "", "", ""]
    forms = {"last_return": "{:.0f}", "std": "{:.2f}", "at_bounds": "{:.0%}"}
    cells = []
    for key, form in forms.items():
        values = [run[key] for run in runs]
        mean, low, high = (form.format(value) for value in (np.mean(values), min(values), max(values)))
        cells.append(f"{mean} ({low} to {high})")
    n_ended = sum(run["num_timesteps"] < N_TIMESTEPS for run in runs)
    return [row.title, f"{row.ent_coef:g}", *cells, f"{n_ended} of {len(runs)}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return PitfallsBenchmark(ROWS, argv).main()
