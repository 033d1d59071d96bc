"""Steps of a tensor environment as one CUDA graph."""

from typing import Any

import torch as th

from sb3_clipvf.envs.tensor import TensorObs, TensorStep, TensorVecEnv

_WARM_UPS = 3
"""Steps before the recording, in which libraries allocate memory."""


class GraphedTensorEnv:
    """
    A :class:`.TensorVecEnv` on a CUDA device whose step is recorded once, and then launched by one call.

    The step must be the same operations each time. It reads nothing from the device, and writes its state in-place, as
    ``reset_tensors`` does. Random numbers come from the device's generator, or from a ``torch.Generator`` that is an
    attribute of the environment. The constructor resets the environment, and steps it with actions of 0.

    :param env: Environment on a CUDA device.
    :raises ValueError: If it is elsewhere.
    :raises RuntimeError: If its step cannot be recorded. The process's generator may then be unusable.
    """

    def __init__(self, env: TensorVecEnv) -> None:
        self.env = env
        self.num_envs, self.device = env.num_envs, th.device(env.device)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        if self.device.type != "cuda":
            raise ValueError(f"`env` must be on a CUDA device, got {self.device}. Use the environment itself.")
        sample = th.as_tensor(self.action_space.sample(), device=self.device)
        self._actions = th.zeros((self.num_envs, *sample.shape), dtype=sample.dtype, device=self.device)
        self._graph, self._step = self._record()

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Begin an episode in every environment."""
        return self.env.reset_tensors(seed)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Step all environments. The next step overwrites the result."""
        self._actions.copy_(actions)
        self._graph.replay()
        return self._step

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _record(self) -> tuple[Any, TensorStep]:
        env, actions = self.env, self._actions
        env.reset_tensors()
        stream, current = th.cuda.Stream(self.device), th.cuda.current_stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with th.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                env.step_tensors(actions)
        current.wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        for value in vars(env).values():
            if isinstance(value, th.Generator):
                graph.register_generator_state(value)
        with th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step = TensorStep(*env.step_tensors(actions))
        return graph, step
