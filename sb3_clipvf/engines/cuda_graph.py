"""
The CUDA graph engine: it captures the operations of a GPU, and replays them by one call.

One graph runs a chunk of minibatches (:mod:`.static_step`), others the policy's step in a rollout and its values. A
graph is captured when it is first needed, and again after more than numbers in its tensors has changed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.common.observations import parts_of
from sb3_clipvf.distributions import current_dist, n_action_numbers, to_action_space
from sb3_clipvf.engines.cuda.capture import Graph, GraphCapturer, warn_about_failure
from sb3_clipvf.engines.cuda.rollout_step import RolloutStep
from sb3_clipvf.engines.cuda.sampling import sampled
from sb3_clipvf.engines.cuda.static_step import StaticEngine, StaticStep, policy_structure
from sb3_clipvf.engines.interface import Acted, ActedTensors, UpdateSettings
from sb3_clipvf.engines.support import why_not_bf16, why_not_cuda_graph

T = TypeVar("T")

_WHOLE = "whole steps"


class CudaGraphEngine(StaticEngine):
    """
    Engine for policies on an NVIDIA GPU whose operations are the same at each call.

    Equals the autograd engine up to float32 rounding, except for the random numbers of actions.
    """

    name = "cuda_graph"

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        super().__init__(policy, settings)
        self._capturer = GraphCapturer(policy.device)
        self._failed: set[str] = set()
        self._chunks: dict[tuple[object, ...], Graph] = {}
        self._captured_step: StaticStep | None = None
        self._functions: dict[str, CapturedFunction] = {}
        self._rollout_step: RolloutStep | None = None
        self._policy_structure: tuple[object, ...] = ()

    def fits(self, buffer: Any) -> bool:
        """Return whether this engine can still run its policy, which a callback may have changed."""
        return why_not_cuda_graph(self.policy, buffer) is None

    def begin_rollout(self, buffer: Any) -> None:
        """Discard the captured steps of the policy if more than numbers has changed."""
        structure = policy_structure(self.policy)
        if structure != self._policy_structure:
            self._functions.clear()
            self._rollout_step = None
            self._policy_structure = structure

    @th.no_grad()
    def rollout_step(self, env: Any, buffer: Any, gamma: float, observations: Any) -> RolloutStep | None:
        """Return the whole step of a rollout from captured environments; None if it cannot be captured."""
        if _WHOLE in self._failed or not self._can_capture("forward"):
            return None
        step = self._rollout_step
        if step is None or not step.fits(env, buffer, gamma):
            self._rollout_step = None  # so that its memory can be used again
            step = RolloutStep(self.policy, env, buffer, gamma, observations)
            if self._try(_WHOLE, step.capture) is None:
                return None
            self._rollout_step = step
        return step

    @th.no_grad()
    def act(self, observations: Any, *, with_dist_params: bool) -> Acted:
        """Sample one action for each environment, and copy all numbers to the host at once."""
        drawn = self._sampled(observations)
        if drawn is None:
            return super().act(observations, with_dist_params=with_dist_params)
        numbers = drawn[-1].cpu().numpy()
        width = n_action_numbers(self.policy.action_dist)
        return Acted(
            actions=to_action_space(numbers[:, :width], self.policy.action_space),
            values=numbers[:, width : width + 1],
            log_prob=numbers[:, width + 1],
            dist_params=numbers[:, width + 2 :] if with_dist_params else None,
        )

    @th.no_grad()
    def act_tensors(self, observations: Any, *, with_dist_params: bool) -> ActedTensors:
        """Act as :meth:`act` does, without a copy to the host. The next call overwrites the result."""
        drawn = self._sampled(observations)
        if drawn is None:
            return super().act_tensors(observations, with_dist_params=with_dist_params)
        actions, values, log_prob, params, _ = drawn
        return ActedTensors(actions, values, log_prob, params if with_dist_params else None)

    @th.no_grad()
    def predict_values(self, observations: Any) -> th.Tensor:
        """Return the values of observations, shape ``(n, 1)``, return units."""
        acting, captured = self._functions.get("forward"), None
        # Only for all environments: the numbers of truncated episodes differ from step to step.
        if acting is not None and acting.takes(observations):
            captured = self._captured("predict_values", lambda rows: (self.policy.predict_values(rows),), observations)
        return super().predict_values(observations) if captured is None else captured(observations)[0].clone()

    def _sampled(self, observations: Any) -> tuple[th.Tensor, ...] | None:
        """Return what the captured :func:`.sampling.sampled` computes, which the next call overwrites, or None."""
        captured = self._captured("forward", partial(sampled, self.policy), observations)
        return None if captured is None else captured(observations)

    def _captured(self, name: str, function: Any, observations: Any) -> "CapturedFunction | None":
        """Return the captured method of SB3's policies for observations of these shapes, or None."""
        captured = self._functions.get(name)
        if captured is not None and captured.takes(observations):
            return captured
        if not self._can_capture(name):
            return None
        what = f"the policy's {name}"
        captured = self._try(what, lambda capturer: CapturedFunction(capturer, self.policy, function, observations))
        if captured is not None:
            self._functions[name] = captured
        return captured

    def _can_capture(self, name: str) -> bool:
        """Return whether a method of the policy is SB3's, whose operations are known."""
        has_own_code = getattr(type(self.policy), name) is not getattr(ActorCriticPolicy, name)
        # gSDE's noise comes from tensors that are new in each rollout.
        return not (has_own_code or isinstance(self.policy.action_dist, StateDependentNoiseDistribution))

    def _run_chunk(self, step: StaticStep, sizes: tuple[int, ...], measure_kl: bool) -> None:
        if step is not self._captured_step:
            self._chunks.clear()
            self._captured_step = step
        graph = self._chunks.get((sizes, measure_kl))
        if graph is None:
            # What one chunk allocates is not read after it.
            beside = next(iter(self._chunks.values()), None)
            graph = self._try("updates", lambda capturer: _capture_chunk(capturer, step, sizes, measure_kl, beside))
            if graph is None:
                step.run(sizes, measure_kl)
                return
            self._chunks[sizes, measure_kl] = graph
        graph.replay()

    def _try(self, what: str, capture: "Callable[[GraphCapturer], T]") -> "T | None":
        """Return what is captured; None after a failure, which ends captures of this kind."""
        if what in self._failed:
            return None
        try:
            return capture(self._capturer)
        except RuntimeError as error:
            self._failed.add(what)
            warn_about_failure(what, error)
            return None


class Bfloat16Engine(CudaGraphEngine):
    """The CUDA graph engine, whose updates run the networks in bfloat16 except for their last layers."""

    name = "cuda_graph_bf16"
    autocast = th.bfloat16

    def fits(self, buffer: Any) -> bool:
        """Return whether this engine can still run its policy, which a callback may have changed."""
        return why_not_bf16(self.policy, buffer) is None


def _capture_chunk(
    capturer: GraphCapturer, step: StaticStep, sizes: tuple[int, ...], measure_kl: bool, beside: Graph | None = None
) -> Graph:
    """Capture the minibatches of a chunk. No warm-up takes a step."""
    active = step.active.clone()

    def warm_up() -> None:
        step.active.fill_(False)
        for size in sorted(set(sizes)):
            step.run((size,), measure_kl)

    try:
        return capturer.capture(lambda: step.run(sizes, measure_kl), warm_up, beside=beside)
    finally:
        step.active.copy_(active)


class CapturedFunction:
    """A function of observations that returns tensors, which the next call overwrites."""

    def __init__(
        self, capturer: GraphCapturer, policy: Any, function: Callable[[Any], tuple[th.Tensor, ...]], observations: Any
    ) -> None:
        self._dist = policy.action_dist
        self._inputs = {key: tensor.clone() for key, tensor in parts_of(observations).items()}
        inputs = self._inputs if isinstance(observations, dict) else self._inputs[""]
        before = current_dist(policy)

        def run() -> None:
            self._outputs = function(inputs)
            now = current_dist(policy)
            self._distribution = None if now is before else now

        self._graph = capturer.capture(run, run)

    def takes(self, observations: Any) -> bool:
        """Return whether the function was captured for observations of these shapes and types."""
        parts = parts_of(observations)
        return parts.keys() == self._inputs.keys() and all(
            (tensor.shape, tensor.dtype) == (self._inputs[key].shape, self._inputs[key].dtype)
            for key, tensor in parts.items()
        )

    def __call__(self, observations: Any) -> tuple[th.Tensor, ...]:
        """Return the function's values for these observations."""
        for key, tensor in parts_of(observations).items():
            self._inputs[key].copy_(tensor)
        self._graph.replay()
        if self._distribution is not None:  # callbacks may read it
            self._dist.distribution = self._distribution
        return self._outputs
