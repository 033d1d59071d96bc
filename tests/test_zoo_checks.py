"""Checks of the RL Zoo's options."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from sb3_clipvf.zoo.checks import check_options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_timesteps": 0}, "`--n-timesteps` must be a whole number of at least 1, got 0"),
        ({"eval_episodes": 0}, "`--eval-episodes` must be a whole number of at least 1, got 0"),
        ({"n_eval_envs": 0}, "`--n-eval-envs` must be"),
        ({"n_trials": 0}, "`--n-trials` must be"),
        ({"log_interval": 0}, r"`--log-interval` must not be 0, got 0\. .* -2 for no log"),
        ({"n_jobs": -1}, "`--n-jobs` must be"),
        ({"num_threads": 0}, "`--num-threads` must be"),
        ({"seed": 2**32, "trained_agent": ""}, r"`--seed` must be a whole number in \[-4294967295, 4294967295\]"),
        ({"seed": -1}, r"`--seed` must be a whole number in \[0, 4294967295\], got -1"),
        ({"episode_window": 0}, "`--episode-window` must be a whole number of at least 1, got 0"),
        ({"log_folder": ""}, "`--log-folder` must be a folder, got ''"),
        ({"algo": "ppo", "device": "gpu"}, "`device` must be 'auto' or a PyTorch device, got 'gpu'"),
        ({"trial_id": None, "storage": "x.log", "study_name": "s"}, "`--trial-id` must be given with `--storage`"),
        ({"trial_id": None, "storage": None, "study_name": "s"}, "`--storage` must be given with `--study-name`"),
        ({"trial_id": 0, "storage": None, "study_name": None}, "`--storage` must be given with `--trial-id`"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(Namespace(**given))


@pytest.mark.parametrize(
    "given",
    [
        {
            "n_timesteps": -1,
            "num_threads": -1,
            "seed": -1,
            "trained_agent": "",
            "max_total_trials": None,
            "n_evaluations": None,
        },
        {"trial_id": None, "storage": "x.log", "study_name": None, "optimize_hyperparameters": True},
        {"trial_id": 0, "storage": "x.log", "study_name": "s"},
        {"tensorboard_log": "", "output_folder": None, "gym_packages": ["json"]},
    ],
)
def test_the_zoos_own_defaults_are_legal(given: dict[str, Any]) -> None:
    check_options(Namespace(**given))


@pytest.mark.parametrize("name", ["log_folder", "tensorboard_log", "output_folder", "reward_log", "benchmark_dir"])
def test_folders_that_cannot_be_written_to_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"`--{name.replace('_', '-')}` must be a folder that can be written to"):
        check_options(Namespace(**{name: str(tmp_path / "file" / "logs")}))


@pytest.mark.parametrize("module", ["not_there", "not.there", ".", "json.not_there"])
def test_modules_that_cannot_be_imported_are_refused(module: str) -> None:
    with pytest.raises(ImportError, match="`--gym-packages` must name modules that can be imported"):
        check_options(Namespace(gym_packages=[module]))
