"""This version reads the files of earlier ones, in tests/data, and resumes their trainings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_files

from sb3_clipvf import ClipPPO
from sb3_clipvf.checkpoint import load_best_training
from sb3_clipvf.envs import FastVecNormalize

VERSIONS = sorted(path for path in saved_files.FOLDER.iterdir() if (path / "expected.npz").exists())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", saved_files.MODELS)
def test_models_predict_and_continue(name: str, folder: Path, expected: dict[str, np.ndarray]) -> None:
    env = saved_files.walks(name)
    model = ClipPPO.load(folder / f"{name}.zip", env=env, device="cpu")
    assert np.array_equal(saved_files.weights(model), expected[f"{name}_weights"])
    actions = model.predict(saved_files.OBSERVATIONS, deterministic=True)[0]
    np.testing.assert_allclose(actions, expected[f"{name}_actions"], rtol=1e-5, atol=1e-6)  # sums of another machine
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 64 + 32


def test_the_statistics(folder: Path, expected: dict[str, np.ndarray]) -> None:
    normalizer = FastVecNormalize.load(str(folder / "vecnormalize.pkl"), saved_files.pendulums(1).venv)
    assert np.array_equal(np.stack([normalizer.obs_rms.mean, normalizer.obs_rms.var]), expected["statistics"])


def test_best_models_are_read_with_their_statistics(folder: Path) -> None:
    pairs: list[tuple[Path, Any]] = [
        load_best_training(folder / "best_training"),
        (folder / "best_eval" / "best_model.zip", folder / "best_eval" / "best_vecnormalize.pkl"),
    ]
    for model_path, statistics_path in pairs:
        env = FastVecNormalize.load(str(statistics_path), saved_files.pendulums(1).venv)
        model = ClipPPO.load(model_path, env=env, device="cpu")
        assert np.isfinite(model.predict(env.reset())[0]).all()


def test_a_training_resumes_from_its_checkpoint(folder: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = ClipPPO.resume(folder / "checkpoints", saved_files.pendulums(1), device="cpu")
    assert (model.num_timesteps, model.remaining_timesteps) == (
        saved_files.KEPT,
        saved_files.TIMESTEPS - saved_files.KEPT,
    )
    model.learn(model.remaining_timesteps, reset_num_timesteps=False, callback=saved_files.callbacks(tmp_path))
    # To the last bit on one machine, with one version; elsewhere sums are rounded differently.
    np.testing.assert_allclose(saved_files.weights(model), expected["training_weights"], rtol=1e-3, atol=1e-4)
