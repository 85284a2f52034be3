"""Adult as a multilabel task: five facts about a person, predicted from the other census columns.

The rows and the test part are those of `adult` with its own split. A label is taken from one column
or from the income, and columns that reveal a label, fully or largely, are not inputs:

| label | present where | columns left out |
|---|---|---|
| `high_income` | income above 50,000 dollars | |
| `married` | marital-status begins with "Married" | marital-status, relationship |
| `female` | gender is "Female" | gender, relationship |
| `full_time` | hours-per-week is 40 or more | hours-per-week |
| `degree` | educational-num is 13 or more: a bachelor's degree | education, educational-num |

The remaining columns are workclass, occupation, race, native-country, age, fnlwgt, capital-gain and
capital-loss. Licence and origin: DATA_LICENSES.md.
"""

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.data import _tables, adult

LABELS = ("high_income", "married", "female", "full_time", "degree")
CATEGORICAL = ("workclass", "occupation", "race", "native-country")
NUMERIC = ("age", "fnlwgt", "capital-gain", "capital-loss")
LOG = (NUMERIC.index("capital-gain"), NUMERIC.index("capital-loss"))


def make(*, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Returns 4 categorical and 4 numeric columns, 5 labels.

    The held-out part is drawn uniformly from all training examples.

    Args:
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: the asset is absent from the installation or damaged.
    """
    parts = _tables.read_asset(
        adult.ASSET, sha256=adult.SHA256, name="Adult, five labels, own split", licence="CC-BY-4.0"
    )
    train, test = map(_with_labels, parts)
    return _tables.make_dataset(
        train,
        test,
        log=LOG,
        classes=LABELS,
        held_out=held_out,
        split_seed=split_seed,
        task="multilabel",
    )


def _with_labels(raw: _tables.Raw) -> _tables.Raw:
    """Returns a part of Adult with the columns and labels of the module."""

    def column(name: str) -> np.ndarray:
        j = adult.CATEGORICAL.index(name)
        return np.array(raw.values[j])[raw.codes[:, j]]

    def number(name: str) -> np.ndarray:
        return raw.numeric[:, adult.NUMERIC.index(name)]

    labels = (
        raw.labels == 1,
        np.char.startswith(column("marital-status"), "Married"),
        column("gender") == "Female",
        number("hours-per-week") >= 40,
        number("educational-num") >= 13,
    )
    categorical = [adult.CATEGORICAL.index(name) for name in CATEGORICAL]
    return raw._replace(
        codes=raw.codes[:, categorical],
        values=[raw.values[j] for j in categorical],
        numeric=np.stack([number(name) for name in NUMERIC], 1),
        labels=np.stack(labels, 1),
    )
