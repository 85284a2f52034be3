"""What objectives over tokens share: log-probabilities of targets, and counts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import Array, Batch, Nets, Outputs, Role, State
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.steps import teacher_view
from distill_jax.losses.sequence import DIVERGENCES, TopLogProbs

MOST_LOGITS = 2**28
"""Largest number of logits of a batch that distillation over all tokens takes: 1 GiB."""


def check_divergence(divergence: str, share: float) -> None:
    """Raises `ArgumentError` for an unknown divergence or a share outside (0, 1)."""
    ranges.within("(0, 1)", share=share)
    if divergence not in DIVERGENCES:
        raise ArgumentError(
            f"no divergence {divergence!r}",
            where="divergence",
            hint=nearest(divergence, DIVERGENCES),
        )


def check_text(batch: Batch) -> None:
    """Raises `ArgumentError` unless a batch has targets of tokens."""
    for name in ("target", "target_mask"):
        if name not in batch:
            raise ArgumentError(
                f"a batch has no {name}",
                where="batch",
                hint="the transform next_token makes it from rows of tokens, as of text_folder",
            )


def ask_student(
    nets: Nets,
    batch: Batch,
    *more: Array,
    role: Role = "student",
    teacher: Outputs | None = None,
) -> tuple[Outputs, State, Array, Array]:
    """Applies a student in training mode.

    Args:
      nets: the networks.
      batch: with `target` `[b, t]`.
      *more: further tokens to ask for at each position, `[b, t, k]`.
      role: of the student.
      teacher: outputs of the teacher, whose vocabulary is compared if it has `logits`.

    Returns:
      The outputs, the state, and the log-probabilities of the targets `[b, t]` and of the further
      tokens `[b, t, k]`.

    Raises:
      ArgumentError: the batch has no targets, the network does not return `log_probs`, or the
        teacher has another vocabulary.
    """
    check_text(batch)
    ask = jnp.concatenate([batch["target"][..., None], *more], axis=-1)
    view = batch["input"]
    view = {**view, "ask": ask} if isinstance(view, Mapping) else {"tokens": view, "ask": ask}
    outputs, state = nets(role, view, train=True)
    if "log_probs" not in outputs:
        raise ArgumentError(
            f"{role} returns no log_probs",
            where=role,
            hint="a transformer, or another network that reads `ask` of its input",
        )
    check_same_tokens(outputs, teacher or {})
    log_probs = outputs["log_probs"]
    return outputs, state, log_probs[..., 0], log_probs[..., 1:]


def ask_teacher(nets: Nets, batch: Batch, *, role: Role = "teacher") -> Outputs:
    """Returns a frozen teacher's outputs for a batch, without gradient, in evaluation mode."""
    outputs, _ = nets(role, teacher_view(batch))
    return jax.lax.stop_gradient(outputs)


def top_of(outputs: Outputs) -> TopLogProbs | None:
    """Returns a teacher's k most probable tokens; None where it returns all logits instead."""
    if "top_index" not in outputs:
        return None
    index = outputs["top_index"].astype(jnp.int32)
    return TopLogProbs(index, outputs["top_log_probs"], outputs["tail_log_prob"])


def check_same_tokens(student: Outputs, teacher: Outputs) -> None:
    """Raises `ArgumentError` for two vocabularies, of networks that both return `logits`."""
    if not ("logits" in student and "logits" in teacher):
        return
    own, others = (x["logits"].shape[-1] for x in (student, teacher))
    if own != others:
        raise ArgumentError(
            f"the teacher has {others} tokens and the student {own}",
            where="teacher",
            hint="both need the same tokenizer",
        )


def check_dense(student: Outputs, teacher: Outputs) -> None:
    """Checks logits `[b, t, v]` for a divergence over all tokens.

    Raises:
      ArgumentError: two vocabularies, or too many logits to hold.
    """
    check_same_tokens(student, teacher)
    if student["logits"].size > MOST_LOGITS:
        shape = ", ".join(map(str, student["logits"].shape))
        raise ArgumentError(
            f"logits [{shape}] of all tokens are too many to hold",
            where="teacher",
            hint="a teacher with top=16: its most probable tokens, and all others as one",
        )
