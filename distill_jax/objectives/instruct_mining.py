"""InstructMining: training on rows that a linear rule prefers (Cao et al. 2023, "Instruction
Mining: Instruction Data Selection for Tuning Large Language Models", arXiv:2307.06290).

The rule `log loss = a_0 + sum_i a_i I_i` predicts the held-out loss after training on a subset from
the means of indicators over its rows. `fit_rule` fits it on many subsets. As the prediction for a
subset of fixed size is lowest for the rows with the lowest `sum_i a_i I_i`, these are selected:
the `share` of the training part that the rule prefers. Training is on the next token.

Indicators here are the number of targets (`length`), the mean loss of a teacher (`nll`), the median
loss of those targets that an early teacher has among its k most probable (`learnable`, the score of
SALT_DS), the distance to the nearest of some other rows (`novelty`), and any number that the
data give with a row, such as `parses` of `stdlib_snippets`.

Deviations: these indicators take the place of the paper's, which need a reward model and a chat
model. Rows that are not selected count 0, so that a batch has fewer targets. The search for the
size of the subset is not here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Key, Nets, PyTree, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.objectives import _tokens
from distill_jax.objectives.next_token import NextToken
from distill_jax.objectives.salt_ds import learnable_loss

SKETCH = 256
"""Size of the vectors that are compared for novelty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructMining(NextToken):
    """Next-token training on selected rows.

    Attributes:
      num_examples: n; all ids of rows are below it; from the data.
      rule: coefficients of indicators, from `fit_rule`; rows with a low sum are selected.
      share: share of the rows that is selected, in (0, 1].
      top: k of `learnable`.
      references: largest number of rows that the novelty of a row is measured against.
    """

    num_examples: int
    rule: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"learnable": -1.0})
    share: float = 0.5
    top: int = 10
    references: int = 2000

    needs_dataset_pass: ClassVar[bool] = True
    auxiliary: ClassVar[tuple[str, ...]] = ("student", "teacher", "teacher_scout")

    def __post_init__(self):
        ranges.within("(0, 1]", share=self.share)
        ranges.sizes(top=self.top, references=self.references)
        if not isinstance(self.rule, Mapping) or not self.rule:
            raise ArgumentError(
                f"rule is {self.rule!r}", where="rule", hint="coefficients by name of an indicator"
            )
        for name, value in self.rule.items():
            ranges.within("(-inf, inf)", where="rule", whole=False, **{name: value})

    @property
    def roles(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        needed = {"teacher": "nll", "teacher_scout": "learnable"}
        return ("student", *(role for role, name in needed.items() if name in self.rule))

    def memory(self, key: Key, batch: Batch) -> PyTree:
        return {"selected": jnp.ones(self.num_examples, jnp.float32)}

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> dict[str, Array]:
        _tokens.check_text(batch)
        target, mask = batch["target"], batch["target_mask"]
        found = {}
        for name in self.rule:
            if name == "length":
                found[name] = mask.sum(1)
            elif name == "nll":
                logits = nets("teacher", batch["input"])[0]["logits"]
                found[name] = mean_loss(logits, target, mask)
            elif name == "learnable":
                logits = nets("teacher_scout", batch["input"])[0]["logits"]
                found[name] = learnable_loss(logits, target, mask, top=self.top)
            elif name == "novelty":
                found[name] = sketch(target, mask)
            elif name in batch and jnp.ndim(batch[name]) == 1:
                found[name] = batch[name].astype(jnp.float32)
            else:
                raise ArgumentError(
                    f"there is no indicator {name!r}",
                    where="rule",
                    hint="length, nll, learnable, novelty, or a number that the data give",
                )
        return found

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        rows = dict(rows)
        if "novelty" in rows:
            sketches = rows["novelty"]
            some = np.sort(random.permutation(len(sketches))[: self.references])
            rows["novelty"] = novelty(sketches, some)
        score = sum(self.rule[name] * filled(rows[name]) for name in self.rule)
        count = math.ceil(self.share * len(ids))
        selected = np.zeros_like(memory["selected"])
        selected[ids[np.argsort(score, kind="stable")[:count]]] = 1
        return {"selected": selected}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        terms = super().loss(nets, batch, memory, step)
        chosen = memory["selected"][batch["index"]][:, None]
        values = {name: chosen * value for name, value in terms.values.items()}
        counts = {name: chosen * count for name, count in terms.counts.items()}
        return dataclasses.replace(terms, values=values, counts=counts)


class Rule(NamedTuple):
    """A linear rule for the logarithm of a loss.

    Attributes:
      intercept: a_0.
      coefficients: a_i by indicator.
    """

    intercept: float
    coefficients: Mapping[str, float]

    def __call__(self, indicators: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the predicted log loss of subsets, `[m]`, from means of indicators `[m]`."""
        terms = [a * indicators[name] for name, a in self.coefficients.items()]
        return self.intercept + np.sum(terms, axis=0)


def fit_rule(indicators: Mapping[str, np.ndarray], loss: np.ndarray) -> Rule:
    """Fits the rule by least squares.

    Args:
      indicators: by name, means over the rows of each subset, `[m]`.
      loss: positive, after training on each subset, `[m]`.

    Raises:
      ArgumentError: fewer subsets than coefficients, or a loss that is not positive.
    """
    loss = np.asarray(loss, np.float64)
    if len(loss) <= len(indicators) or not (loss > 0).all():
        raise ArgumentError(
            f"{len(loss)} losses for {len(indicators)} indicators",
            where="loss",
            hint="more subsets than coefficients, and positive losses",
        )
    x = np.stack([np.asarray(column, np.float64) for column in indicators.values()], 1)
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1)
    columns = np.concatenate([np.ones((len(x), 1)), (x - mean) / scale], 1)
    first, *rest = np.linalg.lstsq(columns, np.log(loss), rcond=None)[0]
    a = np.array(rest) / scale
    return Rule(float(first - a @ mean), dict(zip(indicators, a.tolist(), strict=True)))


def mean_loss(logits: Array, target: Array, mask: Array) -> Array:
    """Returns the mean negative log-probability of the targets of a row, `[b, t, v] -> [b]`."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logs, target[..., None], axis=-1)[..., 0]
    return -(own * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


def sketch(tokens: Array, mask: Array) -> Array:
    """Returns how often a row has each triple of tokens, hashed, `[b, SKETCH]` of length 1.

    Args:
      tokens: ids `[b, t]`.
      mask: `[b, t]`, 0 on padding.
    """
    triples = tokens[:, :-2] * 961 + tokens[:, 1:-1] * 31 + tokens[:, 2:]
    here = (mask[:, :-2] * mask[:, 1:-1] * mask[:, 2:])[..., None]
    counts = (jax.nn.one_hot(triples % SKETCH, SKETCH) * here).sum(1)
    return counts / jnp.maximum(jnp.linalg.norm(counts, axis=1, keepdims=True), 1e-6)


def novelty(sketches: np.ndarray, references: np.ndarray, *, chunk: int = 4096) -> np.ndarray:
    """Returns 1 minus the largest cosine to another row, float32 `[n]`.

    Args:
      sketches: from `sketch`, `[n, SKETCH]`.
      references: rows to compare with, int `[r]`; a row is not compared with itself.
      chunk: rows at a time.
    """
    found = []
    for at in range(0, len(sketches), chunk):
        rows = np.arange(at, min(at + chunk, len(sketches)))
        cosine = sketches[rows] @ sketches[references].T
        cosine[rows[:, None] == references[None]] = -1
        found.append(1 - cosine.max(1))
    return np.concatenate(found).astype(np.float32)


def filled(values: np.ndarray) -> np.ndarray:
    """Returns values in which those that are not finite are the mean of the others, float64."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    return np.where(finite, values, values[finite].mean() if finite.any() else 0.0)


make = InstructMining
