"""What the three forms of a contrastive loss hold in memory, from the compiler's own analysis.

  python benchmarks/ring.py --out=benchmarks/results/ring.json

Value and gradient of `losses/contrastive.py:nt_xent` with two views are compiled for a global batch
of 8,192 and one of 16,384, embeddings of 128 numbers, on eight devices and on one; `temporary_mib`
is what a device needs beside arguments and results. Nothing of that size is run. At a batch of 64
all are run in float64 and compared with one table on one device, padding among the examples.
"""

import argparse
import pathlib

import _record
import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import partition
from distill_jax.losses import contrastive

DEVICES, BATCHES, VIEWS, WIDTH, SMALL = 8, (8192, 16384), 2, 128, 64
CASES = [("dense", 8), ("gathered", 8), ("ring", 8), ("dense", 1), ("ring", 1)]


def make_loss(form: str):
    def loss(z, mask):
        value = contrastive.nt_xent(z, mask, temperature=0.1, form=form)
        return (mask * value).sum() / mask.sum()

    return jax.value_and_grad(loss)


def lower(form: str, devices: int, batch: int, dtype):
    mesh = partition.make_mesh(devices=jax.devices()[:devices])
    sharding = partition.over_batch(mesh)
    z = jax.ShapeDtypeStruct((batch, VIEWS, WIDTH), dtype, sharding=sharding)
    mask = jax.ShapeDtypeStruct((batch,), dtype, sharding=sharding)
    shardings = (partition.replicated(mesh), sharding)
    with jax.set_mesh(mesh):
        lowered = jax.jit(make_loss(form), out_shardings=shardings).lower(z, mask)
    return lowered.compile(), sharding


def measure(form: str, devices: int, batch: int) -> dict[str, float | int | str]:
    found = lower(form, devices, batch, jnp.float32)[0].memory_analysis()
    assert found is not None
    mib = {
        "temporary_mib": found.temp_size_in_bytes / 2**20,
        "arguments_mib": found.argument_size_in_bytes / 2**20,
        "results_mib": found.output_size_in_bytes / 2**20,
    }
    rounded = {k: round(v, 2) for k, v in mib.items()}
    return {"form": form, "devices": devices, "batch": batch, **rounded}


def deviation(form: str, devices: int) -> dict[str, float]:
    """Largest difference from one table on one device, relative to the largest entry."""
    random = np.random.default_rng(0)
    z = random.normal(size=(SMALL, VIEWS, WIDTH))
    mask = (np.arange(SMALL) % 9 != 4).astype(np.float64)
    want = jax.jit(make_loss("dense"))(z, mask)
    compiled, sharding = lower(form, devices, SMALL, jnp.float64)
    got = compiled(jax.device_put(z, sharding), jax.device_put(mask, sharding))
    relative = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(a)))  # noqa: E731
    names = ("value", "gradient")
    return {n: relative(*map(np.asarray, pair)) for n, *pair in zip(names, want, got, strict=True)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path)
    out = parser.parse_args().out
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    memory = []
    for batch in BATCHES:
        for case in CASES:
            memory.append(measure(*case, batch))
            print(memory[-1], flush=True)
    with jax.enable_x64(True):
        every = [(form, devices) for form in contrastive.FORMS for devices in (1, 2, 4, 8)]
        equal = [{"form": f, "devices": n, **deviation(f, n)} for f, n in every]
    block, contrastive.BLOCK = contrastive.BLOCK, 24  # many blocks, the last ragged
    with jax.enable_x64(True):
        equal += [{"form": "ring", "devices": 1, "block": 24, **deviation("ring", 1)}]
    contrastive.BLOCK = block
    for row in equal:
        print(row, flush=True)
    result = {
        "versions": _record.versions("jax", "jaxlib"),
        "views": VIEWS,
        "width": WIDTH,
        "block": contrastive.BLOCK,
        "memory_of_a_device": memory,
        "small": {"batch": SMALL, "seed": 0, "relative_difference": equal},
    }
    _record.write(result, out, indent=2)


if __name__ == "__main__":
    main()
