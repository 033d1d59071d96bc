"""Features of images by the fused engine: SB3's numbers, and the default layout for all code that is not SB3's."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_clipvf.engines.images import FeatureExtraction

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Viewing(BaseFeaturesExtractor):
    """An extractor that needs the default memory layout."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 3 * 34 * 34)
        self.layer = th.nn.Conv2d(3, 3, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations).view(len(observations), -1)


class Keeping(th.nn.Conv2d):
    """A layer that keeps its inputs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: list[th.Tensor] = []

    def forward(self, input: th.Tensor) -> th.Tensor:
        self.kept.append(input)
        return super().forward(input)


class Flat(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.view(len(images), -1)  # fails in any other layout


def test_images_for_other_extractors_keep_their_layout() -> None:
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(space, BOX, lambda _: 1e-3, features_extractor_class=Viewing)
    images = th.zeros(2, 3, 36, 36, dtype=th.uint8)
    assert FeatureExtraction(policy)(images).shape == (2, 3 * 34 * 34)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "not_shared"])
def test_images_are_scaled_as_in_sb3_in_memory_that_is_used_again(share: bool) -> None:
    space = spaces.Box(0, 255, (2, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(space, BOX, lambda _: 1e-3, share_features_extractor=share)
    features = FeatureExtraction(policy)
    addresses = []
    for n in (5, 3, 8, 1):  # memory for more images serves fewer, and grows
        images = th.randint(0, 256, (n, 36, 36, 2), dtype=th.uint8).permute(0, 3, 1, 2)
        assert features.scales(images)
        assert th.equal(features.scaled(images), images.float() / 255.0)
        addresses.append(features.scaled(images).data_ptr())
        ours, theirs = features(images), policy.extract_features(images)
        # Convolutions are summed in an order that depends on memory.
        th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]


@pytest.mark.parametrize("kwargs", [{}, {"normalize_images": False}], ids=["floats", "not_normalised"])
def test_other_images_are_scaled_by_sb3(kwargs: dict[str, Any]) -> None:
    space = spaces.Box(0, 255, (2, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(space, BOX, lambda _: 1e-3, **kwargs)
    features = FeatureExtraction(policy)
    images = th.randint(0, 256, (3, 2, 36, 36), dtype=th.uint8 if kwargs else th.float32)
    ours, theirs = features(images), policy.extract_features(images)
    # Numbers of up to 255 are summed, in an order that depends on memory.
    th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 if not kwargs else 3e-4)
    assert features._scaled is None


@pytest.mark.parametrize("way", ["hook", "global_hook", "layer", "forward", "second_extractor"])
def test_images_kept_by_other_code_do_not_change(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(space, BOX, lambda _: 1e-3, share_features_extractor=way != "second_extractor")
    kept: list[th.Tensor] = []
    of_all = th.nn.modules.module
    extractor, first = policy.features_extractor, policy.features_extractor.cnn[0]
    if way == "hook":
        first.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0]))
    elif way == "global_hook":
        hook = of_all.register_module_forward_hook(
            lambda module, inputs, _: kept.append(inputs[0]) if module is first else None
        )
    elif way == "forward":
        monkeypatch.setattr(first, "forward", lambda x: kept.append(x) or type(first).forward(first, x))
    else:
        other = policy.vf_features_extractor if way == "second_extractor" else extractor
        other.cnn[0] = Keeping(1, 32, 8, 4)
        kept = other.cnn[0].kept
    features = FeatureExtraction(policy)
    try:
        for value in (51, 255):
            features(th.full((2, 1, 36, 36), value, dtype=th.uint8))
    finally:
        if way == "global_hook":
            hook.remove()
    assert [float(images.max()) for images in kept] == pytest.approx([0.2, 1.0])


def test_an_update_can_use_memory_of_a_rollout_in_inference_mode() -> None:
    policy = ActorCriticCnnPolicy(spaces.Box(0, 255, (1, 36, 36), np.uint8), BOX, lambda _: 1e-3)
    features = FeatureExtraction(policy)
    images = th.zeros(4, 1, 36, 36, dtype=th.uint8)
    with th.inference_mode():
        features(images)
    features(images).sum().backward()


@pytest.mark.parametrize("part", ["cnn", "layer", "second extractor", "hook"])
def test_images_keep_their_layout_for_parts_that_are_not_sb3s(part: str) -> None:
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    policy = ActorCriticCnnPolicy(space, spaces.Discrete(2), lambda _: 1e-3, share_features_extractor=False)
    cnn = policy.features_extractor.cnn
    if part == "cnn":
        policy.features_extractor.cnn = nn.Sequential(Flat(), nn.Linear(3888, 64))  # type: ignore[assignment]
    elif part == "layer":
        cnn[-1] = nn.Sequential(Flat())  # type: ignore[index]
    elif part == "second extractor":
        policy.vf_features_extractor.cnn = nn.Sequential(Flat(), nn.Linear(3888, 64))  # type: ignore[assignment]
    seen: list[bool] = []
    if part == "hook":
        cnn[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))  # type: ignore[index]
    features = FeatureExtraction(policy)
    images = th.zeros(2, *space.shape, dtype=th.uint8)
    features(images)
    assert seen == ([True] * len(seen))
