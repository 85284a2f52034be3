"""Options of the outer gradient of a bilevel problem, and the optimizers of both levels."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.core import horizon
from distill_jax.core.api import Params, PyTree, Role
from distill_jax.core.errors import ArgumentError, nearest

ONE_STEP = ("exact", "finite_difference", "last_layer")
METHODS = (*ONE_STEP, "neumann", "cg", "truncated", "two_speed")
UPDATES = ("after_step", "lookahead")


class Optimizers(NamedTuple):
    """The optimizers of both levels; `init` creates the `opt_state` of a `TrainState`.

    Attributes:
      inner: optimizer over `{role: params}` of all networks trained on the training loss.
      outer: optimizer over `{role: params}` of the weighting's networks. Averages of the outer
        gradient over outer steps belong here: Adam's `b1`, or `optax.ema` before an optimizer.
      outer_roles: roles of the weighting's networks.
      method: `Bilevel.method`; "truncated" and "two_speed" keep additional state.
    """

    inner: optax.GradientTransformation
    outer: optax.GradientTransformation
    outer_roles: tuple[Role, ...]
    method: str = "exact"

    def split(self, params: Mapping[Role, Params]) -> tuple[dict, dict]:
        """Returns the inner and the outer part of `{role: params}`."""
        inner = {role: p for role, p in params.items() if role not in self.outer_roles}
        return inner, {role: params[role] for role in self.outer_roles}

    def init(self, params: Mapping[Role, Params]) -> dict[str, PyTree]:
        """Returns the state of both optimizers and the additional state of `method`."""
        inner, outer = self.split(params)
        state = {"inner": self.inner.init(inner), "outer": self.outer.init(outer)}
        if self.method == "truncated":
            state["past"] = jax.tree.map(jnp.copy, {"params": inner, "state": state["inner"]})
        if self.method == "two_speed":
            biases = horizon.output_biases(outer)
            state["tangent"] = horizon.zero_tangents(inner, state["inner"], count=biases.size)
        return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bilevel:
    """Options for computing the outer gradient.

    Attributes:
      method: algorithm for the outer gradient. The following methods differentiate through one
        inner step: "exact"; "finite_difference", provided for comparison; and "last_layer", which
        is cheap, and exact for a student whose other layers are held fixed in both levels. The
        following methods have a longer horizon, see `core.horizon`: "neumann", "cg", "truncated"
        and "two_speed".
      outer_update: order of the two updates. With "after_step", the student takes its training
        step and the weighting is updated after it. With "lookahead", the weighting is updated from
        a virtual step, and the student then repeats that step with the new weights (Shu et al.
        2019, algorithm 1).
      unroll: number of inner steps that the exact gradient is taken through, each on its own
        batch. Values above 1 require outer_update=lookahead.
      horizon: K, the number of terms of the Neumann series, of conjugate gradient steps, or, for
        "truncated", of the most recent inner steps.
      damping: value added to the diagonal of the Hessian by "neumann" and "cg".
      forget: factor by which "two_speed" multiplies its tangents in each step; 1 forgets nothing.
      every: number of student steps between two steps of the weighting.
      warmup: number of student steps before the first step of the weighting. Only "truncated"
        uses `every` and `warmup`, to keep the state from which it starts.
      jvp_fraction: fraction 1/m of the training batch over which the forward-mode product is
        computed: every m-th example, with a random offset. The estimate is unbiased if the
        examples of a batch do not depend on each other. Batch normalization uses the statistics of
        the whole batch, and their derivatives are estimated from the subset (`replay`).
      low_memory: whether the forward-mode product runs its own forward pass instead of keeping the
        activations of the inner gradient. Memory is then that of a plain step, and the cost rises
        by one third of a step. On a fraction of the batch, this pass uses the batch statistics of
        that fraction. The same holds for the passes of the finite difference, and for networks
        with dropout or with loops over the batch.
      outer_terms: terms of the objective whose sum over held-out examples is the outer loss.
    """

    method: str = "exact"
    outer_update: str = "after_step"
    unroll: int = 1
    horizon: int = 1
    damping: float = 0.0
    forget: float = 1.0
    every: int = 1
    warmup: int = 0
    jvp_fraction: float = 1.0
    low_memory: bool = False
    outer_terms: tuple[str, ...] = ("cross_entropy",)

    def __post_init__(self):
        for name, options in (("method", METHODS), ("outer_update", UPDATES)):
            if (value := getattr(self, name)) not in options:
                raise refusal(name, f"unknown {name} {value!r}", nearest(value, options))
        fraction = self.jvp_fraction
        if not 0 < fraction <= 1 or abs(1 / fraction - round(1 / fraction)) > 1e-6:
            what = f"jvp_fraction is {fraction}"
            raise refusal("jvp_fraction", what, "1 divided by a whole number")
        if self.unroll < 1:
            raise refusal("unroll", f"unroll is {self.unroll}", "at least 1")
        how = self.outer_update, self.method, fraction
        if self.unroll > 1 and how != ("lookahead", "exact", 1.0):
            raise refusal(
                "unroll",
                f"{self.unroll} inner steps with outer_update={self.outer_update}, "
                f"method={self.method}, jvp_fraction={fraction}",
                "several steps need outer_update=lookahead, method=exact and jvp_fraction=1",
            )
        self._check_horizon()
        if self.method == "last_layer" and fraction < 1:
            what = "the product of the last layer is cheap on the complete batch"
            raise refusal("jvp_fraction", what, "set jvp_fraction to 1")

    def _check_horizon(self) -> None:
        method, far = self.method, self.method not in ONE_STEP
        if self.horizon < 1:
            raise refusal("horizon", f"horizon is {self.horizon}", "at least 1")
        if self.horizon > 1 and method not in ("neumann", "cg", "truncated"):
            hint = "set horizon to 1" + ("; exact looks ahead by unroll" if not far else "")
            raise refusal("horizon", f"method={method} has no horizon to set", hint)
        if not 0 <= self.damping < math.inf:
            raise refusal("damping", f"damping is {self.damping}", "0 or more")
        if self.damping and method not in ("neumann", "cg"):
            what = f"method={method} inverts no Hessian"
            raise refusal("damping", what, "set damping to 0, or method to neumann or cg")
        if not 0 < self.forget <= 1:
            raise refusal("forget", f"forget is {self.forget}", "above 0, at most 1")
        if self.forget < 1 and method != "two_speed":
            raise refusal("forget", f"method={method} carries no tangents", "set forget to 1")
        if far and self.jvp_fraction < 1:
            what = f"method={method} works on the whole batch"
            raise refusal("jvp_fraction", what, "set jvp_fraction to 1")
        if far and self.low_memory:
            what = f"method={method} has no pass of its own to spare"
            raise refusal("low_memory", what, "set low_memory to false")
        if method in ("truncated", "two_speed") and self.outer_update != "after_step":
            what = f"method={method} goes by the steps taken, and a step ahead is none"
            raise refusal("outer_update", what, "set outer_update to after_step")
        if method == "truncated" and self.horizon > self.every:
            what = f"{self.horizon} steps back, and the weighting changes every {self.every}"
            raise refusal("horizon", what, "at most `every`, so that one weighting made them all")

    @property
    def batches(self) -> int:
        """Number of training batches that an outer step takes."""
        return self.horizon if self.method == "truncated" else self.unroll

    @property
    def back(self) -> int:
        """Number of steps from the first of these batches to the current step."""
        return self.horizon - 1 if self.method == "truncated" else 0

    @property
    def passes(self) -> str:
        """Description of the cost of an outer step in addition to a student step."""
        k = self.horizon
        if self.method == "two_speed":
            return "tangents of gradient and update in every step, a held-out gradient when due"
        if self.method == "truncated":
            return (
                f"{k} gradients and {k} Hessian-vector products, with {k} copies of the parameters"
            )
        if self.method in ("neumann", "cg"):
            return f"a gradient and {k} Hessian-vector products, in a loop that is counted once"
        if self.unroll > 1:
            return f"{self.unroll} gradients and {self.unroll} Hessian-vector products"
        return "a held-out gradient and a forward-mode product"

    @property
    def stride(self) -> int:
        """m, where `jvp_fraction = 1 / m`."""
        return round(1 / self.jvp_fraction)


def refusal(name: str, what: str, hint: str) -> ArgumentError:
    return ArgumentError(what, where=name, hint=hint)
