"""Measures the frozen encoders of runs on data sets that they were not trained on.

  python tools/transfer_matrix.py --data=digits,fashion_mnist_5k --out=transfer.json \\
      runs/simclr runs/byol

Prints a row for each run and a column for each data set: balanced test accuracy of a linear probe
of the encoder (`evaluators.probe`), of the input itself, and of the encoder as it was initialised;
OUT has all metrics. The encoder is that of the best checkpoint, or with --newest of the last one,
and sees what the run's evaluation transforms make of the images, which are scaled to the size of
those that it was trained on; grey images are repeated over channels, colours averaged to grey.
Other inputs must have the shape that the encoder takes.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import CheckpointError, ConfigError, UserError
from distill_jax.data.source import example_ids, example_labels
from distill_jax.run import build
from distill_jax.run import config as config_lib
from distill_jax.run.train import evaluation
from distill_jax.trainer.io.checkpoint import Checkpointer

SPLITS = ("train", "held_out", "test")


class Adapted:
    """Images of another source in the shape `[h, w, c]` that an encoder takes."""

    def __init__(self, source: Source, shape: Sequence[int]):
        self.source, self.shape = source, tuple(shape)
        self.provenance = source.provenance
        self.ids, self.labels = example_ids(source), example_labels(source)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns what the source does, with `input` uint8 `[b, h, w, c]`."""
        rows = self.source.read(indices)
        images = np.asarray(rows["input"])
        if images.shape[1:] != self.shape:
            images = adapt(images, self.shape)
        return {**rows, "input": images}


def adapt(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns images uint8 `[b, h, w, c]` in another size (linear, antialiased) and channels."""
    h, w, c = shape
    pixels = images.astype(np.float32)
    if pixels.shape[3] != c:
        pixels = np.repeat(pixels.mean(axis=3, keepdims=True), c, axis=3)
    if pixels.shape[1:3] != (h, w):
        pixels = np.asarray(jax.image.resize(pixels, (len(pixels), h, w, c), "linear"))
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def fitted(dataset: Dataset, like: Dataset, *, name: str) -> Dataset:
    """Returns a data set with inputs in the shape of those of another.

    Raises:
      ConfigError: they differ in more than size and number of channels of images.
    """
    one, wanted = (d.train.read(np.zeros(1, np.int64))["input"] for d in (dataset, like))
    shapes = [jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree) for tree in (one, wanted)]
    if shapes[0] == shapes[1] and dataset.cardinalities == like.cardinalities:
        return dataset
    if not all(isinstance(x, np.ndarray) and x.dtype == np.uint8 for x in (one, wanted)):
        raise ConfigError(
            f"{name} has other inputs than the encoder was trained on, and they are no images",
            where="--data",
            hint=f"inputs like {shapes[1]}",
        )
    shape = wanted.shape[1:]
    parts = {part: Adapted(getattr(dataset, part), shape) for part in SPLITS}
    return dataset._replace(**parts)


def measure(
    run: pathlib.Path, names: Sequence[str], *, role: str, output: str, newest: bool
) -> dict[str, dict[str, float]]:
    """Returns `{data set: {metric: value}}` of the encoder of a run.

    Raises:
      UserError: the folder holds no run, a data set does not fit, or there is no such output.
    """
    path = run / "config.json"
    if not path.exists():
        raise ConfigError("holds no run", where=str(run), hint="a folder with config.json")
    config = config_lib.from_json(path.read_text())
    config.mesh = config_lib.base().mesh
    config.evaluators = {"probe": {"role": role, "output": output, "balanced": True}}
    config.eval.metric = "held_out/probe_balanced_accuracy"
    config.data.held_out = config.data.held_out or 0.1
    experiment = build.build(config)
    checkpointer = Checkpointer(run / "checkpoints", mode=config.eval.mode)
    step = None if newest else checkpointer.best()
    restored = checkpointer.restore(experiment.abstract_state, step=step)
    checkpointer.close()
    if restored is None:
        raise CheckpointError("holds no finished checkpoint", where=str(run), hint="train it first")
    frozen = build.frozen_networks(experiment, config)
    found = {}
    for name in names:
        other = config_lib.override(config, {"data.name": name})
        other.data.corrupt = config_lib.base().data.corrupt
        dataset = fitted(build.load_dataset(other), experiment.dataset, name=name)
        here = dataclasses.replace(experiment, dataset=dataset)
        metrics, _ = evaluation.evaluate(here, restored.state, frozen, "test")
        metrics |= evaluation.measure_controls(here, config.seed)
        found[name] = {k.partition("/")[2]: v for k, v in evaluation.scalars(metrics).items()}
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Returns a Markdown table: encoder, (raw input, untrained encoder)."""
    lines = [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run, row in found.items():
        cells = []
        for name in names:
            metric = "probe_balanced_accuracy"
            others = [row[name].get(f"{metric}_{c}") for c in ("raw", "initial")]
            said = ", ".join("none" if x is None else f"{x:.4f}" for x in others)
            cells.append(f"{row[name][metric]:.4f} ({said})")
        lines.append(f"| {run} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--data", required=True, help="names of data sets, separated by commas")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of all metrics")
    parser.add_argument("--role", default="student")
    parser.add_argument("--output", default="embedding")
    parser.add_argument("--newest", action="store_true", help="the last state, not the best")
    options = parser.parse_args(argv)
    names = [name for name in options.data.split(",") if name]
    kwargs = {"role": options.role, "output": options.output, "newest": options.newest}
    try:
        found = {str(run): measure(run, names, **kwargs) for run in options.runs}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("Balanced test accuracy of a linear probe: encoder (raw input, untrained encoder)\n")
    print(table(found, names))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
