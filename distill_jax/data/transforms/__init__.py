"""Augmentation on the device, inside the jitted step: `(key, batch, step) -> batch`.

A config names a transform by the part of the name after `make_` in the modules of this package and
in `data.masks`. Images are `batch["input"]` `[b, h, w, c]`, uint8 or float; transforms that move or
hide pixels keep the dtype and the labels, and draw per example from `rng.example_keys`: the result
for an example is a function of (seed, epoch, example) whatever the batch, the step and the devices.
`mixup` and `cutmix` pair examples and set `label_probs`; they depend on the step and on the
neighbours in the batch, and `feature_corruption`, for tables, on the neighbours.

Each transform is a draw followed by a public pure map (`crop`, `rotate`, `erase`, ...). Transforms
that expect a range of values declare it in `registry.TAKES`, see `registry.check_values`.
"""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
