"""Criteo and Avazu: files of the exact layouts, against independent transcriptions."""

import datetime
import gzip
import hashlib
import math

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.data import _tables, avazu, criteo, loader, source
from tests.data.test_tables import assert_equal, rows_of

BUCKETS = 50
N = 40


def criteo_rows(n=N, seed=0):
    """Cells of the challenge's layout: counts with heavy tails, some negative, some missing."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        counts = [str(int(x)) for x in draw.pareto(0.8, 13) * 5 - 2]
        names = [f"{x:08x}" for x in draw.integers(0, 2**32, 26)]
        cells = [*counts, *names]
        for j in draw.integers(0, 39, 6):
            cells[j] = ""
        rows.append([str(int(i % 4 == 1)), *cells])
    return rows


def avazu_rows(n=N, seed=0):
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        hour = datetime.datetime(2014, 10, 21) + datetime.timedelta(hours=5 * i)
        cells = [f"{x:08x}" for x in draw.integers(0, 300, 21)]
        cells[i % 21] = ""
        rows.append([str(10**18 + i), str(int(i % 3 == 1)), hour.strftime("%y%m%d%H"), *cells])
    return rows


def write(path, rows, *, sep="\t", end="\n", header=None):
    lines = [sep.join(row) for row in ([header] if header else []) + rows]
    content = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_avazu(path, rows):
    return write(path, rows, sep=",", header=avazu.COLUMNS)


def bucket(column, value, buckets=BUCKETS):
    """The documented hash."""
    if value == "":
        return 0
    digest = hashlib.blake2b(value.encode(), key=column.encode(), digest_size=8).digest()
    return 1 + sum(byte << (8 * k) for k, byte in enumerate(digest)) % (buckets - 1)


def expected_numbers(cells, cut):
    """Log counts scaled by the present values of the first `cut` rows."""
    out = np.zeros((len(cells), 13))
    for j in range(13):
        x = [row[1 + j] for row in cells]
        y = [math.copysign(math.log1p(abs(int(v))), int(v)) if v else None for v in x]
        known = [v for v in y[:cut] if v is not None]
        mean = sum(known) / len(known)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in known) / len(known))
        out[:, j] = [0.0 if v is None else (v - mean) / deviation for v in y]
    return out


def test_criteo_against_python(tmp_path):
    cells = criteo_rows()
    path = write(tmp_path / "train.txt", cells)
    data = criteo.make(path=path, buckets=BUCKETS, test_fraction=0.25, held_out=0.0)
    ids, numeric, labels = (
        np.concatenate(parts) for parts in zip(rows_of(data.train), rows_of(data.test), strict=True)
    )
    want = [[bucket(f"C{j + 1}", row[14 + j]) for j in range(26)] for row in cells]
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(numeric, expected_numbers(cells, 30), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(labels, [int(row[0]) for row in cells])
    assert (ids == 0).any() and (ids < BUCKETS).all() and ids.max() == BUCKETS - 1
    assert (ids.dtype, numeric.dtype, labels.dtype) == (np.int32, np.float32, np.int32)
    assert data.cardinalities == (BUCKETS,) * 26 and data.classes == ("no click", "click")
    assert any(cell.startswith("-") for row in cells for cell in row)


def test_avazu_against_python(tmp_path):
    cells = avazu_rows()
    path = write_avazu(tmp_path / "train", cells)
    data = avazu.make(path=path, buckets=BUCKETS, held_out=0.0)
    ids, numeric, labels = (
        np.concatenate(parts) for parts in zip(rows_of(data.train), rows_of(data.test), strict=True)
    )
    # 21 October 2014 was a Tuesday.
    hours = 5 * np.arange(N)
    np.testing.assert_array_equal(ids[:, 0], 1 + hours % 24)
    np.testing.assert_array_equal(ids[:, 1], 1 + (1 + hours // 24) % 7)
    names = avazu.COLUMNS[3:]
    want = [
        [bucket(name, cell) for name, cell in zip(names, row[3:], strict=True)] for row in cells
    ]
    np.testing.assert_array_equal(ids[:, 2:], want)
    np.testing.assert_array_equal(labels, [int(row[1]) for row in cells])
    assert numeric.shape == (N, 0) and numeric.dtype == np.float32
    assert data.cardinalities == (25, 8, *[BUCKETS] * 21) and len(avazu.COLUMNS) == 24
    assert ((ids >= 0) & (ids < np.array(data.cardinalities)[None])).all()


def test_the_hash_is_stable_and_depends_on_the_column():
    assert _tables.make_hash("C1", 1000)("68fd1e64") == 1 + 130782546492524071 % 999
    a, b = (_tables.make_hash(column, 2**20) for column in ("C1", "C2"))
    values = [f"{x:08x}" for x in range(400)]
    assert sum(a(v) == b(v) for v in values) < 5 and a("") == b("") == 0
    counts = np.bincount([_tables.make_hash("C1", 5)(v) for v in values], minlength=5)
    assert counts[0] == 0 and (abs(counts[1:] - 100) < 4 * 75**0.5).all()


@pytest.mark.parametrize("chunk", [1, 7, N])
def test_pieces_do_not_matter(tmp_path, monkeypatch, chunk):
    path = write(tmp_path / "train.txt", criteo_rows())
    whole = criteo.make(path=path, buckets=BUCKETS)
    monkeypatch.setattr(_tables, "CHUNK", chunk)
    again = criteo.make(path=path, buckets=BUCKETS)
    for name in ("train", "held_out", "test"):
        assert_equal(getattr(whole, name), getattr(again, name))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_compression_and_line_ends_do_not_matter(tmp_path, name, end):
    plain = criteo.make(path=write(tmp_path / "plain", criteo_rows()), buckets=BUCKETS)
    other = criteo.make(path=write(tmp_path / name, criteo_rows(), end=end), buckets=BUCKETS)
    assert_equal(plain.train, other.train)
    assert_equal(plain.test, other.test)
    assert plain.test.provenance.sha256 == other.test.provenance.sha256


def test_the_last_line_may_lack_its_end(tmp_path):
    path = tmp_path / "train.txt"
    write(path, criteo_rows())
    whole = criteo.make(path=str(path), buckets=BUCKETS)
    path.write_bytes(path.read_bytes()[:-1])
    assert_equal(whole.test, criteo.make(path=str(path), buckets=BUCKETS).test)


@pytest.mark.parametrize("module", [criteo, avazu])
def test_max_rows_reads_the_start(tmp_path, monkeypatch, module):
    cells, save = {
        criteo: (criteo_rows(), write),
        avazu: (avazu_rows(), write_avazu),
    }[module]
    save(tmp_path / "all", cells)
    save(tmp_path / "some", cells[:20])
    monkeypatch.setattr(_tables, "CHUNK", 6)
    some = module.make(path=str(tmp_path / "some"), buckets=BUCKETS)
    first = module.make(path=str(tmp_path / "all"), buckets=BUCKETS, max_rows=20)
    more = module.make(path=str(tmp_path / "some"), buckets=BUCKETS, max_rows=1000)
    for data in (first, more):
        assert_equal(some.train, data.train)
        assert_equal(some.test, data.test)
    assert len(first.train) + len(first.held_out) + len(first.test) == 20


def test_the_test_part_is_the_end_and_changes_nothing_in_training(tmp_path):
    cells = criteo_rows()
    changed = [*cells[:30], *criteo_rows(seed=1)[:10]]
    a, b = (
        criteo.make(path=write(tmp_path / name, rows), buckets=BUCKETS, test_fraction=0.25)
        for name, rows in (("a", cells), ("b", changed))
    )
    assert_equal(a.train, b.train)
    assert_equal(a.held_out, b.held_out)
    ids = [rows_of(data.test)[0] for data in (a, b)]
    assert len(ids[0]) == 10 and (ids[0] != ids[1]).any()
    parts = np.concatenate([source.example_ids(part) for part in (a.train, a.held_out)])
    np.testing.assert_array_equal(np.sort(parts), np.arange(30))
    assert a.test.provenance.name == "Criteo layout, a (test: rows 31 to 40)"
    assert a.train.provenance.name.startswith("Criteo layout, a (train: rows 1 to 30)")


def test_provenance_is_the_digest_of_the_arrays(tmp_path):
    path = write_avazu(tmp_path / "train", avazu_rows())
    a, b = (avazu.make(path=path, buckets=buckets) for buckets in (BUCKETS, BUCKETS + 1))
    ids, numeric, labels = rows_of(a.test)
    arrays = {"input": {"categorical": ids, "numeric": numeric}, "label": labels}
    assert a.test.provenance.sha256 == source.checksum(arrays) != b.test.provenance.sha256
    assert a.test.provenance.origin == path and a.test.provenance.n == len(a.test) == 4


def test_batches_of_a_table_without_numbers(tmp_path):
    data = avazu.make(path=write_avazu(tmp_path / "train", avazu_rows()), buckets=BUCKETS)
    batches = list(loader.eval_batches(data.test, batch_size=3))
    shapes = [{k: v.shape for k, v in batch["input"].items()} for batch in batches]
    assert shapes == [{"categorical": (3, 23), "numeric": (3, 0)}] * 2


def replaced(rows, at, column, cell):
    rows = [list(row) for row in rows]
    rows[at][column] = cell
    return rows


@pytest.mark.parametrize(
    ("rows", "message", "hint"),
    [
        (
            [*criteo_rows(9), criteo_rows(1)[0][:-1]],
            "line 10: 39 columns",
            "40 columns between tab",
        ),
        ([*criteo_rows(9), [*criteo_rows(1)[0], ""]], "line 10: 41 columns", "label, I1, I2, ..."),
        (
            replaced(criteo_rows(), 10, 2, "1e"),
            "line 11: I2 is '1e'",
            "a finite number, or nothing",
        ),
        (replaced(criteo_rows(), 10, 2, "inf"), "line 11: I2 is 'inf'", "a finite number"),
        (replaced(criteo_rows(), 7, 0, "2"), "line 8: label is '2'", "0 or 1"),
        (replaced(criteo_rows(), 7, 0, ""), "line 8: label is ''", "0 or 1"),
    ],
)
def test_malformed_criteo_lines_are_named(tmp_path, monkeypatch, rows, message, hint):
    monkeypatch.setattr(_tables, "CHUNK", 4)
    path = write(tmp_path / "train.txt", rows)
    with pytest.raises(DataUnavailable) as error:
        criteo.make(path=path)
    assert message in error.value.what and hint in error.value.hint and error.value.where == path


@pytest.mark.parametrize(
    ("rows", "message", "hint"),
    [
        (replaced(avazu_rows(), 4, 2, "14103124"), "line 6: hour is '14103124'", "YYMMDDHH"),
        (replaced(avazu_rows(), 4, 2, "2014103"), "line 6: hour is '2014103'", "YYMMDDHH"),
        (replaced(avazu_rows(), 0, 1, "yes"), "line 2: click is 'yes'", "0 or 1"),
        ([*avazu_rows(3), ["1", "0"]], "line 5: 2 columns", "24 columns between ','"),
    ],
)
def test_malformed_avazu_lines_are_named(tmp_path, rows, message, hint):
    with pytest.raises(DataUnavailable) as error:
        avazu.make(path=write_avazu(tmp_path / "train", rows))
    assert message in error.value.what and hint in error.value.hint


def test_another_header_is_refused(tmp_path):
    path = write(tmp_path / "train", avazu_rows(), sep=",")
    with pytest.raises(DataUnavailable, match="line 1: the header is '10000000") as error:
        avazu.make(path=path)
    assert "id, click, hour" in error.value.hint


@pytest.mark.parametrize("module", [criteo, avazu])
def test_files_that_cannot_be_read_are_named(tmp_path, module):
    for path, message in ((tmp_path / "absent", "no such file"), (tmp_path, "is not a file")):
        with pytest.raises(DataUnavailable, match=message) as error:
            module.make(path=str(path))
        assert "challenge" in error.value.hint
    cut = tmp_path / "cut.gz"
    write(cut, criteo_rows())
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(DataUnavailable, match="cannot be read"):
        module.make(path=str(cut))
    (tmp_path / "binary").write_bytes(b"\x80\x81\n")
    with pytest.raises(DataUnavailable, match="cannot be read"):
        module.make(path=str(tmp_path / "binary"))


def test_files_without_rows_are_refused(tmp_path):
    with pytest.raises(DataUnavailable, match="no examples"):
        criteo.make(path=write(tmp_path / "empty", []))
    with pytest.raises(DataUnavailable, match="no examples"):
        avazu.make(path=write_avazu(tmp_path / "header", []))


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [
        ({"buckets": 1}, "buckets"),
        ({"buckets": 2.5}, "buckets"),
        ({"max_rows": -1}, "max_rows"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"test_fraction": 0.001}, "test_fraction"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, kwargs, where):
    path = write(tmp_path / "train.txt", criteo_rows())
    with pytest.raises(ConfigError) as error:
        criteo.make(path=path, **kwargs)
    assert error.value.where == where
