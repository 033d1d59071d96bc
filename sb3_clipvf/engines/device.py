"""Which device ``device="auto"`` selects if there is a GPU. docs/gpu.md has the measurements behind the rule."""

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import get_device
from torch import nn
from torch.nn.parameter import is_lazy

from sb3_clipvf.common.messages import log
from sb3_clipvf.engines.recognition import UnsupportedError
from sb3_clipvf.engines.support import plain_policy

LARGEST_ON_CPU = {"native MLP": 12_000_000, "MLP": 4_000_000}
"""Parameters x batch size up to which the CPU is selected, by kind of network. Other networks use the GPU."""

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def select_device(engine: str, policy: ActorCriticPolicy, batch_size: int) -> th.device:
    """Return the device for a new policy that has not been moved yet, and log the reason if there is a GPU."""
    gpu = get_device("auto")
    if gpu.type == "cpu":
        return gpu
    n_parameters = sum(parameter.numel() for parameter in policy.parameters() if not is_lazy(parameter))
    takes_cpu, reason = choose_cpu(engine, kind_of_network(policy), n_parameters, batch_size)
    device = th.device("cpu") if takes_cpu else gpu
    log.info("device='auto' selects %r: %s", str(device), reason)
    return device


def choose_cpu(engine: str, network: str, n_parameters: int, batch_size: int) -> tuple[bool, str]:
    """
    Return whether a policy uses the CPU although there is a GPU, and the reason.

    :param engine: Engine that the user asked for.
    :param network: Kind of network, from :func:`kind_of_network`.
    :param n_parameters: Number of the policy's parameters.
    :param batch_size: Transitions in a minibatch.
    """
    if engine == "autograd":
        return False, "engine='autograd' uses SB3's choice"
    if engine in ("cuda_graph", "cuda_graph_bf16"):
        return False, f"engine={engine!r} runs only on a GPU"
    if engine in ("native", "fused"):
        return True, f"engine={engine!r} runs only on the CPU"
    if network not in LARGEST_ON_CPU:
        return False, f"the policy has {network}"
    size, largest = n_parameters * batch_size, LARGEST_ON_CPU[network]
    is_small = size <= largest
    limit = f"{'at most' if is_small else 'more than'} {largest:,}"
    return is_small, f"{n_parameters:,} parameters of an MLP x batch_size={batch_size:,} is {size:,}, {limit}"


def kind_of_network(policy: ActorCriticPolicy) -> str:
    """
    Return "native MLP" if the native engine can run the policy, "MLP", or what else the policy has.

    An MLP consists of linear layers, layer normalisation and ``log_std``.
    """
    if any(parameter.device.type != "cpu" for parameter in policy.parameters()):
        return "parameters on another device"  # it was built there
    try:
        plain_policy(policy)
        return "native MLP"
    except UnsupportedError:
        pass
    modules = list(policy.modules())
    if any(isinstance(module, _CONVOLUTIONS) for module in modules):
        return "convolutions"
    layers = [module for module in modules if isinstance(module, nn.Linear | nn.LayerNorm)]
    known = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    known.add(id(getattr(policy, "log_std", None)))
    is_mlp = all(id(parameter) in known and not is_lazy(parameter) for parameter in policy.parameters())
    return "MLP" if is_mlp else "layers of an unknown kind"
