"""Calls around the optimizer steps of a trainer."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StepHooks(TrainerCallback):
    """Calls `begin()` before the first step, `check(step)` before each update, `done(step, logs)` after each.

    Steps count from 0; training resumed from a checkpoint starts at `first`, also for trackers.
    """

    def __init__(
        self,
        first: int,
        begin: Callable[[], None],
        check: Callable[[int], None],
        done: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.first, self.begin, self.check, self.done = first, begin, check, done

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.global_step += self.first
        state.max_steps += self.first
        self.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.check(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.done(state.global_step - 1, logs)
