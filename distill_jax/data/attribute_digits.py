"""Digits described by attributes, some digits only in the test part (zero-shot classification).

The attributes of a digit are the segments that light up when a seven-segment display shows it. A
network learns the attributes of the seen digits and recognizes an unseen one by its signature
(Lampert et al. 2009, CVPR, direct attribute prediction; `evaluators.attributes`). The task is
"multilabel". The images are those of scikit-learn, see `digits`.
"""

from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset
from distill_jax.data import digits, source

SEGMENTS = ("top", "upper_left", "upper_right", "middle", "lower_left", "lower_right", "bottom")
_LIT = "1110111 0010010 1011101 1011011 0111010 1101011 1101111 1010010 1111111 1111011"
SIGNATURES = np.array([[int(bit) for bit in word] for word in _LIT.split()], np.float32)
"""Segments of each digit, `[10, 7]`."""


def make(
    *, unseen: int = 2, shuffled: bool = False, held_out: float = 0.1, split_seed: int = 0
) -> Dataset:
    """Returns images 8x8x1 with labels `[7]`, the `digit` and `unseen`, 1 for unseen digits.

    Args:
      unseen: number of digits that the training and the held-out part do not have, from 1 to 8.
      shuffled: whether signatures are dealt to digits at random, a control: they say nothing then.
      held_out: share of the seen training images that is held out.
      split_seed: seed of the unseen digits, of the deal and of the split; in a config "run" stands
        for the seed of the run.

    Raises:
      DataUnavailable: scikit-learn is not installed.
    """
    ranges.within("[1, 8]", whole=True, unseen=unseen)
    ranges.counts(split_seed=split_seed)
    random = np.random.Generator(np.random.Philox(key=[split_seed, 11]))
    apart = random.permutation(10)[:unseen]
    order = random.permutation(10) if shuffled else np.arange(10)
    whole = digits.make(held_out=0.0)

    def part(name: str, of: source.Source, *, seen_only: bool) -> source.Source:
        rows: Any = of.read(np.arange(len(of)))
        digit = rows["label"]
        chosen = np.flatnonzero(~np.isin(digit, apart)) if seen_only else np.arange(len(digit))
        made = source.make_array_source(
            rows["input"][chosen],
            SIGNATURES[order][digit[chosen]],
            name=f"digits by attributes ({name}, unseen {sorted(apart.tolist())})",
            origin=of.provenance.origin,
            licence=of.provenance.licence,
            task="multilabel",
        )
        flags = {"digit": digit[chosen], "unseen": np.isin(digit[chosen], apart)}
        made.more |= {name: flag.astype(np.int32) for name, flag in flags.items()}
        return made

    return source.make_dataset(
        part("train", whole.train, seen_only=True),
        part("test", whole.test, seen_only=False),
        held_out=held_out,
        split_seed=split_seed,
        classes=SEGMENTS,
        task="multilabel",
    )
