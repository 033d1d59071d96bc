"""Where the time of a configuration goes: the functions that cProfile saw, summed by area of the code."""

from __future__ import annotations

import cProfile
import pstats
from collections import defaultdict
from typing import Any

_TOP = 25
_SWEEPS = 200  # the deepest chain of calls that is followed

# Part of the file's path, function ("" for any), area; the first that fits. Any other function (PyTorch, NumPy,
# built-in ones, the engines, shared helpers) counts to the areas that call it, by the time of each caller's calls.
_AREAS: tuple[tuple[str, str, str], ...] = (
    ("stable_baselines3/common/monitor.py", "", "adapters and wrappers"),
    ("stable_baselines3/common/vec_env/", "", "adapters and wrappers"),
    ("stable_baselines3/common/running_mean_std.py", "", "adapters and wrappers"),
    ("sb3_clipvf/envs", "", "adapters and wrappers"),
    ("stable_baselines3/common/atari_wrappers.py", "", "environments"),
    ("/gymnasium/", "", "environments"),
    ("/envpool/", "", "environments"),
    ("/ale_py/", "", "environments"),
    ("/mujoco/", "", "environments"),
    ("tests/bench/speed_free.py", "", "environments"),
    ("stable_baselines3/common/buffers.py", "", "rollout buffer"),
    ("sb3_clipvf/rollout.py", "", "rollout buffer"),
    ("stable_baselines3/common/logger.py", "", "logger"),
    ("", "dump_logs", "logger"),
    ("stable_baselines3/common/callbacks.py", "", "callbacks"),
    ("sb3_clipvf/engines/", "act", "policy in the rollout"),
    ("sb3_clipvf/engines/", "predict_values", "policy in the rollout"),
    ("sb3_clipvf/collection.py", "bootstrap_truncated", "policy in the rollout"),
    ("stable_baselines3/common/policies.py", "forward", "policy in the rollout"),
    ("stable_baselines3/common/policies.py", "predict_values", "policy in the rollout"),
    ("sbx/ppo/policies.py", "", "policy in the rollout"),
    ("clip_ppo.py", "train", "update"),
    ("ppo/ppo.py", "train", "update"),
    ("", "collect_rollouts", "loop of the rollout"),
    ("tests/bench/speed_child.py", "", "other"),
)


def area_of(path: str, function: str) -> str | None:
    """Return the area of a function by its file ("~" if built in) and name, or None if its callers decide on it."""
    for part, name, area in _AREAS:
        if part in path and name in ("", function):
            return area
    return None


def sum_areas(stats: dict[Any, Any]) -> dict[str, float]:
    """
    Sum by area the seconds that functions spent in themselves, largest area first.

    ``stats`` is ``pstats.Stats(...).stats``: function -> (calls, calls, own seconds, seconds with callees, callers).
    """
    shares = {function: _fixed(function) for function in stats}
    open_functions = [function for function, share in shares.items() if share is None]
    weights = {function: _caller_weights(stats[function][4]) for function in open_functions}
    for _ in range(_SWEEPS):  # each sweep passes areas on to callees; cycles of calls converge
        new = {function: _mixed(weights[function], shares) for function in open_functions}
        if all(new[function] == shares[function] for function in open_functions):
            break
        shares.update(new)
    seconds: dict[str, float] = defaultdict(float)
    for function, (_, _, own, _, _) in stats.items():
        share = shares[function] or {}
        for area, part in share.items():
            seconds[area] += own * part
        seconds["other"] += own * max(0.0, 1.0 - sum(share.values()))
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _fixed(function: Any) -> dict[str, float] | None:
    path, _, name = function
    area = area_of(path, name)
    return None if area is None else {area: 1.0}


def _caller_weights(callers: dict[Any, Any]) -> dict[Any, float]:
    seconds = {caller: float(numbers[3]) for caller, numbers in callers.items()}
    total = sum(seconds.values())
    return {caller: part / total for caller, part in seconds.items()} if total > 0 else {}


def _mixed(weights: dict[Any, float], shares: dict[Any, dict[str, float] | None]) -> dict[str, float]:
    mixed: dict[str, float] = defaultdict(float)
    for caller, weight in weights.items():
        for area, part in (shares.get(caller) or {}).items():
            mixed[area] += weight * part
    return dict(mixed)


def summarise(profiler: cProfile.Profile) -> dict[str, Any]:
    """Summarise a profile: ``areas`` (area -> seconds) and ``top`` (own seconds, calls, function), largest first."""
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    by_own = sorted(stats.items(), key=lambda item: -item[1][2])[:_TOP]
    top = [[own, calls, _label(function)] for function, (_, calls, own, _, _) in by_own]
    return {"areas": sum_areas(stats), "top": top}


def _label(function: Any) -> str:
    path, line, name = function
    if path == "~":
        return str(name)
    short = "/".join(path.split("/")[-3:])
    return f"{short}:{line}({name})"


def render_profile(title: str, result: dict[str, Any]) -> str:
    """Render the result of a profiled run as text."""
    areas, top = result["profile"]["areas"], result["profile"]["top"]
    total = sum(areas.values())
    wall, update = result["wall_seconds"], result["update_seconds"]
    lines = [
        f"{title}: {result['steps']:,} steps in {wall:.2f} s, engine {result['engine']}.",
        "cProfile slows Python code down and compiled code not: compare areas, do not read speeds here.",
        "",
        f"By the clock: environment {result['environment_seconds']:.2f} s, policy {result['policy_seconds']:.2f} s, "
        f"update {update:.2f} s, other {result['other_seconds']:.2f} s",
        "",
        f"{'area':<24}{'seconds':>9}{'share':>8}",
        *(f"{area:<24}{seconds:>9.2f}{seconds / total:>8.1%}" for area, seconds in areas.items()),
        "",
        f"The {len(top)} functions with the most time in themselves:",
        f"{'seconds':>9}{'calls':>10}  function",
        *(f"{seconds:>9.3f}{calls:>10,}  {function}" for seconds, calls, function in top),
    ]
    return "\n".join(lines) + "\n"
