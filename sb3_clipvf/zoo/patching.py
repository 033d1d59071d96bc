"""
Every attribute of another package that ``sb3-clipvf`` replaces while it runs: where, for which version, and why.

Each replacement is defined in the module of its concept and installed by this one. ``tests/test_zoo_patching.py`` has a
test for each patch that fails when its package no longer needs it.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

_ZOO, _SB3 = "rl_zoo3 2.9.2", "stable_baselines3 2.9.2"
_MISSING = object()


@dataclass(frozen=True)
class Patch:
    """One attribute of another package."""

    target: str  # its full name
    version: str  # package and version whose behaviour needs the patch
    reason: str  # what happens without the patch
    copies: tuple[str, ...] = ()  # modules that imported it by its name

    @property
    def name(self) -> str:
        """Return the attribute's name in its owners."""
        return self.target.rpartition(".")[2]

    @property
    def owners(self) -> list[Any]:
        """Return the modules or classes that have the attribute, imported."""
        return [pkgutil.resolve_name(self.target.rpartition(".")[0]), *map(importlib.import_module, self.copies)]


PATCHES = {
    "new_manager": Patch(
        "rl_zoo3.exp_manager.ExperimentManager.__new__",
        _ZOO,
        "All strings become linear schedules. Scripts accept no subclass, and may have imported the class already.",
    ),
    "parse_args": Patch("argparse.ArgumentParser.parse_args", _ZOO, "Scripts build their parsers inside functions."),
    # Files that can run any code as they are read
    "yaml_loader": Patch("yaml.UnsafeLoader", _ZOO, "Settings of runs are unsafe YAML."),
    "load_statistics": Patch(
        "stable_baselines3.common.vec_env.VecNormalize.load",
        _SB3,
        "Statistics are unpickled. For every model, the Zoo loads those from the end of the run.",
    ),
    "load_model": Patch("stable_baselines3.common.base_class.load_from_zip_file", _SB3, "Models are unpickled."),
    "load_replay_buffer": Patch(
        "stable_baselines3.common.off_policy_algorithm.load_from_pkl", _SB3, "Replay buffers are unpickled."
    ),
    "plot_pickle": Patch("rl_zoo3.plots.plot_from_file.pickle", _ZOO, "Data of plots are unpickled."),
    "wrapper_class": Patch("rl_zoo3.utils.get_wrapper_class", _ZOO, "Calls anything that a run names as its wrapper."),
    # Models of runs
    "latest_run": Patch("rl_zoo3.utils.get_latest_run_id", _ZOO, "Takes runs without a model, and no `-uuid` run."),
    "model_path": Patch(
        "rl_zoo3.utils.get_model_path", _ZOO, "Finds no checkpoints of ClipPPO's runs.", ("rl_zoo3.enjoy",)
    ),
    "saved_settings": Patch(
        "rl_zoo3.utils.get_saved_hyperparams", _ZOO, "Keeps null settings, which fail.", ("rl_zoo3", "rl_zoo3.enjoy")
    ),
    "test_env": Patch(
        "rl_zoo3.utils.create_test_env", _ZOO, "Ignores `env_kwargs` of settings.", ("rl_zoo3", "rl_zoo3.enjoy")
    ),
    "models_of_run": Patch("os.scandir", _ZOO, "`record_training` finds no checkpoints of ClipPPO's runs."),
    # Training
    "make_vec_env": Patch("rl_zoo3.exp_manager.make_vec_env", _ZOO, "A resumed run overwrites its episodes."),
    "write_table": Patch(
        "stable_baselines3.common.logger.HumanOutputFormat.write", _SB3, "Prints a table for each of many rollouts."
    ),
    "configure_logger": Patch(
        "stable_baselines3.common.utils.configure_logger", _SB3, "Without TensorBoard, no log of a run is kept."
    ),
    # Processes, figures, Hugging Face hub
    "call": Patch("subprocess.call", _ZOO, "Processes that the Zoo starts do not support ClipPPO."),
    "show": Patch("matplotlib.pyplot.show", "matplotlib 3.11.2", "Figures are lost without a display."),
    "hub_metadata": Patch(
        "huggingface_sb3.push_to_hub.generate_metadata", "sb3-team-hf-integration 3.2", "The Zoo imports an old name."
    ),
    "hub_card": Patch("huggingface_hub.repocard.metadata_save", _ZOO, "Commands of model cards lack ClipPPO."),
    "hub_download": Patch(
        "huggingface_sb3.load_from_hub",
        "sb3-team-hf-integration 3.2, huggingface_hub 2.4",
        "Asks to trust pickles, and its error for a missing file is not the one that the Zoo expects.",
        ("rl_zoo3.load_from_hub",),
    ),
    "hub_models": Patch("rl_zoo3.utils.get_hf_trained_models", _ZOO, "Errors of the network do not name `--no-hub`."),
}


@contextmanager
def patched(**replacements: Any) -> Iterator[None]:
    """Replace attributes of other packages in the context, by their keys in ``PATCHES``."""
    with ExitStack() as stack:
        for key, replacement in replacements.items():
            for owner in PATCHES[key].owners:
                stack.enter_context(replaced(owner, PATCHES[key].name, replacement))
        yield


def patch_permanently(key: str, replacement: Any) -> None:
    """Replace an attribute of another package until the process ends."""
    for owner in PATCHES[key].owners:
        setattr(owner, PATCHES[key].name, replacement)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace or add an attribute of a module or class in the context."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
