"""
Whole steps of rollouts, captured: the same bits as in rollouts of the general kind.

A tape replays the captured operations on the memory of the capture, as a CUDA graph does.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from tape import TapeCapturer
from tensor_cases import BOX, DICT, VECTOR, InPlaceWalk, KeepingWalk, ReadingWalk, tensor_pendulum

from sb3_clipvf import ClipPPO
from sb3_clipvf.common.nonfinite import NonFiniteError
from sb3_clipvf.common.observations import parts_of
from sb3_clipvf.engines import cuda_graph
from sb3_clipvf.engines.cuda import rollout_step, static_step
from sb3_clipvf.engines.cuda_graph import CudaGraphEngine
from sb3_clipvf.engines.device_buffer import DeviceRolloutBuffer
from sb3_clipvf.envs import GraphedTensorEnv, TensorVecNormalize
from sb3_clipvf.tensor_rollouts.device import DeviceRollout
from sb3_clipvf.tensor_rollouts.whole import WholeStepRollout

SETTINGS: dict[str, Any] = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Capture by tapes, and return a list that gets the class of each rollout."""
    monkeypatch.setattr(cuda_graph, "GraphCapturer", TapeCapturer)
    monkeypatch.setattr(cuda_graph, "why_not_cuda_graph", static_step.why_not_static)
    found: list[type] = []
    enter = DeviceRollout.__enter__

    def noted(self: Any) -> Any:
        found.append(type(self))
        return enter(self)

    monkeypatch.setattr(DeviceRollout, "__enter__", noted)
    return found


def make(env: Any, policy: str = "MlpPolicy", **settings: Any) -> Any:
    """Return a model on the CPU that runs on the engine of GPUs."""
    model: Any = ClipPPO(policy, env, rollout_buffer_class=DeviceRolloutBuffer, **SETTINGS | settings)
    engine = CudaGraphEngine(model.policy, model._update_settings())

    def current() -> CudaGraphEngine:
        engine.settings = model._update_settings()
        return engine

    model._current_engine = current
    return model


class Keeper(BaseCallback):
    """Keeps what it sees, and copies of it."""

    NAMES = ("obs_tensor", "actions", "clipped_actions", "values", "log_probs", "new_obs", "rewards", "dones")

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []
        self.copies: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        seen = {name: self.locals[name] for name in self.NAMES}
        self.steps.append(seen | {"infos": self.locals["infos"]})
        self.copies.append({name: tensor.clone() for name, tensor in seen.items() if isinstance(tensor, th.Tensor)})
        return True


def assert_same_models(ours: Any, theirs: Any) -> None:
    for name in ("actions", "rewards", "values", "log_probs", "dist_params", "episode_starts", "advantages"):
        pair = [getattr(model.rollout_buffer, name) for model in (ours, theirs)]
        assert th.equal(*pair), name
    rows = [model.rollout_buffer.observations for model in (ours, theirs)]
    for key in rows[0] if isinstance(rows[0], dict) else [...]:
        assert th.equal(rows[0][key], rows[1][key])
    for parameter, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert th.equal(parameter, other)
    episodes = [[(e["r"], e["l"]) for e in model.ep_info_buffer] for model in (ours, theirs)]
    assert episodes[0] == episodes[1] and len(episodes[0]) > 30
    assert list(ours.ep_success_buffer) == list(theirs.ep_success_buffer)
    for name in ("_last_obs", "_last_episode_starts"):
        np.testing.assert_equal(getattr(ours, name), getattr(theirs, name))
    assert th.equal(*(each.env.unwrapped.statistics.returns.sum() + th.zeros(1) for each in (ours, theirs)))


def same(env: Any, kinds: list[type], callback: Any = None, wrap: Any = lambda env: env, **settings: Any) -> list[Any]:
    models = []
    for graphed in (GraphedTensorEnv, lambda env: env):
        model = make(wrap(graphed(env())), **settings)
        th.manual_seed(0)
        models.append(model.learn(48 * 4, callback and callback()))
    assert kinds == [WholeStepRollout] * 4 + [DeviceRollout] * 4
    assert_same_models(*models)
    return models


SPACES = [BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)]


@pytest.mark.parametrize("callback", [None, Keeper], ids=["", "callback"])
@pytest.mark.parametrize("finals", [True, False], ids=["finals", "no finals"])
@pytest.mark.parametrize("action_space", SPACES, ids=lambda space: type(space).__name__)
def test_whole_steps_are_those_of_the_general_kind(
    action_space: Any, finals: bool, callback: Any, kinds: list[type]
) -> None:
    models = same(partial(InPlaceWalk, action_space=action_space, finals=finals), kinds, callback)
    assert len(models[0].ep_success_buffer) > 30


@pytest.mark.parametrize(
    ("policy", "space", "settings"),
    [("MultiInputPolicy", DICT, {}), ("SquashedMlpPolicy", VECTOR, {}), ("MlpPolicy", VECTOR, {"kl_coef": 0.1})],
)
def test_policies(policy: str, space: Any, settings: dict[str, Any], kinds: list[type]) -> None:
    same(partial(InPlaceWalk, observation_space=space), kinds, policy=policy, **settings)


@pytest.mark.parametrize("limit", [0, 300, 10**9], ids=["one step", "some steps", "all steps"])
def test_final_observations_are_kept_for_some_steps(
    limit: int, kinds: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_clipvf.envs.tensor_episodes.MAX_KEPT", limit)
    same(InPlaceWalk, kinds, gamma=0.9)


def test_environments_that_keep_tensors_of_all_kinds(kinds: list[type]) -> None:
    same(KeepingWalk, kinds)


def test_environments_with_a_generator_of_their_own(kinds: list[type]) -> None:
    same(partial(tensor_pendulum().TensorPendulum, 6, time_limit=5), kinds)


@pytest.mark.parametrize("options", [{}, {"norm_reward": False}, {"norm_obs": False}], ids=str)
def test_statistics_of_observations_and_rewards(options: dict[str, Any], kinds: list[type]) -> None:
    models = same(InPlaceWalk, kinds, wrap=partial(TensorVecNormalize, **options))
    for name in ("mean", "var", "count"):
        for which in ("obs_rms", "ret_rms") if options.get("norm_obs", True) else ("ret_rms",):
            np.testing.assert_array_equal(*(getattr(getattr(model.env, which), name) for model in models))
    np.testing.assert_array_equal(*(model.env.get_original_reward() for model in models))
    np.testing.assert_array_equal(*(model.env.get_original_obs() for model in models))


class ScaledWalk(InPlaceWalk):
    """A walk with a number that its graph has as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def step_tensors(self, actions: th.Tensor) -> Any:
        return super().step_tensors(actions * self.scale)


class Options(BaseCallback):
    """Reads and changes statistics and options in the middle of rollouts."""

    def _on_step(self) -> bool:
        env: Any = self.training_env
        if self.n_calls == 11:
            env.obs_rms.mean[:] = 0.3
        elif self.n_calls == 14:
            env.training = False
        elif self.n_calls == 21:
            env.training = True
        return True


def test_a_callback_may_change_the_statistics(kinds: list[type]) -> None:
    models = same(InPlaceWalk, kinds, Options, wrap=TensorVecNormalize)
    np.testing.assert_array_equal(*(model.env.obs_rms.mean for model in models))


class OptionsForAStep(BaseCallback):
    """Changes an option in the second rollout, and sets it back a step later."""

    def _on_step(self) -> bool:
        env: Any = self.training_env
        if self.n_calls in (11, 12):
            env.training = self.n_calls == 12
        return True


def test_an_option_that_is_set_back_within_a_rollout(kinds: list[type]) -> None:
    models = same(InPlaceWalk, kinds, OptionsForAStep, wrap=TensorVecNormalize)
    np.testing.assert_array_equal(*(model.env.obs_rms.mean for model in models))
    assert models[0]._current_engine()._rollout_step._graph is not None  # captured again


def test_a_callback_may_keep_what_it_sees(kinds: list[type]) -> None:
    keepers = []
    for graphed in (GraphedTensorEnv, lambda env: env):
        keepers.append(Keeper())
        th.manual_seed(0)
        make(graphed(InPlaceWalk())).learn(48 * 2, keepers[-1])
    for step, other, copied in zip(keepers[0].steps, keepers[1].steps, keepers[0].copies, strict=True):
        for name in Keeper.NAMES:
            assert th.equal(step[name], other[name]) and th.equal(step[name], copied[name]), name
        ours, theirs = (
            [(info["position"], info["is_success"], str(info.get("terminal_observation"))) for info in each["infos"]]
            for each in (step, other)
        )
        assert ours == theirs
    distribution = keepers[0].model.policy.action_dist.distribution
    assert distribution.loc.shape == (6, 2)


def test_one_capture_serves_a_training_and_another_policy_gets_its_own(kinds: list[type]) -> None:
    model = make(GraphedTensorEnv(InPlaceWalk()))
    model.learn(48 * 3)
    engine = model._current_engine()
    step, capturer = engine._rollout_step, engine._capturer
    whole = sum("index_copy_" in " ".join(tape.names()) for tape in capturer.tapes)
    assert whole == 1
    model.learn(48)
    assert engine._rollout_step is step
    model.policy.action_net.weight.data = model.policy.action_net.weight.data.clone()
    model.learn(48)
    assert engine._rollout_step is not step


def set_clip_obs(model: Any) -> None:
    model.env.clip_obs = 0.5


def set_clip_rewards(model: Any) -> None:
    model.env.unwrapped.clip_rewards = True


def set_moments(model: Any) -> None:
    model.env.obs_rms.mean = np.full_like(model.env.obs_rms.mean, 0.3)


def set_gamma(model: Any) -> None:
    model.gamma = 0.5


def replace_rewards(model: Any) -> None:
    model.rollout_buffer.rewards = model.rollout_buffer.rewards.clone()


def walk_of(model: Any) -> ScaledWalk:
    env = model.env.unwrapped.env
    walk: ScaledWalk = env.env if isinstance(env, GraphedTensorEnv) else env
    return walk


def set_number(model: Any) -> None:
    walk_of(model).scale = 0.3


def replace_state(model: Any) -> None:
    walk_of(model).x = walk_of(model).x + 0.1


def keep(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "needs_capture"),
    [
        *((keep, False), (set_moments, False), (set_clip_obs, True), (set_clip_rewards, True)),
        *((set_gamma, True), (replace_rewards, True), (set_number, True), (replace_state, True)),
    ],
)
def test_a_change_between_rollouts_is_noticed(change: Any, needs_capture: bool, kinds: list[type]) -> None:
    models, steps = [], []
    for graphed in (GraphedTensorEnv, lambda env: env):
        model = make(TensorVecNormalize(graphed(ScaledWalk())))
        th.manual_seed(0)
        for number in range(3):
            if number == 1:
                change(model)
            model.learn(48 * 2, reset_num_timesteps=False)
            steps.append(model._current_engine()._rollout_step)
        models.append(model)
    assert_same_models(*models)
    assert steps[1] is steps[2] and (steps[0] is not steps[1]) == needs_capture


def test_checks_of_a_step_read_and_change_nothing(kinds: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    env = TensorVecNormalize(GraphedTensorEnv(InPlaceWalk()))
    model = make(env)
    model.learn(48)
    step = model._current_engine()._rollout_step
    assert env.obs_rms.count > 0 and not env._on_device.is_current  # reading moved it to the host
    assert step.fits(env, model.rollout_buffer, model.gamma) and not env._on_device.is_current
    calls: list[str] = []
    for owner, name in ((rollout_step, "vec_env_layers"), (type(env._on_device), "tensors"), (th.Tensor, "data_ptr")):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _m=method, _n=name: (calls.append(_n), _m(*args))[1])
    monkeypatch.setattr(step, "_graph", SimpleNamespace(replay=lambda: None))
    for _ in range(5):
        step()
    assert calls == ["tensors"] * 2  # of both states, when the first step moves the numbers back


def test_environments_and_random_states_stay_where_they_were(kinds: list[type]) -> None:
    env = GraphedTensorEnv(tensor_pendulum().TensorPendulum(6, time_limit=5))
    model = make(env)
    model.learn(48)
    buffer, adapter = model.rollout_buffer, model.env
    before = env.env._observations().clone(), env.env.generator.get_state(), th.get_rng_state()
    engine = model._current_engine()
    engine._rollout_step = None
    buffer.reset()
    assert engine.rollout_step(adapter, buffer, 0.5, adapter.observations) is not None
    after = env.env._observations(), env.env.generator.get_state(), th.get_rng_state()
    assert all(map(th.equal, before, after))


@pytest.mark.parametrize("stop", [True, False])
def test_a_stop_and_ctrl_c_leave_the_environments_where_they_are(stop: bool, kinds: list[type]) -> None:
    class End(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 12 and not stop:
                raise KeyboardInterrupt
            return self.n_calls < 12

    env = InPlaceWalk()
    model = make(GraphedTensorEnv(env))
    try:
        model.learn(48 * 9, End())
    except KeyboardInterrupt:
        assert not stop
    assert model.num_timesteps == 72
    np.testing.assert_array_equal(model._last_obs, env._observe())
    np.testing.assert_array_equal(model._last_obs, model.env.observations)
    assert model.env.statistics.lengths.tolist() == env.n_steps.tolist()
    model.learn(48, reset_num_timesteps=False)
    assert {episode["l"] for episode in model.ep_info_buffer} == {2, 3, 4}


def test_non_finite_numbers_are_reported_at_their_step(kinds: list[type]) -> None:
    env = InPlaceWalk()
    model = make(GraphedTensorEnv(env))
    model.learn(48)

    class Spoil(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 3:
                env.x[4] = th.nan
            return True

    with pytest.raises(NonFiniteError) as caught:
        model.learn(48, Spoil(), reset_num_timesteps=False)
    # The fourth step moves it; its observation is known to the policy only after that.
    assert (caught.value.step, caught.value.env_index) == (3, 4)


def test_environments_that_read_the_device_collect_in_the_general_way(
    kinds: list[type], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_clipvf.envs.graphed.GraphCapturer", TapeCapturer)
    graphed, models = GraphedTensorEnv(ReadingWalk()), []
    graphed._captures = True  # as on a GPU
    for env in (graphed, InPlaceWalk()):
        th.manual_seed(0)
        models.append(make(env).learn(48 * 4))
    assert kinds == [DeviceRollout] * 8
    assert_same_models(*models)
    for what in ("whole steps", "the environments' step"):
        assert caplog.text.count(f"The CUDA graph of {what} could not be captured (operation not permitted") == 1
    engine = models[0]._current_engine()
    assert engine._functions.keys() == {"forward", "predict_values"} and engine._chunks


def test_own_code_of_a_policy_and_gsde_are_collected_in_the_general_way(kinds: list[type]) -> None:
    make(GraphedTensorEnv(InPlaceWalk()), use_sde=True).learn(48)
    assert kinds == [DeviceRollout]


def test_a_resumed_training_is_exact(kinds: list[type], tmp_path: Path) -> None:
    whole = make(TensorVecNormalize(GraphedTensorEnv(InPlaceWalk())))
    th.manual_seed(0)
    whole.learn(48 * 2)
    statistics = tmp_path / "statistics.pkl"
    whole.env.save(str(statistics))
    loaded = TensorVecNormalize.load(str(statistics), GraphedTensorEnv(InPlaceWalk()))
    np.testing.assert_array_equal(loaded.obs_rms.mean, whole.env.obs_rms.mean)
    assert whole.env.observations is not None
    whole.learn(48, reset_num_timesteps=False)
    assert whole.env.obs_rms.count > loaded.obs_rms.count


WALKS: dict[str, Any] = {
    "walk": InPlaceWalk,
    "keeping": KeepingWalk,
    "reading": ReadingWalk,
    "dict": partial(InPlaceWalk, observation_space=DICT),
    "multi-discrete": partial(InPlaceWalk, action_space=SPACES[2]),
    "multi-binary": partial(InPlaceWalk, action_space=SPACES[3]),
    "no finals": partial(InPlaceWalk, finals=False),
    "normalized": InPlaceWalk,
    "drawing": lambda device: tensor_pendulum().TensorPendulum(6, device, time_limit=5),  # keeps a generator
}


def trained_on_a_gpu(name: str, graphed: Any, engine: str) -> Any:
    env: Any = graphed(WALKS[name](device="cuda"))
    env = TensorVecNormalize(env) if name == "normalized" else env
    policy = "MultiInputPolicy" if name == "dict" else "MlpPolicy"
    model: Any = ClipPPO(policy, env, **SETTINGS | {"device": "cuda", "engine": engine}, learning_rate=0.0)
    th.manual_seed(0)
    return model.learn(48 * 4, Keeper())


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("engine", ["cuda_graph", "autograd"])
@pytest.mark.parametrize("name", WALKS)
@pytest.mark.filterwarnings("ignore:You are trying to run ClipPPO on the GPU")
def test_on_a_gpu(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(th.backends.cudnn, "deterministic", True)
    models = [trained_on_a_gpu(name, graphed, engine) for graphed in (GraphedTensorEnv, lambda env: env)]
    if engine == "cuda_graph":
        are_whole = [model._engine._rollout_step is not None for model in models]
        assert are_whole == [name != "reading", False]
    assert models[0].env.unwrapped.env._captures == (name != "reading")
    buffers = [model.rollout_buffer for model in models]
    for field in ("actions", "rewards", "values", "log_probs", "episode_starts"):
        th.testing.assert_close(*(getattr(buffer, field) for buffer in buffers), rtol=1e-4, atol=1e-5, msg=field)
    parts = [parts_of(buffer.observations) for buffer in buffers]
    for key in parts[0]:
        th.testing.assert_close(parts[0][key], parts[1][key], rtol=1e-4, atol=1e-5, msg=key)
    episodes = [[episode["l"] for episode in model.ep_info_buffer] for model in models]
    assert episodes[0] == episodes[1]
