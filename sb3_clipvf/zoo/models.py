"""
Which model of a run is taken, and which statistics of ``VecNormalize`` belong to it.

The Zoo finds ``rl_model_<timesteps>_steps.zip`` only, and normalises every model by the statistics of the last one.
"""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_sb3 import EnvironmentName, ModelName
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_clipvf.checkpoint import newest_checkpoint
from sb3_clipvf.checkpoint.file import sorted_checkpoints
from sb3_clipvf.common.messages import log
from sb3_clipvf.zoo.defaults import ALGORITHM
from sb3_clipvf.zoo.entries import counted, drop_null
from sb3_clipvf.zoo.finding import choose_run
from sb3_clipvf.zoo.resume import CHECKPOINTS
from sb3_clipvf.zoo.run_files import replaced
from sb3_clipvf.zoo.statistics import EARLIER, STATISTICS, has_own_statistics, own_statistics


@contextmanager
def own_models(command: str) -> Iterator[None]:
    """
    Make the RL Zoo find checkpoints of ClipPPO's runs in the context, and normalise each model by its own statistics.

    :param command: Sub-command that will run, whose module may have the Zoo's functions under their names already.
    """
    import rl_zoo3
    from rl_zoo3 import utils

    owners = [utils, rl_zoo3]
    if command == "enjoy":
        owners.append(importlib.import_module("rl_zoo3.enjoy"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        finder = _Finder(Path(folder), utils.get_model_path, utils.get_saved_hyperparams, VecNormalize.load)
        stack.enter_context(replaced(utils, "get_latest_run_id", _latest_run_id))
        stack.enter_context(replaced(VecNormalize, "load", staticmethod(finder.load)))
        for owner in owners:
            for name, function in (
                ("get_model_path", finder.get_model_path),
                ("get_saved_hyperparams", finder.get_saved_hyperparams),
                ("create_test_env", partial(_create_test_env, vars(owner)["create_test_env"])),
            ):
                if name in vars(owner):
                    stack.enter_context(replaced(owner, name, function))
        yield


def complete_settings(hyperparams: dict[str, Any], env_kwargs: dict[str, Any]) -> None:
    """
    Complete in place what the RL Zoo's ``create_test_env`` builds environments from, so that they are the training's.

    :param hyperparams: Settings of the run.
    :param env_kwargs: Arguments of the environment that were given otherwise, and go before those of the settings.
    """
    drop_null(hyperparams)
    hyperparams.setdefault("normalize", False)
    counted(hyperparams)
    for name, value in hyperparams.pop("env_kwargs", {}).items():
        env_kwargs.setdefault(name, value)


def _create_test_env(
    create: Any, *args: Any, hyperparams: dict[str, Any], env_kwargs: dict[str, Any], **kwargs: Any
) -> VecEnv:
    # In place, since `push_to_hub` writes the arguments to its files.
    complete_settings(hyperparams, env_kwargs)
    return create(*args, hyperparams=hyperparams, env_kwargs=env_kwargs, **kwargs)  # type: ignore[no-any-return]


class _Finder:
    """
    The Zoo's functions that find a model and its statistics, and what they found last.

    :param folder: An empty one, for statistics.
    :param model_path: The Zoo's ``get_model_path``.
    :param hyperparams: The Zoo's ``get_saved_hyperparams``.
    :param load: ``VecNormalize.load`` as it was.
    """

    def __init__(self, folder: Path, model_path: Any, hyperparams: Any, load: Any) -> None:
        self._folder = folder
        self._model_path = model_path
        self._hyperparams = hyperparams
        self._load = load
        self._chosen: Path | None = None

    def get_model_path(
        self,
        exp_id: int,
        folder: str,
        algo: str,
        env_name: EnvironmentName,
        load_best: bool = False,
        load_checkpoint: int | None = None,
        load_last_checkpoint: bool = False,
    ) -> tuple[str, str, str]:
        arguments = (exp_id, folder, algo, env_name, load_best, load_checkpoint, load_last_checkpoint)
        if algo != ALGORITHM:
            return self._model_path(*arguments)  # type: ignore[no-any-return]
        run = _run_folder(exp_id, folder, algo, env_name)
        chosen = None
        if not load_best and load_checkpoint is not None:
            path = run / CHECKPOINTS / f"checkpoint_{load_checkpoint}.zip"
            chosen = path if path.is_file() else None
        elif not load_best and load_last_checkpoint:
            chosen = _last_checkpoint(run)
        if chosen is not None:
            found = f"checkpoint-{_steps(chosen)}-{ModelName(algo, env_name)}", str(chosen), str(run)
        else:
            try:
                found = self._model_path(*arguments)
            except ValueError as error:
                steps = [str(_steps(path)) for path in sorted_checkpoints(run / CHECKPOINTS)]
                if not steps:
                    raise
                has_ended = (run / f"{env_name}.zip").is_file()
                resume = "" if has_ended else f", and `sb3-clipvf train --resume {run}` ends the training"
                raise ValueError(
                    f"{error}. {run / CHECKPOINTS} has those of the steps {', '.join(steps)}: `--load-last-checkpoint` "
                    f"or `--load-checkpoint {steps[-1]}` takes one{resume}."
                ) from error
        self._chosen = Path(found[1])
        return found

    def get_saved_hyperparams(
        self, stats_path: str, norm_reward: bool = False, test_mode: bool = False
    ) -> tuple[dict[str, Any], str | None]:
        hyperparams, path = self._hyperparams(stats_path, norm_reward, test_mode)
        drop_null(hyperparams)
        if path is None or self._chosen is None or not hyperparams.get("normalize"):
            return hyperparams, path
        if not has_own_statistics(self._chosen):
            if EARLIER.fullmatch(self._chosen.name):
                log.warning(
                    "%s has no statistics of VecNormalize: those of another step, in %s, are used. Models in "
                    "`checkpoints/` have their own.",
                    self._chosen,
                    path,
                )
            return hyperparams, path
        # The Zoo asks whether there is a file; `load` knows where to read.
        (self._folder / STATISTICS).touch()
        return hyperparams, str(self._folder)

    def load(self, load_path: str, venv: VecEnv) -> VecNormalize:
        if self._chosen is not None and Path(load_path).parent == self._folder:
            return own_statistics(self._chosen, venv)
        return self._load(load_path, venv)  # type: ignore[no-any-return]


def _latest_run_id(log_path: str, env_name: str) -> int:
    """The Zoo's function of this name, where a run counts only if it ended with a model."""
    return choose_run(Path(log_path), env_name, 0, lambda run: (run / f"{env_name}.zip").is_file())


def _run_folder(exp_id: int, folder: str, algo: str, env_name: EnvironmentName) -> Path:
    from rl_zoo3.utils import get_latest_run_id

    parent = Path(folder) / algo
    number = exp_id or get_latest_run_id(str(parent), env_name)
    return parent / f"{env_name}_{number}" if number > 0 else parent


def _steps(path: Path) -> int:
    return int(path.stem.removeprefix("rl_model_").removeprefix("checkpoint_").removesuffix("_steps"))


def _last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint, where the Zoo has no later one of its own."""
    if not sorted_checkpoints(run / CHECKPOINTS):
        return None
    newest = newest_checkpoint(run / CHECKPOINTS)
    of_the_zoo = max(map(_steps, run.glob("rl_model_*_steps.zip")), default=-1)
    return newest.path if newest.manifest.num_timesteps >= of_the_zoo else None
