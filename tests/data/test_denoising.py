"""Hidden spans: counts as in T5, sequences against a transcription, and the text back from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import denoising, tokens
from distill_jax.evaluators import denoising as evaluator

FIRST, B, L, KEY = 100, 24, 40, jax.random.key(3)
SEPARATOR, SENTINEL = FIRST + 3, FIRST + 4
V = FIRST + denoising.extra_tokens(L)


def batch_of(*, padded=5, length=L):
    r = np.random.RandomState(0)
    segments = np.zeros((B, length + 1), np.int32)
    segments[-1, length + 1 - padded :] = -1
    rows = {"tokens": jnp.asarray(r.randint(0, FIRST, (B, length + 1))), "segments": segments}
    return {
        "input": rows,
        "bytes": np.ones(B, np.float32),
        "index": jnp.arange(B, dtype=jnp.int32),
        "epoch": jnp.zeros(B, jnp.int32),
    }


def denoised(batch, key=KEY, **kwargs):
    make = denoising.make_denoise(vocabulary=V, first=FIRST, **kwargs)
    return jax.tree.map(np.asarray, dict(jax.jit(make)(key, batch, jnp.int32(0))))


def sequences(made):
    """Whole sequences without padding, and the first column that is a target."""
    for i in range(B):
        ids = [*made["input"]["tokens"][i], made["target"][i][-1]]
        real = [*(made["input"]["segments"][i] == 0), True]
        last = int(np.flatnonzero(made["target_mask"][i])[-1]) + 1
        assert all(real[:last]), "targets are no padding"
        yield ids[: last + 1]


def restored(ids, *, modes):
    """Puts the spans back in the places of their sentinels."""
    mode, ids = (ids[0], ids[1:]) if modes else (None, ids)
    cut = ids.index(SEPARATOR)
    text, targets = ids[:cut], ids[cut + 1 :]
    spans, now = [], None
    for i in targets:
        if i >= SENTINEL:
            assert i == SENTINEL + len(spans)
            now = []
            spans.append(now)
        else:
            now.append(i)
    assert spans.pop() == [], "the last sentinel ends the targets"
    assert all(spans)
    found, n = [], 0
    for i in text:
        if i >= SENTINEL:
            assert i == SENTINEL + n
            found += spans[n]
            n += 1
        else:
            found.append(i)
    assert n == len(spans)
    return mode, found, [len(span) for span in spans], text


@pytest.mark.parametrize("modes", [True, False])
def test_input_and_targets_give_the_text_back(modes):
    batch = batch_of(padded=0)
    made = denoised(batch, modes=modes)
    assert "bytes" not in made
    seen = set()
    wanted = np.asarray(batch["input"]["tokens"])[:, 1:]
    for row, ids in zip(wanted, sequences(made), strict=True):
        mode, found, lengths, text = restored([int(i) for i in ids], modes=modes)
        assert found == row.tolist()
        # round(40 / 4 or 0.15 or 0.5 of it), divided by 3, 8, 64
        kind = (sum(lengths), len(lengths))
        assert kind in {(6, 2), (6, 1), (20, 7), (20, 2), (20, 1), (10, 1)}
        if modes:
            assert (
                kind
                in {
                    0: {(6, 2), (6, 1)},
                    1: {(10, 1)},
                    2: {(20, 7), (20, 2), (6, 1), (20, 1)},
                }[mode - FIRST]
            )
        if kind == (10, 1):
            assert text[-1] == SENTINEL, "S hides the end"
        seen.add(kind)
    assert len(seen) > 3


def test_spans_have_text_between_them_and_lie_anywhere():
    made = denoising.plan(("X", 3.0, 0.5), L)
    assert (made.hidden, made.spans) == (20, 7)
    keys = jax.random.split(KEY, 400)
    starts, lengths = jax.vmap(lambda k: denoising.draw_spans(k, made, L))(keys)
    starts, lengths = np.asarray(starts), np.asarray(lengths)
    assert (lengths.sum(1) == 20).all() and (lengths >= 1).all()
    assert (starts[:, 1:] > (starts + lengths)[:, :-1]).all()
    assert (starts[:, 0] >= 0).all() and ((starts + lengths)[:, -1] <= L).all()
    hidden = np.zeros(L)
    for start, length in zip(starts.ravel(), lengths.ravel(), strict=True):
        hidden[start : start + length] += 1 / 400
    assert hidden.min() > 0.3 and hidden.max() < 0.7  # none is always or never hidden
    # A uniform division of 20 into 7: P(first length = 1) = C(18, 5) / C(19, 6).
    assert abs((lengths[:, 0] == 1).mean() - 6 / 19) < 0.08


def oracle(text, starts, lengths, mode):
    """A transcription in NumPy and lists of the sequence in the module's docstring."""
    given, wanted, at = [FIRST + "RSX".index(mode)], [], 0
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        given += [*text[at:start], SENTINEL + n]
        wanted += [SENTINEL + n, *text[start : start + length]]
        at = start + length
    given += [*text[at:], SEPARATOR]
    return given, [*wanted, SENTINEL + len(starts)]


@pytest.mark.parametrize("denoiser", denoising.UL2, ids=str)
def test_a_sequence_is_its_transcription(denoiser):
    made = denoising.plan(denoiser, L)
    text = np.random.RandomState(1).randint(0, FIRST, L)
    for i in range(3):
        starts, lengths = denoising.draw_spans(jax.random.key(i), made, L)
        size = made.size(L) + 2
        ids, source, part = denoising.corrupt(
            jnp.asarray(text), starts, lengths, made, first=FIRST, modes=True, size=size
        )
        given, wanted = oracle(text.tolist(), starts.tolist(), lengths.tolist(), made.mode)
        assert ids.tolist() == [*given, *wanted, SEPARATOR, SEPARATOR]
        assert part.tolist() == [0] * len(given) + [1] * len(wanted) + [-1, -1]
        copied = np.asarray(source) >= 0
        np.testing.assert_array_equal(text[np.asarray(source)[copied]], np.asarray(ids)[copied])
        assert sorted(np.asarray(source)[copied]) == list(range(L))


def test_padding_is_no_target():
    batch = batch_of(padded=12)
    made = denoised(batch, denoisers=(("S", 0.0, 0.25),))
    mask = made["target_mask"]
    assert (mask[:-1].sum(1) == 10 + 2).all() and mask[-1].sum() == 2  # sentinels alone


def test_rates_are_those_of_the_draw():
    batch = batch_of(padded=0)
    batch = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * 20), batch)
    batch["index"] = jnp.arange(20 * B, dtype=jnp.int32)
    make = denoising.make_denoise(
        vocabulary=V, first=FIRST, denoisers=(("R", 3, 0.15), ("S", 0, 0.25)), rates=(1, 3)
    )
    made = jax.jit(make)(KEY, batch, jnp.int32(0))
    assert abs((made["input"]["tokens"][:, 0] == FIRST + 1).mean() - 0.75) < 0.07


def test_it_is_a_function_of_the_example():
    batch = batch_of()
    turned = jax.tree.map(lambda x: x[::-1], batch)
    later = {**batch, "epoch": batch["epoch"] + 1}
    make = jax.jit(denoising.make_denoise(vocabulary=V, first=FIRST))
    one, other, new = (make(KEY, x, jnp.int32(0))["target"] for x in (batch, turned, later))
    np.testing.assert_array_equal(one, other[::-1])
    assert (one != new).any()


def test_views_ask_for_the_same_tokens_in_two_forms():
    batch = batch_of(padded=3)
    make = denoising.make_denoised_views(vocabulary=V, first=FIRST, span=8)
    prepared = jax.jit(make)(KEY, batch, jnp.int32(0))
    views = jax.tree.map(np.asarray, prepared["denoised"])
    for name, mode in (("infill", 0), ("continuation", 1)):
        view, left = views[name], views[f"{name}_left"]
        assert (view["tokens"][:, 0] == FIRST + mode).all()
        for i in range(B):
            own, plain = (v["target"][i][v["target_mask"][i] > 0] for v in (view, left))
            np.testing.assert_array_equal(own, plain)
            assert len(own) == (8 if name == "infill" else 10) or i == B - 1
            assert (own < FIRST).all()
            # Nothing of the span is in what the network sees before it.
            if name == "infill" and len(own) == 8:
                first = int(np.flatnonzero(view["target_mask"][i])[0])
                behind = view["tokens"][i][:first].tolist()
                assert SEPARATOR in behind and SENTINEL in behind
    made = tokens.make_next_token()(KEY, prepared, jnp.int32(0))
    assert "denoised" in made and made["target"].shape == (B, L)


def test_bits_of_views():
    views = {
        name: {
            "tokens": jnp.zeros((2, 3), jnp.int32),
            "segments": jnp.zeros((2, 3), jnp.int32),
            "target": jnp.ones((2, 3), jnp.int32),
            "target_mask": jnp.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        }
        for name in ("infill", "continuation")
    }

    def nets(role, view):
        assert role == "student" and view["ask"].shape == (2, 3, 1)
        return {"log_probs": jnp.full((2, 3, 1), -2 * jnp.log(2.0))}, {}

    found = evaluator.make().measure(nets, {"denoised": views}, jnp.int32(0))
    assert all(x.shape == (2,) for x in found.values())
    bits = evaluator.make()({"denoising": jax.tree.map(np.asarray, found)}, {})
    assert bits == {"infill_bits": pytest.approx(2), "continuation_bits": pytest.approx(2)}


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [
        ({"denoisers": ()}, "denoisers"),
        ({"denoisers": (("Q", 3, 0.15),)}, "denoisers"),
        ({"denoisers": (("R", 3, 1.5),)}, "denoisers"),
        ({"rates": (1.0,)}, "rates"),
        ({"rates": (0.0,) * 7}, "rates"),
        ({"scale": 0.0}, "scale"),
        ({"first": V}, "first"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, where):
    with pytest.raises(ConfigError, match=where):
        denoising.make_denoise(**{"vocabulary": V, "first": FIRST, **kwargs})


def test_reserved_tokens_are_counted():
    few = denoising.make_denoise(vocabulary=FIRST + 6, first=FIRST)
    with pytest.raises(ConfigError, match=f"6 reserved tokens, and {V - FIRST} are needed"):
        few(KEY, batch_of(), jnp.int32(0))
    with pytest.raises(ConfigError, match="reserved"):
        denoising.make_denoised_views(vocabulary=FIRST, first=FIRST)
    with pytest.raises(ConfigError, match="span"):
        denoising.make_denoised_views(vocabulary=V, first=FIRST, span=30)(
            KEY, batch_of(), jnp.int32(0)
        )
    again = {**batch_of(), "target": jnp.zeros((B, L))}
    with pytest.raises(ConfigError, match="no rows"):
        denoising.make_denoise(vocabulary=V, first=FIRST)(KEY, again, jnp.int32(0))
