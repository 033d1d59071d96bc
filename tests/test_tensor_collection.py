"""Training in tensor environments: the weights of a training through arrays, ends of episodes, callbacks and files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from tensor_cases import BOX, DICT, IMAGE, VECTOR, InPlaceWalk, Plain, TensorWalk

from sb3_clipvf import ClipPPO
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer
from sb3_clipvf.engines.interface import ActedTensors
from sb3_clipvf.envs import as_vec_env
from sb3_clipvf.envs.tensor import TensorEnvAdapter, TensorStep
from sb3_clipvf.tensor_collection import trains_on_tensors

SETTINGS: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}
# Float32 sums in another order, over a few updates.
CLOSE = 2e-6


def trained(env: Any, policy: str = "MlpPolicy", callback: Any = None, n_rollouts: int = 3, **settings: Any) -> ClipPPO:
    model = ClipPPO(policy, env, **SETTINGS | settings)
    model.learn(48 * n_rollouts, callback)
    return model


def weights(model: ClipPPO) -> np.ndarray:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().numpy()


def episodes(model: ClipPPO) -> list[tuple[float, int]]:
    return [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()]


class Reader(BaseCallback):
    """Keeps the types of the local variables, and stops at a step if there is one to stop at."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.types: set[tuple[str, type]] = set()
        self.steps: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("obs_tensor", "actions", "clipped_actions", "values", "log_probs", "new_obs", "rewards", "dones")
        self.types |= {(name, type(self.locals[name])) for name in names}
        self.steps.append({name: self.locals[name].clone() for name in names} | {"infos": self.locals["infos"]})
        return self.n_calls != self.stop_at


SPACES = [
    BOX,
    spaces.Box(-0.3, 0.3, (1, 2), np.float32),
    spaces.Discrete(3),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(2),
]


@pytest.mark.parametrize("reads", [False, True], ids=["", "callback"])
@pytest.mark.parametrize("engine", ["native", "fused", "autograd"])
@pytest.mark.parametrize("action_space", SPACES, ids=lambda space: f"{type(space).__name__}{space.shape}")
def test_tensors_and_arrays_give_the_same_bits(action_space: Any, engine: str, reads: bool) -> None:
    models = [
        trained(env, engine=engine, callback=Reader() if reads and number else None, clip_range_vf=0.5, kl_coef=0.1)
        for number, env in enumerate(
            [Plain(as_vec_env(TensorWalk(action_space=action_space))), TensorWalk(action_space=action_space)]
        )
    ]
    np.testing.assert_array_equal(*map(weights, models))
    assert len(episodes(models[0])) > 40 and episodes(models[0]) == episodes(models[1])
    for name in ("_last_obs", "_last_episode_starts"):
        np.testing.assert_array_equal(*(getattr(model, name) for model in models))
    received = [model.env.unwrapped.env.received for model in models]
    assert all(map(th.equal, *received))
    assert received[1][0].dtype == (th.int64 if "Discrete" in type(action_space).__name__ else th.float32)


@pytest.mark.parametrize(
    ("policy", "observation_space", "settings"),
    [
        ("CnnPolicy", IMAGE, {}),
        ("MultiInputPolicy", DICT, {}),
        ("SquashedMlpPolicy", VECTOR, {}),
        ("MlpPolicy", VECTOR, {"use_sde": True, "sde_sample_freq": 3}),
        ("MlpPolicy", VECTOR, {"gamma": 0.5, "gae_lambda": 0.7, "advantage_scope": "rollout"}),
    ],
)
def test_all_kinds_of_policies_train(policy: str, observation_space: Any, settings: dict[str, Any]) -> None:
    envs = [TensorWalk(observation_space=observation_space) for _ in range(3)]
    through_arrays = trained(Plain(as_vec_env(envs[0])), policy, **settings)
    on_host = trained(envs[1], policy, **settings)
    np.testing.assert_array_equal(weights(through_arrays), weights(on_host))
    on_device = trained(envs[2], policy, engine="autograd", rollout_buffer_class=DeviceRolloutBuffer, **settings)
    np.testing.assert_allclose(weights(on_device), weights(on_host), atol=1e-4 if policy == "CnnPolicy" else CLOSE)
    assert episodes(on_device) == [(pytest.approx(r, abs=1e-5), length) for r, length in episodes(on_host)]
    assert np.abs(weights(on_host) - weights(ClipPPO(policy, envs[0], **SETTINGS | settings))).max() > 1e-4


@pytest.mark.parametrize("action_space", SPACES, ids=lambda space: f"{type(space).__name__}{space.shape}")
def test_a_rollout_on_the_device_is_that_on_the_host(action_space: Any) -> None:
    models = [
        trained(TensorWalk(action_space=action_space), engine="autograd", n_rollouts=1, rollout_buffer_class=kind)
        for kind in (None, DeviceRolloutBuffer)
    ]
    host, device = (model.rollout_buffer for model in models)
    for name in ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "dist_params"):
        assert isinstance(getattr(device, name), th.Tensor)
        np.testing.assert_allclose(getattr(host, name), getattr(device, name), atol=1e-6, err_msg=name)
    for name in ("advantages", "returns"):
        np.testing.assert_allclose(getattr(host, name), getattr(device, name), atol=1e-5, err_msg=name)
    np.testing.assert_allclose(*map(weights, models), atol=CLOSE)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_memory_that_environments_write_again_is_copied(buffer: Any) -> None:
    models = [
        trained(TensorWalk(reuses_memory=reuses), engine="autograd", rollout_buffer_class=buffer)
        for reuses in (False, True)
    ]
    np.testing.assert_array_equal(*map(weights, models))


class Changing(TensorWalk):
    """The same walk, which writes to the actions that it gets."""

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        step = super().step_tensors(actions)
        actions.zero_()
        return step


@pytest.mark.parametrize(
    ("engine", "buffer"), [("native", None), ("autograd", None), ("autograd", DeviceRolloutBuffer)], ids=str
)
@pytest.mark.parametrize("action_space", SPACES[:1] + SPACES[2:], ids=lambda space: type(space).__name__)
def test_environments_may_change_the_actions_that_they_get(action_space: Any, engine: str, buffer: Any) -> None:
    for callback in (None, Reader()):
        models = [
            trained(cls(action_space=action_space), callback=callback, n_rollouts=1, engine=engine,
                    rollout_buffer_class=buffer)
            for cls in (TensorWalk, Changing)
        ]  # fmt: skip
        np.testing.assert_array_equal(*map(weights, models))


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        (np.float64, "MlpPolicy"),
        (np.float64, "SquashedMlpPolicy"),
        (np.int64, "MlpPolicy"),
        (np.float16, "MlpPolicy"),
    ],
)
def test_actions_of_every_box_are_float32(dtype: Any, policy: str, buffer: Any) -> None:
    env = TensorWalk(action_space=spaces.Box(-1, 1, (2,), dtype))
    trained(env, policy, n_rollouts=1, rollout_buffer_class=buffer)
    assert {actions.dtype for actions in env.received} == {th.float32}
    assert all(actions.abs().max() <= 1 for actions in env.received)


@pytest.mark.parametrize("limit", [0, 300, 10**9], ids=["read at each step", "read twice", "read once"])
def test_truncated_rows_take_the_value_of_the_final_observation(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_clipvf.envs.tensor_episodes.MAX_KEPT", limit)
    reader = Reader()
    model = trained(TensorWalk(), callback=reader, n_rollouts=1, engine="autograd", gamma=0.9, n_epochs=1,
                    rollout_buffer_class=DeviceRolloutBuffer, learning_rate=0.0)  # fmt: skip
    added = model.rollout_buffer.rewards - th.stack([step["rewards"] for step in reader.steps])
    for t, step in enumerate(reader.steps):
        for row in range(6):
            expected = 0.0
            if step["dones"][row] and row % 2 == 0:
                final = th.as_tensor(step["infos"][row]["terminal_observation"])[None]
                expected = 0.9 * model.policy.predict_values(final).item()
            assert float(added[t, row]) == pytest.approx(expected, abs=1e-6)
    assert th.count_nonzero(added) == sum(int(step["dones"][::2].sum()) for step in reader.steps) > 6


@pytest.mark.parametrize(("limit", "sizes"), [(0, [1, 1, 2, 2, 2]), (4 * 72, [4, 4]), (10**9, [6, 2])])
def test_final_observations_of_many_steps_are_predicted_together(
    limit: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of them than environments."""
    monkeypatch.setattr("sb3_clipvf.envs.tensor_episodes.MAX_KEPT", limit)
    predict, found = AutogradEngine.predict_values, []

    def noted(self: AutogradEngine, observations: th.Tensor) -> th.Tensor:
        found.append(len(observations))
        return predict(self, observations)

    monkeypatch.setattr(AutogradEngine, "predict_values", noted)
    trained(TensorWalk(), n_rollouts=1, engine="autograd", rollout_buffer_class=DeviceRolloutBuffer)
    assert found == [*sizes, 6]  # the observations after the rollout


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_unknown_final_observations_are_replaced_by_those_before(engine: str, buffer: Any) -> None:
    if engine == "native" and buffer is not None:
        pytest.skip("native runs on the host")
    model = trained(TensorWalk(finals=False), n_rollouts=1, engine=engine, gamma=0.9, rollout_buffer_class=buffer)
    rewards, values = (np.asarray(getattr(model.rollout_buffer, name)) for name in ("rewards", "values"))
    positions = np.asarray(model.rollout_buffer.observations)[..., 0]
    actions = np.clip(np.asarray(model.rollout_buffer.actions), -0.3, 0.3)
    plain = -np.abs(positions + actions.mean(-1))
    # Row 0 is truncated after every second step, row 3 terminates there.
    np.testing.assert_allclose((rewards - plain)[1::2, 0], 0.9 * values[1::2, 0], atol=1e-6)
    np.testing.assert_allclose((rewards - plain)[:, 3], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("engine", "buffer", "callback"),
    [
        ("native", None, None),
        ("native", None, lambda local, _: local["values"] is not None),
        ("autograd", None, None),
        ("autograd", RolloutBuffer, None),
        ("autograd", DeviceRolloutBuffer, None),
    ],
    ids=["writer", "callback", "arrays", "SB3's buffer", "device"],
)
def test_unknown_final_observations_have_values_through_arrays_too(engine: str, buffer: Any, callback: Any) -> None:
    kwargs: dict[str, Any] = {"n_rollouts": 1, "engine": engine, "gamma": 0.9}
    wrapped = Plain(as_vec_env(TensorWalk(finals=False)))
    through_arrays = trained(wrapped, callback=callback, rollout_buffer_class=buffer, **kwargs)
    direct = trained(TensorWalk(finals=False), **kwargs)
    rewards = np.asarray(through_arrays.rollout_buffer.rewards)
    np.testing.assert_allclose(rewards, direct.rollout_buffer.rewards, atol=1e-6)


class GammaCallback(BaseCallback):
    """Changes ``gamma`` within the second rollout, and keeps that rollout's rewards."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def _on_step(self) -> bool:
        if self.n_calls == self.model.n_steps + 1:
            self.model.gamma = self.gamma
        return True

    def _on_rollout_end(self) -> None:
        self.rewards = th.as_tensor(self.model.rollout_buffer.rewards).numpy().copy()


@pytest.mark.parametrize(
    ("make_env", "buffer"),
    [
        (TensorWalk, None),
        (lambda: TensorWalk(finals=False), None),
        (TensorWalk, DeviceRolloutBuffer),
        (lambda: TensorWalk(finals=False), DeviceRolloutBuffer),
        (lambda: Plain(as_vec_env(TensorWalk())), DeviceRolloutBuffer),
    ],
)
def test_gamma_takes_effect_with_the_next_rollout(make_env: Any, buffer: Any) -> None:
    callbacks = [GammaCallback(gamma) for gamma in (0.99, 0.5)]
    for callback in callbacks:
        trained(make_env(), callback=callback, n_rollouts=2, engine="autograd", rollout_buffer_class=buffer)
    np.testing.assert_array_equal(callbacks[0].rewards, callbacks[1].rewards)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_callbacks_see_tensors(buffer: Any) -> None:
    reader = Reader()
    model = trained(TensorWalk(), callback=reader, n_rollouts=1, rollout_buffer_class=buffer)
    assert {kind for _, kind in reader.types} == {th.Tensor} and len(reader.types) == 8
    stored = np.asarray(model.rollout_buffer.observations)
    np.testing.assert_array_equal(stored, th.stack([step["obs_tensor"] for step in reader.steps]))
    assert reader.steps[1]["infos"][0]["TimeLimit.truncated"]


def test_a_callback_may_stop_the_training_and_another_continues_it() -> None:
    env = TensorWalk()
    reader = Reader(stop_at=5)
    model = trained(env, callback=reader)
    assert model.num_timesteps == 30 and len(reader.steps) == 5
    np.testing.assert_array_equal(model._last_obs, reader.steps[-1]["new_obs"])
    # Row 4 had made the third of its three steps.
    assert model.env.unwrapped.statistics.lengths.tolist() == [1, 2, 1, 1, 2, 1]
    n_episodes = len(episodes(model))
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 78 and len(episodes(model)) > n_episodes
    assert all(length in (2, 3, 4) for _, length in episodes(model))


def test_sb3s_callbacks_work(tmp_path: Path) -> None:
    callbacks = [
        CheckpointCallback(16, str(tmp_path)),
        EvalCallback(as_vec_env(TensorWalk()), eval_freq=8, verbose=0),
    ]
    model = trained(TensorWalk(), callback=callbacks)
    np.testing.assert_array_equal(weights(model), weights(trained(TensorWalk())))
    assert len(list(tmp_path.glob("*.zip"))) == 1


def test_a_saved_model_continues_in_tensor_environments(tmp_path: Path) -> None:
    model = trained(TensorWalk())
    model.save(tmp_path / "model")
    loaded = ClipPPO.load(tmp_path / "model", env=TensorWalk())
    assert isinstance(loaded.env, TensorEnvAdapter) and loaded.device.type == "cpu"
    np.testing.assert_array_equal(weights(model), weights(loaded))
    action, _ = loaded.predict(np.zeros(3, np.float32), deterministic=True)
    assert action.shape == (2,)
    loaded.learn(48)
    assert not np.array_equal(weights(model), weights(loaded))
    loaded.set_env(TensorWalk())
    loaded.learn(48)


def test_the_policy_must_be_on_the_device_of_the_environments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`device` must be that of the tensor environments, meta, got cpu"):
        ClipPPO("MlpPolicy", TensorWalk(device="meta"), device="cpu")
    model = ClipPPO("MlpPolicy", TensorWalk(), **SETTINGS)
    model.env = as_vec_env(TensorWalk(device="meta"))
    with pytest.raises(ValueError, match="`device` must be that of the tensor environments, meta, got cpu"):
        model.learn(48)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize("make_env", [lambda: "CartPole-v1", TensorWalk])
def test_rollouts_without_a_reset_are_refused(make_env: Any, buffer: Any) -> None:
    model = ClipPPO(
        "MlpPolicy", make_env(), engine="autograd", rollout_buffer_class=buffer, **SETTINGS | {"batch_size": 8}
    )
    with pytest.raises(RuntimeError, match="`env` must be reset by the model before `collect_rollouts`"):
        model.collect_rollouts(model.env, CallbackList([]), model.rollout_buffer, 8)


def test_which_environments_step_tensors() -> None:
    model = ClipPPO("MlpPolicy", TensorWalk(), **SETTINGS)
    env, buffer = model.env, model.rollout_buffer
    assert env is not None and trains_on_tensors(env, buffer)
    assert not trains_on_tensors(Plain(env), buffer)
    buffer.add = lambda *args: None
    assert not trains_on_tensors(env, buffer)


class Interrupt(BaseCallback):
    """Presses Ctrl-C at a step."""

    def _on_step(self) -> bool:
        if self.n_calls == 4:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_ctrl_c_leaves_episodes_as_they_are_in_the_environments(buffer: Any) -> None:
    env = TensorWalk()
    model = ClipPPO("MlpPolicy", env, rollout_buffer_class=buffer, engine="autograd", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        model.learn(48, Interrupt())
    assert model.num_timesteps == 24
    base: Any = model.env
    np.testing.assert_array_equal(model._last_obs, base.observations)
    assert model._last_episode_starts.tolist() == [True, False, True, True, False, True]
    assert base.statistics.lengths.tolist() == env.n_steps.tolist() == [0, 1, 0, 0, 1, 0]
    model.learn(48, reset_num_timesteps=False)
    assert {length for _, length in episodes(model)} == {2, 3, 4}


class Keeping(BaseCallback):
    """Keeps the tensors of each step, and copies of them."""

    NAMES = ("obs_tensor", "actions", "values", "log_probs", "new_obs", "rewards", "dones")

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Any]] = []
        self.copied: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.kept.append({name: self.locals[name] for name in self.NAMES} | {"infos": self.locals["infos"]})
        self.copied.append({name: self.locals[name].clone() for name in self.NAMES})
        return True


class Overwriting(AutogradEngine):
    """Returns the same tensors in each step, as a captured function does."""

    out: ActedTensors | None = None

    def act_tensors(self, observations: Any, *, with_dist_params: bool) -> ActedTensors:
        acted = super().act_tensors(observations, with_dist_params=with_dist_params)
        if self.out is None:
            self.out = acted
        for own, new in zip(self.out, acted, strict=True):
            if own is not None:
                own.copy_(new)
        return self.out


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_a_callback_may_keep_what_it_sees(buffer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = TensorWalk(reuses_memory=True)
    model = ClipPPO("MlpPolicy", env, rollout_buffer_class=buffer, engine="autograd", **SETTINGS)
    if buffer is not None:  # arrays on the host are new in each step
        engine = Overwriting(model.policy, model._update_settings())
        monkeypatch.setattr(model, "_current_engine", lambda: engine)
    callback = Keeping()
    model.learn(48 * 2, callback)
    for kept, copied in zip(callback.kept, callback.copied, strict=True):
        for name in Keeping.NAMES:
            assert th.equal(kept[name], copied[name]), name
    positions = [[info["position"] for info in step["infos"]] for step in callback.kept]
    np.testing.assert_allclose(positions, th.stack([step["new_obs"][:, 0] for step in callback.kept]))


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize("masked", [False, True])
def test_successes_are_those_of_a_training_through_arrays(buffer: Any, masked: bool) -> None:
    class Masked(InPlaceWalk):
        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            step = super().step_tensors(actions)
            return step._replace(infos={**step.infos, "_is_success": self.rows < 4}) if masked else step

    models = [
        trained(env, engine="autograd", rollout_buffer_class=kind)
        for env, kind in ((Plain(as_vec_env(Masked())), None), (Masked(), buffer))
    ]
    expected, ours = (list(model.ep_success_buffer or ()) for model in models)
    assert ours == [float(success) for success in expected]
    assert 0 < sum(ours) < len(ours)
    assert (len(ours) < len(episodes(models[1]))) == masked


class Spoilt(TensorWalk):
    """Returns a number that is not finite in row 1 of the third step."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__()
        self.what, self.value = what, value

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        step = super().step_tensors(actions)
        # Row 2 is truncated in step 4.
        if len(self.received) == (4 if self.what == "final_observations" else 3):
            getattr(step, self.what)[2] = self.value
        return step


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize(
    ("what", "value", "named", "at"),
    [
        ("observations", np.nan, "observation", 3),
        ("observations", np.inf, "observation", 3),
        ("rewards", np.inf, "reward", 2),
        ("final_observations", np.inf, "terminal_observation", 3),
        ("final_observations", np.nan, "terminal_observation", 3),
    ],
)
def test_numbers_that_are_not_finite_are_reported(what: str, value: float, named: str, at: int, buffer: Any) -> None:
    engine = "auto" if buffer is None else "autograd"
    with pytest.raises(NonFiniteError) as caught:
        trained(Spoilt(what, value), rollout_buffer_class=buffer, engine=engine)
    assert (caught.value.what, caught.value.step, caught.value.env_index) == (named, at, 2)
    assert "Correct the environment" in str(caught.value)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["read at each step", "read once"])
@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_a_final_observation_is_named_by_its_key(buffer: Any, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class SpoiltKey(TensorWalk):
        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            step = super().step_tensors(actions)
            if len(self.received) == 4:
                step.final_observations["vector"][2, 1] = -np.inf  # type: ignore[index, call-overload]
            return step

    monkeypatch.setattr("sb3_clipvf.envs.tensor_episodes.MAX_KEPT", limit)
    with pytest.raises(NonFiniteError, match=r"got -inf at element \[1\] \(1 of 3 numbers\)") as caught:
        env = SpoiltKey(observation_space=DICT)
        trained(env, "MultiInputPolicy", rollout_buffer_class=buffer, engine="autograd")
    assert (caught.value.what, caught.value.key) == ("terminal_observation", "vector")
    assert (caught.value.step, caught.value.env_index) == (3, 2)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_a_value_that_is_not_finite_is_named(buffer: Any) -> None:
    class Overflowing(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            features = super().forward(observations)
            return th.where(features[:, :1] > 50, th.nan, features)

    class Far(TensorWalk):
        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            step = super().step_tensors(actions)
            if len(self.received) == 4:
                step.final_observations[2] = 100.0  # type: ignore[index, call-overload]
            return step

    settings: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": Overflowing}, "engine": "autograd"}
    with pytest.raises(NonFiniteError) as caught:
        trained(Far(), rollout_buffer_class=buffer, **settings)
    assert (caught.value.what, caught.value.step, caught.value.env_index) == ("terminal_value", 3, 2)


class Filled(FlattenExtractor):
    """Replaces non-finite numbers."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(th.nan_to_num(observations, nan=-1.0, posinf=2.0))


class Passing(FlattenExtractor):
    """Code of the user's that passes non-finite numbers on."""


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_policy_may_replace_final_observations(value: float, buffer: Any) -> None:
    """As in a training through arrays."""
    settings: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": Filled}, "engine": "autograd"}
    through_arrays = trained(Plain(as_vec_env(Spoilt("final_observations", value))), **settings)
    ours = trained(Spoilt("final_observations", value), rollout_buffer_class=buffer, **settings)
    np.testing.assert_allclose(*map(weights, (through_arrays, ours)), atol=CLOSE)
    settings["policy_kwargs"] = {"features_extractor_class": Passing}
    with pytest.raises(NonFiniteError) as caught:
        trained(Spoilt("final_observations", np.nan), rollout_buffer_class=buffer, **settings)
    assert (caught.value.what, caught.value.step, caught.value.env_index) == ("terminal_observation", 3, 2)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
def test_an_infinite_observation_after_the_last_step_is_reported(buffer: Any) -> None:
    """A tanh network turns it into a finite value."""

    class Last(TensorWalk):
        def step_tensors(self, actions: th.Tensor) -> TensorStep:
            step = super().step_tensors(actions)
            if len(self.received) == 8:
                step.observations[2] = np.inf
            return step

    with pytest.raises(NonFiniteError) as caught:
        trained(Last(), rollout_buffer_class=buffer, engine="autograd")
    assert (caught.value.what, caught.value.step, caught.value.env_index) == ("observation", 8, 2)
    assert caught.value.num_timesteps == 48


def test_nan_actions_do_not_reach_environments_on_a_device() -> None:
    env = TensorWalk(action_space=spaces.Box(np.float32([-1.0, 0.5]), np.float32([1.0, 2.0])))
    model = ClipPPO("MlpPolicy", env, engine="autograd", rollout_buffer_class=DeviceRolloutBuffer, **SETTINGS)
    with th.no_grad():
        model.policy.action_net.bias[:] = np.nan
    with pytest.raises(NonFiniteError, match="`parameter` 'action_net.bias'"):
        model.learn(48)
    assert len(env.received) == 8
    assert all(th.equal(actions, th.tensor([[0.0, 0.5]]).expand(6, 2)) for actions in env.received)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize(
    ("what", "value", "at"), [("rewards", np.inf, 2), ("final_observations", np.inf, 3), ("observations", np.nan, 3)]
)
def test_the_file_has_the_arrays_of_the_step(what: str, value: float, at: int, buffer: Any, tmp_path: Path) -> None:
    callback = Keeping()
    # On the host, rewards of steps that are complete include gamma times the values of final observations.
    model = ClipPPO("MlpPolicy", Spoilt(what, value), engine="autograd", rollout_buffer_class=buffer, gamma=0.0,
                    **SETTINGS)  # fmt: skip
    model.set_logger(configure(str(tmp_path), []))
    with pytest.raises(NonFiniteError) as caught:
        model.learn(48, callback)
    assert caught.value.step == at and caught.value.path is not None
    # On the host, an observation is reported with the step that led to it.
    step = callback.kept[at - (what == "observations" and buffer is None)]
    with np.load(caught.value.path) as arrays:
        assert set(arrays) == {"observations", "actions", "values", "log_probs", "rewards", "dones", "new_observations"}
        expected = {**step, "observations": step["obs_tensor"], "new_observations": step["new_obs"]}
        for name, array in arrays.items():
            np.testing.assert_array_equal(array.reshape(expected[name].shape), expected[name], err_msg=name)


@pytest.mark.parametrize("buffer", [None, DeviceRolloutBuffer])
@pytest.mark.parametrize("action_space", [BOX, spaces.Discrete(2)], ids=["box", "discrete"])
def test_weights_that_are_not_finite_are_reported(action_space: Any, buffer: Any) -> None:
    model = ClipPPO("MlpPolicy", TensorWalk(action_space=action_space), engine="autograd",
                    rollout_buffer_class=buffer, **SETTINGS)  # fmt: skip
    with th.no_grad():
        model.policy.action_net.bias[0] = np.nan
    with pytest.raises(NonFiniteError, match="`parameter` 'action_net.bias'"):
        model.learn(48)


def test_the_loop_reads_nothing_from_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first step and the end of a rollout, no tensor is turned into a number or an array."""
    model = ClipPPO("MlpPolicy", TensorWalk(), engine="autograd", rollout_buffer_class=DeviceRolloutBuffer, **SETTINGS)
    model.learn(48)
    reads: list[str] = []
    inside = [False]
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "nonzero"):
        original = getattr(th.Tensor, name)

        def counted(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            reads.extend([_name] if inside[0] else [])
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(th.Tensor, name, counted)

    class Marker(BaseCallback):
        def _on_step(self) -> bool:
            inside[0] = self.n_calls % 8 != 0  # off after the last step
            return True

    model.learn(48, Marker())
    assert reads == []
