"""Batches are a function of (seed, n), wherever the data live."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.api import Provenance
from distill_jax.core.errors import ConfigError
from distill_jax.data import loader, source

N, B, SEED = 23, 5, 7


def toy(n=N):
    inputs = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1)
    return source.ArraySource(inputs, np.arange(n) % 3, Provenance("toy", "", n, ""))


def fetch_all(load, steps):
    fetch = jax.jit(load.fetch)
    return [jax.device_get(fetch(load.data, load.window(n), jnp.int32(n))) for n in steps]


def assert_equal(a, b):
    assert sorted(a) == sorted(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        assert np.asarray(a[key]).dtype == np.asarray(b[key]).dtype, key


def test_the_order_is_pinned():
    # Runs are resumed with this order: a change here breaks every checkpoint.
    assert loader.epoch_order(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert loader.epoch_order(0, 1, 10).tolist() == [9, 4, 2, 1, 0, 7, 8, 5, 3, 6]


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(loader.epoch_order(s, e, 50)) for s in range(4) for e in range(4)}
    assert len(orders) == 16 and all(sorted(o) == list(range(50)) for o in orders)


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23])
def test_every_example_once_an_epoch_also_where_batches_straddle(batch_size):
    load = loader.ResidentLoader(toy(), batch_size=batch_size, seed=SEED)
    steps = -(-4 * N // batch_size)
    batches = fetch_all(load, range(steps))
    index = np.concatenate([batch["index"] for batch in batches])
    epoch = np.concatenate([batch["epoch"] for batch in batches])
    for e in range(4):
        np.testing.assert_array_equal(np.sort(index[epoch == e][:N]), np.arange(N))
        assert (epoch == e).sum() == N
    np.testing.assert_array_equal(np.sort(epoch), epoch)
    straddles = sum(len(set(batch["epoch"].tolist())) == 2 for batch in batches)
    assert straddles == sum(e * N % batch_size != 0 for e in range(1, 5))


def test_rows_carry_their_example():
    part = source.Subset(toy(), np.arange(22, 0, -2), "even")
    load = loader.ResidentLoader(part, batch_size=4, seed=SEED)
    for batch in fetch_all(load, range(5)):
        np.testing.assert_array_equal(batch["input"][:, 0, 0, 0], batch["index"] * 4)
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
        assert set(batch["index"].tolist()) <= set(range(2, 23, 2))
        assert batch["mask"].tolist() == [1.0] * 4 and batch["input"].dtype == np.uint8


def test_a_batch_does_not_depend_on_what_was_read_before():
    forward = fetch_all(loader.ResidentLoader(toy(), batch_size=B, seed=SEED), range(14))
    load = loader.ResidentLoader(toy(), batch_size=B, seed=SEED)
    for step in (13, 2, 9, 0):
        assert_equal(fetch_all(load, [step])[0], forward[step])
    other = fetch_all(loader.ResidentLoader(toy(), batch_size=B, seed=SEED + 1), [0])[0]
    assert (other["index"] != forward[0]["index"]).any()


def test_late_steps_whose_number_of_examples_exceeds_32_bits():
    load = loader.ResidentLoader(toy(), batch_size=B, seed=SEED)
    steps = [2**29 - 1, 2**30 + 3, 2**31 - 2]
    for step, batch in zip(steps, fetch_all(load, steps), strict=True):
        position, epoch = loader.batch_rows(step, batch_size=B, seed=SEED, n=N)
        np.testing.assert_array_equal(batch["index"], position)
        np.testing.assert_array_equal(batch["epoch"], epoch)


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23])
@pytest.mark.parametrize("threads", [0, 2])
def test_stream_equals_resident(batch_size, threads):
    stream = loader.StreamLoader(
        toy(), batch_size=batch_size, seed=SEED, start=3, num_threads=threads
    )
    batches = iter(stream)
    resident = fetch_all(
        loader.ResidentLoader(toy(), batch_size=batch_size, seed=SEED), range(3, 16)
    )
    for expected, got in zip(resident, batches, strict=False):
        assert_equal(got, expected)
    batches.close()


def test_stream_windows_are_used_like_resident_ones():
    resident = loader.ResidentLoader(toy(), batch_size=B, seed=SEED)
    stream = loader.StreamLoader(toy(), batch_size=B, seed=SEED)
    steps = [0, 1, 1, 2, 9, 10, 4]
    for got, expected in zip(fetch_all(stream, steps), fetch_all(resident, steps), strict=True):
        assert_equal(got, expected)
    assert stream.steps_until_next_window(4) == 1
    stream.close()


class OfProcess:
    """The sharding of a batch as a process sees it whose devices hold these parts."""

    def __init__(self, *parts):
        self.parts = parts

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*part),) for i, part in enumerate(self.parts)}


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ([(0, 3), (0, 3)], [0, 1, 2]),
        ([(3, 6)], [3, 4, 5]),
        ([(4, 6), (0, 2)], [0, 1, 4, 5]),
        ([(None, None)], [0, 1, 2, 3, 4, 5]),  # a model that is split between processes
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(parts, rows):
    whole = loader.StreamLoader(toy(), batch_size=6, seed=SEED, num_threads=0)
    sharding: Any = OfProcess(*parts)
    part = loader.StreamLoader(toy(), batch_size=6, seed=SEED, num_threads=0, sharding=sharding)
    for expected, got in itertools.islice(zip(whole, part, strict=True), 9):
        assert_equal(got, {key: x[rows] for key, x in expected.items()})


def test_windows_change_once_an_epoch():
    load = loader.ResidentLoader(toy(), batch_size=B, seed=SEED)
    windows = [load.window(step) for step in range(14)]
    firsts = [step for step in range(14) if step == 0 or windows[step] is not windows[step - 1]]
    assert firsts == [0, 5, 10]
    assert [load.steps_until_next_window(step) for step in (0, 4, 5, 9, 10)] == [5, 1, 5, 1, 4]


def test_steps_far_beyond_int32_examples():
    step = 2**31 - 9
    load = loader.ResidentLoader(toy(), batch_size=22, seed=SEED)
    batch = fetch_all(load, [step])[0]
    position, epoch = loader.batch_rows(step, batch_size=22, seed=SEED, n=N)
    assert step * 22 > 2**31
    np.testing.assert_array_equal(batch["index"], position)
    np.testing.assert_array_equal(batch["epoch"], epoch)


def test_fetch_is_compiled_once_and_equal_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    single = loader.ResidentLoader(toy(), batch_size=16, seed=SEED)
    meshed = loader.ResidentLoader(toy(), batch_size=16, seed=SEED, sharding=replicated)
    stream = loader.StreamLoader(toy(), batch_size=16, seed=SEED, sharding=rows, num_threads=0)
    fetch = jax.jit(meshed.fetch, out_shardings=rows)
    for step, expected in enumerate(fetch_all(single, range(5))):
        batch = fetch(meshed.data, meshed.window(step), jnp.int32(step))
        assert batch["input"].sharding.is_equivalent_to(rows, 4)
        assert_equal(jax.device_get(batch), expected)
        window = stream.window(step)
        assert window["input"].sharding.is_equivalent_to(rows, 4)
        assert_equal(jax.device_get(window), expected)
    assert fetch._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    text = fetch.lower(meshed.data, meshed.window(0), jnp.int32(0)).compile().as_text() or ""
    assert text and "all-gather" not in text and "all-reduce" not in text
    stream.close()


@pytest.mark.parametrize("batch_size", [0, N + 1])
def test_batches_larger_than_the_source_are_refused(batch_size):
    for make in (loader.ResidentLoader, loader.StreamLoader):
        with pytest.raises(ConfigError, match="batch_size"):
            make(toy(), batch_size=batch_size, seed=0)


def test_batches_that_do_not_divide_over_processes_are_refused():
    with pytest.raises(ConfigError, match="2 processes"):
        next(loader.eval_batches(toy(), batch_size=5, process_count=2))


def test_evaluation_reads_each_example_once_and_pads_with_mask_0():
    part = source.Subset(toy(), np.arange(1, 23), "tail")
    batches = list(loader.eval_batches(part, batch_size=8))
    assert [len(batch["index"]) for batch in batches] == [8, 8, 8]
    mask = np.concatenate([batch["mask"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    assert index[mask == 1].tolist() == list(range(1, 23)) and (mask == 0).sum() == 2
    np.testing.assert_array_equal(batches[-1]["input"][-1], toy().inputs[22])
    assert not any(batch["epoch"].any() for batch in batches)
    halves = [
        list(loader.eval_batches(part, batch_size=8, process_index=p, process_count=2))
        for p in range(2)
    ]
    for expected, *got in zip(batches, *halves, strict=True):
        assert_equal({key: np.concatenate([g[key] for g in got]) for key in expected}, expected)


def test_evaluation_of_an_empty_source_gives_no_batches():
    empty = source.Subset(toy(), np.zeros(0, int), "none")
    assert list(loader.eval_batches(empty, batch_size=4)) == []
    with pytest.raises(ConfigError, match="batch_size"):
        list(loader.eval_batches(toy(), batch_size=0))
