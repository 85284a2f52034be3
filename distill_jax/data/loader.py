"""Batches as a function of (seed, n): the same on any device and process count.

Training reads the endless concatenation of one permutation an epoch; batch n holds its positions
n*B .. n*B + B - 1. Every example is used exactly once per epoch, even where a batch straddles two
epochs. Nothing is stateful: resuming starts from another n.

Both loaders are used in the same way, and the jitted step does not depend on which one is used:

    step(..., loader.data, loader.window(n))          # on the host, n = 0, 1, ...
    batch = loader.fetch(data, window, n)             # inside jit, pure

`data` is constant. `window` covers the steps up to `steps_until_next_window`: an epoch where the
data are resident, one batch where they are streamed.
"""

import functools
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from distill_jax.core.api import Array, Batch, PyTree, Source
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data.source import example_ids


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of an epoch: a permutation of 0..n-1, int32 `[n]`, read-only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(n).astype(np.int32)
    order.flags.writeable = False
    return order


def batch_rows(step: int, *, batch_size: int, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions in the source and epochs of batch `step`, both int32 `[b]`."""
    epoch, offset = np.divmod(step * batch_size + np.arange(batch_size), n)
    order = [epoch_order(seed, int(e), n) for e in (epoch[0], epoch[-1])]
    position = np.where(epoch == epoch[0], order[0][offset], order[1][offset])
    return position, epoch.astype(np.int32)


def _check(n: int, batch_size: int) -> None:
    if not 1 <= batch_size <= n:
        raise ArgumentError(
            f"a batch of {batch_size} from {n} training examples",
            where="batch_size",
            hint=f"1 <= batch_size <= {n}: no example may occur twice in a batch's epoch",
        )


def _put(tree: PyTree, sharding: Sharding | None, batch_size: int | None = None) -> PyTree:
    """Puts arrays on the devices; with a batch size, they are this process's rows of the batch."""
    if sharding is None:
        return jax.device_put(tree)

    def one(rows):
        rows = np.asarray(rows)
        shape = rows.shape if batch_size is None else (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(one, tree)


class ResidentLoader:
    """Keeps the whole source on the devices, in its own dtype; batches are gathered inside jit.

    Args:
      source: training examples.
      batch_size: global batch size.
      seed: of the order.
      sharding: replicates `data` and `window` over a mesh; by default the first device.
      teacher_outputs: stored teacher outputs (`trainer.io.teacher_cache`), which `fetch` adds.

    Attributes:
      data: device arrays `[n, ...]`: the entries of `source.read`, and `index`, the example ids.

    Raises:
      ArgumentError: a batch larger than the source.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        sharding: Sharding | None = None,
        teacher_outputs: Any = None,
    ):
        self.n, self.teacher_outputs = len(source), teacher_outputs
        self._tables: dict[int, PyTree] = {}
        _check(self.n, batch_size)
        self.batch_size, self.seed, self.sharding = batch_size, seed, sharding
        rows = source.read(np.arange(self.n))
        self.data = _put({**rows, "index": example_ids(source)}, sharding)
        self._first, self._stop, self._window = 0, 0, {}

    def window(self, step: int) -> Mapping[str, Array]:
        """Returns the data that `fetch` needs about the epoch in which batch `step` begins.

        `epoch` is an int32 scalar, `order` int32 `[2n]` the order of that epoch followed by that of
        the next one. Computed when the epoch changes.
        """
        if not self._first <= step < self._stop:
            self._move(int(step))
        return self._window

    def steps_until_next_window(self, step: int) -> int:
        """Returns the number of steps, including this one, for which `window(step)` is valid."""
        self.window(step)
        return self._stop - step

    def _move(self, step: int) -> None:
        epoch = step * self.batch_size // self.n
        first, stop = (-(-e * self.n // self.batch_size) for e in (epoch, epoch + 1))
        self._first, self._stop = first, stop
        orders = [epoch_order(self.seed, e, self.n) for e in (epoch, epoch + 1)]
        window = {"order": np.concatenate(orders), "epoch": np.int32(epoch)}
        self._window = _put(window, self.sharding)
        if self.teacher_outputs is not None:
            views = [self.teacher_outputs.view(e) for e in (epoch, epoch + 1)]
            self._tables = {v: self._tables.get(v) or self._table(v) for v in views}
            names = ("now", "next")[: self.teacher_outputs.views]
            tables = {name: self._tables[v] for name, v in zip(names, views, strict=False)}
            self._window["teacher_outputs"] = tables

    def _table(self, view: int) -> PyTree:
        everything = np.arange(self.n)
        return _put(self.teacher_outputs.read(np.full(self.n, view), everything), self.sharding)

    def fetch(self, data: PyTree, window: Mapping[str, Array], step: Array) -> Batch:
        """Returns batch `step` from `data` and `window(step)`; see `fetch_resident`."""
        return fetch_resident(data, window, step, batch_size=self.batch_size)


def fetch_resident(
    data: PyTree, window: Mapping[str, Array], step: Array, *, batch_size: int
) -> Batch:
    """Gathers batch `step` from resident data; pure, for use inside jit.

    Constrain the sharding of the result: the partitioner then gathers on each device only the
    rows that it keeps. Offsets stay below 2n, so int32 holds them; both products may wrap around.

    Args:
      data: `ResidentLoader.data`.
      window: `ResidentLoader.window(step)`.
      step: int32 scalar.
      batch_size: b.
    """
    n = window["order"].shape[0] // 2
    start = step * batch_size - window["epoch"] * n
    position = jax.lax.dynamic_slice_in_dim(window["order"], start, batch_size)
    # Kept out of the gather's loop, where XLA:CPU would slice again for every element.
    position = jax.lax.optimization_barrier(position)
    rows = jax.tree.map(lambda a: a.at[position].get(mode="promise_in_bounds"), data)
    later = start + jnp.arange(batch_size, dtype=jnp.int32) >= n
    if "teacher_outputs" in window:
        stored = jax.tree.map(
            lambda a: a.at[position].get(mode="promise_in_bounds"), window["teacher_outputs"]
        )
        rows["teacher_outputs"] = stored["now"]
        if "next" in stored:
            rows["teacher_outputs"] = jax.tree.map(
                lambda now, after: jnp.where(
                    later.reshape((-1,) + (1,) * (now.ndim - 1)), after, now
                ),
                stored["now"],
                stored["next"],
            )
    return {
        **rows,
        "epoch": window["epoch"] + later.astype(jnp.int32),
        "mask": jnp.ones(batch_size, jnp.float32),
    }


def resident_shapes(source: Source, *, sharding: Sharding) -> tuple[PyTree, PyTree]:
    """Returns `data` and `window` of a `ResidentLoader` as `jax.ShapeDtypeStruct`s."""
    n = len(source)

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = source.read(np.zeros(1, np.int64))
    data = jax.tree.map(lambda x: spec((n, *x.shape[1:]), x.dtype), dict(rows))
    window = {"order": spec((2 * n,), jnp.int32), "epoch": spec((), jnp.int32)}
    return {**data, "index": spec((n,), jnp.int32)}, window


class StreamLoader:
    """Reads batches ahead on threads (grain), for sources that do not fit on a device.

    The batches equal those of `ResidentLoader`; each process reads the rows that its devices hold.

    Args:
      source: training examples.
      batch_size: global batch size.
      seed: of the order.
      start: the step of the first batch of `iter(loader)`.
      num_threads: threads that call `source.read`. 0 reads in the caller's thread, best for
        arrays in memory; threads pay where reading waits for a disk or decodes.
      prefetch: batches read ahead.
      sharding: of the batch axis over a mesh; by default all rows, on the first device.
      teacher_outputs: stored teacher outputs (`trainer.io.teacher_cache`), which batches carry.

    Raises:
      ArgumentError: a batch larger than the source.
      DataUnavailable: grain is not installed.
    """

    data: Mapping[str, Array]

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        num_threads: int = 2,
        prefetch: int = 4,
        sharding: Sharding | None = None,
        teacher_outputs: Any = None,
    ):
        _check(len(source), batch_size)
        try:
            import grain
        except ImportError as error:
            raise DataUnavailable(
                "streaming reads with grain, which is not installed",
                where="resident",
                hint="pip install grain, or keep the data on the device",
            ) from error
        self.rows = np.arange(batch_size)
        if sharding is not None:
            held = sharding.addressable_devices_indices_map((batch_size,)).values()
            # Processes that share a split model hold the same rows.
            self.rows = np.unique(np.concatenate([self.rows[index] for index in held]))
        self.source, self.batch_size, self.seed, self.start = source, batch_size, seed, start
        self.sharding, self.data, self.teacher_outputs = sharding, {}, teacher_outputs
        self._ids = example_ids(source)
        self._grain = grain
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
        )
        self._batches, self._step, self._window = None, -1, {}

    def batch(self, step: int) -> Mapping[str, Any]:
        """Reads this process's rows of batch `step`, NumPy arrays `[rows, ...]`."""
        position, epoch = batch_rows(
            step, batch_size=self.batch_size, seed=self.seed, n=len(self.source)
        )
        position, epoch = position[self.rows], epoch[self.rows]
        stored = (
            {}
            if self.teacher_outputs is None
            else {"teacher_outputs": self.teacher_outputs.read(epoch, position)}
        )
        return {
            **self.source.read(position),
            **stored,
            "index": self._ids[position],
            "epoch": epoch,
            "mask": np.ones(len(position), np.float32),
        }

    def iterate(self, start: int) -> Generator[Mapping[str, Any], None, None]:
        """Yields the batches from `start` on, read ahead; `close()` ends the threads."""
        steps = self._grain.MapDataset.range(start, np.iinfo(np.int32).max)
        batches = iter(steps.map(self.batch).to_iter_dataset(self._read_options))
        try:
            yield from batches
        finally:
            batches.close()

    def __iter__(self) -> Generator[Mapping[str, Any], None, None]:
        return self.iterate(self.start)

    def window(self, step: int) -> Batch:
        """Returns batch `step` on the devices, for any step; the next one is fast."""
        if self._batches is None or step not in (self._step, self._step + 1):
            self.close()
            self._batches, self._step = self.iterate(step), step - 1
        if step == self._step + 1:
            batch = next(self._batches)
            size = self.batch_size if self.sharding is not None else None
            self._window, self._step = _put(batch, self.sharding, size), step
        return self._window

    def steps_until_next_window(self, step: int) -> int:
        """Returns 1: a window is one batch."""
        del step
        return 1

    def fetch(self, data: PyTree, window: Batch, step: Array) -> Batch:
        """Returns the window: it is batch `step`."""
        del data, step
        return window

    def close(self) -> None:
        """Stops the reading threads of `window`; a later `window` starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def chunk_batches(
    source: Source, positions: np.ndarray, *, batch_size: int, epoch: int
) -> Iterator[Mapping[str, Any]]:
    """Yields the examples at `positions` in this order, as NumPy batches of `batch_size` rows.

    The last batch is filled with copies of the last example, with mask 0.
    """
    ids = example_ids(source)
    for start in range(0, len(positions), batch_size):
        row = start + np.arange(batch_size)
        position = positions[np.minimum(row, len(positions) - 1)]
        yield {
            **source.read(position),
            "index": ids[position],
            "epoch": np.full(batch_size, epoch, np.int32),
            "mask": (row < len(positions)).astype(np.float32),
        }


def eval_batches(
    source: Source, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Mapping[str, Any]]:
    """Yields the whole source in order, as NumPy batches that all have `batch_size` rows.

    The last batch is filled with copies of the last example, with mask 0. `epoch` is 0. Each
    process reads its contiguous share of every batch. An empty source gives no batches.

    Raises:
      ArgumentError: a batch size below 1 or not divisible over the processes.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}", where="batch_size", hint="at least 1")
    if batch_size % process_count:
        raise ArgumentError(
            f"a batch of {batch_size} does not divide over {process_count} processes",
            where="batch_size",
            hint=f"a multiple of {process_count}",
        )
    share = batch_size // process_count
    ids = example_ids(source)
    for start in range(0, len(source), batch_size):
        row = start + process_index * share + np.arange(share)
        position = np.minimum(row, len(source) - 1)
        yield {
            **source.read(position),
            "index": ids[position],
            "epoch": np.zeros(share, np.int32),
            "mask": (row < len(source)).astype(np.float32),
        }
