"""Whether a language model solves arithmetic chains: it writes, and a parser checks every line."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill_jax.core import chains, ranges
from distill_jax.core.api import TASKS, Array, Batch, Nets
from distill_jax.core.errors import ArgumentError

NEEDED = ("prompt", "start", "solution", "distracted")
MAIN = ("accuracy", "step_accuracy", "sums_right", "accuracy_distracted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactAnswer:
    """Metrics of the solutions that `role` writes; see `make`."""

    role: str = "student"
    new_tokens: int = 0

    tasks: ClassVar[tuple[str, ...]] = TASKS

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def measure(self, nets: Nets, batch: Batch, step: Array) -> dict[str, Array]:
        """Returns prompts and what the network writes after them, `[b, ...]`."""
        del step
        for name in NEEDED:
            if name not in batch:
                raise ArgumentError(
                    f"a batch has no {name}",
                    where="exact_answer",
                    hint="the data arithmetic_chains",
                )
        p, s = batch["prompt"].shape[1], batch["solution"].shape[1]
        samples = nets.sample(
            self.role,
            batch["prompt"],
            batch["start"],
            steps=self.new_tokens or s,
            temperature=0.0,
            end=chains.END,
        )
        return {
            "written": samples.tokens[:, 0, p:],
            "prompt": batch["prompt"],
            "start": batch["start"],
            "distracted": batch["distracted"],
        }

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        del batch
        return scores(**outputs["exact_answer"])


def scores(
    written: np.ndarray, prompt: np.ndarray, start: np.ndarray, distracted: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of `make`; what is no question has no right answer.

    Args:
      written: ids of solutions, int `[n, s]`.
      prompt: ids of questions, int `[n, p]`.
      start: first column of each question, that of its end token, int `[n]`.
      distracted: whether each question has an irrelevant clause, `[n]`.
    """
    found: dict[str, list[float]] = {}
    for ids, asked, first, odd in zip(written, prompt, start, distracted, strict=True):
        try:
            problem = chains.parse(chains.decode(asked[int(first) + 1 :]))
        except ValueError:  # zeros, on which a run tries its evaluators out
            for name in MAIN:
                found.setdefault(name, []).append(0.0)
            continue
        ended = bool((ids == chains.END).any())
        verdict = chains.verify(problem, chains.decode(ids), ended=ended)
        if odd:
            found.setdefault("accuracy_distracted", []).append(verdict.correct)
            continue
        steps = len(problem.changes)
        for name in ("accuracy", f"accuracy_{steps}_steps"):
            found.setdefault(name, []).append(verdict.correct)
        found.setdefault("step_accuracy", []).append(float(np.mean(verdict.steps or 1.0)))
        if verdict.lines:
            found.setdefault("sums_right", []).append(verdict.sums / verdict.lines)
    return {name: float(np.mean(values)) for name, values in found.items()}


def make(*, role: str = "student", new_tokens: int = 0) -> ExactAnswer:
    """Makes the evaluator of solutions of `data/arithmetic_chains.py`, written greedily.

    Metrics, of questions without an irrelevant clause but for the last:
      accuracy: share of solutions whose last line has the right result, and that end behind it.
      accuracy_<k>_steps: the same, by difficulty.
      step_accuracy: share of the steps whose line is the right one, mean over questions.
      sums_right: share of the written lines whose arithmetic holds, whether they belong or not.
      accuracy_distracted: accuracy of questions with an irrelevant clause.

    Args:
      role: the network.
      new_tokens: most tokens that it writes; 0 takes those of the longest solution.

    Raises:
      ArgumentError: `new_tokens` below 0; as it measures, data of another kind.
    """
    ranges.counts(new_tokens=new_tokens)
    return ExactAnswer(role=role, new_tokens=new_tokens)
