"""How far the host runs ahead of the device."""

import jax
import pytest

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
