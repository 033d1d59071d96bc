"""FastSubprocVecEnv returns what DummyVecEnv returns, from several processes that end with it."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from test_envs_dummy import BOX, MIXED, PAIR, SPACES, Infos, Reusing, Scripted, plain, right, same, still_clock

from sb3_clipvf import ClipPPO
from sb3_clipvf.envs import FastSubprocVecEnv, FastVecNormalize
from sb3_clipvf.guards.workers import WorkerDiedError

__all__ = ["still_clock"]

Make = Callable[[int], gym.Env[Any, Any]]

# Forked processes start fast.
fast = partial(FastSubprocVecEnv, start_method="fork")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers of a busy machine end by themselves; those that hang are killed by tests of their own."""
    monkeypatch.setattr("sb3_clipvf.envs.subproc.GRACE", 60.0)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail a test whose workers do not end with their object."""
    before = set(multiprocessing.active_children())
    yield
    if set(multiprocessing.active_children()) - before:
        gc.collect()
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(multiprocessing.active_children()) - before


def env_fns(make: Make, n_envs: int) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [partial(make, number) for number in range(n_envs)]


def pair(make: Make, n_envs: int = 5, n_workers: int = 3) -> tuple[FastSubprocVecEnv, DummyVecEnv]:
    """Return the same environments in our class and in SB3's."""
    return fast(env_fns(make, n_envs), n_workers), DummyVecEnv(env_fns(make, n_envs))


def run_both(ours: VecEnv, theirs: VecEnv, n_steps: int = 40) -> None:
    """Check that both return the same, with at least 3 ends of episodes."""
    rng = np.random.default_rng(0)
    same(ours.reset(), theirs.reset())
    same(ours.reset_infos, theirs.reset_infos)
    n_ends = 0
    for _ in range(n_steps):
        actions = rng.integers(2, size=theirs.num_envs)
        wanted, given = theirs.step(actions), ours.step(actions)
        same(given[:3], wanted[:3])
        for info, other in zip(given[3], wanted[3], strict=True):  # objects are not shared between processes
            same(info, other)
        for info, other in zip(ours.reset_infos, theirs.reset_infos, strict=True):
            same(info, other)
        n_ends += int(wanted[2].sum())
    assert n_ends >= 3


def floats(env: Scripted) -> dict[Any, Any]:
    """Return floats alone, as MuJoCo's environments do; their types change."""
    kinds: list[Any] = [np.float64, np.float32, np.bool_, float, bool]
    return {f"x{number}": kind(env.rng.normal()) for number, kind in enumerate(kinds[env.n_steps % 2 :])} | {3: -0.0}


def values(env: Scripted) -> dict[Any, Any]:
    """Return values of many types; copies of empty arrays have other strides."""
    return {key: value for key, value in plain(env).items() if key != "empty"}


class TestEqualStreams:
    @pytest.mark.parametrize(("n_envs", "n_workers"), [(1, 4), (4, 1), (4, 2), (4, 4)])
    def test_of_monitored_environments(self, n_envs: int, n_workers: int, still_clock: None) -> None:
        kwargs = {"n_workers": n_workers, "start_method": "fork"}
        ours = make_vec_env("CartPole-v1", n_envs, seed=3, vec_env_cls=FastSubprocVecEnv, vec_env_kwargs=kwargs)
        assert isinstance(ours, FastSubprocVecEnv)
        assert len(ours.processes) == min(n_envs, n_workers) - 1
        run_both(ours, make_vec_env("CartPole-v1", n_envs, seed=3), 100)

    def test_of_truncated_and_terminated_episodes(self, still_clock: None) -> None:
        ours, theirs = pair(lambda number: Monitor(gym.make("CartPole-v1", max_episode_steps=9 + 3 * number)))
        for venv in (ours, theirs):
            venv.seed(0)
        run_both(ours, theirs)

    # Copies of empty arrays have other strides.
    @pytest.mark.parametrize("space", [space for space in SPACES if space.shape != (0,)], ids=str)
    def test_of_every_space(self, space: spaces.Space[Any]) -> None:
        run_both(*pair(lambda number: Scripted(number, space)))

    @pytest.mark.parametrize("infos", [values, floats])
    def test_of_infos_of_every_kind(self, infos: Infos) -> None:
        run_both(*pair(lambda number: Scripted(number, infos=infos)))

    def test_of_environments_that_write_to_what_they_returned(self) -> None:
        ours, theirs = right(pair(Reusing))
        same(ours.reset(), theirs.reset())
        for _ in range(20):
            actions = np.zeros(5, int)
            for part, wanted in zip(ours.step(actions), theirs.step(actions), strict=True):
                same(list(part), list(wanted))

    @pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
    def test_of_every_start_method(self, start_method: str) -> None:
        ours = FastSubprocVecEnv(env_fns(Scripted, 2), 2, start_method)
        run_both(ours, DummyVecEnv(env_fns(Scripted, 2)))
        ours.close()

    def test_of_seeds_and_options(self) -> None:
        ours, theirs = pair(Scripted)
        for venv in (ours, theirs):
            venv.seed(7)
            venv.set_options([{"a": 1}, {}, {}, {}, {"b": np.ones(2)}])
        run_both(ours, theirs)
        run_both(ours, theirs)
        assert [resets[0][0] for resets in ours.get_attr("resets")] == [7, 8, 9, 10, 11]

    def test_of_trained_weights(self) -> None:
        weights = []
        for cls, wrapper in ((fast, FastVecNormalize), (DummyVecEnv, VecNormalize)):
            env = make_vec_env("CartPole-v1", 3, seed=0, vec_env_cls=cls)  # type: ignore[arg-type]
            model = ClipPPO("MlpPolicy", wrapper(env), n_steps=16, batch_size=16, seed=1, device="cpu").learn(96)
            weights.append(np.concatenate([part.detach().ravel() for part in model.policy.parameters()]))
        np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-6)  # FastVecNormalize rounds otherwise

    def test_the_default_is_a_process_for_each_core(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sb3_clipvf.envs.subproc.usable_cores", lambda: 3)
        assert [len(rows) for rows in fast(env_fns(Scripted, 8)).worker_rows] == [3, 3]
        assert len(fast(env_fns(Scripted, 2)).processes) == 1


class Taking(Scripted):
    """Report its actions, which it keeps."""

    def __init__(self, number: int, space: spaces.Space[Any]) -> None:
        super().__init__(number)
        self.action_space = space
        self.taken: list[Any] = []

    def step(self, action: Any) -> Any:
        self.taken.append(action)
        return *super().step(0)[:4], {"action": action}


class TestActions:
    @pytest.mark.parametrize(
        ("space", "actions"),
        [
            (spaces.Discrete(3), np.arange(5)),
            (spaces.Discrete(3), np.arange(5, dtype=np.int32)),
            (spaces.Discrete(3), [0, 1, 2, 0, 1]),
            (spaces.Discrete(3), (0, 1, 2, 0, 1)),
            (spaces.Box(-1, 1, (2,)), np.arange(10, dtype=np.float32).reshape(5, 2)),
            (spaces.Box(-1, 1, (2,)), np.arange(10.0).reshape(5, 2)),
            (spaces.MultiBinary(2), np.ones((5, 2), np.int8)),
            (spaces.Dict({"a": spaces.Discrete(2)}), [{"a": number} for number in range(5)]),
        ],
        ids=str,
    )
    def test_arrive_as_they_are(self, space: spaces.Space[Any], actions: Any) -> None:
        ours, theirs = pair(lambda number: Taking(number, space))
        for venv in (ours, theirs):
            venv.reset()
        for _ in range(2):
            infos = [venv.step(actions)[3] for venv in (ours, theirs)]
            same([info["action"] for info in infos[0]], [info["action"] for info in infos[1]])

    def test_that_an_environment_keeps_do_not_change(self) -> None:
        ours, _ = pair(lambda number: Taking(number, spaces.Box(-1, 1, (2,))))
        ours.reset()
        for value in range(3):
            ours.step(np.full((5, 2), value, np.float32))
        assert [[int(action[0]) for action in taken] for taken in ours.get_attr("taken")] == [[0, 1, 2]] * 5

    @pytest.mark.parametrize("n_actions", [4, 6])
    def test_must_be_one_per_environment(self, n_actions: int) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        with pytest.raises(ValueError, match=f"`actions` must be one per environment, 5, got {n_actions}"):
            ours.step(np.zeros(n_actions, int))


@pytest.mark.parametrize("space", [BOX, MIXED, PAIR], ids=str)
def test_returned_values_do_not_change(space: spaces.Space[Any]) -> None:
    ours, _ = pair(lambda number: Scripted(number, space, values))
    held = [ours.reset(), *(ours.step(np.ones(5, int)) for _ in range(10))]
    held_then = pickle.dumps(held)
    for _ in range(10):
        ours.step(np.zeros(5, int))
    ours.reset()
    assert pickle.dumps(held) == held_then


class Drawn(Scripted):
    """Has images, attributes and methods."""

    metadata = {"render_modes": ["rgb_array", "human"]}

    def __init__(self, number: int, render_mode: str | None = "rgb_array") -> None:
        super().__init__(number)
        self.render_mode = render_mode
        self.n_renders = 0

    def render(self) -> Any:
        self.n_renders += 1
        return np.full((2, 2, 3), self.number, np.uint8)

    def nothing_to_pickle(self) -> Any:
        return lambda: None

    def sum_of(self, first: int, second: int = 0) -> int:
        return self.number + first + second

    def called(self, name: str) -> str:
        return f"{name} {self.number}"


class TestCalls:
    @pytest.mark.parametrize("indices", [None, 0, 4, -1, [3, 0, 4, 0], range(1, 3), np.array([2, 1]), []])
    def test_reach_the_environments_at_indices(self, indices: Any) -> None:
        ours, theirs = pair(Drawn)
        for venv in (ours, theirs):
            venv.set_attr("number", 99, indices)
        assert ours.get_attr("number") == theirs.get_attr("number")
        assert ours.get_attr("number", indices) == theirs.get_attr("number", indices)
        calls = [venv.env_method("sum_of", 1, second=2, indices=indices) for venv in (ours, theirs)]
        assert calls[0] == calls[1]
        calls = [venv.env_method("called", name="x", indices=indices) for venv in (ours, theirs)]
        assert calls[0] == calls[1]
        assert ours.env_is_wrapped(Monitor, indices) == theirs.env_is_wrapped(Monitor, indices)

    def test_see_wrappers_and_attributes(self) -> None:
        ours = fast(env_fns(lambda number: Monitor(Drawn(number)) if number else Drawn(number), 3), 3)
        assert ours.env_is_wrapped(Monitor) == [False, True, True]
        assert ours.has_attr("number")
        assert not ours.has_attr("rewards")  # of Monitor
        assert not ours.has_attr("nothing")

    def test_render(self) -> None:
        ours, theirs = pair(Drawn)
        same(ours.get_images(), theirs.get_images())
        same(ours.render(), theirs.render())
        assert ours.metadata == {"render_modes": ["human", "rgb_array"]}
        ours = fast(env_fns(partial(Drawn, render_mode="human"), 3), 2)
        ours.render()
        assert ours.get_attr("n_renders") == [1, 1, 1]
        with pytest.warns(UserWarning, match="must be rgb_array for images, got human"):
            assert ours.get_images() == [None] * 3


class OddError(Exception):
    """Cannot be unpickled, as its arguments are not those of its class."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class Failing(Scripted):
    """Do something at the step of a number, or at the reset of number 0, in one of the environments."""

    def __init__(self, number: int, bad: int = 4, at: int = 3, act: Callable[[], None] | None = None) -> None:
        super().__init__(number)
        self.at, self.act = at if number == bad else -1, act or self.fail

    def fail(self) -> None:
        raise OSError(f"the user's own words, {self.number}")

    def reset(self, **kwargs: Any) -> Any:
        if self.at == 0:
            self.act()
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        if self.n_steps + 1 == self.at:
            self.at = -1
            self.act()
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, False, truncated, info


def odd() -> None:
    raise OddError("two ", "arguments")


class TestErrors:
    @pytest.mark.parametrize("bad", [0, 4])
    def test_of_a_step_are_raised_and_the_next_step_works(self, bad: int) -> None:
        ours, _ = pair(partial(Failing, bad=bad))
        ours.reset()
        actions = np.zeros(5, int)
        for _ in range(2):
            ours.step(actions)
        with pytest.raises(OSError, match=f"the user's own words, {bad}") as caught:
            ours.step(actions)
        if bad:
            assert "in fail" in str(caught.value.__cause__)
        ours.step(actions)
        assert set(ours.get_attr("n_steps")) <= {3, 4}

    def test_of_a_reset(self) -> None:
        ours, _ = pair(partial(Failing, at=0))
        with pytest.raises(OSError, match="the user's own words, 4"):
            ours.reset()

    def test_that_cannot_be_pickled(self) -> None:
        ours, _ = pair(partial(Failing, act=odd))
        ours.reset()
        with pytest.raises(RuntimeError, match="OddError: two arguments"):
            for _ in range(3):
                ours.step(np.zeros(5, int))

    @pytest.mark.parametrize("bad", [0, 4])
    def test_while_environments_are_made(self, bad: int) -> None:
        def make(number: int) -> gym.Env[Any, Any]:
            return Scripted(number) if number != bad else Scripted(number, infos=1, nothing=2)  # type: ignore

        with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
            fast(env_fns(make, 5), 3)

    def test_of_calls(self) -> None:
        ours, _ = pair(Drawn)
        with pytest.raises(AttributeError, match="nothing"):
            ours.get_attr("nothing", 4)
        with pytest.raises(IndexError):
            ours.get_attr("number", 5)
        with pytest.raises(TypeError, match="sum_of"):
            ours.env_method("sum_of")
        with pytest.raises(Exception, match="pickle"):
            ours.set_attr("number", lambda: None)
        with pytest.raises(Exception, match="pickle"):
            ours.env_method("nothing_to_pickle")
        assert ours.get_attr("number") == list(range(5))

    def test_of_shapes_name_the_environment(self) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        ours.set_attr("observation_space", spaces.Box(-1, 1, (4,)), 4)
        with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\) from environment 4"):
            ours.step(np.zeros(5, int))

    def test_of_spaces_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"one observation space, got MultiBinary\(3\) for environment 2"):
            fast(env_fns(lambda number: Scripted(number, BOX if number < 2 else spaces.MultiBinary(3)), 4), 2)

    def test_of_spaces_without_numbers(self) -> None:
        space = spaces.Box(-1, 1, (3,))
        space.dtype = np.dtype(object)
        with pytest.raises(ValueError, match="observations are arrays of numbers, got the space Box.*SubprocVecEnv"):
            fast(env_fns(lambda number: Scripted(number, space), 2), 2)

    @pytest.mark.parametrize(("n_workers", "error"), [(0, ValueError), (1.5, ValueError), ("two", TypeError)])
    def test_of_the_number_of_workers(self, n_workers: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="`n_workers` must be a whole number"):
            fast(env_fns(Scripted, 2), n_workers)


def exit_with_3() -> None:
    os._exit(3)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class TestDeadWorkers:
    @pytest.mark.parametrize("bad", [1, 4])
    def test_are_seen(self, bad: int) -> None:
        ours, _ = pair(partial(Failing, bad=bad, act=exit_with_3))
        ours.reset()
        text = rf"but that of environments {'1 to 2' if bad == 1 else '3 to 4'} ended with exit code 3\. See"
        with pytest.raises(EOFError, match=text):
            for _ in range(3):
                ours.step(np.zeros(5, int))
        with pytest.raises(EOFError, match=text):
            ours.reset()
        ours.close()
        assert [process.exitcode for process in ours.processes] == ([3, 0] if bad == 1 else [0, 3])

    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_are_named_if_they_die_while_they_start(self, start_method: str) -> None:
        def make(number: int) -> gym.Env[Any, Any]:
            if number == 3:
                os._exit(4)
            return Scripted(number)

        with pytest.raises(EOFError, match=r"but that of environments 3 to 4 ended with exit code 4\. See the error"):
            FastSubprocVecEnv(env_fns(make, 5), 3, start_method)

    @pytest.mark.parametrize("delay", [0.0, 1e-4, 1e-3, 1e-2, None])
    def test_are_seen_whenever_they_are_killed(self, delay: float | None) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        victim = ours.processes[1]
        if delay is None:  # while it sleeps
            time.sleep(0.1)
            victim.kill()
            victim.join()
        else:
            threading.Timer(delay, victim.kill).start()
        with pytest.raises(EOFError, match="that of environments 3 to 4 was killed by SIGKILL"):
            while True:
                ours.step(np.zeros(5, int))
        ours.close()
        assert [process.exitcode for process in ours.processes] == [0, -9]

    @pytest.mark.parametrize(
        ("act", "bad", "codes", "text"),
        [
            (kill_itself, 2, {1: -9, 2: -9}, "that of environments 1 to 2 was killed by SIGKILL"),
            (
                exit_with_3,
                4,
                {3: 3, 4: 3},
                "that of environments 3 to 4 ended with exit code 3. The others were terminated. An environment ended",
            ),
        ],
    )
    def test_end_a_training(self, act: Any, bad: int, codes: dict[int, int], text: str) -> None:
        ours, _ = pair(partial(Failing, bad=bad, act=act))
        with pytest.raises(WorkerDiedError, match=f"must keep its 2 processes running, but {text}") as caught:
            ClipPPO("MlpPolicy", ours, n_steps=8, batch_size=8, device="cpu").learn(40)
        assert caught.value.exit_codes == codes
        assert ours.closed
        assert not any(process.is_alive() for process in ours.processes)
        with pytest.raises(ValueError, match="`env` is closed: its worker processes have ended"):
            ClipPPO("MlpPolicy", ours, n_steps=8, batch_size=8, device="cpu").learn(40)

    def test_environments_of_the_training_are_closed(self, tmp_path: Any) -> None:
        def make(number: int) -> gym.Env[Any, Any]:
            env = Failing(number, act=kill_itself)
            env.close = (tmp_path / str(number)).touch  # type: ignore[method-assign]
            return env

        ours, _ = pair(make)
        with pytest.raises(WorkerDiedError):
            ClipPPO("MlpPolicy", ours, n_steps=8, batch_size=8, device="cpu").learn(40)
        assert (tmp_path / "0").exists()

    @pytest.mark.parametrize("bad", [0, 4])
    def test_errors_in_a_training_are_the_environments_own_at_once(
        self, bad: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sb3_clipvf.guards.workers.GRACE", 3600)
        ours, _ = pair(partial(Failing, bad=bad))
        with pytest.raises(OSError, match="the user's own words") as caught:
            ClipPPO("MlpPolicy", ours, n_steps=8, batch_size=8, device="cpu").learn(40)
        assert any("num_timesteps=10 of 40" in note for note in caught.value.__notes__)
        ours.close()


class Closing(Scripted):
    """Write to a file when it is closed."""

    def __init__(self, number: int, path: Any) -> None:
        super().__init__(number)
        self.path = path

    def close(self) -> None:
        with open(self.path, "a") as file:
            file.write(f"{self.number}\n")


def hang() -> None:
    time.sleep(600)


KILLED = """
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from sb3_clipvf.envs import FastSubprocVecEnv

if __name__ == "__main__":
    kwargs = {{"n_workers": 4, "start_method": "{}"}}
    venv = make_vec_env("CartPole-v1", 4, vec_env_cls=FastSubprocVecEnv, vec_env_kwargs=kwargs)
    venv.reset()
    print(*[process.pid for process in venv.processes], flush=True)
    while True:
        venv.step(np.zeros(4, int))
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestEnds:
    def test_close_twice(self, tmp_path: Any) -> None:
        ours, _ = pair(partial(Closing, path=tmp_path / "closed"))
        ours.reset()
        ours.close()
        ours.close()
        assert sorted((tmp_path / "closed").read_text().split()) == list("01234")
        assert [process.exitcode for process in ours.processes] == [0, 0]

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("get_attr", ("number",)),
            ("set_attr", ("number", 1)),
            ("env_method", ("get_wrapper_attr", "number")),
            ("env_is_wrapped", (gym.Wrapper,)),
            ("has_attr", ("number",)),
        ],
    )
    def test_calls_during_a_step_are_refused(self, name: str, arguments: tuple[Any, ...]) -> None:
        """The reply to the step would be lost, and `step_wait` would wait for it."""
        ours, theirs = pair(Scripted)
        same(ours.reset(), theirs.reset())
        ours.step_async(np.zeros(5, int))
        with pytest.raises(
            RuntimeError,
            match=f"`{name}` cannot be called between `step_async` and `step_wait`. Call `step_wait` first",
        ):
            getattr(ours, name)(*arguments)
        same(ours.step_wait(), theirs.step(np.zeros(5, int)))
        getattr(ours, name)(*arguments)

    def test_a_reset_drops_a_step(self) -> None:
        ours, theirs = pair(lambda _: gym.make("CartPole-v1"))
        ours.reset()
        ours.step_async(np.zeros(5, int))
        ours.seed(3)
        theirs.seed(3)
        same(ours.reset(), theirs.reset())
        with pytest.raises(RuntimeError, match="`step_wait` was called without `step_async`"):
            ours.step_wait()
        same(ours.step(np.zeros(5, int))[0], theirs.step(np.zeros(5, int))[0])

    def test_close_during_a_step(self) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        ours.step_async(np.zeros(5, int))
        ours.close()
        assert [process.exitcode for process in ours.processes] == [0, 0]

    def test_close_while_a_worker_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sb3_clipvf.envs.subproc.GRACE", 0.2)
        ours, _ = pair(partial(Failing, at=1, act=hang))
        ours.reset()
        ours.step_async(np.zeros(5, int))
        other = ours.processes[0]
        monkeypatch.setattr(other, "join", lambda _=None, join=other.join: join(60))  # only the hanging one has no time
        ours.close()
        assert [process.exitcode for process in ours.processes] == [0, -9]

    def test_without_close_workers_end_with_their_object(self, tmp_path: Any) -> None:
        ours, _ = pair(partial(Closing, path=tmp_path / "closed"))
        processes = list(ours.processes)
        del ours
        gc.collect()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert {"1", "2", "3", "4"} <= set((tmp_path / "closed").read_text().split())

    def test_memory_is_not_allocated_again_while_a_worker_may_write_to_it(self) -> None:
        def places(venv: FastSubprocVecEnv) -> set[int]:
            return {array.ctypes.data for array in venv._arrays.values()}

        ours, _ = pair(partial(Failing, at=1, act=hang))
        ours.reset()
        ours.step_async(np.zeros(5, int))
        hanging, before = ours.processes[1].pid, places(ours)
        del ours
        gc.collect()
        try:
            others, _ = pair(Scripted)
            assert not before & places(others)
        finally:
            os.kill(hanging, signal.SIGKILL)

    def test_an_interrupted_step_leaves_usable_environments(self) -> None:
        ours, theirs = pair(lambda _: gym.make("CartPole-v1"))
        ours.reset()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for turn in range(40):
                with pytest.raises(KeyboardInterrupt):
                    while True:
                        # More than once, since Python drops an exception that is raised in a finalizer.
                        signal.setitimer(signal.ITIMER_REAL, 2e-3 + turn * 1e-5)
                        for _ in range(2000):
                            ours.step(np.zeros(5, int))
                for venv in (ours, theirs):
                    venv.seed(turn)
                same(ours.reset(), theirs.reset())
                for _ in range(3):
                    same(ours.step(np.zeros(5, int))[:3], theirs.step(np.zeros(5, int))[:3])
        finally:
            signal.signal(signal.SIGALRM, before)

    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_a_killed_training_leaves_no_process_and_no_memory(self, start_method: str, tmp_path: Any) -> None:
        script = tmp_path / "killed.py"
        script.write_text(KILLED.format(start_method))
        before = set(os.listdir("/dev/shm"))
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout is not None
            workers = [int(pid) for pid in training.stdout.readline().split()]
            assert len(workers) == 3
            # Not what other tests make there meanwhile
            made = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("pym-", "sem."))}
            training.kill()
        deadline = time.monotonic() + 120
        while left := [pid for pid in workers if is_running(pid)] + sorted(made & set(os.listdir("/dev/shm"))):
            assert time.monotonic() < deadline, left
            time.sleep(0.01)

    def test_workers_outlive_an_interrupt(self) -> None:
        ours, _ = pair(Scripted)
        ours.reset()
        for process in ours.processes:
            os.kill(process.pid, signal.SIGINT)
        ours.step(np.zeros(5, int))
        assert isinstance(ours, SubprocVecEnv)
        ours.close()
