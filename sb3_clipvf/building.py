"""From ClipPPO's arguments to its parts: the rollout buffer, the engine's settings, the controllers of the KL."""

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_clipvf.common.messages import log
from sb3_clipvf.distributions import dist_param_dim
from sb3_clipvf.engines.interface import UpdateSettings
from sb3_clipvf.rollout import TensorRolloutBuffer
from sb3_clipvf.schedules import AdaptiveKL, KLAdaptiveLR, Schedule, make_controller

if TYPE_CHECKING:
    from sb3_clipvf.clip_ppo import ClipPPO


def make_rollout_buffer(model: "ClipPPO") -> Any:
    """
    Build the buffer of a model.

    :param model: With its policy built.
    :return: A buffer with the interface of SB3's ``RolloutBuffer``.
    :raises ValueError: If it does not fit into memory, or cannot store what the KL penalty needs.
    """
    buffer_class = model.rollout_buffer_class or TensorRolloutBuffer
    width = dist_param_dim(getattr(model.policy, "action_dist", None))
    kwargs = dict(model.rollout_buffer_kwargs)
    if issubclass(buffer_class, TensorRolloutBuffer):
        kwargs.setdefault("dist_param_dim", width or 0)
    stores_dist = issubclass(buffer_class, TensorRolloutBuffer) and kwargs["dist_param_dim"] == width
    _check_kl_is_known(model, buffer_class, width, stores_dist)
    rollout_buffer = buffer_class(
        model.n_steps,
        stored_observation_space(model),
        model.action_space,
        device=model.device,
        gamma=model.gamma,
        gae_lambda=model.gae_lambda,
        n_envs=model.n_envs,
        **kwargs,
    )
    if isinstance(rollout_buffer, TensorRolloutBuffer) and model.env is not None:
        rollout_buffer.check_memory()
    return rollout_buffer


def leave_out_kl(model: "ClipPPO", rollout_buffer: Any) -> None:
    """
    Do without the exact KL in a rollout of a policy whose distribution turned out to be of an unknown type.

    :param model: Collecting its first step.
    :param rollout_buffer: Stores the rollout.
    :raises ValueError: If an argument needs the exact KL.
    """
    _check_kl_is_known(model, type(rollout_buffer), None, stores_dist=False)
    _say_once(model, "`train/kl` is omitted, since the policy leaves no action distribution whose exact KL is known.")


def _say_once(model: "ClipPPO", message: str) -> None:
    if not model._warned_of_missing_kl:
        model._warned_of_missing_kl = True
        log.info(message)


def check_kl_is_stored(model: "ClipPPO") -> None:
    """
    Check that the rollout holds what the exact KL is computed from, where an argument needs it.

    A loop of the user's, or SB3's, adds steps without the old distribution's parameters.

    :param model: With a complete rollout.
    :raises ValueError: If it does not.
    """
    rollout_buffer = model.rollout_buffer
    if _has_dist_params(rollout_buffer):
        return
    name, can_store = _needs_kl(model), bool(getattr(rollout_buffer, "dist_param_dim", 0))
    if name is None:
        if can_store:
            _say_once(model, "The rollout holds no parameters of the old action distribution: `train/kl` is omitted.")
        return
    if can_store:
        raise ValueError(
            f"`dist_params` must be given at each step where `{name}` is set, got None and {getattr(model, name)!r}. "
            "Pass them to `rollout_buffer.add`, or collect by ClipPPO's own `collect_rollouts`, which does."
        )
    width = dist_param_dim(getattr(model.policy, "action_dist", None))
    _check_kl_is_known(model, type(rollout_buffer), width, stores_dist=False)


def _has_dist_params(rollout_buffer: Any) -> bool:
    """Return whether the rollout in a buffer holds them; one of the user's may have no such property."""
    return bool(getattr(rollout_buffer, "has_dist_params", getattr(rollout_buffer, "dist_param_dim", 0)))


def stored_observation_space(model: "ClipPPO") -> spaces.Space[Any]:
    """
    The observation space as the buffer sees it: VecNormalize turns integer observations into floats.

    :param model: With its environment, if any.
    :return: The model's space, with float32 in the place of the integer boxes that are normalised.
    """
    normalizer = model.get_vec_normalize_env()
    space = model.observation_space
    if normalizer is None or not normalizer.norm_obs:
        return space
    if isinstance(space, spaces.Dict):
        keys = normalizer.norm_obs_keys or []
        return spaces.Dict({key: _as_float(sub) if key in keys else sub for key, sub in space.spaces.items()})
    return _as_float(space)


def _as_float(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
        return spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    return space


def _needs_kl(model: "ClipPPO") -> str | None:
    """:return: The first argument that needs the exact KL, or None."""
    names = ("kl_coef", "adaptive_kl_target", "lr_kl_target")
    return next((name for name in names if getattr(model, name) not in (None, 0)), None)


def _check_kl_is_known(model: "ClipPPO", buffer_class: type[Any], width: int | None, stores_dist: bool) -> None:
    name = _needs_kl(model)
    if name is None or (width and stores_dist):
        return
    if width:
        cause = f"`rollout_buffer_class` {buffer_class.__name__} does not store the old distribution"
        way_out = "Derive the buffer class from TensorRolloutBuffer, and leave its `dist_param_dim` alone."
    else:
        dist = type(getattr(model.policy, "action_dist", None)).__name__
        cause = f"the exact KL of the policy's action distribution ({dist}) is not known"
        way_out = "Use one of SB3's action distributions."
    raise ValueError(f"`{name}` must not be set, since {cause}, got {getattr(model, name)!r}. {way_out}")


def make_update_settings(model: "ClipPPO") -> UpdateSettings:
    """
    Collect what an engine needs to know beside the coefficients.

    :param model: With its buffer built.
    :return: Settings, as the model's attributes are now.
    """
    return UpdateSettings(
        batch_size=model.batch_size,
        n_epochs=model.n_epochs,
        normalize_advantage=model.normalize_advantage,
        advantage_scope=model.advantage_scope,
        vf_clip=model.vf_clip,
        max_grad_norm=model.max_grad_norm,
        target_kl=model.target_kl,
        measure_kl_after=model.adaptive_kl is not None or model.adaptive_lr is not None,
        has_dist_params=_has_dist_params(model.rollout_buffer),
        discrete_actions=isinstance(model.action_space, spaces.Discrete),
        needs_kl=_needs_kl(model) is not None,
        on_nonfinite=model.on_nonfinite,
    )


def make_adaptive_kl(kept: AdaptiveKL | None, target: float | None, kl_coef: Schedule) -> AdaptiveKL | None:
    """
    Start the controller of the KL penalty, or go on with the beta that a saved file brought.

    :param kept: State so far, if any.
    :param target: d_targ, nats; None: beta does not adapt.
    :param kl_coef: Beta starts at its value at progress 1.
    :return: The state, or None.
    """
    return make_controller(AdaptiveKL, kept, target, kl_coef)


def make_adaptive_lr(kept: KLAdaptiveLR | None, target: float | None, lr_schedule: Schedule) -> KLAdaptiveLR | None:
    """
    Start the controller of the learning rate, or go on with the rate that a saved file brought.

    :param kept: State so far, if any.
    :param target: nats; None: the rate does not adapt.
    :param lr_schedule: The rate starts at its value at progress 1.
    :return: The state, or None.
    """
    return make_controller(KLAdaptiveLR, kept, target, lr_schedule)
