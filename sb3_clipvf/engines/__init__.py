"""
Engines run one update of the policy. They differ in speed, never in meaning; ``autograd`` is the reference.

:func:`select_engine` turns the user's ``engine=`` into an engine, or says why it cannot.
"""

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.settings import UpdateCoefficients, UpdateSettings, UpdateStatistics, check_finite

ENGINE_NAMES = ("auto", "autograd", "native", "cuda_graph")

__all__ = [
    "ENGINE_NAMES",
    "AutogradEngine",
    "UpdateCoefficients",
    "UpdateSettings",
    "UpdateStatistics",
    "check_engine_name",
    "check_finite",
    "select_engine",
]


def check_engine_name(engine: object) -> None:
    """
    Refuse an engine that does not exist.

    :param engine: What the user passed as ``engine=``.
    :raises ValueError: If it is none of :data:`ENGINE_NAMES`, or one that this version does not bring.
    """
    if engine not in ENGINE_NAMES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINE_NAMES)}, got {engine!r}. Leave it out for 'auto'.")
    if engine in ("native", "cuda_graph"):
        raise ValueError(
            f"`engine` must be 'auto' or 'autograd' in this version, got {engine!r}, which it does not bring yet. "
            "Use 'auto', which picks the fastest engine that runs the policy."
        )


def select_engine(engine: str, policy: ActorCriticPolicy, settings: UpdateSettings) -> tuple[AutogradEngine, str]:
    """
    Build the engine that updates a policy.

    :param engine: "auto" or an engine's name.
    :param policy: The policy that it will update.
    :param settings: What stays the same over all updates.
    :return: The engine, and why it was chosen, for the log.
    :raises ValueError: If the engine does not exist.
    """
    check_engine_name(engine)
    reason = "asked for" if engine == "autograd" else "it runs every SB3 policy, and no faster engine is installed"
    return AutogradEngine(policy, settings), reason
