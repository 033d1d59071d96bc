"""What tests/test_data_parallel.py runs in each of several processes: functions of a process's number."""

import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from io import StringIO
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_clipvf import ClipPPO, distributed
from sb3_clipvf.checkpoint import TrainingCheckpoint, monitor_files, newest_checkpoint, training_checkpoint
from sb3_clipvf.common.nonfinite import BadMinibatchError, NonFiniteError
from sb3_clipvf.distributed import ALONE, Group, current_group
from sb3_clipvf.distributions import dist_param_dim, dist_params
from sb3_clipvf.engines.epochs import MinibatchStatistics
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings
from sb3_clipvf.engines.kernels.warmup import warm_up
from sb3_clipvf.engines.reduction import _Sums
from sb3_clipvf.engines.selection import select_engine
from sb3_clipvf.envs import as_vec_env
from sb3_clipvf.guards import failures
from sb3_clipvf.guards.workers import WorkerDiedError
from sb3_clipvf.rollout import TensorRolloutBuffer

N_STEPS, N_EPOCHS = 8, 3
OBS, BOX = spaces.Box(-2.0, 2.0, (3,), np.float32), spaces.Box(-1.0, 1.0, (2,), np.float32)


def fork_server(requests: Connection) -> None:
    """
    Fork processes that run :func:`serve`, until the other end is closed: they need not import anything.

    A request is the arguments of :func:`serve`, or the id of a process to end. The answer is the id.
    """
    importlib.import_module("torch._dynamo")  # otherwise the first optimizer of each process does
    for group in ("native", "fused"):
        warm_up(group)
    processes: dict[int | None, Any] = {}
    with suppress(EOFError):
        while True:
            request = requests.recv()
            if isinstance(request, int):
                processes[request].kill()
                processes.pop(request).join()
                requests.send(request)
            else:
                process = multiprocessing.get_context("fork").Process(target=serve, args=request, daemon=True)
                process.start()
                processes[process.pid] = process
                requests.send(process.pid)


def serve(rank: int, size: int, address: str | int, seconds: float, socket: str) -> None:
    """
    Join a group with a timeout, and run the functions of this module whose names arrive at a socket, until None does.

    ``address`` is the path of a file for a group of the user's own, or the port of a store for one as under torchrun.
    """
    pipe = Client(socket)
    th.set_num_threads(1)
    np.random.seed()  # otherwise the fork's numbers are its parent's
    if isinstance(address, int):
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": address, "RANK": rank, "WORLD_SIZE": size}
        names["TORCHELASTIC_USE_AGENT_STORE"] = True
        os.environ |= {name: str(value) for name, value in {**names, distributed.TIMEOUT_VARIABLE: seconds}.items()}
        distributed._claim_launch = os.getpid  # although this is a child
        distributed._join()
    else:
        join_own_group(rank, size, address, seconds)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        name, arguments = task
        try:
            result: Any = globals()[name](rank, *arguments)
        except Exception as error:
            result = error if is_picklable(error) else RuntimeError(repr(error))
        pipe.send(result)
        if name in ENDS:
            return


def join_own_group(rank: int, size: int, path: str, seconds: float) -> None:
    """Join a group whose timeout holds once all have joined, since processes of a busy machine start far apart."""
    long = timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=long)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_picklable(error: Exception) -> bool:
    """Whether an error can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


# ---------------------------------------------------------------------- one update


def make_policy() -> ActorCriticPolicy:
    """The same policy in all processes."""
    th.manual_seed(5)
    return ActorCriticPolicy(OBS, BOX, lambda _: 1e-2, net_arch=[16])


def make_buffer(policy: ActorCriticPolicy, n_envs: int) -> TensorRolloutBuffer:
    """A rollout of random numbers."""
    width = dist_param_dim(policy.action_dist)
    buffer = TensorRolloutBuffer(N_STEPS, OBS, BOX, device="cpu", n_envs=n_envs, dist_param_dim=width)
    buffer.reset()
    generator = np.random.default_rng(11)
    for _ in range(N_STEPS):
        obs = generator.normal(size=(n_envs, 3)).astype(np.float32)
        with th.no_grad():
            actions, values, log_prob = policy(th.from_numpy(obs))
            params = dist_params(policy.get_distribution(th.from_numpy(obs)))
        shift = generator.normal(size=n_envs).astype(np.float32) * 0.1
        buffer.add(
            obs, actions.numpy(), np.ones(n_envs), np.zeros(n_envs), values, log_prob + th.from_numpy(shift), params
        )
    buffer.advantages[:] = generator.normal(1.0, 2.0, size=buffer.advantages.shape)
    buffer.returns[:] = buffer.values + buffer.advantages
    return buffer


def part_of(buffer: TensorRolloutBuffer, envs: slice) -> TensorRolloutBuffer:
    """The rollout of some environments of a buffer."""
    n_envs = len(range(*envs.indices(buffer.n_envs)))
    part = TensorRolloutBuffer(N_STEPS, OBS, BOX, device="cpu", n_envs=n_envs, dist_param_dim=buffer.dist_param_dim)
    part.reset()
    for name in (
        "observations",
        "actions",
        "rewards",
        "returns",
        "episode_starts",
        "values",
        "log_probs",
        "advantages",
    ):
        getattr(part, name)[:] = getattr(buffer, name)[:, envs]
    part.dist_params[:] = buffer.dist_params[:, envs]
    part.pos, part.full = N_STEPS, True
    return part


def run_update(engine: str, buffer: Any, policy: Any, batch_size: int, changes: dict[str, Any], group: Group) -> Any:
    """Run an update, and return parameters, statistics and what comes next from NumPy's random state."""
    options = dict(changes)
    coefficients = {"clip_range": 0.2, "clip_range_vf": 0.5, "ent_coef": 0.01, "vf_coef": 0.5, "kl_coef": 0.3}
    coefficients.update({name: options.pop(name) for name in list(options) if name in coefficients})
    settings = UpdateSettings(
        batch_size=batch_size,
        n_epochs=N_EPOCHS,
        **{
            "normalize_advantage": True,
            "advantage_scope": "minibatch",
            "vf_clip": "max",
            "max_grad_norm": 0.5,
            "target_kl": None,
            "measure_kl_after": True,
            **options,
        },
        has_dist_params=True,
        discrete_actions=False,
        needs_kl=True,
        group=group,
    )
    runner, _ = select_engine(engine, policy, settings, buffer)
    statistics = runner.update(buffer, UpdateCoefficients(**coefficients))
    parameters = th.cat([parameter.detach().flatten() for parameter in policy.parameters()]).numpy()
    steps = {int(state["step"]) for state in policy.optimizer.state.values()}
    counts = (statistics.n_epochs, statistics.n_skipped, steps, statistics.stopped_at_kl is None)
    return parameters, statistics.read(), counts


def shared_update(rank: int, engine: str, n_envs: tuple[int, ...], batch_size: int, changes: dict[str, Any]) -> Any:
    """This process's part of an update."""
    policy = make_policy()
    start = sum(n_envs[:rank])
    buffer = part_of(make_buffer(policy, sum(n_envs)), slice(start, start + n_envs[rank]))
    np.random.seed(rank)
    return run_update(engine, buffer, policy, batch_size, changes, current_group())


def partial_gradients(rank: int) -> list[Any]:
    """Gradients of three parameters in a minibatch: of both processes, of process 1, and of none."""
    parameters = [th.nn.Parameter(th.zeros(2)) for _ in range(3)]
    for parameter in parameters[: rank + 1]:
        parameter.grad = th.full((2,), 4.0 + rank)
    zero = th.zeros(())
    part = MinibatchStatistics(zero, zero, zero, None, zero, zero, zero, None, None)
    statistics = _Sums(parameters).of(current_group(), part, (0.25, 0.75)[rank])
    assert statistics.kl is None and statistics.loss == 0.0
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def update_with_nan(rank: int, engine: str, on_nonfinite: str) -> Any:
    """An update where one advantage of process 1 is NaN."""
    policy = make_policy()
    buffer = make_buffer(policy, 2)
    buffer.advantages[0, 0] = np.nan if rank == 1 else 0.0
    np.random.seed(0)
    changes = {"on_nonfinite": on_nonfinite, "normalize_advantage": False}
    try:
        return run_update(engine, buffer, policy, 4, changes, current_group())
    except BadMinibatchError as error:
        return (error.epoch, error.minibatch, str(error))


def whole_update(engine: str, n_envs: tuple[int, ...], batch_size: int, changes: dict[str, Any]) -> Any:
    """The update of all parts in a single process, with minibatches that are unions of the processes' ones."""
    policy = make_policy()
    buffer = make_buffer(policy, sum(n_envs))
    generators = [np.random.RandomState(rank) for rank in range(len(n_envs))]
    starts = np.cumsum([0, *n_envs])[:-1]

    def permutation(n: int) -> np.ndarray:
        drawn = [
            each.permutation(N_STEPS * n) + N_STEPS * start
            for each, n, start in zip(generators, n_envs, starts, strict=True)
        ]
        rows = range(0, max(map(len, drawn)), batch_size)
        return np.concatenate([part[row : row + batch_size] for row in rows for part in drawn])

    original, np.random.permutation = np.random.permutation, permutation
    try:
        return run_update(engine, buffer, policy, batch_size * len(n_envs), changes, ALONE)
    finally:
        np.random.permutation = original


# ---------------------------------------------------------------------- trainings


class Recorder(VecEnvWrapper):
    """Keeps all observations."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.kept: list[np.ndarray] = []

    def reset(self) -> Any:
        """Reset, and keep the observations."""
        self.kept.append(self.venv.reset().copy())
        return self.kept[-1]

    def step_wait(self) -> Any:
        """Step, and keep the observations."""
        observations, *rest = self.venv.step_wait()
        self.kept.append(observations.copy())
        return observations, *rest


class Counter(BaseCallback):
    """Counts its calls, and stops at one of them."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last = last

    def _on_step(self) -> bool:
        return self.n_calls != self.last


def parameters_of(model: ClipPPO) -> bytes:
    """The bits of all parameters."""
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.policy.parameters())


def make_model(env: Any = None, cls: type[ClipPPO] = ClipPPO, **changes: Any) -> ClipPPO:
    """A small model on CartPole."""
    env = make_vec_env("CartPole-v1", n_envs=2) if env is None else env
    options = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu", "engine": "autograd"}
    return cls("MlpPolicy", env, **{**options, **changes})


def training(rank: int, changes: dict[str, Any], total: int) -> Any:
    """A training, and what it leaves."""
    model, counter = make_model(**changes), Counter()
    first = parameters_of(model)
    starts = model.env.reset()
    model.learn(total, callback=counter)
    controllers = (model.adaptive_kl, model.adaptive_lr, model.policy.optimizer.param_groups[0]["lr"])
    return {
        "initial": first,
        "parameters": parameters_of(model),
        "num_timesteps": model.num_timesteps,
        "calls": counter.n_calls,
        "starts": starts,
        "controllers": controllers,
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
    }


def stopped_training(rank: int, last: int) -> int:
    """A training that a callback of the first process stops; the number of updates."""
    model = make_model(n_epochs=1)
    model.learn(10_000, callback=Counter(last))
    return model._n_updates


def training_with_progress_bar(rank: int) -> tuple[int, int] | None:
    """A training with SB3's progress bar; its steps and its total in the first process."""
    bar = ProgressBarCallback()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        make_model(n_epochs=1).learn(200, callback=bar)
    return None if rank else (bar.pbar.n, bar.pbar.total)


def changed_training(rank: int) -> Any:
    """A training whose callback in the first process changes arguments and weights."""

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.model.ent_coef, self.model.n_epochs, self.model.learning_rate = 0.5, 3, 1e-4
            self.model.clip_range_vf, self.model.gamma = 0.2, 0.5
            self.model._setup_lr_schedule()

    model = make_model()
    model.learn(256, callback=Change())
    rate = model.policy.optimizer.param_groups[0]["lr"]
    return parameters_of(model), model._n_updates, rate, model.rollout_buffer.gamma


def parameters_changed_by_a_callback(rank: int, event: str, what: str, engine: str) -> Any:
    """A training whose callback in the first process changes weights or the optimizer; what both are at updates."""
    at_updates = []

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            if event == "step" and self.n_calls == 40:
                self._change()
            return True

        def _on_rollout_end(self) -> None:
            if event == "rollout_end" and self.n_calls == 64:
                self._change()

        def _on_training_end(self) -> None:
            if event == "training_end":
                self._change()

        def _change(self) -> None:
            optimizer = self.model.policy.optimizer
            if what == "weights":
                self.model.policy.value_net.bias.data.fill_(7.0)
            elif what == "moments":
                optimizer.state.clear()
            else:
                optimizer.param_groups[0].update(betas=(0.5, 0.9), weight_decay=0.1)

    class Recording(ClipPPO):
        def train(self) -> None:
            at_updates.append(_bits_of(self))
            super().train()

    env = make_vec_env("CartPole-v1", n_envs=2)
    model = Recording("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=2, seed=3, device="cpu", engine=engine)
    model.learn(384, callback=Change())
    return at_updates, _bits_of(model)


def _bits_of(model: ClipPPO) -> bytes:
    """Weights, moments and options of the optimizer."""
    state = model.policy.optimizer.state_dict()
    moments = [(name, value.tolist()) for each in state["state"].values() for name, value in sorted(each.items())]
    options = [sorted((key, value) for key, value in each.items() if key != "lr") for each in state["param_groups"]]
    return parameters_of(model) + repr((moments, options)).encode()


class Change(BaseCallback):
    """Calls a function with the model at one kind of event; of steps, at the fifth one."""

    def __init__(self, event: str, function: Callable[[Any], None]) -> None:
        super().__init__()
        self.event, self.function = event, function

    def _at(self, event: str) -> None:
        if event == self.event:
            self.function(self.model)

    def _on_training_start(self) -> None:
        self._at("training_start")

    def _on_step(self) -> bool:
        if self.n_calls == 5:
            self._at("step")
        return True

    def _on_rollout_end(self) -> None:
        self._at("rollout_end")

    def _on_training_end(self) -> None:
        self._at("training_end")


def controllers_changed_by_a_callback(rank: int, event: str) -> Any:
    """A training whose callback changes initial values of controllers; their states in a file of this process."""

    def change(model: ClipPPO) -> None:
        model.learning_rate, model.kl_coef = 1e-3, 0.5

    model = make_model(kl_coef=1.0, adaptive_kl_target=0.01, lr_kl_target=0.01)
    model.learn(384, callback=Change(event, change))
    attributes = model._saved_attributes()
    return attributes["adaptive_kl"], attributes["adaptive_lr"]


def function_set_by_a_callback(rank: int) -> Any:
    """Trainings after a callback has replaced a number by a function, and one with different arguments."""

    def change(model: Any) -> None:
        model.lr_schedule = lambda _: 1e-4

    model = make_model(n_epochs=1)
    model.learn(128, callback=Change("step", change))
    for _ in range(2):
        model.learn(128, reset_num_timesteps=False)
    model.gamma = (0.9, 0.8)[rank]
    with pytest.raises(ValueError, match="must have the same `gamma`, got `gamma`: 0.9 and 0.8"):
        model.learn(128, reset_num_timesteps=False)
    return model.num_timesteps, parameters_of(model)


def frozen_by_a_callback(rank: int, event: str, engine: str, freezes: bool) -> Any:
    """A training whose callback freezes or unfreezes layers; whether they change from then on."""
    weights = []

    def change(model: ClipPPO) -> None:
        for parameter in model.policy.mlp_extractor.parameters():
            parameter.requires_grad_(not freezes)
        weights.append(extractor(model))

    def extractor(model: ClipPPO) -> bytes:
        return b"".join(each.detach().numpy().tobytes() for each in model.policy.mlp_extractor.parameters())

    model = make_model(engine=engine, policy_kwargs={"net_arch": [8]})
    for parameter in model.policy.mlp_extractor.parameters():
        parameter.requires_grad_(freezes)
    model.learn(256, callback=Change(event, change))
    changes = None if rank else extractor(model) != weights[0]
    flags = [parameter.requires_grad for parameter in model.policy.parameters()]
    return changes, (flags, cast(Any, model._engine).name, parameters_of(model))


def frozen_normaliser(rank: int) -> Any:
    """A training whose callback in the first process freezes VecNormalize; its statistics, and whether they change."""

    class Freeze(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.training_env.training = False  # type: ignore[attr-defined]

    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    make_model(env, n_steps=16).learn(192, callback=Freeze())
    return env.training, env.obs_rms.count, env.obs_rms.mean.tolist()


def normalised_training(rank: int) -> Any:
    """A training with VecNormalize; its statistics, and this process's observations."""
    recorder = Recorder(make_vec_env("CartPole-v1", n_envs=2))
    env = VecNormalize(recorder)
    model = make_model(env, n_steps=16)
    model.learn(128)
    rms = env.obs_rms
    return rms.mean, rms.var, rms.count, env.ret_rms.var, env.ret_rms.count, recorder.kept


def saved_training(rank: int, folder: str) -> Any:
    """Two trainings whose callbacks change arguments in the first process; each process saves the model."""

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.model.ent_coef, self.model.n_epochs, self.model.n_steps = 0.5, 3, 16

    model = make_model(verbose=1)
    with redirect_stdout(StringIO()):
        model.learn(256, callback=[TrainingCheckpoint(128, f"{folder}/checkpoints", on_signal=False), Change()])
        model.learn(64, reset_num_timesteps=False)
    model.save(f"{folder}/{rank}")
    return model.num_timesteps, model._n_updates


def loaded_training(rank: int, path: str) -> Any:
    """A training that continues from a file, which only the first process loads."""
    model = make_model()
    model.learn(128)
    if rank == 0:
        model.save(path)
        model = ClipPPO.load(path, env=model.env, device="cpu")
    else:
        model = make_model()
    model.learn(128, reset_num_timesteps=False)
    return model.num_timesteps, parameters_of(model)


def resumed_training(rank: int, path: str, readers: tuple[int, ...], normalizes: bool) -> Any:
    """The end of a training of 512 steps, and that of one that processes resume after 256; their warnings."""

    def end_of(model: ClipPPO) -> Any:
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
        moments = getattr(model.env, "obs_rms", None)
        return (
            model.num_timesteps,
            parameters_of(model),
            episodes,
            model._last_obs.tobytes(),
            None if moments is None else (moments.mean.tobytes(), moments.var.tobytes(), moments.count),
        )

    def make_env() -> VecEnv:
        env = make_vec_env("CartPole-v1", n_envs=2)
        return VecNormalize(env) if normalizes else env

    model = make_model(make_env())
    model.learn(512, callback=TrainingCheckpoint(256, path))
    dist.barrier()
    with logged() as messages:
        if rank in readers:
            resumed = ClipPPO.resume(f"{path}/checkpoint_256.zip", make_env(), device="cpu")
        else:
            resumed = make_model(make_env())
        dist.barrier()
        resumed.learn(256, reset_num_timesteps=False, callback=TrainingCheckpoint(256, f"{path}/more"))
    return end_of(model), end_of(resumed), [message for message in messages if "not resumed exactly" in message]


def copied_before_the_first_rollout(rank: int, folder: str, total: int) -> Any:
    """Random states of process 1 in a checkpoint, and in one that a resumed training makes before its rollouts."""
    make_model(n_epochs=1).learn(128, callback=TrainingCheckpoint(128, folder, on_signal=False))
    dist.barrier()
    model = ClipPPO.resume(folder, make_vec_env("CartPole-v1", n_envs=2), device="cpu")
    np.random.rand(), th.rand(1)  # as a script may
    checkpoint, trees = TrainingCheckpoint(10**6, f"{folder}/more"), [newest_checkpoint(folder).tree]

    class Copy(BaseCallback):
        def _on_step(self) -> bool:
            trees.append(cast(Any, checkpoint._unwritten).tree)
            return False

    model.learn(total, reset_num_timesteps=False, callback=[checkpoint, Copy()])
    if rank:
        return None
    trees.append(newest_checkpoint(f"{folder}/more").tree)
    states = [tree["processes"][0]["random"] for tree in trees[:2]]
    return [(state["numpy"][1].tobytes(), state["numpy"][2], state["torch"].numpy().tobytes()) for state in states]


def checkpointed_training(rank: int, path: str) -> bytes:
    """The weights of a training with checkpoints."""
    return parameters_of(make_model().learn(640, callback=TrainingCheckpoint(every_timesteps=128, path=path)))


def resumed_from_one(rank: int, path: str) -> Any:
    """A training that two processes resume from a checkpoint of a single one."""
    with logged() as messages:
        model = ClipPPO.resume(path, make_vec_env("CartPole-v1", n_envs=2), device="cpu")
        model.learn(256, reset_num_timesteps=False)
    return model.num_timesteps, parameters_of(model), model._last_obs.tobytes(), messages


def training_with_resets(rank: int, path: str) -> None:
    """A training whose checkpoints reset environments."""
    make_model().learn(64, callback=TrainingCheckpoint(64, path, reset_envs=True))


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the package's log messages."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sb3_clipvf").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("sb3_clipvf").removeHandler(handler)


def copied_training(rank: int) -> list[str]:
    """A training whose processes are seeded alike by other means than `seed`; its warnings."""
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = make_model(env, seed=None)
    set_random_seed(0)
    with logged() as messages:
        model.learn(256)
    return [message for message in messages if "same actions" in message]


def pools_without_a_seed(rank: int, env_seed: int | None) -> Any:
    """The first observations of an EnvPool, whose default seed is always the same, in a training without a seed."""
    import envpool

    env = as_vec_env(envpool.make_gymnasium("CartPole-v1", num_envs=2))
    if env_seed is not None:
        env.seed(env_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EnvPool's spaces
        model = make_model(env, seed=None, n_epochs=1).learn(1)
    return model.rollout_buffer.observations[0].tolist()


def engine_changed_in_a_rollout(rank: int) -> Any:
    """A training whose callback changes the engine in the first process."""

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            self.model.engine = "fused" if self.n_calls > 40 else "autograd"  # type: ignore[attr-defined]
            return True

    model = make_model().learn(256, callback=Change())
    return model._engine.name, parameters_of(model)


def files_elsewhere(rank: int, folder: str) -> None:
    """A training with checkpoints, where the first process cannot read the files of Monitor of process 1."""

    def reading(path: Any, *arguments: Any) -> Any:
        if str(path).startswith(f"{folder}/1"):
            raise FileNotFoundError(path)
        return open(path, *arguments)

    env = make_vec_env("CartPole-v1", n_envs=2, monitor_dir=f"{folder}/{rank}")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(monitor_files, "open", reading, raising=False)
        make_model(env).learn(256, callback=TrainingCheckpoint(256, f"{folder}/checkpoints", on_signal=False))


def resumed_with_unequal_numbers(rank: int, folder: str) -> list[str]:
    """A resumed training with different numbers of environments; its warnings about them."""
    env = make_vec_env("CartPole-v1", n_envs=2 + rank)
    make_model(env, seed=None, n_steps=16, batch_size=48).learn(80, callback=TrainingCheckpoint(80, folder))
    dist.barrier()
    with logged() as messages:
        resumed = ClipPPO.resume(folder, env, device="cpu")
        resumed.learn(80, reset_num_timesteps=False)
    return [message for message in messages if "environments, and the model was saved with" in message]


def monitored_env(rank: int, folder: str, n_envs: int) -> VecNormalize:
    """Environments whose episodes are written to a folder of this process."""
    return VecNormalize(make_vec_env("CartPole-v1", n_envs=n_envs, monitor_dir=f"{folder}/{rank}"))


def monitored_training(rank: int, folder: str) -> None:
    """A training with checkpoints, where process 1 has one environment more, and VecNormalize is frozen."""
    env = monitored_env(rank, folder, 1 + rank)
    env.training = False
    checkpoint = TrainingCheckpoint(96, folder, on_signal=False)
    make_model(env, seed=None, batch_size=96, n_epochs=1).learn(192, callback=checkpoint)


def resumed_on_more_processes(rank: int, folder: str) -> Any:
    """A training that three processes resume; whether it keeps the rows of this one, and what must be common."""
    paths = [Path(f"{folder}/{rank}/{index}.monitor.csv") for index in range(1 + rank)]
    before = [path.read_bytes() if path.exists() else b"" for path in paths]
    model = ClipPPO.resume(f"{folder}/checkpoint_96.zip", monitored_env(rank, folder, 1 + rank), device="cpu")
    after = [path.read_bytes() for path in paths]
    model.learn(model.remaining_timesteps, reset_num_timesteps=False)
    kept = all(whole.startswith(part) and len(part) > 0 for whole, part in zip(before, after, strict=True))
    return kept, (model.num_timesteps, model._schedule_timesteps, parameters_of(model))


def short_training(rank: int) -> list[str]:
    """A training of one rollout of both processes, which would be two of one; its warnings about schedules."""
    model = make_model(learning_rate="lin_0.001", n_epochs=1)
    with logged() as messages:
        model.learn(128)
    return [message for message in messages if "schedules end" in message]


def smallest_training(rank: int) -> Any:
    """A training of one transition a rollout in each process; the warnings of one with a minibatch of one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_model(make_vec_env("CartPole-v1"), n_steps=3, batch_size=2)
        warnings.simplefilter("ignore")
        model = make_model(make_vec_env("CartPole-v1"), n_steps=1, batch_size=2, n_epochs=1)
    before = parameters_of(model)
    model.learn(4)
    return parameters_of(model) != before, parameters_of(model), [str(warning.message) for warning in caught]


class Passing(ClipPPO):
    """A class that passes its arguments on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def different_training(rank: int, name: str, values: list[Any], is_subclass: bool = False) -> None:
    """A training with different arguments in each process."""
    make_model(**{name: values[rank]}, cls=Passing if is_subclass else ClipPPO).learn(64)


@contextmanager
def failing_env(rank: int, bad_rank: int, how: str, call: int = 100) -> Iterator[None]:
    """Make CartPole fail at one of its steps in one process."""
    from gymnasium.envs.classic_control import CartPoleEnv

    step, calls = CartPoleEnv.step, [0]

    def failing(self: Any, action: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and rank == bad_rank:
            if how == "exit":
                os._exit(9)
            if how == "hang":
                time.sleep(1000)
            if how == "nan":
                return np.full(4, np.nan), *step(self, action)[1:]
            raise ZeroDivisionError("a planted error")
        return step(self, action)

    CartPoleEnv.step = failing
    try:
        yield
    finally:
        CartPoleEnv.step = step


def failing_training(rank: int, bad_rank: int, how: str) -> None:
    """A training that ends in one process."""
    with failing_env(rank, bad_rank, how):
        make_model().learn(10_000)


def failing_twice(rank: int) -> None:
    """Two trainings in one group: in the first one all processes fail alike, in the second one process 1 ends."""
    model = make_model(learning_rate=0.0)
    model.vf_coef = 3e38
    with pytest.raises(NonFiniteError):
        model.learn(64)
    failing_training(rank, 1, "exit")


def gathering(rank: int, ending: int | None, seconds: float) -> None:
    """An exchange before which one process ends, or the others but the first one sleep."""
    if rank == ending:
        os._exit(9)
    if ending is None and rank > 0:
        time.sleep(seconds)
    group = current_group()
    with group.failing_together():
        group.gather(rank)


def largest_gathered(rank: int, path: str) -> int:
    """A training with checkpoints; the bytes of the largest value that all processes receive."""
    gather, sizes = dist.all_gather_object, [0]

    def recorded(values: list[Any], value: Any) -> None:
        gather(values, value)
        sizes.append(max(len(pickle.dumps(received)) for received in values))

    dist.all_gather_object = recorded
    try:
        make_model().learn(256, callback=TrainingCheckpoint(128, path, on_signal=False))
    finally:
        dist.all_gather_object = gather
    return max(sizes)


@contextmanager
def nan_in_rollout(model: ClipPPO, number: int | None) -> Iterator[None]:
    """Make an advantage of one rollout NaN."""
    buffer = model.rollout_buffer
    compute, calls = buffer.compute_returns_and_advantage, [0]

    def computing(*args: Any, **kwargs: Any) -> None:
        compute(*args, **kwargs)
        calls[0] += 1
        if calls[0] == number:
            buffer.advantages[0, 0] = np.nan

    buffer.compute_returns_and_advantage = computing  # type: ignore[method-assign]
    yield


@contextmanager
def own_group(rank: int, path: str) -> Iterator[None]:
    """A group that ends with the context, so that the processes can go on after an error."""
    if dist.is_initialized():
        dist.destroy_process_group()
    join_own_group(rank, 2, path, 10.0)
    try:
        yield
    finally:
        dist.destroy_process_group()


def error_of(rank: int, folder: str, name: str, *arguments: Any) -> Any:
    """The error that ends a case which runs in a group of its own: its type, text, file if it has one, and notes."""
    try:
        with own_group(rank, f"{folder}/group"):
            globals()[name](rank, folder, *arguments)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "path", None), "".join(getattr(error, "__notes__", []))
    return None


def failing_after_a_checkpoint(rank: int, folder: str) -> None:
    """A training with checkpoints that fails in process 1."""
    with failing_env(rank, 1, "raise"):
        make_model().learn(10_000, callback=TrainingCheckpoint(64, f"{folder}/checkpoints", on_signal=False))


def without_a_backend(rank: int, folder: str) -> None:
    """A training on a device for which the group has no backend."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        make_model().learn(64)
    finally:
        dist.destroy_process_group()


def nan_after_a_copy(rank: int, folder: str, signals: bool) -> None:
    """A training with a copy in memory, which process 1 ends by a NaN observation; the first one may get a signal."""

    class Signal(BaseCallback):
        def _on_step(self) -> bool:
            if signals and self.n_calls == 40:
                notes: Any = distributed._notes
                while not notes.failure()[1]:
                    time.sleep(0.01)
                signal.raise_signal(signal.SIGTERM)
            return True

    with failing_env(rank, 1, "nan"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_checkpoint, "COPY_SHARE", 1e9)  # a copy after each update
        try:
            make_model().learn(10_000, callback=[TrainingCheckpoint(10**6, f"{folder}/checkpoints"), Signal()])
        except SystemExit as error:
            raise RuntimeError(f"exit code {error.code}") from None


def losing_a_worker(rank: int, folder: str) -> None:
    """A training whose process 1 has lost a worker of SubprocVecEnv."""
    with failing_env(rank, 1, "raise"), pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(failures, "worker_death", lambda *_: WorkerDiedError("a worker has died"))
        make_model().learn(10_000)


def nan_in_update(rank: int, folder: str, bad_rank: int | None) -> None:
    """A training with checkpoints that has a NaN advantage in one process; for None, an overflow in all of them."""
    model = make_model(learning_rate=0.0) if bad_rank is None else make_model()
    if bad_rank is None:
        model.vf_coef = 3e38
    with nan_in_rollout(model, 2 if rank == bad_rank else None):
        model.learn(10_000, callback=TrainingCheckpoint(64, f"{folder}/checkpoints", on_signal=False))


def nan_in_step(rank: int, folder: str) -> None:
    """A training with checkpoints whose environments return a NaN observation in process 1."""
    with failing_env(rank, 1, "nan"):
        make_model().learn(10_000, callback=TrainingCheckpoint(64, f"{folder}/checkpoints", on_signal=False))


def random_training(rank: int, folder: str, seed: int) -> Any:
    """A training with random sizes and decisions, in a group of its own; how it ends."""
    try:
        with own_group(rank, f"{folder}/{seed}"):
            return _random_training(rank, folder, seed)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _random_training(rank: int, folder: str, seed: int) -> Any:
    random = np.random.default_rng(seed)

    def one_of(*values: Any) -> Any:
        return values[random.integers(len(values))]

    n_envs = one_of((1, 1), (2, 2), (2, 1), (3, 3))
    changes = {
        "n_steps": 8,
        "batch_size": one_of(4, 8, 12, 64),
        "n_epochs": int(random.integers(1, 4)),
        "engine": one_of("autograd", "fused", "native"),
        "seed": int(seed) if n_envs[0] == n_envs[1] else None,
        "target_kl": one_of(None, None, 1e-4, 3e-3, 5e-2),
        "on_nonfinite": one_of("raise", "skip", "skip"),
        "advantage_scope": one_of("minibatch", "rollout"),
        "lr_kl_target": one_of(None, 0.01),
        "learning_rate": one_of(3e-4, 1e-2),
        "policy_kwargs": {"net_arch": [8]},
    }
    bad_rank, fault = int(random.integers(2)), one_of(None, None, "nan", "nan", "error", "argument")
    if fault == "argument" and rank == bad_rank:
        changes["gamma"] = 0.5
    call = int(random.integers(1, 40)) if fault == "error" else -1
    callbacks: list[BaseCallback] = [Counter(one_of(None, None, int(random.integers(1, 30))))]
    if one_of(True, False):
        callbacks.append(
            TrainingCheckpoint(int(random.integers(8, 40)), f"{folder}/checkpoints_{seed}", on_signal=False)
        )
    number = int(random.integers(1, 4)) if fault == "nan" else None
    model = make_model(make_vec_env("CartPole-v1", n_envs=n_envs[rank]), **changes)
    with failing_env(rank, bad_rank, "raise", call), nan_in_rollout(model, number if rank == bad_rank else None):
        model.learn(48, callback=callbacks)
    return model._n_updates, model.num_timesteps, parameters_of(model)


ENDS = ("failing_training", "failing_twice", "gathering")
