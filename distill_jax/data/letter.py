"""Letter Recognition: capital letters from 16 measurements of their images, 26 classes.

Frey, Slate 1991, UCI; ships with the package. Of the 20,000 rows, images of letters in 20 fonts,
distorted at random, 1,332 repeat an earlier one, and each is taken once: 18,668 rows. The test
part is a fixed 20 % of each class, ours; figures on it are not figures on UCI's last 4,000 rows,
whose order the source of this copy does not keep. Licence and origin: DATA_LICENSES.md.
"""

from distill_jax.core.api import Dataset
from distill_jax.data import _tables

NAME = "Letter Recognition, distinct rows, own split"
ASSET = "letter.npz"
SHA256 = "f2b6db1abd90c1a88aaa9aa08f25096707f06a91be00b9c76333d96fc055d060"
CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COLUMNS = (
    "x-box",
    "y-box",
    "width",
    "high",
    "onpix",
    "x-bar",
    "y-bar",
    "x2bar",
    "y2bar",
    "xybar",
    "x2ybr",
    "xy2br",
    "x-ege",
    "xegvy",
    "y-ege",
    "yegvx",
)
PER_CLASS = (605, 584, 568, 608, 580, 602, 594, 563, 419, 572, 574, 538, 586)
PER_CLASS += (550, 574, 626, 608, 590, 583, 598, 614, 565, 581, 542, 597, 512)
N_TEST = 3735


def make(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns 16 numeric columns, whole numbers from 0 to 15 before they are standardized.

    No row is in two parts. Means and deviations are those of the training part.

    Raises:
      DataUnavailable: the asset is absent from the installation or damaged.
    """
    train, test = _tables.read_asset(ASSET, sha256=SHA256, name=NAME, licence="CC-BY-4.0")
    return _tables.make_dataset(
        train, test, classes=CLASSES, held_out=held_out, split_seed=split_seed
    )


def spec(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns the sizes and shapes of `make` without reading the asset."""
    del split_seed
    return _tables.make_spec(
        per_class=PER_CLASS,
        n_test=N_TEST,
        cardinalities=(),
        numeric=len(COLUMNS),
        held_out=held_out,
        classes=CLASSES,
    )
