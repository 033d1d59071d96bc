"""Checks of the training environments: shapes and types of what they return, their number and their spaces."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from failing import ENGINES, SPACE, Call, Faulty, Step, check_resumes, make, model_of, notes
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.envs import FastDummyVecEnv, FastVecNormalize, faster
from sb3_clipvf.envs.shapes import StepCheck


def gives(obs: Any) -> Callable[[Step], Step]:
    return lambda step: (obs, *step[1:])


@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
@pytest.mark.parametrize(
    ("obs", "shape"),
    [
        (np.zeros(1, np.float32), "(1,)"),
        (0.5, "()"),
        (np.zeros((4, 1)), "(4, 1)"),
        (np.zeros(3), "(3,)"),
        ([[0.0] * 4] * 2, "(2, 4)"),
        (None, "()"),
    ],
)
def test_observations_that_numpy_would_broadcast(
    obs: Any, shape: str, cls: type[DummyVecEnv], at: int, tmp_path: Path
) -> None:
    venv = make(gives(obs), at, cls)
    with pytest.raises(ValueError, match="must return observations of its space's shape") as caught:
        model_of(venv).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert f"shape (4,), got {shape} from environment 1. Fix it" in str(caught.value)
    assert venv.envs[1].n == at  # at once, not at the end of the episode
    assert "_save_obs" not in vars(venv)
    if at:
        check_resumes(tmp_path, make(cls=cls))


@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_a_dict_observation_with_one_key_of_another_shape(cls: type[DummyVecEnv]) -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(-1, 1, (3,))})
    venv = cls([partial(Faulty, gives({"a": np.zeros(2), "b": np.zeros(1)}), space=space)])
    with pytest.raises(ValueError, match=r"observations\['b'\] of its space's shape \(3,\), got \(1,\)"):
        ClipPPO("MultiInputPolicy", venv, n_steps=16, batch_size=16).learn(16)


@pytest.mark.parametrize("at", [0, 20])
@pytest.mark.parametrize("cls", [VecNormalize, FastVecNormalize])
def test_observations_that_a_wrapper_would_broadcast(cls: type[VecNormalize], at: int) -> None:
    processes = SubprocVecEnv([partial(Faulty, gives(np.zeros(1, np.float32)), at)] * 2, start_method="fork")
    venv = cls(processes)
    text = r"`env` must return observations of its space's shape, \(2, 4\) for 2 environments, got \(2, 1\)"
    with pytest.raises(ValueError, match=text):
        model_of(venv).learn(96)
    assert venv.obs_rms.mean.shape == (4,)
    assert round(venv.obs_rms.count) == 2 * at  # the reset, and the steps before the faulty one
    assert not {"reset", "step_wait"} & vars(processes).keys()
    venv.close()


class ShortEnd(Faulty):
    """Only its final observations have another shape."""

    def step(self, action: Any) -> Step:
        obs, reward, terminated, truncated, info = super().step(action)
        return np.zeros(1) if truncated else obs, reward, terminated, truncated, info


@pytest.mark.parametrize("cls", [DummyVecEnv, FastDummyVecEnv])
def test_final_observations_that_a_wrapper_would_broadcast(cls: type[DummyVecEnv]) -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(1,\) from environment 1"):
        model_of(FastVecNormalize(cls([Faulty, ShortEnd]))).learn(96)


class Part(DummyVecEnv):
    """Resets single environments itself, as some on a GPU do, and overrides the step."""

    def reset(self, indices: Any = None) -> Any:
        obs = super().reset()
        return obs if indices is None else obs[indices]

    def step_wait(self) -> Any:
        self.reset(np.array([1]))
        return super().step_wait()


def test_methods_that_others_replaced_are_kept() -> None:
    venv, n_calls = Part([Faulty] * 2), []
    original = venv.step_wait
    venv.step_wait = lambda: (n_calls.append(1), original())[1]
    own = venv.step_wait
    model_of(venv).learn(32)
    assert len(n_calls) == 16
    assert venv.step_wait is own


class Bent(VecEnvWrapper):
    """Changes the steps from ``at`` on; if ``at`` is 0, also the first observations."""

    def __init__(self, venv: VecEnv, change: Callable[..., Any], at: int = 20) -> None:
        super().__init__(venv)
        self.change, self.at, self.n = change, at, 0

    def reset(self) -> Any:
        obs = self.venv.reset()
        return obs if self.at else self.change(obs, *[np.zeros(2)] * 2, [{}] * 2)[0]

    def step_wait(self) -> Any:
        self.n += 1
        step = self.venv.step_wait()
        return step if self.n < self.at else self.change(*step)


OBS = "`env` must return observations"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda o, r, d, i: (np.zeros((2, 3), o.dtype), r, d, i), ValueError, f"{OBS} of its space's shape, (2, 4)"),
        (lambda o, r, d, i: (np.zeros((2, 5), o.dtype), r, d, i), ValueError, "(2, 4) for 2 environments, got (2, 5)"),
        (lambda o, r, d, i: (o.reshape(2, 2, 2), r, d, i), ValueError, "got (2, 2, 2)"),
        (lambda o, r, d, i: (o[:1], r, d, i), ValueError, "got (1, 4)"),
        (lambda o, r, d, i: (o[0], r, d, i), ValueError, "got (4,)"),
        (
            lambda o, r, d, i: (o.tolist(), r, d, i),
            TypeError,
            f"{OBS} as a NumPy array of numbers, got one of type list",
        ),
        (lambda o, r, d, i: (o.astype(object), r, d, i), TypeError, "got one of object"),
        (lambda o, r, d, i: (o.astype(complex), r, d, i), TypeError, "got one of complex128"),
        (lambda o, r, d, i: (o, r[:1], d, i), ValueError, "`env` must return rewards of the shape (2,), got (1,)"),
        (lambda o, r, d, i: (o, r[:, None], d, i), ValueError, "rewards of the shape (2,), got (2, 1)"),
        (lambda o, r, d, i: (o, np.array([1.0, None]), d, i), TypeError, "`env` must return numbers as rewards"),
        (lambda o, r, d, i: (o, r, d[:1], i), ValueError, "`env` must return dones of the shape (2,), got (1,)"),
        (lambda o, r, d, i: (o, r, False, i), ValueError, "dones of the shape (2,), got ()"),
    ],
)
def test_steps_that_do_not_fit(change: Any, error: type[Exception], text: str, engine: str, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        model_of(Bent(make(), change), engine).learn(96, callback=TrainingCheckpoint(32, tmp_path))
    assert text in str(caught.value)
    assert "checkpoint_32.zip" in notes(caught.value)
    if OBS in str(caught.value):
        with pytest.raises(error) as caught:
            model_of(Bent(make(), change, at=0), engine).learn(96)
        assert text in str(caught.value)


def test_final_observations_of_another_shape() -> None:
    check, obs, dones = StepCheck(SPACE, 2), np.zeros((2, 4), np.float32), np.array([False, True])
    infos: Any = [{}, {"terminal_observation": np.zeros(3), "TimeLimit.truncated": True}]
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\) from environment 1"):
        check((obs, np.zeros(2), dones, infos))
    infos[1]["TimeLimit.truncated"] = False  # it is then not read
    check((obs, np.zeros(2), dones, infos))


@pytest.mark.parametrize("engine", ENGINES)
def test_fractions_in_a_space_of_whole_numbers(engine: str) -> None:
    space = spaces.Box(0, 9, (4,), np.uint8)

    def change(obs: Any, *others: Any) -> Any:
        return (obs + 0.5, *others)

    with pytest.raises(
        ValueError, match="must return whole numbers as observations, since its space has the dtype uint8"
    ):
        model_of(Bent(DummyVecEnv([partial(Faulty, space=space)] * 2), change, at=3), engine).learn(32)

    def floats(obs: Any, *others: Any) -> Any:
        return (obs.astype(np.float64), *others)

    model_of(Bent(DummyVecEnv([partial(Faulty, space=space)] * 2), floats, at=3), engine).learn(32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("space", "engine"),
    [
        (spaces.Box(0, 9, (4,), np.uint8), "native"),
        (spaces.Box(0, 9, (4,), np.uint8), "autograd"),
        (spaces.MultiDiscrete([2] * 4), "autograd"),
    ],
    ids=["box-native", "box-autograd", "discrete-autograd"],
)
def test_numbers_that_are_not_finite_in_a_space_of_whole_numbers(
    space: spaces.Space[Any], bad: float, engine: str
) -> None:
    def change(obs: Any, *others: Any) -> Any:
        return (np.where([[False] * 4, [True] * 4], bad, obs), *others)

    with pytest.raises(NonFiniteError) as caught:
        model_of(Bent(DummyVecEnv([partial(Faulty, space=space)] * 2), change, at=3), engine).learn(32)
    assert (caught.value.what, caught.value.env_index) == ("observation", 1)


def test_each_key_of_a_batch_is_checked() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 9, (3,), np.uint8), "c": spaces.Discrete(3)})
    check = StepCheck(space, 2)
    good = {"a": np.full((2, 2), 0.5), "b": np.zeros((2, 3), np.float32), "c": np.zeros(2, np.int32)}
    check.observations(good)
    check.observations({**good, "c": np.zeros((2, 1), int)})
    for key, bad, text in (
        ("a", np.zeros((2, 1)), r"observations\['a'\] of its space's shape, \(2, 2\) for 2 environments, got \(2, 1\)"),
        ("b", good["b"] + 0.5, r"whole numbers as observations\['b'\]"),
        ("a", np.zeros((2, 1, 2)), r"observations\['a'\] of its space's shape, \(2, 2\) for 2 .*, got \(2, 1, 2\)"),
        ("c", np.zeros((2, 2), int), r"observations\['c'\] of its space's shape, \(2,\) for 2 environments"),
    ):
        with pytest.raises(ValueError, match=text):
            check.observations({**good, key: bad})
    with pytest.raises(TypeError, match=r"observations\['c'\] as a NumPy array of numbers, got one of type list"):
        check.observations({**good, "c": [0, 1]})


def weights(cls: type[Any], venv: VecEnv, engine: str) -> list[np.ndarray]:
    arguments = {**SB3_EQUIVALENT, "engine": engine} if cls is ClipPPO else {}
    model = cls("MlpPolicy", venv, n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu", **arguments)
    return [parameter.detach().numpy() for parameter in model.learn(64).policy.parameters()]


@pytest.mark.parametrize(
    ("change", "theirs"),
    [
        (lambda o, r, d, i: (o.astype(np.float64) + 1e-12, r, d, i), None),
        (lambda o, r, d, i: (1000 * o, r, d, i), None),
        (lambda o, r, d, i: (np.repeat(o, 2, axis=1)[:, ::2], r, d, i), None),
        (lambda o, r, d, i: (np.asfortranarray(o), r, d, i), None),
        # SB3 truncates bootstrapped values that it adds to integer rewards; ours are compared with float rewards.
        (lambda o, r, d, i: (o, r.astype(int), d, i), lambda *step: step),
        (lambda o, r, d, i: (o, r.astype(bool), d, i), lambda *step: step),
        (lambda o, r, d, i: (o, r.tolist(), d.astype(int), i), lambda *step: step),
        (lambda o, r, d, i: (o, r, 255 * d.astype(np.uint8), i), lambda *step: step),
        (lambda o, r, d, i: (o, r, d.astype(float), i), lambda *step: step),
    ],
    ids=["float64", "outside", "strided", "columns", "int", "bool", "lists", "bytes", "float dones"],
)
def test_steps_that_sb3_accepts_give_sb3s_weights(change: Any, theirs: Any) -> None:
    expected = weights(PPO, Bent(make(), theirs or change, at=0), "")
    for engine in ENGINES:
        # Float32 sums in another order, over 8 minibatches. Deliberate errors gave at least 1e-4.
        for one, other in zip(weights(ClipPPO, Bent(make(), change, at=0), engine), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def in_columns(obs: Any, rewards: Any, dones: Any, infos: Any) -> Any:
    for info in infos:
        if "terminal_observation" in info:
            info["terminal_observation"] = np.array([info["terminal_observation"]])
    return obs[:, None], rewards, dones, infos


@pytest.mark.parametrize(
    ("change", "space", "column", "engines"),
    [
        (lambda step: (step[0][None], *step[1:]), SPACE, False, ENGINES),
        (lambda step: (step[0].reshape(2, 2), *step[1:]), spaces.Box(-1, 1, (1, 2, 2)), False, ENGINES),
        (lambda step: (step[0][0], *step[1:]), spaces.Box(-1, 1, (1,)), False, ENGINES),
        (lambda step: (int(7 * step[0][0] + 0.5), *step[1:]), spaces.Discrete(7), True, ("autograd", "auto")),
    ],
    ids=["(1, 4) for (4,)", "(2, 2) for (1, 2, 2)", "() for (1,)", "column of discrete"],
)
@pytest.mark.parametrize("normalizes", [False, True])
def test_axes_of_length_one_give_sb3s_weights(
    change: Any, space: spaces.Space[Any], column: bool, engines: tuple[str, ...], normalizes: bool
) -> None:
    def built(cls: type[DummyVecEnv] = DummyVecEnv) -> VecEnv:
        envs = [partial(Faulty, lambda step: (*change(step)[:2], False, step[2], {}), space=space)] * 2
        venv: VecEnv = cls(envs)
        if column:
            venv = Bent(venv, in_columns, at=0)
        return VecNormalize(venv, norm_obs=not isinstance(space, spaces.Discrete)) if normalizes else venv

    expected = weights(PPO, built(), "")
    for engine in engines:
        for cls in (DummyVecEnv, FastDummyVecEnv):
            for one, other in zip(weights(ClipPPO, built(cls), engine), expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # as above


def test_copies_of_environments_write_into_their_own_rows() -> None:
    venv, copies = make(), []
    model_of(venv).learn(32, callback=Call(lambda: copies.append(copy.deepcopy(venv)) or True, 20))
    before = copy.deepcopy(venv.buf_obs)
    copies[0].step(np.zeros(2, int))
    np.testing.assert_array_equal(venv.buf_obs[None], before[None])


@pytest.mark.parametrize("name", ["step_wait", "reset", "_save_obs"])
@pytest.mark.parametrize("wraps", [False, True])
def test_methods_that_a_callback_replaces_are_kept_after_the_training(name: str, wraps: bool) -> None:
    venv, n_calls = make(), 0
    before = set(vars(venv))

    class Puts(BaseCallback):
        def _on_training_start(self) -> None:
            old = getattr(venv, name) if wraps else partial(getattr(DummyVecEnv, name), venv)

            def own(*args: Any) -> Any:
                nonlocal n_calls
                n_calls += 1
                return old(*args)

            setattr(venv, name, own)

        def _on_step(self) -> bool:
            return True

    model_of(VecNormalize(venv)).learn(32, callback=Puts())
    assert set(vars(venv)) - before == {name, "actions"}
    n_calls = 0
    model_of(VecNormalize(venv)).learn(32)
    assert n_calls >= (1 if name == "reset" else 16)
    if wraps and name == "_save_obs":  # the wrapped check is still active
        venv.envs[1].change = lambda step: (step[0][:1], *step[1:])
        with pytest.raises(ValueError, match=r"shape \(4,\), got \(1,\) from environment 1"):
            model_of(VecNormalize(venv)).learn(32)


class Exchange(BaseCallback):
    """Gives the model other environments after the first rollout."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__()
        self.venv = venv

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.model.env is not self.venv:
            self.model.set_env(self.venv, force_reset=False)
            self.model._last_obs = self.venv.reset()


def broadcasting(at: int, wraps: bool) -> VecEnv:
    change = gives(np.zeros(1, np.float32))
    if not wraps:
        return make(change, at)
    return VecNormalize(SubprocVecEnv([partial(Faulty, change, at)] * 2, start_method="fork"))


@pytest.mark.parametrize("wraps", [False, True])
def test_environments_that_a_callback_sets_are_checked(wraps: bool) -> None:
    venv = broadcasting(20, wraps)
    model = model_of(VecNormalize(make()) if wraps else make())
    with pytest.raises(ValueError, match="must return observations of its space's shape"):
        model.learn(96, callback=Exchange(venv))
    assert model.num_timesteps == 32 + 38  # the first rollout, and 19 steps of the other environments
    assert vars(model.env).keys().isdisjoint(["_save_obs", "step_wait"])
    venv.close()


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("at", [0, 5])
def test_environments_are_checked_in_an_own_loop(at: int, wraps: bool) -> None:
    venv = broadcasting(at, wraps)
    model = model_of(venv)
    with pytest.raises(ValueError, match="must return observations of its space's shape"):
        _, callback = model._setup_learn(32, None)
        assert at  # else the reset fails
        model.collect_rollouts(venv, callback, model.rollout_buffer, 16)
    venv.close()


def test_environments_that_a_callback_sets_step_by_the_faster_code(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step_wait = faster.fast_step_wait
    monkeypatch.setattr(faster, "fast_step_wait", lambda venv: (steps.append(venv), step_wait(venv))[1])
    venvs = [make(), make()]
    model_of(venvs[0]).learn(96, callback=Exchange(venvs[1]))
    assert [steps.count(venv) for venv in venvs] == [16, 32]


# ------------------------------------------------------------------ other environments than before


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model_of(make(), batch_size=8).learn(32, callback=TrainingCheckpoint(32, tmp_path / "checkpoints"))
    return tmp_path / "checkpoints" / "checkpoint_32.zip"


def test_another_number_of_environments_is_logged(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ClipPPO.load(saved, env=DummyVecEnv([Faulty] * 3), device="cpu")
    assert caplog.text == ""  # it may be loaded only to act
    model.learn(48)
    assert "`env` has 3 environments, and the model was saved with 2" in caplog.text
    assert (
        "now has 48 transitions instead of 32, and an epoch 6 minibatches of batch_size=8 instead of 4" in caplog.text
    )
    caplog.clear()
    assert model.learn(48).num_timesteps == 48
    ClipPPO.load(saved, env=make(), device="cpu").learn(32)
    ClipPPO.load(saved, device="cpu")
    assert caplog.text == ""
    with pytest.raises(ValueError, match="`env` must have the number of environments of the checkpoint, 2, got 3"):
        ClipPPO.resume(saved, DummyVecEnv([Faulty] * 3))


def test_another_number_of_environments_in_learn(saved: Path) -> None:
    model = ClipPPO.load(saved, env=make(), device="cpu")
    with pytest.raises(AssertionError, match=r"\(3 != 2\).*ClipPPO.load"):
        model.set_env(DummyVecEnv([Faulty] * 3))
    model.env = DummyVecEnv([Faulty] * 3)
    with pytest.raises(ValueError, match="number of environments that the model was built for, 2, got 3"):
        model.learn(32)


class OtherActions(Faulty):
    action_space = spaces.Discrete(3)


def test_other_spaces_are_refused_everywhere(saved: Path) -> None:
    boxes = DummyVecEnv([partial(Faulty, space=spaces.Box(-1, 1, (5,)))] * 2)
    model = ClipPPO.load(saved, env=make(), device="cpu")
    for venv, both in (
        (boxes, r"Observation spaces do not match: Box\(.*\(4,\).* != Box\(.*\(5,\)"),
        (DummyVecEnv([OtherActions] * 2), r"Action spaces do not match: Discrete\(2\) != Discrete\(3\)"),
    ):
        text = f"`env` must have the model's spaces. {both}.*Wrap the environment"
        with pytest.raises(ValueError, match=text):
            ClipPPO.load(saved, env=venv, device="cpu")
        with pytest.raises(ValueError, match=text):
            ClipPPO.resume(saved, venv, device="cpu")
        with pytest.raises(ValueError, match=text):
            model.set_env(venv)
        own, model.env = model.env, venv
        with pytest.raises(ValueError, match=text):
            model.learn(32)
        model.env = own
    model.learn(32)


@pytest.mark.parametrize("has_keys", [False, True])
def test_bounds_of_observations_may_change_between_trainings(has_keys: bool) -> None:
    def space(high: float, n: int = 4, dtype: Any = np.float32, key: str = "b") -> spaces.Space[Any]:
        box = spaces.Box(-high, high, (n,), dtype)
        return spaces.Dict({"a": spaces.Discrete(2), key: box}) if has_keys else box

    def change(step: Step) -> Step:
        return ({"a": 0, "b": step[0]} if has_keys else step[0], *step[1:])

    policy = "MultiInputPolicy" if has_keys else "MlpPolicy"
    arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "seed": 0, "device": "cpu"}
    models: list[Any] = []
    for cls, more in ((PPO, {}), (ClipPPO, SB3_EQUIVALENT)):
        venv = DummyVecEnv([partial(Faulty, change, space=space(1))])
        model: Any = cls(policy, venv, **arguments, **more)
        model.learn(16)
        venv.observation_space = space(2)
        models.append(model.learn(16))
    theirs, ours = (list(model.policy.parameters()) for model in models)
    assert all(map(th.equal, ours, theirs))
    others = [space(1, 5), space(1, dtype=np.float64), *([space(1, key="c")] if has_keys else [])]
    for other in [*others, spaces.Discrete(2)]:
        venv.observation_space = other
        with pytest.raises(ValueError, match="`env` must have the model's spaces"):
            models[1].learn(16)


def test_spaces_of_a_file_are_checked_like_those_of_an_environment(saved: Path) -> None:
    space = spaces.Discrete(2, start=1)
    with pytest.raises(ValueError, match="`env` must count its discrete actions from 0, got"):
        ClipPPO.load(saved, device="cpu", custom_objects={"action_space": space})
