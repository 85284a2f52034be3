"""Text of the suite of learned trust: who gave an address, from a passage of 80 words.

Inputs are word counts, log(1 + count) in standard deviations, of the most frequent words of the
pool in the order of frequency. The student sees the first `KNOWN` words only.
"""

import collections
import functools
import json
import os
import pathlib

import numpy as np

from distill_jax.core.api import Model

POOL, WORDS, KNOWN = 5000, 2000, 500
FOLDER = "TRUST_SUITE_TEXT"
"""Environment variable with the folder that `tools/fetch_addresses.py` has filled."""


@functools.cache
def passages() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs `[n, WORDS]` and labels of the pool and of the test part."""
    path = pathlib.Path(os.environ.get(FOLDER, "runs/addresses"), "passages.jsonl")
    if not path.exists():
        raise SystemExit(f"{path} is missing: python tools/fetch_addresses.py --out={path.parent}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [row["text"].split() for row in rows]
    count = collections.Counter(word for text in texts[:POOL] for word in text)
    column = {word: i for i, (word, _) in enumerate(count.most_common(WORDS))}
    x = np.zeros((len(texts), WORDS), np.float32)
    for i, text in enumerate(texts):
        for word in text:
            if word in column:
                x[i, column[word]] += 1
    x = np.log1p(x)
    x = (x - x[:POOL].mean(0)) / x[:POOL].std(0)
    names = sorted({row["label"] for row in rows})
    y = np.array([names.index(row["label"]) for row in rows], np.int32)
    return x[:POOL], y[:POOL], x[POOL:], y[POOL:]


def seen(model: Model) -> Model:
    """The network, on the words that the student knows."""

    def init(key, x):
        return model.init(key, x[:, :KNOWN])

    def apply(params, state, x, *, train, rngs):
        return model.apply(params, state, x[:, :KNOWN], train=train, rngs=rngs)

    return Model(init, apply)
