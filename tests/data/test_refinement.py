"""Questions, drafts and solutions in one sequence, against a transcription with lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import refinement

END, B, P, S = 9, 8, 6, 5


def batch_of():
    r = np.random.RandomState(0)

    def ended(shape):
        ids = r.randint(0, END, (*shape, S))
        length = r.randint(1, S, shape)
        return np.where(np.arange(S) >= length[..., None], END, ids).astype(np.int32)

    drafts = ended((B, 2))
    drafts[0, 0] = 1  # one that never ends
    return {
        "prompt": r.randint(0, END, (B, P)).astype(np.int32),
        "start": r.randint(0, P - 1, B).astype(np.int32),
        "drafts": drafts,
        "solution": ended((B,)),
    }


def cut(ids):
    ids = ids.tolist()
    return ids[: ids.index(END) + 1] if END in ids else ids


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_a_sequence_is_its_transcription(weight):
    batch = batch_of()
    make = jax.jit(refinement.make_refinement(end=END, draft_weight=weight))
    made = jax.tree.map(np.asarray, make(jax.random.key(0), batch, jnp.int32(0)))
    for i in range(B):
        question = batch["prompt"][i][batch["start"][i] :].tolist()
        drafts = [cut(x) for x in batch["drafts"][i]]
        solution = cut(batch["solution"][i])
        context = drafts[0] + drafts[1]
        wanted = [*question, *context, *solution]
        weights = [0.0] * len(question) + [weight] * len(context) + [1.0] * len(solution)
        found = [made["input"]["tokens"][i][0], *made["target"][i]]
        n = len(wanted)
        assert found[:n] == wanted and set(found[n:]) <= {END}
        np.testing.assert_array_equal(made["target_mask"][i][: n - 1], weights[1:])
        assert not made["target_mask"][i][n - 1 :].any()
        assert made["input"]["segments"][i].tolist() == [
            0 if j < n else -1 for j in range(P + 3 * S - 1)
        ]


def test_prompts_are_padded_on_the_left():
    batch = batch_of()
    prompt, start = jnp.asarray(batch["prompt"]), jnp.asarray(batch["start"])
    tokens, part, first = refinement.joined(
        prompt, start, jnp.asarray(batch["drafts"][:, 1]), end=END, left=True
    )
    for i in range(B):
        wanted = [*batch["prompt"][i][batch["start"][i] :], *cut(batch["drafts"][i, 1])]
        assert tokens[i, first[i] :].tolist() == wanted
        assert (np.asarray(part[i, : first[i]]) == -1).all()


def test_bad_arguments():
    with pytest.raises(ConfigError, match="draft_weight"):
        refinement.make_refinement(end=END, draft_weight=2.0)
    with pytest.raises(ConfigError, match="no drafts"):
        refinement.make_refinement(end=END)(jax.random.key(0), {}, jnp.int32(0))
