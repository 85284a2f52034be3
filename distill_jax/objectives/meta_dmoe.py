"""Meta-distillation from a mixture of domain experts (Meta-DMoE, Zhong et al. 2022).

arXiv:2210.03885. The examples of a domain are split in half, into support S and query Q:

    L_in(theta) = mean_{S, d} (f(x; theta) - A(M_1(x), ..., M_M(x); phi))^2
    theta' = theta - inner_lr grad L_in(theta)
    L = mean_Q CE(h(f(x; theta')), y)

f are the student's features and h its classifier, which is not updated in the inner step. M are the
frozen experts and A is the aggregator, which is trained through theta' only. In training, the
experts of the current domain are left out. A test domain has unknown labels: all experts are used,
the student adapts to the batch in the same way, and then predicts it (`predictions`). Evaluation
therefore adapts to the batch that it predicts, as in the paper.

Expert j of M is trained on the domains e with `floor(e M / domains) = j - 1`.

Deviations: each step uses one domain, step modulo the number of domains, and only the examples of
that domain in the batch, so batches must be large. The network is in evaluation mode throughout, as
in the authors' program, so batch statistics keep their initial values. Dropout in the aggregator is
left out.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Objective, Outputs, PyTree, Role, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.classification import cross_entropy
from distill_jax.objectives._distillation import check_positive, endpoint
from distill_jax.objectives.invariance import domain_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaDMoE(Objective):
    """The loss term `cross_entropy` of the query examples after the inner step.

    Attributes:
      experts: M, at least 2; the networks are `teacher1` to `teacher<M>`.
      domains: number of training domains, numbered from 0, at least M.
      test_domains: number of further domains, numbered on, that may occur in evaluation.
      inner_lr: step size of the inner step, positive; 1e-4 to 1e-3 in the paper.
      leave_out: whether training leaves out the expert of the domain. In the paper this is better
        on some data only.
      feature: the output that is matched, `[b, d]` for all networks.
    """

    experts: int = 2
    domains: int = 2
    test_domains: int = 0
    inner_lr: float = 0.1
    leave_out: bool = True
    feature: str = "embedding"

    couples_batch: ClassVar[bool] = True

    def __post_init__(self):
        check_positive(inner_lr=self.inner_lr)
        most = f"[0, {ranges.MOST}]"
        ranges.within(most, whole=True, domains=self.domains, test_domains=self.test_domains)
        ranges.depths(experts=self.experts)
        if not 2 <= self.experts <= self.domains:
            raise ArgumentError(
                f"{self.experts} experts of {self.domains} domains",
                where="experts",
                hint="at least 2, and no more than domains",
            )

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("student", *(f"teacher{j + 1}" for j in range(self.experts)), "aggregator")

    def _target(self, nets: Nets, batch: Batch, keep: Array) -> Array:
        """Returns the aggregator's output for the experts, `[b, d]`."""
        features = []
        for role in self.roles[1:-1]:
            outputs, _ = nets(role, batch["input"])
            features.append(endpoint(outputs, self.feature, role=role, where="feature"))
        experts = jax.lax.stop_gradient(jnp.stack(features, axis=1))
        return nets("aggregator", experts, keep, train=True)[0]["output"]

    def _student(self, nets: Nets, batch: Batch) -> tuple[Array, Array]:
        outputs, _ = nets("student", batch["input"])
        feature = endpoint(outputs, self.feature, role="student", where="feature")
        return feature, outputs["logits"]

    def _distance(self, nets: Nets, batch: Batch, target: Array) -> Array:
        feature, _ = self._student(nets, batch)
        if feature.shape != target.shape:
            raise ArgumentError(
                f"the student has {feature.shape[-1]} features and the experts {target.shape[-1]}",
                where="student.kwargs",
                hint="the widths of the features must be equal",
            )
        return ((feature - target) ** 2).mean(1)

    def _adapted(self, nets: Nets, batch: Batch, keep: Array, support: Array) -> Array:
        """Returns the logits of a batch after an inner step on its support, `[b, k]`."""
        target = self._target(nets, batch, keep)

        def inner(nets: Nets) -> Array:
            distance = self._distance(nets, batch, target)
            return (support * distance).sum() / jnp.maximum(support.sum(), 1)

        return self._student(nets.after_sgd_step("student", inner, lr=self.inner_lr), batch)[1]

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        mask, domain = batch["mask"], domain_of(batch)
        expert = domain * self.experts // self.domains
        keep = jnp.ones((mask.shape[0], self.experts), mask.dtype)
        if self.leave_out:
            keep -= jax.nn.one_hot(expert, self.experts, dtype=mask.dtype)
        here = mask * (domain == step % self.domains)
        support = here * (jnp.cumsum(here) % 2)
        query = here - support
        logits = self._adapted(nets, batch, keep, support)
        return Terms(
            values={"cross_entropy": query * cross_entropy(logits, batch["label"])},
            counts={"cross_entropy": query},
            logits={"student": logits},
        )

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> dict[str, Outputs]:
        """Returns `prediction`: logits after adaptation to each domain in the batch, without
        labels."""
        mask, domain = batch["mask"], domain_of(batch)
        keep = jnp.ones((mask.shape[0], self.experts), mask.dtype)

        def of_domain(number: Array) -> Array:
            return self._adapted(nets, batch, keep, mask * (domain == number))

        logits = jax.vmap(of_domain)(jnp.arange(self.domains + self.test_domains))
        own = jnp.take_along_axis(logits, domain[None, :, None], axis=0, mode="clip")[0]
        return {"prediction": {"logits": own}}


make = MetaDMoE
