"""Text of arithmetic chains: their alphabet, how they are written, and an exact parser.

A problem is a quantity that changes k times, each time by a sum or a difference:

    question  a42a-12a+7a?          solution  42-12=30;30+7=37;

A clause begins with its subject, one of `SUBJECTS`, and the question ends with the subject that is
asked for. A clause of another subject is irrelevant, such as `c+5` in `a42a-12c+5a+7a?`: the kind
of distractor that GSM-IC adds to word problems (Shi et al. 2023, arXiv:2302.00093).
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ALPHABET = "0123456789+-=;?abcd"
"""Characters, whose place is their token id."""

SUBJECTS = "abcd"

END = len(ALPHABET)
"""Token before a question and after a solution."""

MASK = END + 1
"""Token that hides another one, which no text has."""

VOCABULARY = MASK + 1

_NUMBER = r"(0|[1-9][0-9]*)"
_CLAUSE = re.compile(rf"([{SUBJECTS}])([+-]?){_NUMBER}")
_LINE = re.compile(rf"{_NUMBER}([+-]){_NUMBER}={_NUMBER};")


class Problem(NamedTuple):
    """What a question asks.

    Attributes:
      start: the quantity before all changes.
      changes: what is added, in order.
    """

    start: int
    changes: tuple[int, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The quantity before and after each change; the last one is the answer."""
        found = [self.start]
        for change in self.changes:
            found.append(found[-1] + change)
        return tuple(found)


class Verdict(NamedTuple):
    """What is right of a solution.

    Attributes:
      answer: the result of the last line; None where the text is not a sequence of lines.
      correct: whether that is the answer of the problem.
      steps: for each change of the problem, whether the line in its place is the right one.
      sums: number of lines, up to the first that is none, whose arithmetic holds, right or not.
      lines: number of lines up to the first that is none.
    """

    answer: int | None
    correct: bool
    steps: tuple[bool, ...]
    sums: int
    lines: int


def encode(text: str) -> list[int]:
    """Returns token ids; ValueError for a character outside the alphabet."""
    return [ALPHABET.index(character) for character in text]


def decode(ids: Iterable[int]) -> str:
    """Returns the text before the first token that is no character."""
    text = ""
    for i in ids:
        if not 0 <= i < END:
            break
        text += ALPHABET[i]
    return text


def question(
    problem: Problem, subject: str = "a", distractor: tuple[int, str, int] | None = None
) -> str:
    """Returns the text of a question.

    Args:
      problem: what it asks.
      subject: of all its clauses.
      distractor: a clause to add, (number of clauses before it, subject, change).
    """
    clauses = [f"{subject}{problem.start}", *(f"{subject}{x:+d}" for x in problem.changes)]
    if distractor is not None:
        before, other, change = distractor
        clauses.insert(before, f"{other}{change:+d}")
    return f"{''.join(clauses)}{subject}?"


def solution(problem: Problem) -> str:
    """Returns the right lines."""
    values = problem.values
    pairs = zip(values, problem.changes, values[1:], strict=False)
    return "".join(f"{before}{change:+d}={after};" for before, change, after in pairs)


def parse(text: str) -> Problem:
    """Returns the problem of a question; clauses of other subjects do not count.

    Raises:
      ValueError: the text is no question.
    """
    if len(text) < 2 or text[-1] != "?" or text[-2] not in SUBJECTS:
        raise ValueError(f"{text!r} does not end with a subject and ?")
    subject, body, at = text[-2], text[:-2], 0
    start, changes = None, []
    while at < len(body):
        found = _CLAUSE.match(body, at)
        if found is None:
            raise ValueError(f"{text!r} has no clause at {at}")
        owner, sign, number = found.groups()
        at = found.end()
        if owner != subject:
            continue
        if (start is None) == bool(sign):
            raise ValueError(f"{text!r}: the first clause of {subject} alone has no sign")
        if start is None:
            start = int(number)
        else:
            changes.append(int(f"{sign}{number}"))
    if start is None:
        raise ValueError(f"{text!r} has no clause of {subject}")
    return Problem(start, tuple(changes))


def verify(problem: Problem, text: str, *, ended: bool = True) -> Verdict:
    """Compares a solution with a problem.

    Args:
      problem: what was asked.
      text: the lines.
      ended: whether an end token followed; a text without it has no answer.
    """
    lines: list[tuple[int, int, int]] = []
    at = 0
    while (found := _LINE.match(text, at)) is not None:
        left, sign, right, result = found.groups()
        lines.append((int(left), int(f"{sign}{right}"), int(result)))
        at = found.end()
    whole = ended and at == len(text) and bool(lines)
    values = problem.values
    right_lines: Sequence[tuple[int, int, int]] = list(
        zip(values, problem.changes, values[1:], strict=False)
    )
    steps = tuple(i < len(lines) and lines[i] == line for i, line in enumerate(right_lines))
    answer = lines[-1][2] if whole else None
    sums = sum(left + change == result for left, change, result in lines)
    return Verdict(answer, answer == values[-1], steps, sums, len(lines))
