"""Reuse of the teacher's classifier (SimKD: Chen et al. 2022, arXiv:2203.14001).

`L = label_weight CE + weight mean((r(s) - t)^2)`, with the last maps s of the student and t of the
teacher and a projector r. The student's prediction is the output of the teacher's classifier on
r(s), averaged over positions. Evaluators read it as `role="prediction"`.

The paper uses no labels: `label_weight=0`. The student's own classifier is not part of the method
and then keeps its initial weights. With labels, the default, it is trained as well, and both
predictions can be compared. The distance between the reused classifier's logits and the teacher's
is logged as `regression`, with zero weight.

Deviation: if two maps differ in size, the larger is average-pooled first.

Networks: as for `srrl`; regressor as a bottleneck, `kernel_sizes=(1, 3, 1), reduction=2,
batch_norm=True, relu=True`.
"""

import dataclasses
from collections.abc import Mapping

from distill_jax.core.api import Array, Batch, Nets, Outputs, PyTree
from distill_jax.objectives.srrl import SRRL


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimKD(SRRL):
    """Regression of the teacher's last maps, with reuse of the teacher's classifier.

    Attributes:
      regression_weight: coefficient of the distance of logits; published 0.
      student_stage: output of the student; empty takes its last `stage<i>`.
      teacher_stage: output of the teacher whose mean over positions is the input of its classifier;
        empty takes its last `stage<i>`.
    """

    regression_weight: float = 0.0
    student_stage: str = ""
    teacher_stage: str = ""

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        """Returns `prediction`: `logits` `[b, k]` of the teacher's classifier on the student."""
        student, _ = nets("student", batch["input"])
        teacher, _ = nets("teacher", batch["input"])  # for shapes alone; XLA drops the rest
        regressed, _, _ = self._regress(nets, student, teacher, train=False)
        return {"prediction": {"logits": self._reuse(nets, regressed)}}


make = SimKD
