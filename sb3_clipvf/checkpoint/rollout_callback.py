"""Callbacks that act at the start or the end of rollouts, which callbacks inside of others do not see."""

from stable_baselines3.common.callbacks import BaseCallback, EventCallback


class RolloutCallback(BaseCallback):
    """A callback that ``learn`` itself must call: SB3's ``EventCallback`` passes on neither rollouts nor the end."""

    @property
    def parent(self) -> BaseCallback | None:
        """The callback that calls this one; lists of callbacks pass theirs on."""
        return self._parent

    @parent.setter
    def parent(self, parent: BaseCallback | None) -> None:
        if isinstance(parent, EventCallback):
            raise ValueError(
                f"`callback` must not be a {type(self).__name__}, got one in {type(parent).__name__}. Pass it to "
                "learn(callback=[...]) itself: it must be called at the start and at the end of each rollout."
            )
        self._parent = parent
