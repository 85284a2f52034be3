"""KDD99 attack types: which attack a connection is, 7 classes; ships with the package.

The union of the five two-class extracts of the KDD Cup 1999 data in the KEEL repository
(tools/build_assets.py), each class taken once and equal rows counted once: 2,414 rows of 41
features. There are no normal connections, the classes are KEEL's (rootkit and imap are one), and
the split, 70 % train and 30 % test of each class, is ours: figures on it are not figures on KDD99.
Licence and origin: DATA_LICENSES.md.
"""

from distill_jax.core.api import Dataset
from distill_jax.data import _tables
from distill_jax.data.nsl_kdd import LOG, NUMERIC

NAME = "KDD99 attack types (KEEL extracts)"
ASSET = "kdd99_attack_types.npz"
SHA256 = "74c9348a49fed992c22ebf696fb534385d4efdadf88684366e6845cfdd6d2663"
CLASSES = (
    "back",
    "buffer_overflow",
    "guess_passwd",
    "land",
    "portsweep",
    "rootkit or imap",
    "satan",
)
PER_CLASS = (678, 21, 37, 13, 291, 15, 634)
N_TEST = 725
CARDINALITIES = (4, 40, 12)


def make(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns 3 categorical and 38 numeric columns, treated as in `nsl_kdd`.

    No row is in two parts. Services that occur only in the test part have id 0.

    Raises:
      DataUnavailable: the asset is absent from the installation or damaged.
    """
    train, test = _tables.read_asset(ASSET, sha256=SHA256, name=NAME, licence="CC-BY-4.0")
    return _tables.make_dataset(
        train, test, log=LOG, classes=CLASSES, held_out=held_out, split_seed=split_seed
    )


def spec(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns the sizes and shapes of `make` without reading the asset."""
    del split_seed
    return _tables.make_spec(
        per_class=PER_CLASS,
        n_test=N_TEST,
        cardinalities=CARDINALITIES,
        numeric=len(NUMERIC),
        held_out=held_out,
        classes=CLASSES,
    )
