"""
Recognition of code: native and fused run only original code. The reference trains a policy with replaced code.

Each case is trained by ``engine="auto"`` and by the reference: their weights agree, and differ from those of a training
without the change.
"""

import contextlib
import copy
import dis
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common import distributions as sb3_distributions
from stable_baselines3.common import preprocessing
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO, objectives
from sb3_clipvf.distributions import dist_params
from sb3_clipvf.engines import autograd, recognition
from sb3_clipvf.engines.autograd import AutogradEngine, AutogradUpdate
from sb3_clipvf.engines.fused import FusedEngine
from sb3_clipvf.engines.native import NativeEngine
from sb3_clipvf.engines.support import why_not_bf16, why_not_cuda_graph
from sb3_clipvf.rollout import TensorRolloutBuffer

N_STEPS = 16
Change = Callable[[ClipPPO], object]


class OwnExtractor(FlattenExtractor):
    """An extractor with which the fused engine runs the policy."""


FAST: dict[str, tuple[dict[str, Any], type[Any]]] = {
    "native": ({}, NativeEngine),
    "fused": ({"features_extractor_class": OwnExtractor}, FusedEngine),
}


def make(engine: str = "auto", policy: Any = "MlpPolicy", env: Any = "Pendulum-v1", **kwargs: Any) -> ClipPPO:
    policy_kwargs = {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    return ClipPPO(
        policy,
        make_vec_env(env, n_envs=2, seed=1),
        n_steps=N_STEPS,
        batch_size=16,
        n_epochs=2,
        learning_rate=1e-2,
        clip_range=0.05,
        ent_coef=0.01,
        device="cpu",
        seed=0,
        engine=engine,
        policy_kwargs=policy_kwargs,
        **kwargs,
    )


def trained(change: Change | None, engine: str, **kwargs: Any) -> tuple[list[th.Tensor], Any]:
    """:return: The parameters after two updates, and the engine that made them."""
    model = make(engine, **kwargs)
    if change is not None:
        change(model)
    model.learn(2 * N_STEPS * 2)
    return [parameter.detach().clone() for parameter in model.policy.parameters()], model._engine


def difference(ours: list[th.Tensor], theirs: list[th.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def assert_trains_what_the_user_has(change: Change, *, has_effect: bool = True, **kwargs: Any) -> Any:
    """:return: The engine that ``"auto"`` took."""
    ours, engine = trained(change, "auto", **kwargs)
    theirs, _ = trained(change, "autograd", **kwargs)
    # Adam divides gradients by their size, which turns float32 rounding of small ones into steps of some 1e-4.
    assert difference(ours, theirs) < 2e-3
    if has_effect:
        assert difference(trained(None, "autograd", **kwargs)[0], theirs) > 5e-3
    return engine


# ------------------------------------------------------------------ parts that were replaced on the objects


class Scaled(nn.Module):
    """A module without parameters, which no list of parameters contains."""

    def forward(self, tensor: th.Tensor) -> th.Tensor:
        return 3.0 * tensor


def replaced(name: str, result: Callable[[Any], Any], *path: str) -> Change:
    """:return: What replaces a method of a part of the model by one that changes its result."""

    def change(model: ClipPPO) -> None:
        owner: Any = model
        for attribute in path:
            owner = getattr(owner, attribute)
        original = getattr(owner, name)
        object.__setattr__(owner, name, lambda *args, **kwargs: result(original(*args, **kwargs)))

    return change


def tripled(tensor: Any) -> Any:
    return 3.0 * tensor


def of_all_but_values(result: tuple[Any, ...]) -> tuple[Any, ...]:
    values, log_prob, entropy = result
    return values, 3.0 * log_prob, entropy


def widened(dist: Any) -> Any:
    dist.distribution = th.distributions.Normal(dist.distribution.loc, 3.0 * dist.distribution.scale)
    return dist


def more_advantage(batch: Any) -> Any:
    return batch._replace(advantages=batch.advantages**3)


def more_advantages(batches: Iterator[Any]) -> Iterator[Any]:
    return map(more_advantage, batches)


def flatten_with(module: Callable[[Any], nn.Module]) -> Change:
    def change(model: ClipPPO) -> None:
        model.policy.features_extractor.flatten = module(model.policy.features_extractor.flatten)

    return change


def inserted_activation(model: ClipPPO) -> None:
    model.policy.mlp_extractor.policy_net.add_module("2", Scaled())


ON_OBJECTS: dict[str, Change] = {
    "flatten": flatten_with(lambda flatten: nn.Sequential(flatten, Scaled())),
    "module in flatten's place": flatten_with(lambda _: Scaled()),
    "module in the network": inserted_activation,
    "forward_actor": replaced("forward_actor", tripled, "policy", "mlp_extractor"),
    "forward_critic": replaced("forward_critic", tripled, "policy", "mlp_extractor"),
    "mlp_extractor.forward": replaced("forward", lambda pair: (3.0 * pair[0], pair[1]), "policy", "mlp_extractor"),
    "extractor.forward": replaced("forward", tripled, "policy", "features_extractor"),
    "action_net.forward": replaced("forward", tripled, "policy", "action_net"),
    "log_prob": replaced("log_prob", tripled, "policy", "action_dist"),
    "sample": replaced("sample", tripled, "policy", "action_dist"),
    "entropy": replaced("entropy", lambda entropy: 300.0 * entropy, "policy", "action_dist"),
    "proba_distribution": replaced("proba_distribution", widened, "policy", "action_dist"),
    "get_actions": replaced("get_actions", tripled, "policy", "action_dist"),
    "evaluate_actions": replaced("evaluate_actions", of_all_but_values, "policy"),
    "extract_features": replaced("extract_features", tripled, "policy"),
    "predict_values": replaced("predict_values", lambda values: values + 100.0, "policy"),
    "_get_action_dist_from_latent": replaced("_get_action_dist_from_latent", widened, "policy"),
    "policy.forward": replaced("forward", lambda row: (3.0 * row[0], *row[1:]), "policy"),
    "get": replaced("get", more_advantages, "rollout_buffer"),
    "_gather": replaced("_gather", more_advantage, "rollout_buffer"),
}


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("name", ON_OBJECTS)
def test_parts_that_were_replaced_on_objects_count(name: str, fast: str) -> None:
    kwargs = {"policy_kwargs": FAST[fast][0]}
    # Torch itself calls the parts of a network, so that the other fast engine may run what was replaced there.
    engine = assert_trains_what_the_user_has(ON_OBJECTS[name], **kwargs)
    assert type(engine) is not NativeEngine


@pytest.mark.parametrize("fast", FAST)
def test_an_optimizers_step_that_was_replaced_counts(fast: str) -> None:
    def change(model: ClipPPO) -> None:
        optimizer = model.policy.optimizer
        original = optimizer.step
        optimizer.step = lambda: (original(), original())[0]  # type: ignore[method-assign]

    engine = assert_trains_what_the_user_has(change, policy_kwargs=FAST[fast][0])
    assert type(engine) is AutogradEngine


@pytest.mark.parametrize("fast", FAST)
def test_zero_grad_that_was_replaced_counts(fast: str) -> None:
    """Gradients that are never set to None add up, over minibatches and updates."""

    def change(model: ClipPPO) -> None:
        model.policy.optimizer.zero_grad = lambda *_, **__: None  # type: ignore[method-assign]

    # Clipping to one norm, and Adam, leave little of the difference.
    engine = assert_trains_what_the_user_has(change, has_effect=False, policy_kwargs=FAST[fast][0])
    assert type(engine) is AutogradEngine


# ------------------------------------------------------------------ code that was replaced in classes and modules

CLASSES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "DiagGaussianDistribution.log_prob": (sb3_distributions.DiagGaussianDistribution, "log_prob", tripled),
    "DiagGaussianDistribution.proba_distribution": (
        sb3_distributions.DiagGaussianDistribution,
        "proba_distribution",
        widened,
    ),
    "Distribution.get_actions": (Distribution, "get_actions", tripled),
    "Normal.log_prob": (th.distributions.Normal, "log_prob", tripled),
    "MlpExtractor.forward_actor": (MlpExtractor, "forward_actor", tripled),
    "FlattenExtractor.forward": (FlattenExtractor, "forward", tripled),
    "Linear.forward": (nn.Linear, "forward", tripled),
    "Tanh.forward": (nn.Tanh, "forward", tripled),
    "functional.linear": (nn.functional, "linear", tripled),
    "functional.mse_loss": (nn.functional, "mse_loss", lambda loss: 0.0 * loss),
    "tanh": (th, "tanh", tripled),
    "ActorCriticPolicy.evaluate_actions": (ActorCriticPolicy, "evaluate_actions", of_all_but_values),
    "ActorCriticPolicy.extract_features": (ActorCriticPolicy, "extract_features", tripled),
    "sum_independent_dims": (sb3_distributions, "sum_independent_dims", tripled),
    "objectives.clipped_surrogate": (objectives, "clipped_surrogate", lambda loss: 0.0 * loss),
    "objectives.normalize_advantages": (objectives, "normalize_advantages", lambda advantages: advantages**3),
    "AutogradUpdate._value_loss": (AutogradUpdate, "_value_loss", lambda loss: 0.0 * loss),
    "TensorRolloutBuffer._gather": (TensorRolloutBuffer, "_gather", more_advantage),
}


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("name", CLASSES)
def test_functions_that_were_replaced_count(name: str, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, result = CLASSES[name]
    original = getattr(owner, attribute)
    kwargs = {"policy_kwargs": FAST[fast][0]}
    plain, engine = trained(None, "auto", **kwargs)
    assert type(engine) is FAST[fast][1]
    monkeypatch.setattr(owner, attribute, lambda *args, **kw: result(original(*args, **kw)))
    engine = assert_trains_what_the_user_has(lambda _: None, has_effect=False, **kwargs)
    assert type(engine) is AutogradEngine
    assert difference(trained(None, "auto", **kwargs)[0], plain) > 5e-3
    monkeypatch.undo()
    # Nothing keeps the fast engine from coming back.
    assert type(trained(None, "auto", **kwargs)[1]) is FAST[fast][1]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (preprocessing, "is_image_space"),
        (sys.modules["torch.nn.utils.clip_grad"], "_get_total_norm"),
        (autograd, "advantage_moments"),
    ],
)
def test_functions_of_other_modules_that_were_replaced_count(
    owner: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, lambda *_, **__: None)
    assert recognition.replaced_code() == f"{owner.__name__}.{name} was replaced"
    monkeypatch.undo()
    assert recognition.replaced_code() is None


# Modules and functions that initialise, copy, save or check, choose devices and implementations, or that only predict()
# and other distributions call.
NOT_TRAINING = frozenset(
    "torch.nn.init torch.cuda torch.accelerator torch.compiler torch.jit torch.__future__ torch.overrides torch.utils "
    "torch.nn.parameter torch.nn._reduction torch.utils._foreach_utils torch.optim.optimizer "
    "stable_baselines3.common.utils sb3_clipvf.common.resources sb3_clipvf.common.validation "
    "torch._disable_dynamo torch.compile torch.is_tensor torch.load torch.save torch.typename torch.autograd.grad "
    "torch.distributions.kl_divergence torch.nn.functional.handle_torch_function "
    "torch.nn.modules.module.is_traceable_wrapper_subclass "
    "torch.nn.utils.parameters_to_vector torch.nn.utils.vector_to_parameters".split()
)


PACKAGES = ("torch", "stable_baselines3", "sb3_clipvf")


def python_functions(value: Any) -> Iterator[FunctionType]:
    """:return: The functions of a method, a property or a function, and those that decorators wrap."""
    for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
        function = getattr(function, "__func__", function)
        while isinstance(function, FunctionType):
            yield function
            function = getattr(function, "__wrapped__", None)


def codes(code: CodeType) -> Iterator[CodeType]:
    """:return: The code of a function, and of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def called(function: FunctionType) -> Iterator[tuple[ModuleType, str]]:
    """:return: Functions that a function finds by a global name, or in a module with one, and these modules."""
    for code in codes(function.__code__):
        place: Any = None
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL":
                place = sys.modules[function.__globals__["__name__"]]
            elif not (step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(place, ModuleType)):
                place = None
                continue
            value = getattr(place, step.argval, None)
            if isinstance(value, FunctionType) and str(value.__module__).split(".")[0] in PACKAGES:
                yield place, step.argval
            place = value


def test_functions_that_known_code_calls_are_known() -> None:
    missing = {
        f"{place.__name__}.{name}"
        for original in recognition._originals.values()
        for value in original.code.values()
        for function in python_functions(value)
        for place, name in called(function)
        if place not in recognition._MODULES and (place, name) not in recognition._original_functions
        if place.__name__ not in NOT_TRAINING
    }
    assert missing - NOT_TRAINING == set()


@pytest.mark.parametrize("fast", FAST)
def test_steps_of_adam_that_were_replaced_count(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = th.optim.Adam.step

    def twice(self: th.optim.Adam, closure: Any = None) -> Any:
        original(self, closure)
        return original(self, closure)

    monkeypatch.setattr(th.optim.Adam, "step", twice)
    engine = assert_trains_what_the_user_has(lambda _: None, has_effect=False, policy_kwargs=FAST[fast][0])
    assert type(engine) is AutogradEngine


@pytest.mark.parametrize("scope", ["minibatch", "rollout"])
@pytest.mark.parametrize("fast", FAST)
def test_the_offset_of_normalised_advantages_counts(fast: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"policy_kwargs": FAST[fast][0], "advantage_scope": scope}
    before = trained(None, "auto", **kwargs)[0]
    monkeypatch.setattr(objectives, "ADVANTAGE_EPS", 100.0)
    engine = assert_trains_what_the_user_has(lambda _: None, has_effect=False, **kwargs)
    assert type(engine) is FAST[fast][1]
    assert difference(trained(None, "auto", **kwargs)[0], before) > 5e-3


def test_a_method_that_was_added_to_a_subclass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hides the inherited one, which is still there."""
    monkeypatch.setattr(
        sb3_distributions.DiagGaussianDistribution, "get_actions", lambda self, **_: self.mode(), raising=False
    )
    assert recognition.replaced_code() == "DiagGaussianDistribution.get_actions was replaced"
    engine = assert_trains_what_the_user_has(lambda _: None, has_effect=False)
    assert type(engine) is AutogradEngine


def test_functions_that_were_replaced_before_the_import_count() -> None:
    code = (
        "import torch as th; from torch import nn; forward = nn.Linear.forward\n"
        "nn.Linear.forward = lambda self, x: 3 * forward(self, x)\n"
        "from sb3_clipvf.engines import recognition; print(recognition.replaced_code())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Linear.forward was replaced"


def test_torchs_own_wrappers_are_known() -> None:
    """torch.compile() wraps functions of torch's optimizers and modules, for the whole process."""
    code = (
        "import torch as th; from sb3_clipvf.engines import recognition\n"
        "before = th.optim.Adam._init_group\n"
        "th.compile(th.nn.Linear(2, 2), backend='eager')(th.zeros(1, 2))\n"
        "th.optim.Adam([th.zeros(1, requires_grad=True)])\n"
        "th.nn.utils.clip_grad_norm_ = th._dynamo.disable(th.nn.utils.clip_grad_norm_)\n"
        "print(th.optim.Adam._init_group is before, recognition.replaced_code())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False None"


# ------------------------------------------------------------------ hooks


class Counter:
    """Counts calls, as a hook of any kind."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.calls += 1


def sb3(**kwargs: Any) -> PPO:
    return PPO(
        "MlpPolicy",
        make_vec_env("Pendulum-v1", n_envs=2, seed=1),
        n_steps=N_STEPS,
        batch_size=16,
        n_epochs=2,
        device="cpu",
        seed=0,
        policy_kwargs={"net_arch": [8], **kwargs},
    )


@contextlib.contextmanager
def policy_hook(model: Any, hook: Counter) -> Iterator[None]:
    yield model.policy.register_forward_hook(hook)


@contextlib.contextmanager
def global_module_hook(_: Any, hook: Counter) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def global_optimizer_hook(_: Any, hook: Counter) -> Iterator[None]:
    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def gradient_hook(model: Any, hook: Counter) -> Iterator[None]:
    yield model.policy.value_net.weight.register_hook(hook)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("registered", [policy_hook, global_module_hook, global_optimizer_hook, gradient_hook])
def test_hooks_run_as_often_as_in_sb3(registered: Any, fast: str) -> None:
    counts = []
    for model in (sb3(**FAST[fast][0]), make(policy_kwargs=FAST[fast][0])):
        model.learn(N_STEPS * 2)
        counter = Counter()
        with registered(model, counter):
            model.learn(N_STEPS * 2)
        counts.append(counter.calls)
    assert counts[0] > 0
    # SB3 asks for the values of the last observations by predict_values(), and so do we.
    assert counts[1] == counts[0]


def test_a_subclass_with_a_call_of_its_own_is_called() -> None:
    class Called(ActorCriticPolicy):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Called.calls += 1
            return super().__call__(*args, **kwargs)

    model = make(policy=Called)
    model.learn(N_STEPS * 2)
    assert Called.calls == N_STEPS
    assert "its class overrides __call__()" in model._engine_choice[2]


# ------------------------------------------------------------------ what torch does by a switch of the process


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: th.dtype) -> Iterator[None]:
    before = th.get_default_dtype()
    th.set_default_dtype(dtype)
    try:
        yield
    finally:
        th.set_default_dtype(before)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize(
    ("switch", "reason"),
    [
        (lambda: default_dtype(th.float64), "torch's default dtype is torch.float64"),
        (lambda: th.autocast("cpu", dtype=th.float16), "torch's autocast is on"),
        (Mode, "torch has a dispatch mode"),
        (th.autograd.detect_anomaly, "torch's anomaly detection is on"),
        (th.autograd.graph.save_on_cpu, "torch has hooks on saved tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_switches_of_torch_are_honoured(switch: Any, reason: str, fast: str) -> None:
    models = []
    for engine in ("auto", "autograd"):
        models.append(make(engine, policy_kwargs=FAST[fast][0]))
        with switch():
            models[-1].learn(N_STEPS * 2)
    assert type(models[0]._engine) is AutogradEngine
    assert reason in models[0]._engine_choice[2]
    ours, theirs = ([*model.policy.parameters()] for model in models)
    assert all(th.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    models[0].learn(N_STEPS * 2)
    assert type(models[0]._engine) is FAST[fast][1]


@pytest.mark.parametrize("fast", FAST)
def test_training_without_gradients_is_an_error(fast: str) -> None:
    for engine in ("auto", "autograd"):
        model = make(engine, policy_kwargs=FAST[fast][0])
        before = [parameter.clone() for parameter in model.policy.parameters()]
        with th.no_grad(), pytest.raises(RuntimeError, match="grad"):
            model.learn(N_STEPS)
        assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize("fast", FAST)
def test_kernels_need_numbas_compiler(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    model = make("auto", policy_kwargs=FAST[fast][0])
    model.learn(N_STEPS)
    assert type(model._engine) is AutogradEngine
    assert "NUMBA_DISABLE_JIT switches off" in model._engine_choice[2]


def test_hooks_keep_the_outputs_that_they_have_seen() -> None:
    seen: dict[str, list[th.Tensor]] = {}
    for engine in ("auto", "autograd"):
        model = make(engine, env="CartPole-v1")
        outputs = seen[engine] = []
        model.policy.action_net.register_forward_hook(lambda *call, kept=outputs: kept.append(call[2].detach()))
        model.learn(N_STEPS)
    assert type(model._engine) is AutogradEngine and len(seen["auto"]) == len(seen["autograd"])
    assert all(th.allclose(a, b, atol=1e-5) for a, b in zip(seen["auto"], seen["autograd"], strict=True))


def test_a_default_device_other_than_the_policys() -> None:
    with th.device("meta"):
        assert recognition.altered_torch() == "torch has a default device or a function mode"
    with th.device("cpu"):
        assert recognition.altered_torch() is None


# ------------------------------------------------------------------ policies that are something else


# torch.compile of Python 3.13.0, and of no later one.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_policy_goes_to_the_reference(validation_as_before: None) -> None:
    def compile(model: ClipPPO) -> None:
        model.policy = th.compile(model.policy, backend="eager")  # type: ignore[assignment]

    ours, engine = trained(compile, "auto")
    assert type(engine) is AutogradEngine
    assert difference(ours, trained(None, "autograd")[0]) < 2e-3


class Delegating(nn.Module):
    """Delegates attributes that it does not have."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.inner = policy

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_policy_that_delegates_goes_to_the_reference() -> None:
    def delegate(model: ClipPPO) -> None:
        model.policy = Delegating(model.policy)  # type: ignore[assignment]

    engine = assert_trains_what_the_user_has(delegate, has_effect=False)
    assert type(engine) is AutogradEngine


def test_an_unknown_mixin_counts() -> None:
    class Mixin(nn.Module):
        pass

    class Mixed(ActorCriticPolicy, Mixin):
        def __getattribute__(self, name: str) -> Any:
            return super().__getattribute__(name)

    model = make(policy=Mixed)
    model.learn(N_STEPS * 2)
    assert "its class overrides __getattribute__()" in model._engine_choice[2]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("kind", ["buffer", "tensor"])
def test_log_std_that_is_no_parameter(kind: str, fast: str) -> None:
    def change(model: ClipPPO) -> None:
        policy = model.policy
        del policy.log_std
        log_std = th.full((1,), -1.0)
        policy.register_buffer("log_std", log_std) if kind == "buffer" else setattr(policy, "log_std", log_std)
        policy.optimizer = th.optim.Adam(policy.parameters(), lr=1e-2)

    ours, engine = trained(change, "auto", policy_kwargs=FAST[fast][0])
    theirs, _ = trained(change, "autograd", policy_kwargs=FAST[fast][0])
    assert type(engine) is AutogradEngine
    assert difference(ours, theirs) == 0


# ------------------------------------------------------------------ sizes: kernels would read and write beyond memory


def other_layer(index: int, layer: nn.Module) -> Change:
    def change(model: ClipPPO) -> None:
        model.policy.mlp_extractor.policy_net[index] = copy.deepcopy(layer)
        model.policy.optimizer = th.optim.Adam(model.policy.parameters())

    return change


def other_part(name: str, part: Any) -> Change:
    def change(model: ClipPPO) -> None:
        setattr(model.policy, name, copy.deepcopy(part))
        model.policy.optimizer = th.optim.Adam(model.policy.parameters())

    return change


def smaller_weight(model: ClipPPO) -> None:
    model.policy.mlp_extractor.policy_net[0].weight = nn.Parameter(th.zeros(2, 3))
    model.policy.optimizer = th.optim.Adam(model.policy.parameters())


MISFITS: dict[str, Change] = {
    "fewer inputs": other_layer(0, nn.Linear(2, 8)),
    "more outputs": other_layer(0, nn.Linear(3, 9)),
    "smaller weight": smaller_weight,
    "more means": other_part("action_net", nn.Linear(8, 3)),
    "two values": other_part("value_net", nn.Linear(8, 2)),
    "other distribution": other_part("action_dist", sb3_distributions.DiagGaussianDistribution(3)),
}


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("name", MISFITS)
def test_layers_that_do_not_fit_each_other_are_an_error_or_the_references(name: str, fast: str) -> None:
    results = []
    for engine in ("auto", "autograd"):
        try:
            results.append(trained(MISFITS[name], engine, policy_kwargs=FAST[fast][0])[0])
        except (RuntimeError, ValueError):
            results.append([])
    ours, theirs = results
    assert bool(ours) == bool(theirs)
    assert not ours or difference(ours, theirs) == 0


def with_two_actions() -> gym.Env[Any, Any]:
    box = spaces.Box(-2.0, 2.0, (2,))
    return gym.wrappers.TransformAction(gym.make("Pendulum-v1"), lambda action: action.mean(keepdims=True), box)


@pytest.mark.parametrize("fast", FAST)
def test_one_mean_for_several_actions_is_broadcast(fast: str) -> None:
    kwargs = {"env": with_two_actions, "policy_kwargs": FAST[fast][0]}
    engine = assert_trains_what_the_user_has(other_part("action_net", nn.Linear(8, 1)), has_effect=False, **kwargs)
    assert type(engine) is AutogradEngine


class AtRolloutEnd(BaseCallback):
    def __init__(self, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.change = change

    def _on_rollout_end(self) -> None:
        self.change(self.model.rollout_buffer)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("name", ["actions", "observations", "dist_params", "returns"])
def test_stored_rows_of_another_width_are_refused(name: str, fast: str) -> None:
    def cut(buffer: Any) -> None:
        setattr(buffer, name, getattr(buffer, name)[..., :-1])

    with pytest.raises((RuntimeError, ValueError), match="must have|cannot be multiplied|cannot reshape"):
        make(policy_kwargs=FAST[fast][0]).learn(N_STEPS * 2, callback=AtRolloutEnd(cut))


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("change", [np.asfortranarray, lambda array: array.astype(np.float64)])
@pytest.mark.parametrize("name", ["advantages", "observations", "values"])
def test_stored_arrays_of_another_type_or_layout_count(name: str, change: Callable[[Any], Any], fast: str) -> None:
    def replace(buffer: Any) -> None:
        setattr(buffer, name, change(getattr(buffer, name)))

    weights = []
    for engine in ("auto", "autograd"):
        model = make(engine, policy_kwargs=FAST[fast][0])
        model.learn(N_STEPS * 2, callback=AtRolloutEnd(replace))
        weights.append([*model.policy.state_dict().values()])
    assert difference(*weights) < 1e-4


def test_minibatches_of_another_length_are_refused() -> None:
    def shorten(batch: Any) -> Any:
        return batch._replace(returns=batch.returns[:-1])

    model = make(policy_kwargs=FAST["fused"][0])
    replaced("_gather", shorten, "rollout_buffer")(model)
    with pytest.raises(ValueError, match=r"`rollout_buffer_class` must return `returns` of shape \(16,\) for 16 trans"):
        model.learn(N_STEPS * 2)


def test_lazy_layers_train() -> None:
    """Their parameters have no memory before the first forward pass."""

    def change(model: ClipPPO) -> None:
        other_layer(0, nn.LazyLinear(8))(model)

    assert_trains_what_the_user_has(change, has_effect=False)


# ------------------------------------------------------------------ changes without effect


class OwnBuild(ActorCriticPolicy):
    """A policy as in SB3's documentation: its own network, and helpers."""

    flag = False

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = MlpExtractor(self.features_dim, net_arch=[4], activation_fn=nn.Tanh)

    def helper(self) -> int:
        return 1


def test_subclasses_that_only_build_and_help_stay_fast() -> None:
    def change(model: ClipPPO) -> None:
        model.policy.flag = True  # type: ignore[assignment]

    assert type(trained(change, "auto", policy=OwnBuild)[1]) is FusedEngine


def test_other_attributes_change_nothing() -> None:
    def change(model: ClipPPO) -> None:
        for owner in (model.policy, model.policy.action_dist, model.policy.optimizer, model.rollout_buffer):
            owner.note = "mine"  # type: ignore[union-attr]

    noted, engine = trained(change, "auto")
    assert type(engine) is NativeEngine
    assert difference(noted, trained(None, "auto")[0]) == 0


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_plain_policies_run_on_native(env: str) -> None:
    assert type(trained(None, "auto", env=env)[1]) is NativeEngine


def test_sb3s_other_policies_are_known() -> None:
    space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    for policy in (
        ActorCriticCnnPolicy(space, spaces.Discrete(2), lambda _: 1e-3),
        MultiInputActorCriticPolicy(spaces.Dict({"a": space}), spaces.Discrete(2), lambda _: 1e-3),
    ):
        recognition.check_code(policy)


# ------------------------------------------------------------------ policies that SB3's PPO trains


class MaskedHead(nn.Module):
    """Masks one action by -inf, another one in each state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, latent: th.Tensor) -> th.Tensor:
        logits = self.inner(latent)
        mask = th.arange(logits.shape[1]) == (latent[:, :1] > 0).long()
        return logits.masked_fill(mask, -th.inf)


class MaskedPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = MaskedHead(self.action_net)  # type: ignore[assignment, arg-type]


class HeldHead(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, latent: th.Tensor) -> th.Tensor:
        return self.inner(latent).detach()


class HeldCritic(ActorCriticPolicy):
    """A critic that is not trained, though its parameters are not frozen."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.value_net = HeldHead(self.value_net)  # type: ignore[assignment]


class HeldActor(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = HeldHead(self.action_net)  # type: ignore[assignment, arg-type]


class TableHead(nn.Module):
    """Returns its own memory: logits that no observation changes."""

    def __init__(self, n_actions: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(th.arange(1.0, n_actions + 1))

    def forward(self, latent: th.Tensor) -> th.Tensor:
        return self.logits.expand(len(latent), -1)


class TablePolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = TableHead(self.action_net.out_features)  # type: ignore[assignment]
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), weight_decay=0.1)


class NoisyLinear(nn.Linear):
    def forward(self, latent: th.Tensor) -> th.Tensor:
        return super().forward(latent) + 0.1 * th.randn(len(latent), self.out_features)


class NoisyHeads(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net, self.value_net = NoisyLinear(8, self.action_net.out_features), NoisyLinear(8, 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))


class FreshDistribution(ActorCriticPolicy):
    """Leaves nothing in `action_dist`, and draws random numbers at each forward pass."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Sequential(nn.Dropout(0.3), self.action_net)  # type: ignore[assignment]

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return sb3_distributions.CategoricalDistribution(2).proba_distribution(self.action_net(latent_pi))


class OwnEverything(ActorCriticPolicy):
    """Has none of the parts of SB3's policies."""

    def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, use_sde: bool = False, **_: Any):
        super(ActorCriticPolicy, self).__init__(observation_space, action_space)
        self.net = nn.Linear(4, 3)
        self.optimizer = th.optim.Adam(self.parameters(), lr=lr_schedule(1))

    def both(self, obs: Any) -> tuple[Any, th.Tensor]:
        outputs = self.net(obs)
        return th.distributions.Categorical(logits=outputs[:, :2]), outputs[:, 2:]

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        dist, values = self.both(obs)
        actions = dist.sample()
        return actions, values, dist.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        dist, values = self.both(obs)
        return values, dist.log_prob(actions), dist.entropy()

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.both(obs)[1]


class FromBasePolicy(BasePolicy):
    """The attributes that SB3's PPO needs, and no others."""

    def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, use_sde: bool = False, **_: Any):
        super().__init__(observation_space, action_space)
        self.net = nn.Linear(4, 3)
        self.optimizer = th.optim.Adam(self.parameters(), lr=lr_schedule(1))

    both, forward = OwnEverything.both, OwnEverything.forward
    evaluate_actions, predict_values = OwnEverything.evaluate_actions, OwnEverything.predict_values

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        return self.both(observation)[0].sample()


PPOS = [MaskedPolicy, HeldCritic, HeldActor, TablePolicy, NoisyHeads, FreshDistribution, OwnEverything, FromBasePolicy]


@pytest.mark.parametrize("policy", PPOS)
def test_policies_that_sb3_trains(policy: Any) -> None:
    """The reference ends with SB3's weights, to the last bit; the fast engines agree to rounding."""
    arguments = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", "ent_coef": 0.01}
    kwargs = {**arguments, "policy_kwargs": {"net_arch": [8]}}
    weights = []
    for algorithm, more in ((PPO, {}), (ClipPPO, SB3_EQUIVALENT), (ClipPPO, {**SB3_EQUIVALENT, "engine": "auto"})):
        model: Any = algorithm(policy, "CartPole-v1", **kwargs, **more)
        model.learn(96)
        weights.append([parameter.detach() for parameter in model.policy.parameters()])
    assert difference(weights[0], weights[1]) == 0
    assert difference(weights[0], weights[2]) < 1e-4


@pytest.mark.parametrize("policy", [OwnEverything, FromBasePolicy])
def test_policies_without_sb3s_parts_get_a_reason_on_a_gpu(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("auto", policy, "CartPole-v1")
    monkeypatch.setattr(policy, "device", th.device("cuda", 0), raising=False)
    for why_not in (why_not_cuda_graph, why_not_bf16):
        assert isinstance(why_not(model.policy, model.rollout_buffer), str)


@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_masked_actions_have_an_exact_kl(kl_coef: float) -> None:
    for engine in ("auto", "autograd"):
        model = make(engine, MaskedPolicy, "CartPole-v1", kl_coef=kl_coef)
        model.learn(N_STEPS * 2)
        assert 0 <= model.logger.name_to_value["train/kl"] < 0.1


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_callbacks_see_the_distribution_of_the_step(env: str, fast: str) -> None:
    class Spy(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.entropies: list[float] = []

        def _on_training_start(self) -> None:
            self.model.predict(self.training_env.reset())  # leaves a distribution behind

        def _on_step(self) -> bool:
            dist = self.model.policy.action_dist
            self.entropies.append(float(dist.entropy().mean()))
            actions = th.as_tensor(self.locals["actions"]).reshape(self.training_env.num_envs, -1)
            log_prob = dist.log_prob(actions.squeeze(1) if env == "CartPole-v1" else actions)
            assert th.allclose(log_prob, self.locals["log_probs"], atol=1e-5)
            assert dist.mode().shape[0] == self.training_env.num_envs
            assert float(sb3_distributions.kl_divergence(dist, dist).abs().max()) == 0
            assert dist_params(dist).shape[0] == self.training_env.num_envs
            copy.deepcopy(self.model.policy)
            return True

    seen = []
    for engine in ("auto", "autograd"):
        spy = Spy()
        make(engine, env=env, policy_kwargs=FAST[fast][0]).learn(N_STEPS * 4, callback=spy)
        seen.append(spy.entropies)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3, abs=1e-4)


def test_wider_parts_in_the_middle_of_a_rollout_are_an_error() -> None:
    """Kernels prepared for the distribution at the rollout's start would write beyond the actions."""

    class Widen(BaseCallback):
        def _on_step(self) -> bool:
            self.model.policy.action_dist = sb3_distributions.DiagGaussianDistribution(3)
            self.model.policy.action_net = nn.Linear(8, 3)
            return True

    for engine in ("auto", "autograd"):
        with pytest.raises(ValueError, match="cannot reshape|shape"):
            make(engine, policy_kwargs=FAST["fused"][0]).learn(N_STEPS * 2, callback=Widen())


@pytest.mark.parametrize("part", ["action_net", "policy", "action_dist"])
def test_a_class_that_was_changed_counts(part: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, latent: th.Tensor) -> th.Tensor:
            return 2.0 * super().forward(latent)

    class DoubledPolicy(ActorCriticPolicy):
        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            return of_all_but_values(super().evaluate_actions(obs, actions))

    class DoubledDist(sb3_distributions.DiagGaussianDistribution):
        def log_prob(self, actions: th.Tensor) -> th.Tensor:
            return 2.0 * super().log_prob(actions)

    classes: dict[str, Any] = {"action_net": Doubled, "policy": DoubledPolicy, "action_dist": DoubledDist}

    class Change(BaseCallback):
        def _on_rollout_end(self) -> None:
            policy = self.model.policy
            owner = policy if part == "policy" else getattr(policy, part)
            owner.__class__ = classes[part]

        def _on_step(self) -> bool:
            return True

    weights = []
    for engine in ("auto", "autograd"):
        model = make(engine)
        model.learn(N_STEPS * 2)
        model.learn(N_STEPS * 2, callback=Change())
        assert type(model._engine) is not NativeEngine
        weights.append([parameter.detach() for parameter in model.policy.parameters()])
    assert difference(*weights) < 2e-3


def transposed_moment(model: ClipPPO) -> None:
    """Store the same numbers in another layout, as a file of a channels-last policy has them."""
    state = model.policy.optimizer.state[model.policy.mlp_extractor.policy_net[0].weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


def transposed_weight(model: ClipPPO) -> None:
    weight = model.policy.mlp_extractor.policy_net[2].weight
    weight.data = weight.data.t()


def restarted_head(model: ClipPPO) -> None:
    for parameter in model.policy.action_net.parameters():
        for tensor in model.policy.optimizer.state[parameter].values():
            tensor.zero_()


def shared_weight(model: ClipPPO) -> None:
    extractor = model.policy.mlp_extractor
    extractor.value_net[0].weight.data = extractor.policy_net[0].weight.data


def shared_moments(model: ClipPPO) -> None:
    state = model.policy.optimizer.state
    zeros = th.zeros(max(map(th.numel, state)))
    for parameter, moments in state.items():
        moments["exp_avg"] = zeros[: parameter.numel()].view_as(parameter)


def grown_layer(model: ClipPPO) -> None:
    """Replace tensors by larger ones without a new optimizer."""
    network = model.policy.mlp_extractor.policy_net
    network[0].weight.data, network[0].bias.data = th.randn(16, 3), th.randn(16)
    network[2].weight.data = th.randn(8, 16)
    model.policy.optimizer.zero_grad()


class AfterAnUpdate(BaseCallback):
    def __init__(self, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.change = change

    def _on_rollout_end(self) -> None:
        if self.num_timesteps == 2 * N_STEPS * 2:
            self.change(self.model)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("change", [transposed_moment, transposed_weight, restarted_head])
def test_layouts_and_the_optimizers_state_count(change: Change, fast: str) -> None:
    weights, steps = [], []
    for engine in ("auto", "autograd"):
        model = make(engine, policy_kwargs={**FAST[fast][0], "net_arch": [8, 8]})
        model.learn(3 * N_STEPS * 2, callback=AfterAnUpdate(change))
        weights.append([parameter.detach() for parameter in model.policy.parameters()])
        steps.append([float(model.policy.optimizer.state[each]["step"]) for each in model.policy.parameters()])
    assert difference(*weights) < 2e-3
    assert steps[0] == steps[1]


class InARollout(AfterAnUpdate):
    def _on_rollout_end(self) -> None:
        pass

    def _on_step(self) -> bool:
        if self.num_timesteps == 3 * N_STEPS:
            self.change(self.model)
        return True


@pytest.mark.parametrize("when", [AfterAnUpdate, InARollout])
@pytest.mark.parametrize("change", [shared_weight, shared_moments])
def test_tensors_that_share_memory_leave_native(change: Change, when: type[AfterAnUpdate]) -> None:
    """Two threads would write to them at the same time."""
    weights = []
    for engine in ("auto", "autograd"):
        model = make(engine)
        model.learn(3 * N_STEPS * 2, callback=when(change))
        weights.append([parameter.detach() for parameter in model.policy.parameters()])
        assert type(model._engine) is (FusedEngine if engine == "auto" else AutogradEngine)
    assert difference(*weights) < 2e-3


@pytest.mark.parametrize("fast", FAST)
def test_tensors_that_do_not_fit_the_optimizers_state_are_an_error(fast: str) -> None:
    """Kernels would write beyond the moments."""
    for engine in ("auto", "autograd"):
        model = make(engine, policy_kwargs={**FAST[fast][0], "net_arch": [8, 8]})
        with pytest.raises(RuntimeError, match="must match"):
            model.learn(3 * N_STEPS * 2, callback=AfterAnUpdate(grown_layer))


def test_steps_of_removed_parameters_do_not_count() -> None:
    def reload(model: ClipPPO) -> None:
        model.learn(N_STEPS * 2)
        policy = model.policy
        policy.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()}, assign=True)
        policy.optimizer.param_groups[0]["params"] = list(policy.parameters())

    assert_trains_what_the_user_has(reload, has_effect=False, policy_kwargs=FAST["fused"][0])
