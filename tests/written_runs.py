"""Folders of runs as the RL Zoo and SB3 write them, without a training."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def write_monitor(
    path: Path, episodes: list[tuple[float, int, float]], start: float = 1000.0, env_id: str = ""
) -> None:
    """Write episodes (return, length, end in seconds) as SB3's Monitor does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{value},{length},{end}\n" for value, length, end in episodes)
    path.write_text(f"#{json.dumps({'t_start': start, 'env_id': env_id})}\nr,l,t\n{rows}")


def write_run(
    folder: Path,
    *,
    env_id: str = "CartPole-v1",
    algo: str = "clipppo",
    seed: int = 1,
    returns: tuple[float, ...] = (10.0, 20.0, 30.0, 40.0),
    settings: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    version: str = "2.9.2",
) -> Path:
    """Write a run of the Zoo with episodes of 100 steps and one second; return its folder."""
    own = folder / env_id
    own.mkdir(parents=True)
    options = {"algo": algo, "env": env_id, "seed": seed, "n_timesteps": -1, "log_folder": "logs", **(arguments or {})}
    (own / "args.yml").write_text(yaml.dump(options))
    (own / "config.yml").write_text(yaml.dump({"policy": "MlpPolicy", **(settings or {})}))
    episodes = [(value, 100, float(number)) for number, value in enumerate(returns, 1)]
    write_monitor(folder / "0.monitor.csv", episodes, env_id=env_id)
    with zipfile.ZipFile(folder / f"{env_id}.zip", "w") as archive:
        data = {"num_timesteps": 100 * len(returns), "_num_timesteps_at_start": 0, "start_time": 1000 * 10**9}
        archive.writestr("data", json.dumps(data))
        archive.writestr("system_info.txt", f"- Python: 3.11.7\n- Stable-Baselines3: {version}\n")
    return folder


def write_report(folder: Path, mean_return: float, num_timesteps: int, **numbers: Any) -> None:
    """Write the numbers that a report of the final model contains and others read."""
    model = f"{folder}/CartPole-v1.zip"
    content = {"model": model, "mean_return": mean_return, "num_timesteps": num_timesteps, "deterministic": True}
    (folder / "report.json").write_text(json.dumps({**content, **numbers}))


def write_evaluations(path: Path, steps: list[int], results: list[list[float]]) -> None:
    """Write evaluations as SB3's EvalCallback does."""
    np.savez(path, timesteps=steps, results=results, ep_lengths=results)
