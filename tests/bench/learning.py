"""``python -m tests.bench learning``: train with the packaged settings and SB3's PPO beside, for a table of returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sb3_clipvf.zoo import ALGORITHM
from tests.bench.experiments.estimates import difference, estimate, mean, over_seeds
from tests.bench.experiments.runs import Record
from tests.bench.learning_figure import CAPTION, TimeComparison, fastest_seconds, write_time_figure
from tests.bench.results import Results, machines_text, markdown_table
from tests.bench.training_runs import TrainingBenchmark, TrainingRow, how_made


@dataclass(frozen=True, kw_only=True)
class Row(TrainingRow):
    """
    One line of the table, or the training of SB3's PPO beside it.

    :param goal: mean return to reach, in reward units; None: no goal
    :param comparison: what others reach, with its source
    :param n_episodes: episodes of the evaluation; more where the returns of one policy differ much
    :param has_times: whether times are shown. False: the machine was slower in the runs of one of the two algorithms
    """

    goal: float | None = None
    comparison: str = ""
    n_episodes: int = 20
    has_times: bool = True

    def run(self, seed: int) -> dict[str, Any]:
        """Return the entries that a seed's result is found by."""
        return {**super().run(seed), "n_episodes": self.n_episodes}

    def peer(self) -> Row:
        """Return the training of SB3's PPO in the same environments, for as many steps, with the Zoo's settings."""
        return replace(self, name=f"{self.env_id}-sb3-ppo", algo="ppo", params=(), goal=None, comparison="")


_FIXED_KL = ("clip_range:None", "kl_coef:1.0")
# Seed 1 ended at 149, 148, 225 and -95 with a coefficient of 0.3, 1, 3 and 10 and 4 epochs as packaged, and at 254 with
# 3 and 10 epochs, seed 3 at 183: without a clip a larger penalty holds the policy back over more epochs. A rate that
# falls to 0 from 5e-4 gave 238 (mean of three seeds), minibatches of 128 and a rate from 1e-3 gave 242.
_FIXED_KL_LANDER = ("clip_range:None", "kl_coef:3.0", "n_epochs:10", "batch_size:128", "learning_rate:'lin_1e-3'")
_ADAPTIVE_KL = (*_FIXED_KL, "adaptive_kl_target:0.01")
# These settings of the squashed policy on MountainCarContinuous-v0 are not among the packaged ones.
# log_std_init 2 makes first forces near the bounds, which swing the car up the hill often enough to learn from.
_SQUASHED_MOUNTAIN_CAR: tuple[str, ...] = (
    "policy:'SquashedMlpPolicy'",
    "use_sde:False",
    "policy_kwargs:dict(log_std_init=2.0)",
)


def _row(env_id: str, n_timesteps: int, goal: float | None, kind: str = "", **other: Any) -> Row:
    return Row(name=env_id + kind, env_id=env_id, n_timesteps=n_timesteps, goal=goal, **other)


def with_peers(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows, each environment's first one followed by its peer."""
    named = {made.name: made for row in rows for made in (row, row.peer())}
    return tuple(named.values())


# Comparisons: entries of the RL Zoo's benchmark.md, with their algorithm and steps, one run each.
#
# Rows are in the order of their cost. Estimate for a seed on one core, from the first 16,000 to 65,000 steps of each
# row: 30 minutes for ClipPPO, of which MuJoCo takes 11 and BipedalWalker 14; 80 minutes for SB3's PPO, of which MuJoCo
# takes 45 and BipedalWalker 25. Five seeds of both take 9 hours on one core, about 5 hours with `--jobs 2`.
ROWS: tuple[Row, ...] = (
    _row("CartPole-v1", 100_000, 500, comparison="500 (ppo, 100k)"),
    _row("CartPole-v1", 100_000, 500, "-fixed-kl", params=_FIXED_KL),
    _row("CartPole-v1", 100_000, 500, "-adaptive-kl", params=_ADAPTIVE_KL),
    _row("Pendulum-v1", 100_000, -170, comparison="-163 (a2c, 1M), -172 (ppo, 100k)", n_episodes=100),
    _row("MountainCarContinuous-v0", 50_000, 92, comparison="92.5 (trpo, 50k), 88.3 (ppo, 20k)"),
    _row("MountainCarContinuous-v0", 50_000, 92, "-squashed", params=_SQUASHED_MOUNTAIN_CAR),
    _row("Acrobot-v1", 500_000, -80, comparison="-73.5 (ppo, 1M)", n_episodes=100),
    _row("LunarLander-v3", 1_000_000, 240, comparison="242 (ppo, 1M)", n_episodes=100),
    _row("LunarLander-v3", 1_000_000, 240, "-fixed-kl", params=_FIXED_KL_LANDER, n_episodes=100),
    _row("LunarLander-v3", 1_000_000, 240, "-adaptive-kl", params=_ADAPTIVE_KL, n_episodes=100),
    _row("Hopper-v5", 1_000_000, None, comparison="3618 (trpo, 1M), 2410 (ppo, 1M)"),
    # All runs of SB3's PPO came when the machine was half as fast as in ClipPPO's fastest one.
    _row("HalfCheetah-v5", 1_000_000, None, comparison="5819 (ppo, 1M)", has_times=False),
    _row("Walker2d-v5", 1_000_000, None, comparison="4933 (trpo, 1M), 3479 (ppo, 1M)"),
    _row(
        "BipedalWalker-v3",
        5_000_000,
        290,
        comparison="300 (a2c, 5M), 213 (ppo, 5M)",
        n_episodes=100,
        vec_env="envpool",  # 14 minutes instead of 60
    ),
)

_Runs: TypeAlias = Sequence[Mapping[str, Any]]

_NOTES = (
    "A return is the mean over the seeds of the final models' evaluations, with its 95 % interval "
    "(`docs/experiments.md` defines it). An evaluation is the mean of 20 episodes, or 100 where returns differ much, "
    "with the most probable actions and the environment's own rewards. SB3's PPO uses the RL Zoo's settings, and the "
    "same steps, environments and seeds as ClipPPO. *reached*: whether ClipPPO's mean reaches the goal, and how many "
    "single seeds do. *CPU minutes*: processor time of the fastest run, ClipPPO's and SB3's. *others*: the RL Zoo's "
    "published results, with algorithm and steps, one run each, on version 3 of MuJoCo's environments and version 2 of "
    "LunarLander."
)


class LearningBenchmark(TrainingBenchmark[Row]):
    """Evaluates final models, and tabulates their returns beside SB3's and the goals."""

    name = "learning"
    description = "Train with the packaged settings, and SB3's PPO with the RL Zoo's, and tabulate the returns."
    # Lower seeds chose settings: those of suites of the kind tune, and, for clip ranges, those of the suite defaults.
    first_seed = 2000
    default_seeds = tuple(range(first_seed, first_seed + 5))
    log_folder = "logs/bench"

    def measure(self, record: Record) -> dict[str, Any]:
        """Keep the evaluation of the final model, the processor time, and the training's curve."""
        scores = record.scores
        evaluation = {"mean_return": scores["evaluation_mean"], "std_return": scores["evaluation_std"]}
        return {**evaluation, "cpu_seconds": scores.get("cpu_seconds"), "curve": record.curve}

    def summary(self, row: Row, result: Mapping[str, Any]) -> str:
        """Return the evaluation beside the goal."""
        goal = "" if row.goal is None else f" (goal {row.goal:g})"
        return f"{result['mean_return']:.2f} +/- {result['std_return']:.2f}{goal}"

    def listed(self, row: Row) -> str:
        """Return the goal before the rest."""
        goal = "" if row.goal is None else f"goal {row.goal:>4g}"
        return f"{goal:<9}  {super().listed(row)}"

    def render(self) -> str:
        """Return the table of returns, after the figure."""
        table = render_table(self.results, self._ours(), self.seeds)
        if not self._compared():
            return table
        return f"![{CAPTION}]({self.figure.name})\n\n{CAPTION}.\n\n{table}"

    def draw(self, path: Path) -> bool:
        """Draw the curves of the packaged settings and of SB3's PPO against processor time."""
        compared = self._compared()
        if compared:
            write_time_figure(compared, path)
        return bool(compared)

    def _compared(self) -> list[TimeComparison]:
        """Return the environments to draw: those in which the runs of both algorithms are complete."""
        found = []
        for row in self._ours():
            if row.has_times and not row.params:
                ours, peers = (_runs(self.results, one, self.seeds) for one in (row, row.peer()))
                found.append(TimeComparison(row.env_id, row.n_timesteps, ours, peers, len(self.seeds)))
        return [one for one in found if one.is_drawn()]

    def _ours(self) -> list[Row]:
        return [row for row in self.rows if row.algo == ALGORITHM]


def render_table(results: Results, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Render the results of the rows and seeds, beside those of their peers, as a Markdown table with notes."""
    header = ["environment and settings", "steps", "ClipPPO", "SB3 PPO", "difference from SB3 PPO"]
    header += ["difference from the packaged settings", "goal", "reached", "CPU minutes", "others (RL Zoo)"]
    found = {row: _runs(results, row, seeds) for made in rows for row in (made, made.peer())}
    shipped = {row.env_id: found[row] for row in rows if not row.params}
    begun = [row for row in rows if found[row] or found[row.peer()]]
    lines = [_cells(row, found[row], found[row.peer()], shipped.get(row.env_id, []), len(seeds)) for row in begun]
    table = markdown_table(header, "lrrrrrrlrl", lines)
    if missing := [row.name for row in rows if row not in begun]:
        table += f"\n\nNot run: {', '.join(missing)}."
    machines = machines_text([run for runs in found.values() for run in runs], how_made)
    return f"{table}\n\nSeeds: {', '.join(map(str, seeds))}. {_NOTES}\n\n{machines}"


def _runs(results: Results, row: Row, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [run for seed in seeds if (run := results.find(row.run(seed))) is not None]


def _cells(row: Row, ours: _Runs, peers: _Runs, shipped: _Runs, n_seeds: int) -> list[str]:
    options = [*row.params, *(["--vec-env", row.vec_env] if row.vec_env != "dummy" else [])]
    settings = f"{row.name}<br>`{' '.join(options)}`" if options else row.name
    our_returns, peer_returns = _returns(ours), _returns(peers)
    goal = "" if row.goal is None else f"{row.goal:g}"
    cells = [settings, f"{row.n_timesteps:,}", _mean(our_returns, n_seeds), _mean(peer_returns, n_seeds)]
    cells += [_difference(our_returns, peer_returns)]
    cells += [_difference(our_returns, _returns(shipped)) if row.params else "", goal, _reached(row.goal, our_returns)]
    # Times of a few runs compare machines.
    is_timed = row.has_times and len(ours) == len(peers) == n_seeds
    minutes = f"{_minutes(ours)} / {_minutes(peers)}" if is_timed else ""
    return [*cells, minutes, row.comparison]


def _returns(runs: _Runs) -> list[float]:
    return [run["mean_return"] for run in runs]


def _difference(returns: Sequence[float], others: Sequence[float]) -> str:
    found = estimate(difference(mean), over_seeds(returns), over_seeds(others))
    return "" if found is None else found.text("z,.1f")


def _mean(returns: Sequence[float], n_seeds: int) -> str:
    found = estimate(mean, over_seeds(returns))
    if found is None:
        return "not run"
    text = found.text("z,.1f")
    return text if len(returns) == n_seeds else f"{text} ({len(returns)} of {n_seeds} seeds)"


def _reached(goal: float | None, returns: Sequence[float]) -> str:
    if goal is None or not returns:
        return ""
    alone = sum(value >= goal for value in returns)
    return f"{'yes' if np.mean(returns) >= goal else 'no'} ({alone} of {len(returns)})"


def _minutes(runs: _Runs) -> str:
    seconds = fastest_seconds(runs)
    return "?" if seconds is None else f"{seconds / 60:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with these options, and return its exit code."""
    return LearningBenchmark(with_peers(ROWS), argv).main()
