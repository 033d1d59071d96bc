"""Generalised advantage estimation and the rollout buffer, compared with independent programs and SB3."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_clipvf.rollout import MiniBatch, TensorRolloutBuffer, gae

N_STEPS, N_ENVS = 7, 3


def random_rollout(
    dtype: Any = np.float64, seed: int = 0, n_steps: int = N_STEPS, n_envs: int = N_ENVS
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    starts = rng.random((n_steps, n_envs)) < 0.3
    starts[0] = True
    return {
        "rewards": rng.normal(size=(n_steps, n_envs)).astype(dtype),
        "values": rng.normal(size=(n_steps, n_envs)).astype(dtype),
        "episode_starts": starts.astype(dtype),
        "last_values": rng.normal(size=n_envs).astype(dtype),
        "dones": rng.random(n_envs) < 0.5,
    }


def slow_gae(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    dones: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> list[list[float]]:
    """
    Equation 16 of arXiv 1506.02438 as it stands, a sum for each t: sum_l (gamma lambda)^l delta_{t+l}, with equation
    12's delta_t = r_t + gamma V(s_{t+1}) - V(s_t), where a state after the end of an episode is worth nothing and the
    sum ends with the episode.
    """
    n_steps, n_envs = rewards.shape
    advantages = [[0.0] * n_envs for _ in range(n_steps)]
    for env in range(n_envs):
        ends = [*(bool(start) for start in episode_starts[1:, env]), bool(dones[env])]
        v = [*(float(value) for value in values[:, env]), float(last_values[env])]
        deltas = [float(rewards[t, env]) + (0.0 if ends[t] else gamma * v[t + 1]) - v[t] for t in range(n_steps)]
        for t in range(n_steps):
            last = next((u for u in range(t, n_steps) if ends[u]), n_steps - 1)
            advantages[t][env] = sum((gamma * gae_lambda) ** (u - t) * deltas[u] for u in range(t, last + 1))
    return advantages


class TestGAE:
    def test_golden(self) -> None:
        # gamma = lambda = 1/2, V = 1, 2, 4 and then 8; the second step ends an episode.
        # delta_2 = 1 + 8/2 - 4 = 1; delta_1 = 1 - 2 = -1 (terminal); delta_0 = 1 + 2/2 - 1 = 1
        # A_2 = 1; A_1 = -1; A_0 = 1 + 1/4 * -1 = 0.75; returns = A + V
        advantages, returns = gae(
            rewards=np.array([[1.0], [1.0], [1.0]]),
            values=np.array([[1.0], [2.0], [4.0]]),
            episode_starts=np.array([[1.0], [0.0], [1.0]]),
            last_values=np.array([8.0]),
            dones=np.array([False]),
            gamma=0.5,
            gae_lambda=0.5,
        )
        assert advantages.tolist() == [[0.75], [-1], [1]]
        assert returns.tolist() == [[1.75], [1], [5]]

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.5, 0.3), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)])
    def test_against_a_slow_program(self, gamma: float, gae_lambda: float, seed: int) -> None:
        rollout = random_rollout(seed=seed)
        advantages, returns = gae(**rollout, gamma=gamma, gae_lambda=gae_lambda)
        # Summed in another order: float64 rounding
        expected = np.array(slow_gae(**rollout, gamma=gamma, gae_lambda=gae_lambda))
        np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(returns, advantages + rollout["values"])

    def test_lambda_one_gives_discounted_returns_with_bootstrap(self) -> None:
        rollout = random_rollout()
        _, returns = gae(**rollout, gamma=0.9, gae_lambda=1.0)
        for env in range(N_ENVS):
            value = 0.0 if rollout["dones"][env] else rollout["last_values"][env]
            for t in reversed(range(N_STEPS)):
                if t < N_STEPS - 1 and rollout["episode_starts"][t + 1, env]:
                    value = 0.0
                value = rollout["rewards"][t, env] + 0.9 * value
                assert returns[t, env] == pytest.approx(value, abs=1e-12)

    def test_lambda_zero_gives_the_one_step_error(self) -> None:
        rollout = random_rollout()
        advantages, _ = gae(**rollout, gamma=0.9, gae_lambda=0.0)
        next_values = np.vstack([rollout["values"][1:], rollout["last_values"]])
        goes_on = 1.0 - np.vstack([rollout["episode_starts"][1:], rollout["dones"]])
        one_step = rollout["rewards"] + 0.9 * goes_on * next_values - rollout["values"]
        np.testing.assert_allclose(advantages, one_step, rtol=0, atol=1e-12)

    def test_perfect_values_leave_no_advantage(self) -> None:
        # Reward 1 forever is worth 1 / (1 - gamma) everywhere
        ones = np.ones((4, 2))
        advantages, returns = gae(ones, 2 * ones, 0 * ones, 2 * ones[0], np.array([False, False]), 0.5, 0.7)
        assert advantages.tolist() == (0 * ones).tolist()
        assert returns.tolist() == (2 * ones).tolist()

    def test_inputs_do_not_change(self) -> None:
        rollout = random_rollout()
        before = copy.deepcopy(rollout)
        gae(**rollout, gamma=0.9, gae_lambda=0.5)
        for name, array in before.items():
            np.testing.assert_array_equal(rollout[name], array)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_result_has_the_dtype_of_the_values(self, dtype: Any) -> None:
        advantages, returns = gae(**random_rollout(dtype), gamma=0.9, gae_lambda=0.5)
        assert (advantages.dtype, returns.dtype) == (dtype, dtype)

    def test_sb3_gives_the_same_bits(self) -> None:
        rollout = random_rollout(np.float32, n_steps=50)
        host = RolloutBuffer(50, BOX, BOX, "cpu", gae_lambda=0.95, gamma=0.99, n_envs=N_ENVS)
        host.reset()
        for name in ("rewards", "values", "episode_starts"):
            getattr(host, name)[:] = rollout[name]
        host.compute_returns_and_advantage(th.as_tensor(rollout["last_values"]), rollout["dones"])
        advantages, returns = gae(**rollout, gamma=0.99, gae_lambda=0.95)
        # The same operations in the same order on the same float32 numbers
        np.testing.assert_array_equal(advantages, host.advantages)
        np.testing.assert_array_equal(returns, host.returns)


BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 8, 8), np.uint8)
DICT = spaces.Dict({"image": IMAGE, "position": BOX, "room": spaces.Discrete(5)})

CASES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "box": (BOX, BOX),
    "box_float64": (spaces.Box(-1.0, 1.0, (2,), np.float64), spaces.Box(-1.0, 1.0, (1, 2), np.float64)),
    "image": (IMAGE, spaces.Discrete(4)),
    "discrete": (spaces.Discrete(6), spaces.MultiDiscrete([2, 3])),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)),
    "multi_binary": (spaces.MultiBinary(4), spaces.Discrete(2, start=1)),
    "dict": (DICT, BOX),
}


def make(name: str = "box", n_steps: int = N_STEPS, n_envs: int = N_ENVS, **kwargs: Any) -> TensorRolloutBuffer:
    observation_space, action_space = CASES[name]
    return TensorRolloutBuffer(n_steps, observation_space, action_space, "cpu", n_envs=n_envs, **kwargs)


def make_host(name: str, **kwargs: Any) -> RolloutBuffer:
    observation_space, action_space = CASES[name]
    host_class = DictRolloutBuffer if name == "dict" else RolloutBuffer
    return host_class(N_STEPS, observation_space, action_space, "cpu", n_envs=N_ENVS, **kwargs)  # type: ignore[arg-type]


def fill(buffer: Any, name: str, seed: int = 0, **extra: Any) -> None:
    """One rollout of random steps, the same for each buffer; as `collect_rollouts` passes them."""
    observation_space, action_space = CASES[name]
    rng = np.random.default_rng(seed)
    n_steps, n_envs = buffer.buffer_size, buffer.n_envs
    th.manual_seed(seed)
    for space in (observation_space, action_space):
        space.seed(seed)
    buffer.reset()
    starts = np.ones(n_envs, bool)
    for _ in range(n_steps):
        obs: Any = [observation_space.sample() for _ in range(n_envs)]
        obs = {key: np.stack([o[key] for o in obs]) for key in obs[0]} if isinstance(obs[0], dict) else np.stack(obs)
        actions = np.stack([action_space.sample() for _ in range(n_envs)])
        if isinstance(action_space, spaces.Discrete):
            actions = actions.reshape(-1, 1)
        rewards = rng.normal(size=n_envs).astype(np.float32)
        buffer.add(obs, actions, rewards, starts, th.randn(n_envs, 1), th.randn(n_envs), **extra)
        starts = rng.random(n_envs) < 0.3
    buffer.compute_returns_and_advantage(th.randn(n_envs, 1), starts)


def as_dict(observations: Any) -> dict[str, th.Tensor]:
    return observations if isinstance(observations, dict) else {"": observations}


class TestMinibatches:
    @pytest.mark.parametrize("batch_size", [4, 7, 21, 100, None])
    @pytest.mark.parametrize("name", CASES)
    def test_equal_sb3s_for_the_same_random_state(self, name: str, batch_size: int | None) -> None:
        drawn: list[list[Any]] = []
        for buffer in (make(name, gamma=0.9, gae_lambda=0.8), make_host(name, gamma=0.9, gae_lambda=0.8)):
            fill(buffer, name)
            np.random.seed(5)
            # Two epochs, as SB3's buffer changes its arrays in the first
            drawn.append([batch for _ in range(2) for batch in buffer.get(batch_size)])
        assert len(drawn[0]) == len(drawn[1]) == 2 * -(-N_STEPS * N_ENVS // (batch_size or 21))
        for ours, theirs in zip(*drawn, strict=True):
            observations = as_dict(theirs.observations)
            assert as_dict(ours.observations).keys() == observations.keys()
            for key, tensor in observations.items():
                assert th.equal(as_dict(ours.observations)[key], tensor)
                assert as_dict(ours.observations)[key].dtype == tensor.dtype
            for field in ("actions", "old_values", "old_log_prob", "advantages", "returns"):
                assert th.equal(getattr(ours, field), getattr(theirs, field)), field
                assert getattr(ours, field).dtype == th.float32
            assert ours.old_dist_params is None

    def test_last_one_is_truncated(self) -> None:
        buffer = make()
        fill(buffer, "box")
        assert [len(batch.returns) for batch in buffer.get(8)] == [8, 8, 5]
        assert [len(batch.returns) for batch in buffer.in_order(8)] == [8, 8, 5]

    def test_each_epoch_draws_every_transition_once_in_a_new_order(self) -> None:
        buffer = make()
        fill(buffer, "box")
        epochs = [th.cat([batch.old_values for batch in buffer.get(4)]) for _ in range(2)]
        assert not th.equal(epochs[0], epochs[1])
        for epoch in epochs:
            assert th.equal(epoch.sort().values, th.as_tensor(buffer.values).flatten().sort().values)

    def test_in_order_follows_memory_and_keeps_the_random_state(self) -> None:
        buffer = make(dist_param_dim=2)
        fill(buffer, "box", dist_params=th.rand(N_ENVS, 2))
        np.random.seed(0)
        batches = list(buffer.in_order(4))
        assert np.random.random() == np.random.RandomState(0).random()
        assert th.equal(th.cat([b.returns for b in batches]), th.as_tensor(buffer.returns).flatten())
        assert th.equal(th.cat([b.observations for b in batches]), th.as_tensor(buffer.observations).flatten(0, 1))

    def test_arrays_keep_their_shape(self) -> None:
        buffer = make("dict")
        fill(buffer, "dict")
        list(buffer.get(4))
        assert buffer.returns.shape == buffer.values.shape == (N_STEPS, N_ENVS)
        assert isinstance(buffer.observations, dict)
        assert buffer.observations["image"].shape == (N_STEPS, N_ENVS, *IMAGE.shape)

    def test_a_minibatch_is_a_copy(self) -> None:
        buffer = make()
        fill(buffer, "box")
        before = buffer.advantages.copy()
        batch = next(buffer.get())
        batch.advantages.zero_()
        np.testing.assert_array_equal(buffer.advantages, before)

    def test_an_incomplete_rollout_is_refused(self) -> None:
        buffer = make()
        buffer.reset()
        buffer.add(np.zeros((3, 2)), np.zeros((3, 2)), np.zeros(3), np.ones(3, bool), th.zeros(3), th.zeros(3))
        with pytest.raises(ValueError, match="The rollout is incomplete: 1 of 7 steps"):
            next(buffer.get())

    def test_a_complete_rollout_takes_no_further_step(self) -> None:
        buffer = make()
        fill(buffer, "box")
        row = (np.zeros((3, 2)), np.zeros((3, 2)), np.zeros(3), np.ones(3, bool), th.zeros(3), th.zeros(3))
        with pytest.raises(ValueError, match=r"The rollout buffer is full \(7 steps\)\..*`reset`"):
            buffer.add(*row)

    def test_the_first_rollout_needs_no_reset_as_in_sb3(self) -> None:
        buffer = make()
        buffer.add(np.ones((3, 2)), np.zeros((3, 2)), np.zeros(3), np.ones(3, bool), th.zeros(3), th.zeros(3))
        assert (buffer.pos, buffer.observations[0].sum()) == (1, 6)

    @pytest.mark.parametrize("size", [(3, 3), (20, 3), (7, 1)])
    def test_an_assigned_size_takes_effect_at_the_next_reset_as_in_sb3(self, size: tuple[int, int]) -> None:
        buffer = make()
        fill(buffer, "box")
        buffer.buffer_size, buffer.n_envs = size
        buffer.reset()
        assert buffer.rewards.shape == buffer.returns.shape == size
        assert buffer.observations.shape == (*size, 2)

    @pytest.mark.parametrize("name", ["image", "dict"])
    def test_the_next_rollout_replaces_this_one(self, name: str) -> None:
        buffer, other = make(name), make(name)
        fill(buffer, name, seed=0)
        list(buffer.get(4))
        fill(buffer, name, seed=1)
        fill(other, name, seed=1)
        for ours, theirs in zip(buffer.in_order(100), other.in_order(100), strict=True):
            # Discrete actions are cast, and thereby copied, once a rollout
            assert th.equal(ours.actions, theirs.actions)
            assert th.equal(ours.advantages, theirs.advantages)
            for key, tensor in as_dict(theirs.observations).items():
                assert th.equal(as_dict(ours.observations)[key], tensor)

    def test_changes_before_the_draw_are_seen(self) -> None:
        """Callbacks may change the rollout at its end, for example add an intrinsic reward."""
        buffer = make()
        fill(buffer, "box")
        buffer.rewards += 1.0
        buffer.compute_returns_and_advantage(th.zeros(N_ENVS), np.ones(N_ENVS, bool))
        assert th.equal(next(buffer.in_order(100)).returns, th.as_tensor(buffer.returns).flatten())

    @pytest.mark.parametrize("name", ["advantages", "actions", "observations", "dist_params"])
    @pytest.mark.parametrize("how", ["assigned", "transposed", "in place"])
    @pytest.mark.parametrize("case", ["box", "multi_binary", "dict"])
    def test_changes_after_a_draw_are_seen_by_the_next_one(self, case: str, how: str, name: str) -> None:
        buffer = make(case, dist_param_dim=2)
        fill(buffer, case, dist_params=th.rand(N_ENVS, 2))
        list(buffer.get(4))
        holder, key = (buffer.observations, "position") if (case, name) == ("dict", "observations") else (None, name)
        array = getattr(buffer, name) if holder is None else holder[key]  # type: ignore[index]
        changed = 1 - array
        if how == "in place":
            array[:] = changed
        else:
            other = changed if how == "assigned" else np.asfortranarray(changed)
            setattr(buffer, name, other) if holder is None else holder.update({key: other})  # type: ignore[union-attr]
        field = {"dist_params": "old_dist_params"}.get(name, name)
        for batch in (next(buffer.in_order(100)), next(buffer.get())):
            drawn = getattr(batch, field) if holder is None else batch.observations[key]
            expected = th.as_tensor(changed).flatten(0, 1).to(drawn.dtype)
            assert th.equal(*(rows.reshape(len(drawn), -1).sort(0).values for rows in (drawn, expected)))

    def test_samples_by_index_follow_assigned_arrays_and_after_forget_copies_changed_ones(self) -> None:
        """Integer actions are copies here, as all tensors are if the buffer's device is not the CPU."""
        buffer = make("multi_binary")
        fill(buffer, "multi_binary")
        indices = np.arange(4)
        before = buffer._get_samples(indices)
        buffer.advantages = buffer.advantages + 1
        assert th.equal(buffer._get_samples(indices).advantages, before.advantages + 1)
        buffer.actions[:] = 1 - buffer.actions
        buffer.forget_copies()
        assert th.equal(buffer._get_samples(indices).actions, 1 - before.actions)

    @pytest.mark.parametrize("of", ["class", "instance"])
    def test_a_hook_for_samples_makes_the_minibatches_as_in_sb3(self, of: str) -> None:
        """`get` calls it with the transitions of each minibatch, in SB3's numbering."""

        def marked(self: TensorRolloutBuffer, batch_inds: np.ndarray, env: Any = None) -> MiniBatch:
            return TensorRolloutBuffer._get_samples(self, batch_inds)._replace(returns=th.as_tensor(batch_inds))

        own = type("Own", (TensorRolloutBuffer,), {"_get_samples": marked} if of == "class" else {})
        buffer, plain = own(N_STEPS, *CASES["box"], "cpu", n_envs=N_ENVS), make()
        if of == "instance":
            buffer._get_samples = marked.__get__(buffer)
        for each in (buffer, plain):
            fill(each, "box")
        np.random.seed(5)
        ours = list(buffer.get(4))
        assert th.equal(
            th.cat([batch.returns for batch in ours]), th.as_tensor(np.random.RandomState(5).permutation(21))
        )
        np.random.seed(5)
        for batch, other in zip([*ours, *buffer.in_order(4)], [*plain.get(4), *plain.in_order(4)], strict=True):
            assert th.equal(batch.old_values, other.old_values)
            assert th.equal(batch.observations, other.observations)


class TestMemory:
    @pytest.mark.parametrize("dist_param_dim", [0, 5])
    @pytest.mark.parametrize("name", CASES)
    def test_nbytes_is_what_is_allocated(self, name: str, dist_param_dim: int) -> None:
        buffer = make(name, dist_param_dim=dist_param_dim)
        announced = buffer.nbytes
        buffer.reset()
        arrays = [array for array in vars(buffer).values() if isinstance(array, np.ndarray)]
        if isinstance(buffer.observations, dict):
            arrays += list(buffer.observations.values())
        assert announced == sum(array.nbytes for array in arrays)

    def test_golden_size(self) -> None:
        # 7 * 3 transitions of 3 * 8 * 8 bytes of image, an 8-byte action and 6 float32; 2 more for the distribution
        assert make("image", dist_param_dim=2).nbytes == 21 * (192 + 8 + 4 * 6 + 4 * 2)

    def test_images_keep_one_byte_a_pixel(self) -> None:
        for name in ("image", "dict"):
            buffer = make(name)
            fill(buffer, name)
            stored = buffer.observations["image"] if isinstance(buffer.observations, dict) else buffer.observations
            assert stored.dtype == np.uint8
            drawn = next(buffer.get(4)).observations
            assert (drawn["image"] if name == "dict" else drawn).dtype == th.uint8

    def test_nothing_is_allocated_before_the_first_reset(self) -> None:
        buffer = make()
        assert not any(isinstance(value, np.ndarray) for value in vars(buffer).values())
        buffer.reset()
        address = buffer.observations.ctypes.data  # type: ignore[union-attr]
        buffer.reset()
        assert buffer.observations.ctypes.data == address  # type: ignore[union-attr]

    def test_a_rollout_that_does_not_fit_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = make(n_steps=1000)
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=buffer.nbytes - 1))
        message = (
            r"`n_steps` must be small enough for the rollout to fit into memory, got n_steps=1000 with n_envs=3, which "
            r"takes 0\.0 GiB, but 0\.0 GiB are free\. Lower `n_steps` or the number of environments"
        )
        with pytest.raises(ValueError, match=message):
            buffer.check_memory()
        with pytest.raises(ValueError, match=message):
            buffer.reset()
        assert not hasattr(buffer, "observations")

    def test_a_rollout_that_just_fits_is_accepted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        buffer = make(n_steps=1000)
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=buffer.nbytes))
        buffer.check_memory()
        buffer.reset()
        # Memory that is allocated already is not counted again
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
        buffer.check_memory()
        buffer.reset()


class TestOldDistribution:
    def test_rows_belong_to_their_transitions(self) -> None:
        buffer = make("discrete", dist_param_dim=1)
        observation_space, action_space = CASES["discrete"]
        buffer.reset()
        for step in range(N_STEPS):
            marks = th.arange(N_ENVS) + 10.0 * step
            buffer.add(
                np.zeros(N_ENVS, np.int64),
                np.zeros((N_ENVS, 2)),
                np.zeros(N_ENVS),
                np.zeros(N_ENVS, bool),
                marks,
                marks + 0.5,
                dist_params=marks[:, None].requires_grad_() + 0.25,
            )
        buffer.compute_returns_and_advantage(th.zeros(N_ENVS), np.zeros(N_ENVS, bool))
        for batch in [*buffer.get(4), *buffer.in_order(4)]:
            assert th.equal(batch.old_log_prob, batch.old_values + 0.5)
            assert batch.old_dist_params is not None
            assert th.equal(batch.old_dist_params[:, 0], batch.old_values + 0.25)
            assert not batch.old_dist_params.requires_grad

    def test_a_rollout_without_them_does_not_keep_those_of_the_previous_one(self) -> None:
        buffer = make(dist_param_dim=4)
        held = []
        for dist_params in ({"dist_params": th.ones(N_ENVS, 4)}, {}, {"dist_params": th.ones(N_ENVS, 4)}):
            fill(buffer, "box", **dist_params)
            held.append((buffer.has_dist_params, next(buffer.get()).old_dist_params is not None))
        assert held == [(True, True), (False, False), (True, True)]

    def test_none_are_stored_with_a_width_of_zero(self) -> None:
        buffer = make()
        fill(buffer, "box", dist_params=th.zeros(N_ENVS, 4))
        assert next(buffer.get()).old_dist_params is None


def test_minibatch_begins_with_sb3s_fields() -> None:
    from stable_baselines3.common.type_aliases import RolloutBufferSamples

    assert MiniBatch._fields[:6] == RolloutBufferSamples._fields


def test_a_filled_buffer_can_be_pickled() -> None:
    """Callbacks save buffers; the copy draws the same minibatches."""
    buffer = make("dict")
    fill(buffer, "dict")
    restored = pickle.loads(pickle.dumps(buffer))
    for ours, theirs in zip(buffer.in_order(4), restored.in_order(4), strict=True):
        assert th.equal(ours.advantages, theirs.advantages)
        assert th.equal(ours.observations["image"], theirs.observations["image"])


def test_subclass_may_change_what_is_stored() -> None:
    class Doubled(TensorRolloutBuffer):
        def add(self, obs: Any, action: Any, reward: Any, *args: Any, **kwargs: Any) -> None:
            super().add(obs, action, 2 * reward, *args, **kwargs)

    plain, doubled = make(), Doubled(N_STEPS, BOX, BOX, "cpu", n_envs=N_ENVS)
    fill(plain, "box")
    fill(doubled, "box")
    np.testing.assert_array_equal(doubled.rewards, 2 * plain.rewards)
    assert not np.array_equal(doubled.returns, plain.returns)
