"""
Updates whose minibatches are functions of static tensors (see the package), and copy no number to the host.

Coefficients are numbers on the device. A minibatch that must take no step is masked there, and the statistics of all
minibatches are read together. Therefore, a CUDA graph can capture and replay the operations (:mod:`.cuda_graph`).
On the CPU they run one by one, which tests compare with the other engines.
"""

from collections.abc import Iterator
from functools import partial
from itertools import compress
from typing import Any, ClassVar, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.common.nonfinite import FLOAT32_MAX
from sb3_clipvf.common.observations import from_parts, parts_of
from sb3_clipvf.engines.autograd import AutogradEngine, advantage_moments
from sb3_clipvf.engines.binding import moments_of
from sb3_clipvf.engines.cuda.static_loss import LOGGED, StaticLoss
from sb3_clipvf.engines.cuda.static_policy import ImageScaling, replaced_parameters
from sb3_clipvf.engines.epochs import MinibatchStatistics, UpdateRecord, run_epochs
from sb3_clipvf.engines.interface import UpdateCoefficients, UpdateSettings
from sb3_clipvf.engines.support import steps_made, why_not_static
from sb3_clipvf.rollout import MiniBatch

CHUNK = 32
"""Largest number of minibatches that run together, as one CUDA graph."""

_GSDE_OPTIONS = ("full_std", "use_expln", "learn_features", "epsilon", "bijector")
# Columns of the rollout besides actions and the old distribution's parameters.
_COLUMNS = ("values", "log_probs", "advantages", "returns")
_NORM_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


class StaticEngine(AutogradEngine):
    """Engine whose minibatches run by :class:`StaticStep`. Equals the autograd engine up to float32 rounding."""

    name = "static"
    # Type in which the networks of updates compute, except for their last layers; None: that of the parameters.
    autocast: ClassVar[th.dtype | None] = None

    def __init__(self, policy: ActorCriticPolicy, settings: UpdateSettings) -> None:
        super().__init__(policy, settings)
        self._step: StaticStep | None = None

    def fits(self, buffer: Any) -> bool:
        """Return whether this engine can still run its policy, which a callback may have changed."""
        return why_not_static(self.policy, buffer) is None

    def _run_epochs(self, buffer: Any, coefficients: UpdateCoefficients) -> UpdateRecord:
        step = self._bind(buffer, coefficients)
        epochs = DeferredEpochs(self, step, buffer, coefficients)
        try:
            return run_epochs(epochs, self.settings, coefficients, buffer, draw=epochs.draw)
        finally:  # also after Ctrl-C, the optimizer's state must count the steps taken
            step.write_back()

    def _bind(self, buffer: Any, coefficients: UpdateCoefficients) -> "StaticStep":
        """Return the step with the numbers of this update; a new one if more than numbers has changed."""
        buffer.forget_copies()  # arrays may have changed in-place
        rollout = buffer._flat_tensors()
        # Arrays of the host are copied to a new place in each update; tensors on the device stay there.
        moves = self.policy.device.type != "cpu" and not isinstance(buffer.values, th.Tensor)
        structure = structure_of(self.policy, self.settings, coefficients, rollout, moves)
        if self._step is None or self._step.structure != structure:
            self._step = StaticStep(self.policy, structure, coefficients, rollout, self.autocast)
        self._step.load(coefficients, rollout)
        return self._step

    def run_epoch(self, step: "StaticStep", rows: th.Tensor, measure_kl: bool, log: th.Tensor) -> None:
        """Run the minibatches of one epoch, whose order of the rollout's rows is given, and fill the epoch's log."""
        start, number = 0, 0
        for sizes in chunks(len(rows), self.settings.batch_size):
            n_rows = sum(sizes)
            step.rows[:n_rows].copy_(rows[start : start + n_rows])
            self._run_chunk(step, sizes, measure_kl)
            log[number : number + len(sizes)].copy_(step.log[: len(sizes)])
            start, number = start + n_rows, number + len(sizes)

    def _run_chunk(self, step: "StaticStep", sizes: tuple[int, ...], measure_kl: bool) -> None:
        step.run(sizes, measure_kl)


def chunks(n_rows: int, batch_size: int) -> list[tuple[int, ...]]:
    """Return the sizes of the minibatches of an epoch, by chunks that run together."""
    full, rest = divmod(n_rows, batch_size)
    sizes = [batch_size] * full + ([rest] if rest else [])
    return [tuple(sizes[start : start + CHUNK]) for start in range(0, len(sizes), CHUNK)]


class DeferredEpochs:
    """
    Epochs that run when the first minibatch is drawn, with their statistics as :func:`.epochs.run_epochs` reads them.

    All epochs run before the first read of their statistics. Only with ``target_kl``, each epoch is read after it ran,
    since this decides whether there is a next one.
    """

    def __init__(self, engine: StaticEngine, step: "StaticStep", buffer: Any, coefficients: UpdateCoefficients) -> None:
        self._engine, self._step, self._buffer, self._coefficients = engine, step, buffer, coefficients
        self._rows: list[th.Tensor] = []
        self._logs: list[list[list[float]]] = []
        self._epoch = 0
        self._numbers: dict[str, float] = {}

    def draw(self, batch_size: int) -> Iterator[MiniBatch | None]:
        """Yield the minibatches of the next epoch; None for finite ones, which are not needed again."""
        if self._epoch == len(self._logs):
            settings = self._engine.settings
            self._run(1 if settings.target_kl is not None else settings.n_epochs)
        log, rows = self._logs[self._epoch], self._rows[self._epoch]
        self._epoch += 1
        for number, values in enumerate(log):
            self._numbers = dict(zip(LOGGED, values, strict=True))
            is_finite = all(abs(self._numbers[name]) <= FLOAT32_MAX for name in ("loss", "grad_norm"))
            start = number * batch_size
            yield None if is_finite else self._step.minibatch(rows[start : start + batch_size])

    def loss(self, batch: MiniBatch | None, measure_kl: bool) -> MinibatchStatistics:
        """Return the statistics of the minibatch."""
        coefficients = self._coefficients
        absent: dict[str, Any] = {"grad_norm": None}
        if not measure_kl:
            absent["kl"] = None
        if coefficients.clip_range is None:
            absent["clip_fraction"] = None
        if coefficients.clip_range_vf is None:
            absent["vf_clip_fraction"] = None
        return MinibatchStatistics(**{**self._numbers, **absent})

    def backward(self) -> None:
        """Do nothing, since the gradients were computed."""

    def prepare_step(self) -> float:
        """Return the gradient's norm before clipping."""
        return self._numbers["grad_norm"]

    def step(self) -> None:
        """Do nothing, since the step was taken."""

    def _run(self, n_epochs: int) -> None:
        """Draw and run the next epochs, then read their statistics."""
        settings, first = self._engine.settings, len(self._logs)
        n_minibatches = sum(map(len, chunks(self._step.n_rows, settings.batch_size)))
        logs = th.zeros(n_epochs, n_minibatches, len(LOGGED), device=self._step.log.device)
        for number, log in enumerate(logs):
            # The host draws an epoch while the device runs the one before.
            rows = self._buffer.draw_rows()
            measure_kl = settings.measures_kl(first + number, self._coefficients)
            self._engine.run_epoch(self._step, rows, measure_kl, log)
            self._rows.append(rows)
        self._logs += logs.tolist()


class Structure(NamedTuple):
    """What the operations of a step depend on, besides the numbers in its tensors."""

    settings: UpdateSettings
    has_terms: tuple[bool, ...]  # whether there are a ratio clip, a value clip, an entropy bonus and a KL penalty
    moves: bool  # whether observations are copied to the step's own tensors
    tensors: tuple[tuple[object, ...], ...]  # names, sizes and types of the rollout's; addresses of those that stay
    policy: tuple[object, ...]
    optimizer: tuple[object, ...]


def structure_of(
    policy: ActorCriticPolicy,
    settings: UpdateSettings,
    coefficients: UpdateCoefficients,
    rollout: dict[str, Any],
    moves: bool,
) -> Structure:
    """Return the structure of the step for a policy, arguments and the tensors of a rollout."""
    optimizer = policy.optimizer
    moments = [tensor for parameter in policy.parameters() for tensor in moments_of(optimizer, parameter)]
    options = [value for group in optimizer.param_groups for key, value in group.items() if key not in ("params", "lr")]
    return Structure(
        settings=settings,
        has_terms=(
            coefficients.clip_range is not None,
            coefficients.clip_range_vf is not None,
            bool(coefficients.ent_coef),
            bool(coefficients.kl_coef),
        ),
        moves=moves,
        tensors=(
            *((rollout[name].shape,) for name in ("values", "actions", "dist_params")),
            *(
                (key, tensor.shape, tensor.dtype, None if moves else tensor.data_ptr())
                for key, tensor in parts_of(rollout["observations"]).items()
            ),
            tuple(tensor.data_ptr() for tensor in moments),
        ),
        policy=policy_structure(policy),
        optimizer=(type(optimizer), *options),
    )


def policy_structure(policy: ActorCriticPolicy) -> tuple[object, ...]:
    """Return what the operations of a policy's forward pass depend on, besides the numbers in its parameters."""
    dist: Any = policy.action_dist
    return (
        (id(policy), policy.normalize_images, policy.squash_output),
        [
            (name, id(module), *(getattr(module, constant, None) for constant in getattr(module, "__constants__", ())))
            for name, module in policy.named_modules(remove_duplicate=False)
        ],
        (id(dist), *(getattr(dist, name, None) for name in _GSDE_OPTIONS)),
        tuple((parameter.data_ptr(), parameter.shape) for parameter in policy.parameters()),
        _switches(),
    )


def _switches() -> tuple[object, ...]:
    """Return PyTorch's switches of precision and of the choice of algorithms."""
    backends: Any = th.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    if hasattr(backends, "fp32_precision"):  # since torch 2.9, where the older getters raise an error once this is set
        precisions = [part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn)]
    else:
        precisions = [th.get_float32_matmul_precision(), cudnn.allow_tf32]
    algorithms = (th.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.deterministic, cudnn.benchmark)
    return (*precisions, *algorithms)


class StaticStep:
    """
    Loss, gradients, clipping and Adam's step of minibatches, and the tensors that these read and write.

    ``rows`` holds the rows of a chunk's minibatches, ``log`` their statistics, and ``active`` whether minibatches may
    still take steps.
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        structure: Structure,
        coefficients: UpdateCoefficients,
        rollout: dict[str, Any],
        autocast: th.dtype | None = None,
    ) -> None:
        device, settings = policy.device, structure.settings
        self.policy, self.structure, self._settings = policy, structure, settings
        self._parameters = list(policy.parameters())
        self._optimizer = _optimizer_step(policy.optimizer)
        self._moments = [moments_of(policy.optimizer, parameter) for parameter in self._parameters]
        for state in policy.optimizer.state.values():
            state["step"] = state["step"].cpu()  # a loaded file may have put it on the device
        # If they move, the first ones are a copy of the host's arrays that belongs to this object.
        self._observations = parts_of(rollout["observations"])
        self._columns = _columns(rollout)
        self.n_rows = len(self._columns)
        self._n_actions = rollout["actions"].shape[1]
        self.rows = th.zeros(min(self.n_rows, CHUNK * settings.batch_size), dtype=th.int64, device=device)
        self.log = th.zeros(CHUNK, len(LOGGED), device=device)
        self.active = th.ones((), dtype=th.bool, device=device)
        self._found_inf, self._learning_rate = (th.zeros((), device=device) for _ in range(2))
        self._n_steps = th.zeros(len(self._parameters), device=device)  # of each parameter, if it is reached
        self._gradients = [th.zeros_like(parameter) for parameter in self._parameters]
        self._reached: list[bool] = []  # whether the loss of a minibatch depends on a parameter
        self._loss = StaticLoss(policy, settings, coefficients, rollout["advantages"], autocast)
        self._scaling = ImageScaling(policy)

    def load(self, coefficients: UpdateCoefficients, rollout: dict[str, Any]) -> None:
        """Copy the numbers of an update to the step's tensors. It must have the step's structure."""
        if self.structure.moves:
            for key, tensor in parts_of(rollout["observations"]).items():
                if tensor is not self._observations[key]:
                    self._observations[key].copy_(tensor)
        _columns(rollout, out=self._columns)
        optimizer = self.policy.optimizer
        of_advantages = None
        if self._settings.normalizes_rollout:
            of_advantages = advantage_moments(rollout["advantages"], self._settings, self.policy.device)
        self._loss.load(coefficients, of_advantages)
        self._learning_rate.fill_(optimizer.param_groups[0]["lr"])
        self._n_steps.copy_(th.tensor(steps_made(optimizer, self._parameters)))
        self.active.fill_(True)

    def run(self, sizes: tuple[int, ...], measure_kl: bool) -> None:
        """Run minibatches of these sizes, whose rows are in ``rows``, and fill the first rows of ``log``."""
        rows = self.rows[: sum(sizes)]
        whole = self._loss.prepared(self._transitions(rows), sizes)
        log_ratios, values, start = [], [], 0
        with self._scaling.policy_scaling_off():
            for number, size in enumerate(sizes):
                part = slice(start, start + size)
                columns: Any = (column if column is None else column[part] for column in whole[1:])
                batch = MiniBatch(from_parts(self._scaling(self._observed(rows[part]))), *columns)
                gradients = self._run_minibatch(batch, measure_kl, self.log[number])
                log_ratios.append(self._loss.log_ratio)
                values.append(self._loss.values)
                start += size
        self._loss.write_log(self.log, whole, sizes, th.cat(log_ratios), th.cat(values))
        th._foreach_copy_(list(compress(self._gradients, self._reached)), gradients)

    def minibatch(self, rows: th.Tensor) -> MiniBatch:
        """Return the transitions in these rows of the rollout."""
        return self._transitions(rows)._replace(observations=from_parts(self._observed(rows)))

    def write_back(self) -> None:
        """Write the numbers of steps to the optimizer, and the last gradients to the parameters."""
        columns = zip(self._parameters, self._gradients, self._n_steps.tolist(), strict=True)
        for parameter, gradient, n_steps in compress(columns, self._reached):
            self.policy.optimizer.state[parameter]["step"].fill_(n_steps)
            parameter.grad = gradient

    def _observed(self, rows: th.Tensor) -> dict[str, th.Tensor]:
        return {key: tensor.index_select(0, rows) for key, tensor in self._observations.items()}

    def _transitions(self, rows: th.Tensor) -> MiniBatch:
        """Return the transitions in these rows without their observations."""
        columns, n = self._columns.index_select(0, rows), len(_COLUMNS)
        values, log_probs, advantages, returns = columns[:, :n].t().contiguous()
        return MiniBatch(
            observations=None,
            actions=columns[:, n : n + self._n_actions].contiguous(),
            old_values=values,
            old_log_prob=log_probs,
            advantages=advantages,
            returns=returns,
            old_dist_params=columns[:, n + self._n_actions :] if self._settings.has_dist_params else None,
        )

    def _run_minibatch(self, batch: MiniBatch, measure_kl: bool, log: th.Tensor) -> list[th.Tensor]:
        """Run one minibatch, and return the gradients of the parameters that its loss depends on."""
        # New leaves for each pass: nodes of a parameter that is part of another graph remember that graph's stream,
        # which no CUDA graph may wait for.
        leaves = [parameter.detach().requires_grad_() for parameter in self._parameters]
        with replaced_parameters(self.policy, leaves):
            statistics = self._loss.statistics(batch, measure_kl)
        found = self._loss.gradients(leaves)
        self._reached = [gradient is not None for gradient in found]
        # Those of convolutions may have the layout of the images, which the optimizer would misread.
        gradients = [gradient.contiguous() for gradient in found if gradient is not None]
        with th.no_grad():
            statistics["grad_norm"] = norm = th.nn.utils.get_total_norm(gradients)
            loss = statistics["loss"]
            self._make_step(gradients, norm, self._may_step(loss, statistics.get("approx_kl"), norm))
            values = [statistics.get(name, loss) for name in LOGGED[: LOGGED.index("ratio_max")]]
            th.stack(values, out=log[: len(values)])
        return gradients

    def _may_step(self, loss: th.Tensor, approx_kl: Any, norm: th.Tensor) -> th.Tensor:
        """Return whether this minibatch takes a step, as :func:`.epochs.run_epochs` decides, and update ``active``."""
        settings, active = self._settings, self.active
        is_finite = th.maximum(loss.abs(), norm) <= FLOAT32_MAX
        if settings.on_nonfinite != "skip":
            active.logical_and_(is_finite)
            if settings.target_kl is not None:
                active.logical_and_(~(approx_kl.double() > 1.5 * settings.target_kl))
            return active
        steps = active & is_finite
        if settings.target_kl is not None:
            exceeds = approx_kl.double() > 1.5 * settings.target_kl
            steps = steps & ~exceeds
            active.logical_and_(~(exceeds & (loss.abs() <= FLOAT32_MAX)))
        return steps

    def _make_step(self, gradients: list[th.Tensor], norm: th.Tensor, steps: th.Tensor) -> None:
        """Clip the gradients, and take a step of Adam if ``steps`` is true."""
        moments = list(compress(self._moments, self._reached))
        self._n_steps += steps
        self._optimizer(
            [parameter.detach() for parameter in compress(self._parameters, self._reached)],
            gradients,
            [exp_avg for exp_avg, _ in moments],
            [exp_avg_sq for _, exp_avg_sq in moments],
            [],
            list(compress(self._n_steps.unbind(), self._reached)),
            lr=self._learning_rate,
            # Divides the gradients, also in their own memory. torch's clipping multiplies by the inverse.
            grad_scale=((norm + _NORM_EPS) / self._settings.max_grad_norm).clamp_(min=1.0),
            found_inf=th.logical_not(steps, out=self._found_inf),
        )


def _optimizer_step(optimizer: th.optim.Optimizer) -> Any:
    """Return Adam's fused step with an optimizer's options. A step with a positive ``found_inf`` changes nothing."""
    group = optimizer.param_groups[0]
    is_decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, th.optim.AdamW))
    return partial(
        th._fused_adamw_ if is_decoupled else th._fused_adam_,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _columns(rollout: dict[str, Any], out: th.Tensor | None = None) -> th.Tensor:
    """Return all numbers of a rollout except observations in one tensor, shape ``(n_transitions, k)``."""
    columns = [rollout[name].unsqueeze(1) for name in _COLUMNS]
    return th.cat([*columns, rollout["actions"].float(), rollout["dist_params"]], dim=1, out=out)
