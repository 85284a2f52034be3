"""How far the host runs ahead of the device."""

import types
from typing import Any

import jax
import numpy as np
import pytest

from distill_jax.run.train import stepping
from distill_jax.run.train.stepping import IN_FLIGHT, SHORT_STEP, SHORT_STEPS, wait_every


@pytest.mark.parametrize(
    ("pace", "devices", "every"),
    [
        (None, 1, IN_FLIGHT),
        (SHORT_STEP / 2, 1, SHORT_STEPS),
        (SHORT_STEP, 1, IN_FLIGHT),
        (SHORT_STEP / 2, 2, IN_FLIGHT),
    ],
)
def test_short_steps_of_one_device_are_waited_for_less_often(monkeypatch, pace, devices, every):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert wait_every(pace) == every


class Metrics:
    """Metrics of a step that note when the host waits for them or reads them."""

    def __init__(self, step, seen):
        self.step, self.seen = step, seen

    def block_until_ready(self):
        self.seen.append(("wait", self.step))

    def __array__(self, dtype=None, copy=None):
        self.seen.append(("read", self.step))
        return np.zeros(2, np.float32)


def test_between_events_the_host_waits_for_steps_far_back_and_reads_nothing():
    seen, nothing = [], lambda *args: None

    def update(state, online, fed, key):
        seen.append(("step", state))
        return state + 1, Metrics(state, seen)

    stepper: Any = object.__new__(stepping.Stepper)
    stepper.program = types.SimpleNamespace(
        feed=nothing, update={"inner": update}, online=None, key=None
    )
    stepper.watch = types.SimpleNamespace(enter=nothing, step=0)
    stepper.progress = types.SimpleNamespace(update=nothing)
    stepper.paces, stepper._variant, stepper._first = [], lambda step: "inner", -1
    stop = types.SimpleNamespace(asked=lambda step: False)
    total = 5 * IN_FLIGHT
    state, step, rows = stepper.advance(0, 0, until=total, stop=stop)
    assert (state, step, len(rows)) == (total, total, total)
    ends = seen.index(("step", total - 1))
    waits = [(i, at) for i, (kind, at) in enumerate(seen[: ends + 1]) if kind == "wait"]
    assert not any(kind == "read" for kind, _ in seen[: ends + 1])
    assert [at for _, at in waits] == [i * IN_FLIGHT for i in range(4)]
    assert all(seen[i - 1] == ("step", at + IN_FLIGHT - 1) for i, at in waits)
    assert [at for kind, at in seen if kind == "read"] == list(range(total))
