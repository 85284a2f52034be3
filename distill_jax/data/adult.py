"""Adult: whether a person earns more than 50,000 dollars a year; ships with the package.

48,842 rows of the 1994 census, 23.93 % positive, 14 features (Becker, Kohavi 1996, UCI). By
default the test part is a fixed 20 % of each class, ours; figures on it are not figures on UCI's
test set, which `split="uci"` gives. 57 rows repeat the features of an earlier one, and the two may
lie in different parts. Licence and origin: DATA_LICENSES.md.
"""

from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data import _tables

NAMES = {"own": "Adult, own split", "uci": "Adult, UCI's split"}
ASSET = "adult.npz"
SHA256 = "c318316a1e3a0fff208de4f4ec5021ece7ae7a01d7d88b7ff3efb0c574ae41dc"
CLASSES = ("<=50K", ">50K")
CATEGORICAL = (
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "gender",
    "native-country",
)
NUMERIC = (
    "age",
    "fnlwgt",
    "educational-num",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
)
LOG = (NUMERIC.index("capital-gain"), NUMERIC.index("capital-loss"))
PER_CLASS = {"own": (29724, 9350), "uci": (24720, 7841)}
N_TEST = {"own": 9768, "uci": 16281}
CARDINALITIES = (9, 17, 8, 15, 7, 6, 3, 42)


def make(*, split: str = "own", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns 8 categorical and 6 numeric columns, 2 classes.

    "?" is a missing value, id 0. Capital gain and loss enter as log(1 + x). Ids, means and
    deviations are those of the training part.

    Args:
      split: "own", a stratified 20 % for the test, or "uci", the published 32,561 and 16,281 rows.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      ArgumentError: another `split`.
      DataUnavailable: the asset is absent from the installation or damaged.
    """
    train, test = _tables.read_asset(
        ASSET, sha256=SHA256, name=_name(split), licence="CC-BY-4.0", split=split
    )
    return _tables.make_dataset(
        train, test, log=LOG, classes=CLASSES, held_out=held_out, split_seed=split_seed
    )


def spec(*, split: str = "own", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns the sizes and shapes of `make` without reading the asset."""
    del split_seed
    _name(split)
    return _tables.make_spec(
        per_class=PER_CLASS[split],
        n_test=N_TEST[split],
        cardinalities=CARDINALITIES,
        numeric=len(NUMERIC),
        held_out=held_out,
        classes=CLASSES,
    )


def _name(split: str) -> str:
    if split not in NAMES:
        raise ArgumentError(f"split is {split!r}", where="split", hint=nearest(split, NAMES))
    return NAMES[split]
