"""
Every attribute of another package that ``sb3-clipvf`` replaces while it runs: where, since which version, and why.

The replacements stand in the modules of their concepts, and are put in here. ``tests/test_zoo_patching.py`` has a test
for each patch that fails when its package no longer needs it.
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class Patch:
    """
    One attribute of another package.

    :param owners: Modules, or ``module:Class``, that have it; several where modules imported it by name.
    :param name: Its name.
    :param version: Package and version that the patch was made for; "" for Python's own library.
    :param reason: What happens without the patch.
    """

    owners: tuple[str, ...]
    name: str
    version: str
    reason: str


_ZOO, _SB3 = "rl_zoo3 2.9.2", "stable_baselines3 2.9.2"
_FINDING = ("rl_zoo3.utils", "rl_zoo3", "rl_zoo3.enjoy")

PATCHES = {
    # Registration
    "new_manager": Patch(
        ("rl_zoo3.exp_manager:ExperimentManager",),
        "__new__",
        _ZOO,
        "Makes linear schedules of all strings, and the Zoo's scripts have no way to use a subclass. They may have "
        "imported the class already, so it must stay the same object.",
    ),
    # Options
    "parse_args": Patch(
        ("argparse:ArgumentParser",),
        "parse_args",
        _ZOO,
        "Parsers are built and used inside the Zoo's scripts, which take no other options or defaults.",
    ),
    # Files of runs
    "yaml_loader": Patch(("yaml",), "UnsafeLoader", _ZOO, "Settings of a run can run any code as they are read."),
    "load_statistics": Patch(
        ("stable_baselines3.common.vec_env:VecNormalize",),
        "load",
        _SB3,
        "Statistics can run any code as they are read, and the Zoo takes the run's last ones for every model.",
    ),
    "load_model": Patch(
        ("stable_baselines3.common.base_class",), "load_from_zip_file", _SB3, "Models can run any code as they load."
    ),
    "load_replay_buffer": Patch(
        ("stable_baselines3.common.off_policy_algorithm",),
        "load_from_pkl",
        _SB3,
        "Replay buffers can run any code as they load.",
    ),
    "wrapper_class": Patch(
        ("rl_zoo3.utils",), "get_wrapper_class", _ZOO, "Calls whatever the settings of a run name as a wrapper."
    ),
    "plot_pickle": Patch(
        ("rl_zoo3.plots.plot_from_file",), "pickle", _ZOO, "Data of plots can run any code as they are read."
    ),
    # Models of runs
    "latest_run": Patch(
        ("rl_zoo3.utils",), "get_latest_run_id", _ZOO, "Takes runs without a model, and finds none of `-uuid`."
    ),
    "model_path": Patch(
        ("rl_zoo3.utils", "rl_zoo3.enjoy"), "get_model_path", _ZOO, "Finds no checkpoints of ClipPPO's runs."
    ),
    "saved_settings": Patch(_FINDING, "get_saved_hyperparams", _ZOO, "Fails on null settings."),
    "test_env": Patch(_FINDING, "create_test_env", _ZOO, "Ignores `env_kwargs` of the settings in some scripts."),
    # Training
    "make_vec_env": Patch(
        ("rl_zoo3.exp_manager",), "make_vec_env", _ZOO, "A resumed training would overwrite its files of episodes."
    ),
    "write_table": Patch(
        ("stable_baselines3.common.logger:HumanOutputFormat",),
        "write",
        _SB3,
        "A small policy trains through several rollouts in a second, and each prints a table.",
    ),
    # Processes and figures
    "call": Patch(("subprocess",), "call", _ZOO, "The processes that the Zoo starts do not know ClipPPO."),
    "show": Patch(("matplotlib.pyplot",), "show", "", "Without a display, figures would be lost."),
    # Hugging Face hub
    "hub_metadata": Patch(
        ("huggingface_sb3.push_to_hub",),
        "generate_metadata",
        "huggingface_sb3 3.2",
        "The Zoo imports it by this name; now it is `_generate_metadata`.",
    ),
    "hub_card": Patch(
        ("huggingface_hub.repocard",), "metadata_save", _ZOO, "Commands in a model card do not know ClipPPO."
    ),
    "hub_models": Patch(
        ("rl_zoo3.utils",), "get_hf_trained_models", _ZOO, "An error of the network does not name `--no-hub`."
    ),
}


@contextmanager
def patched(**replacements: Any) -> Iterator[None]:
    """Replace attributes of other packages in the context, by their keys in ``PATCHES``."""
    with ExitStack() as stack:
        for key, replacement in replacements.items():
            for owner in PATCHES[key].owners:
                stack.enter_context(replaced(_imported(owner), PATCHES[key].name, replacement))
        yield


def patch_for_good(key: str, replacement: Any) -> None:
    """Replace an attribute of another package until the process ends."""
    for owner in PATCHES[key].owners:
        setattr(_imported(owner), PATCHES[key].name, replacement)


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


def _imported(owner: str) -> Any:
    module, _, attribute = owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
