"""``device="auto"``: the rule, and what follows it. A GPU is simulated: torch's device "meta" stands for it."""

import io
import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_clipvf import SB3_EQUIVALENT, ClipPPO
from sb3_clipvf.checkpoint import TrainingCheckpoint
from sb3_clipvf.engines.device import choose_cpu, kind_of_network, select_device

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "seed": 0}
GPU = th.device("meta")
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")


class Blank(gym.Env[Any, Any]):
    """An environment with given spaces, whose observations are zeros; an episode has five steps."""

    def __init__(self, observation_space: spaces.Space[Any], n_actions: int = 2) -> None:
        self.observation_space = observation_space
        self.action_space: spaces.Space[Any] = spaces.Discrete(n_actions)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.n = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        return self._observe(), 1.0, self.n == 5, False, {}

    def _observe(self) -> Any:
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            return {key: np.zeros(part.shape or (), part.dtype) for key, part in space.spaces.items()}
        return np.zeros(space.shape or (), space.dtype)


VECTOR = spaces.Box(-1, 1, (4,))
PICTURE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
SPACES: dict[str, spaces.Space[Any]] = {
    "MlpPolicy": VECTOR,
    "CnnPolicy": PICTURE,
    "MultiInputPolicy": spaces.Dict({"a": VECTOR, "b": VECTOR}),
}


# Between the limits of the rule, so that it depends on the engine.
MEDIUM: dict[str, Any] = {"policy_kwargs": {"net_arch": [96, 96]}, "n_steps": 512, "batch_size": 512}
# Far beyond the rule's limits with a large minibatch.
WIDE: dict[str, Any] = {"policy_kwargs": {"net_arch": [512, 256]}, "n_steps": 1024, "batch_size": 1024}


def make(policy: str = "MlpPolicy", **kwargs: Any) -> ClipPPO:
    return ClipPPO(policy, Blank(SPACES[policy]), **{**SMALL, **kwargs})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> th.device:
    """A GPU, for SB3's choice and for the rule."""

    def get_device(device: Any = "auto") -> th.device:
        return GPU if isinstance(device, str) and device in ("auto", "cuda") else th.device(device)

    for module in ("base_class", "buffers", "save_util"):  # replaced code elsewhere would rule out the native engine
        monkeypatch.setattr(f"stable_baselines3.common.{module}.get_device", get_device)
    for ours in ("clip_ppo", "engines.device"):
        monkeypatch.setattr(f"sb3_clipvf.{ours}.get_device", get_device)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    return GPU


# ------------------------------------------------------------------ the rule

# Parameters of the policies that were measured (docs/gpu.md), and the device that was faster.
HALF_CHEETAH, CART_POLE, LARGE = 11_085, 9_155, 380_313


@pytest.mark.parametrize(
    ("engine", "network", "n_parameters", "batch_size", "takes_cpu", "reason"),
    [
        (
            "auto",
            "native MLP",
            HALF_CHEETAH,
            64,
            True,
            "11,085 parameters of an MLP x batch_size=64 is 709,440, at most",
        ),
        ("auto", "native MLP", CART_POLE, 256, True, "is 2,343,680, at most 12,000,000"),
        ("auto", "native MLP", LARGE, 24_576, False, "is 9,346,572,288, more than 12,000,000"),
        ("auto", "native MLP", 12_000, 1_000, True, "at most"),
        ("auto", "native MLP", 12_000, 1_001, False, "more than"),
        ("auto", "MLP", HALF_CHEETAH, 64, True, "at most 4,000,000"),
        ("auto", "MLP", CART_POLE, 256, True, "at most 4,000,000"),
        ("auto", "MLP", 4_000, 1_000, True, "at most"),
        ("auto", "MLP", 4_000, 1_001, False, "more than"),
        ("auto", "MLP", LARGE, 24_576, False, "more than"),
        ("auto", "convolutions", 100, 2, False, "the policy has convolutions"),
        ("auto", "convolutions", 1_700_000, 256, False, "the policy has convolutions"),
        ("auto", "layers of an unknown kind", 100, 2, False, "the policy has layers of an unknown kind"),
        ("native", "native MLP", LARGE, 24_576, True, "engine='native' runs only on the CPU"),
        ("fused", "convolutions", 1_700_000, 256, True, "engine='fused' runs only on the CPU"),
        ("autograd", "native MLP", HALF_CHEETAH, 64, False, "engine='autograd' uses SB3's choice"),
        ("cuda_graph", "native MLP", HALF_CHEETAH, 64, False, "engine='cuda_graph' runs only on a GPU"),
        ("cuda_graph_bf16", "MLP", HALF_CHEETAH, 64, False, "engine='cuda_graph_bf16' runs only on a GPU"),
    ],
)
def test_the_rule(engine: str, network: str, n_parameters: int, batch_size: int, takes_cpu: bool, reason: str) -> None:
    chosen, why = choose_cpu(engine, network, n_parameters, batch_size)
    assert chosen is takes_cpu
    assert reason in why


def test_the_measured_sizes_are_those_of_the_policies() -> None:
    for n_observed, n_actions, net_arch, n_parameters in (
        (4, None, [64, 64], CART_POLE),
        (17, 6, [64, 64], HALF_CHEETAH),
        (48, 12, [512, 256, 128], LARGE),
    ):
        env = Blank(spaces.Box(-1, 1, (n_observed,)))
        if n_actions is not None:
            env.action_space = spaces.Box(-1, 1, (n_actions,))
        model = ClipPPO("MlpPolicy", env, **SMALL, device="cpu", policy_kwargs={"net_arch": net_arch})
        assert sum(parameter.numel() for parameter in model.policy.parameters()) == n_parameters


class Recurrent(FlattenExtractor):
    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)  # type: ignore[arg-type]
        self.memory = nn.GRU(4, 4)


class Normed(FlattenExtractor):
    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(4)


class Bare(FlattenExtractor):
    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)  # type: ignore[arg-type]
        self.scale = nn.Parameter(th.ones(4))


@pytest.mark.parametrize(
    ("policy", "policy_kwargs", "kind"),
    [
        ("MlpPolicy", {}, "native MLP"),
        ("MlpPolicy", {"activation_fn": nn.GELU}, "MLP"),
        ("MlpPolicy", {"features_extractor_class": Normed}, "MLP"),
        ("MultiInputPolicy", {}, "MLP"),
        ("CnnPolicy", {}, "convolutions"),
        ("MlpPolicy", {"features_extractor_class": Recurrent}, "layers of an unknown kind"),
        ("MlpPolicy", {"features_extractor_class": Bare}, "layers of an unknown kind"),
    ],
)
def test_kinds_of_networks(policy: str, policy_kwargs: dict[str, Any], kind: str) -> None:
    assert kind_of_network(make(policy, device="cpu", policy_kwargs=policy_kwargs).policy) == kind


def test_a_gaussian_and_a_squashed_policy_are_mlps() -> None:
    for policy, kind in (("MlpPolicy", "native MLP"), ("SquashedMlpPolicy", "MLP")):
        model = ClipPPO(policy, "Pendulum-v1", **SMALL, device="cpu")
        assert kind_of_network(model.policy) == kind


def test_a_policy_with_parameters_without_a_shape_or_on_a_device_takes_sb3s_choice(gpu: th.device) -> None:
    policy = make(device="cpu").policy
    policy.later = nn.LazyLinear(4)
    assert kind_of_network(policy) == "layers of an unknown kind"
    assert select_device("auto", policy, 8) == gpu
    placed = make(device="cpu").policy.to("meta")
    assert kind_of_network(placed) == "parameters on another device"
    assert select_device("auto", placed, 8) == gpu


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("policy", "arguments", "device"),
    [
        ("MlpPolicy", {}, "cpu"),
        ("MlpPolicy", MEDIUM, "cpu"),
        ("MlpPolicy", {**MEDIUM, "policy_kwargs": {"net_arch": [96, 96], "activation_fn": nn.GELU}}, "meta"),
        ("MlpPolicy", WIDE, "meta"),
        ("MlpPolicy", {**WIDE, "engine": "native"}, "cpu"),
        ("MultiInputPolicy", {}, "cpu"),
        ("CnnPolicy", {}, "meta"),
        ("CnnPolicy", {"engine": "fused"}, "cpu"),
        ("CnnPolicy", {"engine": "autograd"}, "meta"),
        ("CnnPolicy", {"device": "cpu"}, "cpu"),
    ],
)
def test_the_constructor_and_load_follow_the_rule(
    gpu: th.device, caplog: pytest.LogCaptureFixture, policy: str, arguments: dict[str, Any], device: str
) -> None:
    caplog.set_level(logging.INFO, "sb3_clipvf")
    chosen = arguments.get("device", "auto")
    file = io.BytesIO()
    make(policy, **{**arguments, "device": "cpu"}).save(file)
    for build in (lambda: make(policy, **arguments), lambda: ClipPPO.load(file, Blank(SPACES[policy]), chosen)):
        caplog.clear()
        model = build()
        assert model.device.type == model.policy.device.type == model.rollout_buffer.device.type == device
        assert {parameter.device.type for parameter in model.policy.parameters()} == {device}
        assert caplog.text.count(f"device='auto' selects '{device}': ") == (0 if "device" in arguments else 1)


def test_an_explicit_gpu_stays_and_sb3_warns(gpu: th.device) -> None:
    with pytest.warns(UserWarning, match="on the GPU"):
        model = make(device="cuda")
    assert model.device == gpu
    file = io.BytesIO()
    make(device="cpu").save(file)
    with pytest.warns(UserWarning, match="on the GPU"):
        assert ClipPPO.load(file, device="cuda").device == gpu


def test_with_the_arguments_of_sb3_the_choice_and_the_warning_are_sb3s(
    gpu: th.device, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for algorithm, arguments in ((PPO, {}), (ClipPPO, SB3_EQUIVALENT)):
        with pytest.warns(UserWarning, match="on the GPU"):
            model: Any = algorithm("MlpPolicy", Blank(VECTOR), **SMALL, **arguments, verbose=1)
        assert model.device == gpu
        outputs.append("Using meta device" in capsys.readouterr().out)
    assert outputs == [True, True]


@pytest.mark.parametrize(
    ("arguments", "device"), [({}, "meta"), ({"engine": "fused"}, "cpu"), ({"device": "cpu"}, "cpu")]
)
def test_verbose_shows_the_device_in_use_once(
    gpu: th.device, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], device: str
) -> None:
    model = make("CnnPolicy", verbose=1, **arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Using")] == [f"Using {model.device} device"]
    assert model.device.type == device and model.verbose == 1
    assert [line for line in lines if line.startswith("Wrapping")] == [
        "Wrapping the env with a `Monitor` wrapper",
        "Wrapping the env in a DummyVecEnv.",
        "Wrapping the env in a VecTransposeImage.",
    ]


def test_a_file_of_sb3_takes_sb3s_choice_unless_another_engine_is_asked_for(gpu: th.device) -> None:
    file = io.BytesIO()
    PPO("MlpPolicy", Blank(VECTOR), **SMALL, device="cpu").save(file)
    with pytest.warns(UserWarning, match="not saved by ClipPPO"), pytest.warns(UserWarning, match="on the GPU"):
        assert ClipPPO.load(file).device == gpu
    with pytest.warns(UserWarning, match="not saved by ClipPPO"):
        assert ClipPPO.load(file, engine="auto").device.type == "cpu"


def test_a_small_mlp_trains_and_resumes_on_the_cpu_as_without_a_gpu(
    gpu: th.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = []
    for device in ("auto", "cpu"):
        folder = tmp_path / device
        model = make(device=device, verbose=1)
        model.learn(32, callback=TrainingCheckpoint(16, folder) if device == "auto" else None)
        states.append(model.policy.state_dict())
    output = capsys.readouterr().out
    assert output.count("Using cpu device") == 2 and output.count("device='auto' selects 'cpu': ") == 1
    assert "Training runs on the engine 'native'" in output
    assert all(th.equal(states[0][name], tensor) for name, tensor in states[1].items())

    resumed = ClipPPO.resume(tmp_path / "auto", Blank(VECTOR))
    assert resumed.device.type == "cpu"
    assert {value["step"].device.type for value in resumed.policy.optimizer.state.values()} == {"cpu"}
    resumed.learn(16, reset_num_timesteps=False)


def test_weights_are_drawn_on_the_cpu_whatever_the_device(gpu: th.device) -> None:
    drawn = []
    for device in ("cpu", "auto"):
        model = make("CnnPolicy", device=device)
        drawn.append(th.rand(3))
    assert model.device == gpu
    assert th.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("source", ["constructor", "load"])
def test_a_seed_makes_cudnn_deterministic_as_in_sb3(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    file = io.BytesIO()
    make("CnnPolicy", device="cpu").save(file)
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(th.backends.cudnn, "benchmark", True)
    monkeypatch.setattr("sb3_clipvf.clip_ppo.select_device", lambda *_: th.device("meta"))
    if source == "constructor":
        make("CnnPolicy")
    else:
        ClipPPO.load(file)
    assert th.backends.cudnn.deterministic and not th.backends.cudnn.benchmark


def test_set_parameters_reads_a_file_to_the_device_of_the_model(gpu: th.device) -> None:
    file = io.BytesIO()
    trained = make(device="cpu").learn(16)
    trained.save(file)
    model = make(device="auto")
    model.set_parameters(file)  # tensors on "meta" have no values to copy
    for name, tensor in trained.policy.state_dict().items():
        assert th.equal(model.policy.state_dict()[name], tensor)
    assert {value["step"].device.type for value in model.policy.optimizer.state.values()} == {"cpu"}


def test_the_choice_is_not_saved(gpu: th.device) -> None:
    assert "_device_is_auto" not in make()._saved_attributes()


@pytest.mark.parametrize("engine", ["auto", "autograd", "fused"])
def test_without_a_gpu_nothing_is_chosen_or_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    caplog.set_level(logging.INFO, "sb3_clipvf")
    file = io.BytesIO()
    model = make("CnnPolicy", engine=engine)
    model.save(file)
    assert model.device == ClipPPO.load(file).device == th.device("cpu")
    assert caplog.text == ""
