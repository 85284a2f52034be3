"""Generalized knowledge distillation of language models (Agarwal et al. 2023, arXiv:2306.13649).

`L = (1 - lambda) E_data[D(p_T || p_S)(y | x)] + lambda E_{y ~ p_S(. | x)}[D(p_T || p_S)(y | x)]`,
where D is a divergence of the next-token distributions, averaged over the tokens of y (section 3).
The second expectation is over continuations that the student samples in the step; no gradient flows
through the samples. lambda 0 is supervised distillation, lambda 1 is on-policy distillation.

Deviation: algorithm 1 takes the batch from the data or from the student, with probability lambda.
Here every step has both terms with their weights, which has the same expectation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import TASKS, Array, Batch, Nets, Objective, PyTree, State, Terms
from distill_jax.core.errors import ArgumentError
from distill_jax.losses.sequence import softmax_divergence, sparse_divergence
from distill_jax.objectives import _tokens


class Prompts(NamedTuple):
    """What a student continues.

    Attributes:
      tokens: int32 `[b, p]`, padded on the left.
      start: int32 `[b]`, the first column that is not padding; None for no padding.
      valid: float32 `[b]`, 0 where there is nothing to continue.
    """

    tokens: Array
    start: Array | None
    valid: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKD(Objective):
    """Terms `off_policy`, on the rows of the data, and `on_policy`, on samples of the student.

    Prompts are `prompt` `[b, p]` and `start` `[b]` of the batch. Without them, the first tokens of
    each row are its prompt, from the beginning of the document that they end in.

    Attributes:
      on_policy: lambda, weight of the student's samples, in [0, 1].
      divergence: one of `losses.sequence.DIVERGENCES`. The paper's JSD(beta) is "jensen_shannon".
      share: s of the skew and Jensen-Shannon divergences, in (0, 1); beta is 1 - s.
      prompt: number of tokens of a row that are its prompt, if the batch has no prompts.
      new_tokens: maximum number of sampled tokens.
      temperature: T of the sampling, 0 or more; the divergence has none.
      end: the token that ends a sample; -1 for none.
    """

    on_policy: float = 0.5
    divergence: str = "jensen_shannon"
    share: float = 0.5
    prompt: int = 16
    new_tokens: int = 16
    temperature: float = 1.0
    end: int = -1

    roles: ClassVar[tuple[str, ...]] = ("student", "teacher")
    auxiliary: ClassVar[tuple[str, ...]] = ("student", "teacher")
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        ranges.within("[0, 1]", on_policy=self.on_policy)
        ranges.within("[0, inf)", temperature=self.temperature)
        ranges.sizes(prompt=self.prompt, new_tokens=self.new_tokens)
        ranges.within("[-1, inf)", whole=True, end=self.end)
        _tokens.check_divergence(self.divergence, self.share)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        values, counts, coef, state = {}, {}, {}, {}
        parts = {"off_policy": 1 - self.on_policy, "on_policy": self.on_policy}
        for name, weight in parts.items():
            if weight:
                part = batch if name == "off_policy" else self.sampled(nets, batch)
                value, state = self.divergences(nets, part)
                # The mean over the tokens of a row, then over the rows that have any.
                mask = part["target_mask"]
                counts[name] = mask / jnp.maximum(mask.sum(1, keepdims=True), 1)
                values[name], coef[name] = value * counts[name], weight
        return Terms(values=values, counts=counts, coef=coef, state={"student": state})

    def divergences(self, nets: Nets, batch: Batch) -> tuple[Array, State]:
        """Returns the divergence at each position `[b, t]`, and the student's new state."""
        teacher = _tokens.ask_teacher(nets, batch)
        top = _tokens.top_of(teacher)
        if top is not None:
            _, state, _, asked = _tokens.ask_student(nets, batch, top.index, teacher=teacher)
            return sparse_divergence(self.divergence, top, asked, share=self.share), state
        _tokens.check_text(batch)
        student, state = nets("student", batch["input"], train=True)
        _tokens.check_dense(student, teacher)
        logits = (x["logits"] for x in (teacher, student))
        return softmax_divergence(self.divergence, *logits, share=self.share), state

    def sampled(self, nets: Nets, batch: Batch) -> Batch:
        """Returns a batch of prompts with the student's continuations, which are the targets."""
        prompts = self.prompts(batch)
        samples = nets.sample(
            "student",
            prompts.tokens,
            prompts.start,
            steps=self.new_tokens,
            temperature=self.temperature,
            end=self.end,
        )
        tokens, drawn = samples.tokens[:, 0], samples.mask[:, 0]
        view: Any = tokens[:, :-1]
        if prompts.start is not None:
            seen = jnp.arange(view.shape[1])[None] >= prompts.start[:, None]
            view = {"tokens": view, "mask": seen.astype(jnp.float32)}
        mask = drawn[:, 1:] * prompts.valid[:, None]
        return {"input": view, "target": tokens[:, 1:], "target_mask": mask}

    def prompts(self, batch: Batch) -> Prompts:
        """Returns what the student continues.

        Raises:
          ArgumentError: rows are shorter than the prompt.
        """
        if "prompt" in batch:
            rows = len(batch["prompt"])
            return Prompts(batch["prompt"], batch.get("start"), jnp.ones(rows, jnp.float32))
        view, p = batch["input"], self.prompt
        tokens = view["tokens"] if isinstance(view, Mapping) else view
        if tokens.ndim != 2 or tokens.shape[1] < p:
            raise ArgumentError(
                f"inputs of shape {tokens.shape} have no prompt of {p} tokens",
                where="prompt",
                hint="at most the length of a row of tokens",
            )
        valid = jnp.ones(len(tokens), jnp.float32)
        if not isinstance(view, Mapping) or "segments" not in view:
            return Prompts(tokens[:, :p], None, valid)
        last = view["segments"][:, p - 1 : p]
        start = jnp.argmax(view["segments"][:, :p] == last, axis=1).astype(jnp.int32)
        return Prompts(tokens[:, :p], start, valid * (last[:, 0] >= 0))


make = GKD
