"""Arguments and settings of all kinds: each must make a model, or raise an error that names it and its value."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.faults_files import MEMORY, SECONDS
from tests.bench.faults_processes import Tally, append_line, finish, limit_memory, limit_processor, read_lines, start

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

EXAMPLES_IN_A_PROCESS = 500

KINDS = ("arguments", "settings")
"""Arguments of ClipPPO, and entries of a settings file in YAML."""

NUMBERS = (
    *("learning_rate", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "ent_coef", "vf_coef", "kl_coef"),
    *("max_grad_norm", "target_kl", "adaptive_kl_target", "lr_kl_target"),
)
"""Arguments that must be finite, at least 0, where they are accepted as numbers."""

_SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "seed": 0, "device": "cpu"}
_ENTRY = {"policy": "MlpPolicy", "n_timesteps": 64, "n_steps": 8, "batch_size": 8, "n_envs": 1}
# Not fuzzed: Gymnasium refuses ids of unknown environments.
_LEFT_OUT = {"self", "env", "_init_setup_model"}
# A large number of environments is built, not refused.
_NOT_LARGE = ("n_envs", "frame_stack")
_WORDS = ["", "x", "max", "prediction", "absolute", "rollout", "auto", "native", "autograd", "MlpPolicy", "cpu", "meta"]
_WORDS += ["lin_0.1", "lin_", "cos_nan", "exp_-1", "const_1e400", "lin_1_0", "1e-3", "true", "None", "nan", ".inf"]


@dataclass
class FuzzCampaign:
    """Random arguments or settings, of a kind in :data:`KINDS`."""

    kind: str
    folder: Path
    seed: int

    def run(self, index: int, wanted: int) -> Tally:
        """Try up to :data:`EXAMPLES_IN_A_PROCESS` examples, and count the outcomes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        report = self.folder / f"{self.kind}.report"
        report.unlink(missing_ok=True)
        code = finish(start(fuzz, report, self.kind, self.seed + index, min(wanted, EXAMPLES_IN_A_PROCESS)))
        lines = read_lines(report)
        if lines and lines[-1]["event"] == "error":
            raise RuntimeError(f"the examples of {self.kind!r} were not made: {lines[-1]['trace']}")
        tally = Tally()
        for line in lines:
            if line["event"] == "tried":
                tally.counts[line["counted"]] += 1
                tally.add(line["outcome"], line["failure"])
        if code != 0:
            last = lines[-1] if lines else {"event": "nothing"}
            tally.add("unclear", f"{self.kind}: the process ended with code {code} at {last}")
        return tally


def fuzz(report: Path, kind: str, seed: int, n_examples: int) -> None:
    """Try at most ``n_examples`` examples, in a separate process, and report a line before and after each."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.configuration import set_hypothesis_home_dir

    # Not `.hypothesis` in the working folder, on which pytest fails.
    set_hypothesis_home_dir(report.parent / "hypothesis")
    limit_memory(MEMORY)
    build = _model_of_arguments() if kind == "arguments" else _model_of_settings()

    def attempt(changes: dict[str, Any]) -> None:
        append_line(report, event="tries", changes=_repr(changes))
        limit_processor(SECONDS)
        outcome, counted, failure = judged(build, changes)
        limit_processor(0)
        text = f"{kind} {_repr(changes)}: {failure}" if failure else ""
        append_line(report, event="tried", outcome=outcome, counted=counted, failure=text)

    alone = settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seeded(seed)(alone(given(_changes(kind))(attempt)))()


def judged(build: Callable[[dict[str, Any]], Any], changes: dict[str, Any]) -> tuple[str, str, str]:
    """Build a model with changes; return the outcome, the name under which it is counted, and the failure."""
    try:
        model = build(changes)
    except Exception as error:
        if is_clear(error, changes):
            return "survived", "refused", ""
        return "unclear", "unclear errors", f"{type(error).__name__}: {str(error)[:300]}"
    wrong = [name for name in NUMBERS if not _is_legal(getattr(model, name))]
    if wrong:
        return "wrong", "wrong", f"accepted as {', '.join(f'{name}={getattr(model, name)!r}' for name in wrong)}"
    return "survived", "models built", ""


def is_clear(error: Exception, changes: dict[str, Any]) -> bool:
    """Return whether an error of an expected class names one of the changes as code, and what it got."""
    text = str(error)
    is_named = any(f"`{name}`" in text for name in changes)
    return isinstance(error, (ValueError, TypeError, ImportError)) and is_named and "got" in text


def _is_legal(value: Any) -> bool:
    if isinstance(value, (int, float, np.number)):
        return math.isfinite(value) and bool(value >= 0)
    return value is None or isinstance(value, str) or callable(value)


def _changes(kind: str) -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    if kind == "arguments":
        from sb3_clipvf import ClipPPO

        names = sorted(set(inspect.signature(ClipPPO.__init__).parameters) - _LEFT_OUT)
        return st.dictionaries(st.sampled_from(names), _values(), min_size=1, max_size=3)
    from sb3_clipvf.zoo.entries import ZOO_KEYS
    from sb3_clipvf.zoo.settings import COMMAND_LINE_KEYS, constructor_keys

    keys = sorted({*constructor_keys(), *ZOO_KEYS, *COMMAND_LINE_KEYS, "clip_rang", "buffer_size"})
    pair = st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key), _scalars(large=key not in _NOT_LARGE)))
    return st.lists(pair, min_size=1, max_size=3).map(dict)


def _scalars(*, large: bool = True) -> SearchStrategy[Any]:
    """Return values that a settings file can hold."""
    from hypothesis import strategies as st

    texts = st.one_of(st.sampled_from(_WORDS), st.text("abc_.019e-", max_size=6))
    plain = st.one_of(st.none(), st.booleans(), st.integers(-3, 4), st.floats(), st.floats(0, 1), texts)
    if large:
        plain = st.one_of(plain, st.sampled_from([2**31, 2**63, 10**400, -(10**30)]), st.integers())
    return st.one_of(plain, st.lists(plain, max_size=2), st.dictionaries(texts, plain, max_size=2))


def _values() -> SearchStrategy[Any]:
    """Return values that a program can pass."""
    from hypothesis import strategies as st

    kinds = [np.float32("nan"), np.float64(0.5), np.int64(8), np.uint8(255), np.bool_(True), np.str_("max")]
    kinds += [np.array(3), np.array([1, 2]), np.array([]), np.array(["max"]), b"max", 1j, (), {1}, object(), int, len]
    kinds += [lambda progress: progress, lambda progress: math.nan, lambda progress: -1.0, lambda: 0.1]
    return st.one_of(_scalars(), st.sampled_from(kinds))


def _model_of_arguments() -> Callable[[dict[str, Any]], Any]:
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_clipvf import ClipPPO

    env = make_vec_env("CartPole-v1", 1)
    return lambda changes: ClipPPO(**{"policy": "MlpPolicy", **_SMALL, **changes, "env": env})


def _model_of_settings() -> Callable[[dict[str, Any]], Any]:
    from argparse import Namespace

    import yaml

    from sb3_clipvf.zoo import register
    from sb3_clipvf.zoo.experiment import ClipPPOExperimentManager

    register()

    def build(changes: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "settings.yml"
            path.write_text(yaml.safe_dump({"CartPole-v1": {**_ENTRY, **changes}}), encoding="utf-8")
            manager = ClipPPOExperimentManager(
                Namespace(), "clipppo", "CartPole-v1", folder, config=str(path), eval_freq=-1, device="cpu", verbose=0
            )
            model = (manager.setup_experiment() or (None,))[0]
            if model is not None and model.env is not None:
                model.env.close()
            return model

    return build


def _repr(value: Any) -> str:
    try:
        return repr(value)[:200]
    except ValueError:  # Python converts no int of more than 4300 digits
        return "a long number"
