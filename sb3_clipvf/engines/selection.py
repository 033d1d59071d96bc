"""Selection of the engine that runs a policy, from its name or for ``engine="auto"``."""

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_clipvf.engines.autograd import AutogradEngine
from sb3_clipvf.engines.cuda_graph import Bfloat16Engine, CudaGraphEngine
from sb3_clipvf.engines.interface import Engine, UpdateSettings
from sb3_clipvf.engines.support import why_not_bf16, why_not_cuda_graph, why_not_fused, why_not_native
from sb3_clipvf.engines.threads import warn_of_excess_threads

_ONE_PROCESS = "it trains in a single process only"

ENGINE_NAMES = ("auto", "autograd", "fused", "native", "cuda_graph", "cuda_graph_bf16")


def check_engine_name(engine: object) -> None:
    """Check the argument ``engine``, and raise ``ValueError`` if it is none of ``ENGINE_NAMES``."""
    if engine not in ENGINE_NAMES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINE_NAMES)}, got {engine!r}. 'auto' is the default.")


def select_engine(name: str, policy: ActorCriticPolicy, settings: UpdateSettings, buffer: Any) -> tuple[Engine, str]:
    """
    Return the engine that runs a policy, and why it was chosen. Raise ValueError if the named one cannot run it.

    ``"auto"`` selects the first of native, fused and autograd that can; on an NVIDIA GPU, of cuda_graph and autograd.
    """
    check_engine_name(name)
    engine, why = _select_engine(name, policy, settings, buffer)
    if engine.name in ("autograd", "fused") and policy.device.type == "cpu":
        warn_of_excess_threads()
    return engine, why


def _select_engine(name: str, policy: ActorCriticPolicy, settings: UpdateSettings, buffer: Any) -> tuple[Engine, str]:
    if name == "autograd":
        return AutogradEngine(policy, settings), "as requested"
    reasons = {}
    on_cuda = policy.device.type == "cuda"
    if name == "cuda_graph" or (name == "auto" and on_cuda):
        reasons["cuda_graph"] = _ONE_PROCESS if settings.group.size > 1 else why_not_cuda_graph(policy, buffer)
        if reasons["cuda_graph"] is None:
            why = "as requested" if name == "cuda_graph" else "it is the fastest for this policy on a GPU"
            return CudaGraphEngine(policy, settings), why
        if name == "auto":
            return AutogradEngine(policy, settings), f"cuda_graph cannot run the policy: {reasons['cuda_graph']}"
    if name == "cuda_graph_bf16":
        reasons[name] = _ONE_PROCESS if settings.group.size > 1 else why_not_bf16(policy, buffer)
        if reasons[name] is None:
            return Bfloat16Engine(policy, settings), "as requested"
    # An engine with kernels imports numba, which takes half a second.
    if name in ("auto", "native"):
        reasons["native"] = why_not_native(policy, buffer)
        if reasons["native"] is None:
            from sb3_clipvf.engines.native import NativeEngine

            why = "as requested" if name == "native" else "it is the fastest for this policy"
            return NativeEngine(policy, settings), why
    if name in ("auto", "fused"):
        reasons["fused"] = why_not_fused(policy)
        if reasons["fused"] is None:
            from sb3_clipvf.engines.fused import FusedEngine

            why = "as requested" if name == "fused" else f"native cannot run the policy: {reasons['native']}"
            return FusedEngine(policy, settings), why
    if name != "auto":
        raise ValueError(
            f"`engine` must be one that can run the policy, got {name!r}, which cannot: {reasons[name]}. Use 'auto', "
            "which selects the fastest one that can."
        )
    return AutogradEngine(policy, settings), (
        f"native cannot run the policy ({reasons['native']}), and neither can fused ({reasons['fused']})"
    )


def is_surpassed(engine: Engine, buffer: Any) -> bool:
    """Return whether ``"auto"`` would now choose a faster engine, since the reasons against it may have gone."""
    if engine.name in ("native", "cuda_graph", "cuda_graph_bf16"):
        return False
    if engine.policy.device.type == "cuda":
        return engine.settings.group.size == 1 and why_not_cuda_graph(engine.policy, buffer) is None
    if why_not_native(engine.policy, buffer) is None:
        return True
    return engine.name == "autograd" and why_not_fused(engine.policy) is None
