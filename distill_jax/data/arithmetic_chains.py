"""Arithmetic in steps: questions, solutions line by line, and an exact check (`core/chains.py`).

A problem has k changes, its difficulty, and all quantities are in [0, `largest`]. Each quantity is
drawn uniformly and independently, so that no part of a question tells more of the answer than the
lines do. Problems of the parts are disjoint. Half of the held-out and test questions have an
irrelevant clause, of the training questions the share `distracted`.

Rows are sequences of their own: an end token, the question, the solution, an end token, padding.
The tokens of the solution and its end are targets (`loss_mask`).
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core import chains, ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError

PARTS = ("train", "held_out", "test")

MOST = 2**62
"""Problems of one difficulty are numbered below this."""


class _Sizes(NamedTuple):
    """Columns of the longest question, with the end token before it, and of the longest solution,
    with the end token behind it; and the examples of each part."""

    prompt: int
    solution: int
    parts: Mapping[str, int]


class ChainRows:
    """Rows of one part in memory.

    `read` gives `input`, a dictionary of `tokens`, `segments` (0, and -1 on padding) and
    `loss_mask` (1 for tokens that are targets), int32 `[b, p + s]` each; `label` int32 `[b]`, the
    number of steps; `prompt` int32 `[b, p]`, the question padded on the left, `start` int32 `[b]`,
    its first column that is not padding, `solution` int32 `[b, s]`, filled with end tokens, and
    `distracted` float32 `[b]`, whether there is an irrelevant clause.

    Args:
      questions: texts.
      solutions: texts.
      steps: number of steps of each.
      distracted: whether each question has an irrelevant clause.
      sizes: columns.
      provenance: of the part.
    """

    def __init__(
        self,
        questions: Sequence[str],
        solutions: Sequence[str],
        steps: np.ndarray,
        distracted: np.ndarray,
        *,
        sizes: _Sizes,
        provenance: Provenance,
    ):
        n, p, s = len(questions), sizes.prompt, sizes.solution
        end = chains.END
        self.provenance = provenance
        tokens, mask = np.full((n, p + s), end, np.int32), np.zeros((n, p + s), np.int32)
        segments = np.full((n, p + s), -1, np.int32)
        prompt, solution = np.full((n, p), end, np.int32), np.full((n, s), end, np.int32)
        start = np.zeros(n, np.int32)
        for i, (question, answer) in enumerate(zip(questions, solutions, strict=True)):
            asked, lines = [end, *chains.encode(question)], [*chains.encode(answer), end]
            q, whole = len(asked), len(asked) + len(lines)
            tokens[i, :whole] = asked + lines
            segments[i, :whole], mask[i, q:whole] = 0, 1
            start[i] = p - q
            prompt[i, p - q :], solution[i, : len(lines)] = asked, lines
        rows = {"tokens": tokens, "segments": segments, "loss_mask": mask}
        self._rows = rows
        self._more = {
            "label": steps.astype(np.int32),
            "prompt": prompt,
            "start": start,
            "solution": solution,
            "distracted": distracted.astype(np.float32),
        }

    def __len__(self) -> int:
        return self.provenance.n

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns the rows at `indices` `[b]`, see the class."""
        indices = np.asarray(indices, np.int64)
        return {
            "input": {name: x[indices] for name, x in self._rows.items()},
            **{name: x[indices] for name, x in self._more.items()},
        }


class _Shapes:
    """As `ChainRows`, with zeros of the same shapes."""

    shapes_only = True

    def __init__(self, n: int, sizes: _Sizes):
        self._sizes = sizes
        self.provenance = Provenance("shapes only", "none", n, "")

    def __len__(self) -> int:
        return self.provenance.n

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        b, (p, s, _) = len(indices), self._sizes
        names = ("tokens", "segments", "loss_mask")
        return {
            "input": {name: np.zeros((b, p + s), np.int32) for name in names},
            "label": np.zeros(b, np.int32),
            "prompt": np.zeros((b, p), np.int32),
            "start": np.zeros(b, np.int32),
            "solution": np.zeros((b, s), np.int32),
            "distracted": np.zeros(b, np.float32),
        }


def make(
    *,
    steps: Sequence[int] = (1, 2, 3),
    largest: int = 99,
    n_train: int = 4000,
    n_test: int = 1000,
    held_out: float = 0.1,
    distracted: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Draws problems; see the module.

    Args:
      steps: difficulties k, which the examples of a part have in turn.
      largest: largest quantity.
      n_train: training examples, before the held-out share is taken.
      n_test: test examples.
      held_out: share of the training examples that is held out, in [0, 1).
      distracted: share of the training questions with an irrelevant clause, in [0, 1].
      seed: of the problems; the parts are theirs.

    Raises:
      ArgumentError: a number out of its range, or more examples than half of the problems that
        there are of a difficulty.
    """
    sizes = _sizes(steps, largest, n_train, n_test, held_out, distracted)
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    n, base = sum(sizes.parts.values()), largest + 1
    difficulty = np.resize(np.asarray(steps), n)
    problems: list[Any] = [None] * n
    for k in sorted(set(steps)):
        at = np.flatnonzero(difficulty == k)
        numbers = random.choice(base ** (k + 1), len(at), replace=False)
        digits = numbers[:, None] // base ** np.arange(k + 1, dtype=np.int64) % base
        for i, values in zip(at, digits.tolist(), strict=True):
            changes = tuple(after - before for before, after in itertools.pairwise(values))
            problems[i] = chains.Problem(values[0], changes)
    subjects = random.integers(len(chains.SUBJECTS), size=n)
    others = (subjects + random.integers(1, len(chains.SUBJECTS), size=n)) % len(chains.SUBJECTS)
    before = random.integers(1, difficulty + 2)
    change = random.integers(-largest, largest + 1, size=n)
    u = random.random(n)
    parts, first = {}, 0
    for name, count in sizes.parts.items():
        rows = np.arange(first, first + count)
        first += count
        # Every other problem of a difficulty, where it is not a share.
        odd = u[rows] < distracted if name == "train" else rows // len(steps) % 2 == 1
        questions = [
            chains.question(
                problems[i],
                chains.SUBJECTS[subjects[i]],
                (before[i], chains.SUBJECTS[others[i]], int(change[i])) if extra else None,
            )
            for i, extra in zip(rows, odd, strict=True)
        ]
        sha = hashlib.sha256("\n".join(questions).encode()).hexdigest()
        title = f"arithmetic chains of {', '.join(map(str, steps))} steps ({name})"
        provenance = Provenance(title, f"generated, seed {seed}", count, sha, "CC0-1.0")
        solutions = [chains.solution(problems[i]) for i in rows]
        parts[name] = ChainRows(
            questions, solutions, difficulty[rows], odd, sizes=sizes, provenance=provenance
        )
    return Dataset(*(parts[name] for name in PARTS), vocabulary=chains.VOCABULARY)


def spec(
    *,
    steps: Sequence[int] = (1, 2, 3),
    largest: int = 99,
    n_train: int = 4000,
    n_test: int = 1000,
    held_out: float = 0.1,
    distracted: float = 0.0,
    **unused: int,
) -> Dataset:
    """Returns the sizes and shapes of `make` without drawing a problem."""
    del unused
    sizes = _sizes(steps, largest, n_train, n_test, held_out, distracted)
    train, held, test = (_Shapes(sizes.parts[name], sizes) for name in PARTS)
    return Dataset(train, held, test, vocabulary=chains.VOCABULARY)


def _sizes(
    steps: Sequence[int],
    largest: int,
    n_train: int,
    n_test: int,
    held_out: float,
    distracted: float,
) -> _Sizes:
    ranges.sizes(steps=tuple(steps), largest=largest, n_train=n_train, n_test=n_test)
    ranges.within("[0, 1)", held_out=held_out)
    ranges.within("[0, 1]", distracted=distracted)
    if not steps:
        raise ArgumentError("no difficulty", where="steps", hint="such as (1, 2, 3)")
    most, base = max(steps), largest + 1
    if base ** (most + 1) > MOST:
        raise ArgumentError(
            f"{most} steps of quantities up to {largest} are too many problems to number",
            where="steps",
            hint="fewer steps, or smaller quantities",
        )
    held = round(held_out * n_train)
    parts = {"train": n_train - held, "held_out": held, "test": n_test}
    easiest, n = min(steps), n_train + n_test
    needed = sum(steps[i % len(steps)] == easiest for i in range(n))
    if 2 * needed > base ** (easiest + 1):
        raise ArgumentError(
            f"{needed} problems of {easiest} steps, and there are {base ** (easiest + 1)}",
            where="n_train",
            hint="at most half of them: fewer examples, larger quantities or more steps",
        )
    digits = len(str(largest))
    clause = 2 + digits
    prompt = 1 + (1 + digits) + (most + 1) * clause + 2
    return _Sizes(prompt, most * (3 * digits + 3) + 1, parts)
