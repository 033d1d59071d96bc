"""Imports of the package load heavy and optional packages only where they are used."""

import subprocess
import sys

import sb3_clipvf
from sb3_clipvf import callbacks, checkpoint


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_the_package_alone_loads_neither_torch_nor_sb3() -> None:
    assert not loaded_by("import sb3_clipvf") & {"torch", "stable_baselines3", "gymnasium", "numpy"}


def test_the_package_has_all_callbacks_for_users() -> None:
    homes = {callbacks: ["IsolatedEvalCallback"], checkpoint: ["SaveBestTrainingReward", "TrainingCheckpoint"]}
    for home, names in homes.items():
        assert [getattr(sb3_clipvf, name) for name in names] == [getattr(home, name) for name in names]
    assert all(hasattr(sb3_clipvf, name) for name in sb3_clipvf.__all__)


def test_the_algorithm_loads_no_package_that_sb3_does_not() -> None:
    ours, theirs = loaded_by("from sb3_clipvf import ClipPPO"), loaded_by("from stable_baselines3 import PPO")
    standard = set(sys.stdlib_module_names)
    assert {name for name in ours - theirs - standard if not name.startswith("_")} == {"sb3_clipvf"}
