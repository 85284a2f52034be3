"""A method of two phases, as somebody outside the package writes it, for `test_phases.py`."""

import dataclasses

from distill_jax.objectives.kd import KD
from distill_jax.objectives.supervised import Supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phased(KD):
    """Distillation, and labels alone from `alone` on."""

    alone: int | str = "50 %"

    def phases(self):
        return ((0, self), (self.alone, Supervised()))
