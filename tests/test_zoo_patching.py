"""Patches of other packages: they are undone, and each fails here once its package no longer needs it."""

import importlib
import inspect
import io
import subprocess
import warnings
from argparse import Namespace
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_sb3
import pytest
import rl_zoo3.train
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_sb3 import EnvironmentName
from matplotlib import pyplot as plt
from requests.exceptions import HTTPError
from rl_zoo3 import exp_manager, utils
from stable_baselines3.common import save_util
from stable_baselines3.common import utils as base_utils
from stable_baselines3.common.logger import HumanOutputFormat
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_clipvf.zoo import register
from sb3_clipvf.zoo.patching import PATCHES, patched, replaced

register()


def _script(name: str) -> str:
    return (files("rl_zoo3") / f"{name}.py").read_text()


def _strings_become_linear_schedules() -> bool:
    read = exp_manager.ExperimentManager._preprocess_schedules({"clip_range": "cos_0.2"})
    return isinstance(read["clip_range"], utils.SimpleLinearSchedule)


def _runs_without_a_model_are_taken() -> bool:
    Path("CartPole-v1_2").mkdir()
    return utils.get_latest_run_id(".", EnvironmentName("CartPole-v1")) == 2


def _checkpoints_are_not_found() -> bool:
    folder = Path("clipppo", "E_1", "checkpoints")
    folder.mkdir(parents=True)
    (folder / "checkpoint_8.zip").touch()
    with pytest.raises(ValueError, match="No checkpoint found"):
        utils.get_model_path(1, ".", "clipppo", EnvironmentName("E"), load_last_checkpoint=True)
    return True


def _null_settings_are_kept() -> bool:
    Path("config.yml").write_text("frame_stack: null")
    settings, _ = utils.get_saved_hyperparams(".")
    return "frame_stack" in settings  # which it compares with 0


def _arguments_of_the_settings_are_ignored() -> bool:
    settings = {"normalize": False, "env_kwargs": {"g": 5.0}}
    env = utils.create_test_env("Pendulum-v1", hyperparams=settings, should_render=False)
    gravity: float = env.get_attr("g")[0]
    env.close()
    return gravity != 5.0


def _monitors_overwrite_their_files() -> bool:
    is_default = inspect.signature(Monitor).parameters["override_existing"].default
    return bool(is_default) and "override_existing" not in inspect.getsource(exp_manager)


def _each_row_is_a_table() -> bool:
    shown = io.StringIO()
    output = HumanOutputFormat(shown)
    for row in range(2):
        output.write({"row": row}, {"row": ()})
    return shown.getvalue().count("row") == 2


def _figures_are_lost() -> bool:
    plt.switch_backend("Agg")
    plt.figure()
    with warnings.catch_warnings(action="ignore"):
        plt.show()
    plt.close("all")
    return not list(Path().glob("*.png"))


def _errors_of_the_network_are_raw() -> bool:
    def list_models(**_: Any) -> None:
        raise RuntimeError("unreachable")

    with replaced(utils, "HfApi", lambda: Namespace(list_models=list_models)):
        with pytest.raises(RuntimeError, match="^unreachable$"):
            utils.get_hf_trained_models()
    return True


NEEDED: dict[str, Callable[[], bool]] = {
    "new_manager": _strings_become_linear_schedules,
    "parse_args": lambda: "args = parser.parse_args()" in inspect.getsource(rl_zoo3.train.train),
    "yaml_loader": lambda: "yaml.UnsafeLoader" in inspect.getsource(utils.get_saved_hyperparams),
    "load_statistics": lambda: "pickle.load(" in inspect.getsource(VecNormalize.load),
    "load_model": lambda: "cloudpickle.loads(" in inspect.getsource(save_util.json_to_data),
    "load_replay_buffer": lambda: "pickle.load(" in inspect.getsource(save_util.load_from_pkl),
    "wrapper_class": lambda: utils.get_wrapper_class({"env_wrapper": "os.getcwd"}) is not None,
    "plot_pickle": lambda: "pickle.load(" in _script("plots/plot_from_file"),
    "latest_run": _runs_without_a_model_are_taken,
    "model_path": _checkpoints_are_not_found,
    "saved_settings": _null_settings_are_kept,
    "test_env": _arguments_of_the_settings_are_ignored,
    "models_of_run": lambda: "in os.scandir(log_path) if dir_ent.is_file()]" in _script("record_training"),
    "make_vec_env": _monitors_overwrite_their_files,
    "write_table": _each_row_is_a_table,
    "configure_logger": lambda: not base_utils.configure_logger(0).output_formats,
    "call": lambda: (
        'call(["python", "enjoy.py"' in _script("benchmark")
        and 'call(["python", "-m", "rl_zoo3.record_video"' in _script("record_training")
    ),
    "show": _figures_are_lost,
    "hub_metadata": lambda: (
        not hasattr(importlib.import_module("huggingface_sb3.push_to_hub"), "generate_metadata")
        and "generate_metadata" in _script("push_to_hub")
    ),
    "hub_card": lambda: "python -m rl_zoo3." in _script("push_to_hub"),
    "hub_download": lambda: (
        not issubclass(RemoteEntryNotFoundError, HTTPError)
        and "TRUST_REMOTE_CODE" in inspect.getsource(huggingface_sb3.load_from_hub)
    ),
    "hub_models": _errors_of_the_network_are_raw,
}


@pytest.mark.parametrize("key", PATCHES)
def test_each_patch_is_still_needed(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert NEEDED[key]()


@pytest.mark.parametrize("key", PATCHES)
def test_each_patch_is_undone(key: str) -> None:
    patch = PATCHES[key]

    def values() -> list[Any]:
        return [vars(owner).get(patch.name) for owner in patch.owners]

    before = values()
    assert (None in before) == (key == "hub_metadata")
    with pytest.raises(KeyError, match="inside"), patched(**{key: 3}):
        assert values() == [3] * len(before)
        raise KeyError("inside")
    assert values() == before


def test_an_unknown_patch_is_refused() -> None:
    call = subprocess.call
    with pytest.raises(KeyError, match="nothing"), patched(call=None, nothing=None):
        pass
    assert subprocess.call is call
