"""How the outer gradient of a bilevel problem is taken, and the optimizers of both levels."""

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
    """The optimizers of both levels; `init` makes the `opt_state` of a `TrainState`.

    Attributes:
      inner: over `{role: params}` of everything that learns from the training loss.
      outer: over `{role: params}` of the weighting's networks.
      outer_roles: those networks.
      method: of `Bilevel`; "truncated" and "two_speed" keep more in the state.
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
        """Returns the state of both optimizers, and what `method` keeps of earlier steps."""
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
    """Computation of the outer gradient.

    Attributes:
      method: through one step: "exact"; "finite_difference", which is there to compare with;
        "last_layer", exact for a student whose other layers are held fixed in both levels, and
        cheap. Over a longer horizon, see `core.horizon`: "neumann", "cg", "truncated", "two_speed".
      outer_update: "after_step": the inner step is the step of training, and the weighting learns
        after it; "lookahead": the weighting learns from a step that is then made again with the
        new weights (Shu et al. 2019, algorithm 1).
      unroll: inner steps that the exact gradient goes through, on as many batches ahead; more than
        one with outer_update=lookahead only.
      horizon: K: terms of the Neumann series, steps of conjugate gradients, or, for "truncated",
        the last of the steps taken.
      damping: added to the diagonal of the Hessian by "neumann" and "cg".
      forget: factor of the tangents that "two_speed" carries, in each step; 1 forgets nothing.
      every: student steps between two of the weighting, and
      warmup: those before the first; only "truncated" needs them, to keep the state that it goes
        back to.
      jvp_fraction: share 1/m of the training batch over which the product is taken, every m-th
        example from a random one on. The estimate is unbiased where the examples of a batch do not
        depend on each other. Under batch normalization the statistics are those of the whole
        batch, and their changes are estimated from the part (`replay`).
      low_memory: whether the forward-mode product makes its own forward pass, so that it need not
        wait for the inner gradient's activations: as much memory as a plain step, for one third of
        a step more. On a part of the batch that pass has the part's statistics; so has that of the
        finite difference, and of networks with dropout or with loops over the batch.
      outer_terms: terms of the objective whose sum, over held-out examples, is the outer loss.
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
        """Training batches that an outer step takes."""
        return self.horizon if self.method == "truncated" else self.unroll

    @property
    def back(self) -> int:
        """How many steps before the present one the first of these batches is."""
        return self.horizon - 1 if self.method == "truncated" else 0

    @property
    def passes(self) -> str:
        """What an outer step costs beside a step of the student, in words."""
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
        """m of `jvp_fraction = 1 / m`."""
        return round(1 / self.jvp_fraction)


def refusal(name: str, what: str, hint: str) -> ArgumentError:
    return ArgumentError(what, where=name, hint=hint)
