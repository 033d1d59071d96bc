"""
Engines act for a policy and update it. They differ in speed, never in meaning; ``autograd`` is the reference.

:func:`select_engine` turns the user's ``engine=`` into an engine, or says why it cannot.
"""

from importlib.util import find_spec
from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.binding import plain_policy
from sb3_clipvf.engines.interface import Engine, UpdateSettings
from sb3_clipvf.engines.recognition import NotPlainError, why_unknown_buffer

ENGINE_NAMES = ("auto", "autograd", "native", "cuda_graph")

_PACKAGES = ("numba", "scipy", "threadpoolctl")


def check_engine_name(engine: object) -> None:
    """
    Refuse an engine that does not exist.

    :param engine: What the user passed as ``engine=``.
    :raises ValueError: If it is none of :data:`ENGINE_NAMES`, or one that this version does not bring.
    """
    if engine not in ENGINE_NAMES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINE_NAMES)}, got {engine!r}. Leave it out for 'auto'.")
    if engine == "cuda_graph":
        raise ValueError(
            f"`engine` must be 'auto', 'native' or 'autograd' in this version, got {engine!r}, which it does not bring "
            "yet. Use 'auto', which picks the fastest engine that runs the policy."
        )


def why_not_native(policy: ActorCriticPolicy, buffer: Any) -> str | None:
    """
    Say what keeps a policy from running on the native engine.

    :param policy: The policy.
    :param buffer: Its rollout buffer.
    :return: Half a sentence, or None where nothing does.
    """
    reason = why_unknown_buffer(buffer)
    if reason is not None:
        return reason
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        return f"the package {missing[0]} is not installed"
    try:
        plain_policy(policy)
    except NotPlainError as not_plain:
        return str(not_plain)
    return None


def select_engine(name: str, policy: ActorCriticPolicy, settings: UpdateSettings, buffer: Any) -> tuple[Engine, str]:
    """
    Build the engine that runs a policy.

    :param name: "auto" or an engine's name.
    :param policy: The policy that it will act for and update.
    :param settings: What stays the same over all updates.
    :param buffer: The rollout buffer that it will update from.
    :return: The engine, and why it was chosen, for the log.
    :raises ValueError: If the engine does not exist, or cannot run the policy.
    """
    check_engine_name(name)
    if name == "autograd":
        return AutogradEngine(policy, settings), "asked for"
    reason = why_not_native(policy, buffer)
    if reason is None:
        # numba takes half a second to import, which a policy that runs on the other engine need not wait for.
        from sb3_clipvf.engines.native import NativeEngine

        return NativeEngine(policy, settings), "asked for" if name == "native" else "it is the fastest for this policy"
    if name == "native":
        raise ValueError(
            f"`engine` must be one that runs the policy, got 'native', which does not: {reason}. "
            "Use 'auto' or 'autograd'."
        )
    engine, around = _autograd_engine(policy, settings)
    return engine, f"the native engine does not run the policy: {reason}; {around}"


def is_surpassed(engine: Engine, buffer: Any) -> bool:
    """
    Tell whether a faster engine than one of autograd's would run its policy, since what kept it from that is gone.

    :param engine: Any.
    :param buffer: The rollout buffer.
    :return: Whether ``"auto"`` would choose another one now.
    """
    if engine.name != "autograd":
        return False
    if why_not_native(engine.policy, buffer) is None:
        return True
    return type(engine) is AutogradEngine and _why_not_compiled(engine.policy) is None


def _why_not_compiled(policy: ActorCriticPolicy) -> str | None:
    """What keeps kernels from computing a policy's losses and steps, as the log goes on with it; None: nothing."""
    if any(find_spec(package) is None for package in _PACKAGES):
        return ""
    from sb3_clipvf.engines.fused import check_around_networks

    try:
        check_around_networks(policy)
    except NotPlainError as reason:
        return f": {reason}"
    return None


def _autograd_engine(policy: ActorCriticPolicy, settings: UpdateSettings) -> tuple[Engine, str]:
    """The autograd engine with compiled losses and steps where they fit the policy, else as it is."""
    reason = _why_not_compiled(policy)
    if reason is not None:
        return AutogradEngine(policy, settings), f"nor are its losses compiled{reason}"
    from sb3_clipvf.engines.fused import LeanAutogradEngine

    return LeanAutogradEngine(policy, settings), "its losses and its optimizer are compiled"
