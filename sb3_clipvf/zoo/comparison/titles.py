"""Titles, units and order of the quantities that a report draws."""

from __future__ import annotations

_TITLES: dict[str, tuple[str, str]] = {
    "return": ("Return of training episodes", "mean of the last 100"),
    "return/raw": ("Return of training episodes", "mean of each interval"),
    "return/evaluation": ("Return of evaluations", "during the training"),
    "train/kl": ("KL divergence, exact", "nats"),
    "train/approx_kl": ("KL divergence, estimate", "nats"),
    "train/kl_after_update": ("KL divergence after the update", "nats"),
    "train/clip_fraction": ("Clip fraction", "share of ratios"),
    "train/kl_coef": ("β, weight of the KL penalty", "1/nats"),
    "train/entropy_loss": ("Entropy", "nats"),
    "train/policy_gradient_loss": ("Policy loss", ""),
    "train/policy_loss": ("Policy loss", ""),
    "train/value_loss": ("Value loss", "squared return units"),
    "train/loss": ("Total loss", "last minibatch"),
    "train/explained_variance": ("Explained variance", "at most 1"),
    "train/vf_clip_fraction": ("Clip fraction of values", "share of predictions"),
    "train/grad_norm": ("Norm of the gradient", ""),
    "train/ratio_max": ("Largest ratio", ""),
    "train/std": ("Standard deviation of actions", ""),
    "train/learning_rate": ("Learning rate", ""),
    "train/clip_range": ("Clip range ε", ""),
    "train/clip_range_vf": ("Clip range of values", "return units"),
    "train/actor_loss": ("Actor loss", ""),
    "train/critic_loss": ("Critic loss", ""),
    "train/ent_coef": ("Entropy coefficient", ""),
    "rollout/ep_len_mean": ("Length of episodes", "steps"),
    "rollout/success_rate": ("Success rate", ""),
    "time/fps": ("Speed", "steps/s"),
    "time/rollout_seconds": ("Time of a rollout", "seconds"),
    "time/update_seconds": ("Time of an update", "seconds"),
}

NEGATED = {"train/entropy_loss"}
"""Keys that are drawn with the other sign: the loss is the negative entropy."""


def title_of(key: str) -> tuple[str, str]:
    """Return title and unit of a quantity; the key itself for one that is not known."""
    return _TITLES.get(key, (key, ""))


def order_of(key: str) -> tuple[int, str]:
    """Return the place of a quantity among others: the known ones in the order of this file, then the rest by name."""
    known = list(_TITLES)
    return (known.index(key) if key in known else len(known), key)


def plural(number: int, noun: str) -> str:
    """Return a number of things, such as ``1 run`` or ``3 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
