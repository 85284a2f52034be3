"""Known faults in a data set: how many, where, and nowhere else."""

import statistics
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.api import Dataset, Provenance, Source
from distill_jax.core.errors import ConfigError
from distill_jax.data import corruption, loader, source, synthetic
from distill_jax.data.corruption import corrupt

K = 5
PARTS = ("train", "held_out", "test")
SIZES = {"n_train": 2000, "n_test": 1000, "image_size": 4, "num_classes": K, "held_out": 0.2}
EVERYTHING = {"label_noise": 0.3, "teacher_damage": 0.2, "outliers": 0.1}
SMALL = SIZES | {"n_train": 60, "n_test": 23}


def rows_of(part):
    return part.read(np.arange(len(part)))


def by_id(part, key):
    return dict(zip(source.example_ids(part).tolist(), rows_of(part)[key].tolist(), strict=True))


def uniforms(i, seed, purpose):
    """Pair i of a Philox stream, which gives four words of 64 bits a counter (see its paper)."""
    philox = np.random.Philox(key=[seed, zlib.crc32(purpose.encode())]).advance(i // 2)
    words = philox.random_raw(4)[2 * (i % 2) :][:2]
    return [int(word >> 11) / 2**53 for word in words]


def assert_share(hits, n, p):
    assert abs(hits - n * p) < 4 * (n * p * (1 - p)) ** 0.5 + 1e-9, (hits, n, p)


def array_dataset(inputs, classes):
    n = len(jax.tree.leaves(inputs)[0])
    labels = np.arange(n) % max(len(classes), 1)
    part = source.ArraySource(inputs, labels, Provenance("toy", "", n, ""))
    return Dataset(part, part, part, classes, cardinalities=(3,))


@pytest.mark.parametrize("kwargs", [{}, {"seed": 3, "label_noise_kind": "pair"}])
def test_without_a_share_nothing_happens(kwargs):
    data = synthetic.make(**SMALL)
    assert corrupt(data, **kwargs) is data


def test_label_noise_hits_its_share_of_the_training_part_uniformly():
    data = synthetic.make(**SIZES)
    noisy = corrupt(data, label_noise=0.3)
    clean, rows = source.example_labels(data.train), rows_of(noisy.train)
    hit = rows["label_noisy"] == 1
    assert rows["label_noisy"].dtype == rows["label"].dtype == np.int32
    np.testing.assert_array_equal(hit, rows["label"] != clean)
    assert_share(hit.sum(), len(hit), 0.3)
    pairs = np.stack([clean, rows["label"]], 1)[hit]
    for c in range(K):
        wrong = np.bincount(pairs[pairs[:, 0] == c, 1], minlength=K)
        assert wrong[c] == 0
        for other in np.delete(wrong, c):
            assert_share(other, wrong.sum(), 1 / (K - 1))
    np.testing.assert_array_equal(source.example_labels(noisy.train), rows["label"])
    np.testing.assert_array_equal(rows["input"], rows_of(data.train)["input"])


def test_pair_noise_moves_a_label_to_the_next_class():
    data = synthetic.make(**SIZES)
    rows = rows_of(corrupt(data, label_noise=0.4, label_noise_kind="pair").train)
    clean = source.example_labels(data.train)
    np.testing.assert_array_equal(rows["label"], (clean + rows["label_noisy"]) % K)
    assert_share(rows["label_noisy"].sum(), len(clean), 0.4)


@pytest.mark.parametrize("part", ["held_out", "test"])
def test_what_is_measured_on_stays_clean(part):
    data = synthetic.make(**SMALL)
    before, after = getattr(data, part), getattr(corrupt(data, **EVERYTHING), part)
    rows = rows_of(after)
    for key, values in rows_of(before).items():
        np.testing.assert_array_equal(rows[key], values)
    np.testing.assert_array_equal(source.example_labels(after), source.example_labels(before))
    assert not rows["label_noisy"].any() and not rows["outlier"].any()
    assert set(rows) == {"input", "label", "label_noisy", "teacher_shift", "outlier"}


def test_flags_are_those_of_the_faults_that_are_switched_on():
    keys = {"label_noise": "label_noisy", "teacher_damage": "teacher_shift", "outliers": "outlier"}
    for fault, key in keys.items():
        data = corrupt(synthetic.make(**SMALL), **{fault: 0.2})
        for part in PARTS:
            rows = rows_of(getattr(data, part))
            assert set(rows) == {"input", "label", key} and rows[key].dtype == np.int32


def test_decisions_are_a_function_of_seed_and_id():
    data = corrupt(synthetic.make(**SIZES), label_noise=0.3, teacher_damage=0.4, seed=7)
    clean = by_id(synthetic.make(**SIZES).train, "label")
    label, noisy = by_id(data.train, "label"), by_id(data.train, "label_noisy")
    shift, of_test = by_id(data.train, "teacher_shift"), by_id(data.test, "teacher_shift")
    for i in sorted(clean)[:200]:
        u, size = uniforms(i, 7, "label")
        assert noisy[i] == (u < 0.3)
        assert label[i] == (clean[i] + (u < 0.3) * (1 + int(size * (K - 1)))) % K
        for found, purpose in ((shift, "teacher, train"), (of_test, "teacher, test")):
            u, size = uniforms(i, 7, purpose)
            assert found[i] == (u < 0.4) * (1 + int(size * (K - 1)))


@pytest.mark.parametrize("kind", ["random", "class"])
def test_a_root_example_meets_the_same_fate_under_another_split(kind):
    kwargs = EVERYTHING | {"teacher_damage_kind": kind, "seed": 2}
    one, two = (corrupt(synthetic.make(**SIZES, split_seed=s), **kwargs) for s in (0, 1))
    moved = set(source.example_ids(one.train)) ^ set(source.example_ids(two.train))
    assert len(moved) > 100
    for key in ("label", "label_noisy", "teacher_shift", "outlier"):
        a, b = by_id(one.train, key), by_id(two.train, key)
        assert all(a[i] == b[i] for i in a.keys() & b.keys())
    a, b = by_id(one.held_out, "teacher_shift"), by_id(two.train, "teacher_shift")
    assert len(a.keys() & b.keys()) > 100 and all(a[i] == b[i] for i in a.keys() & b.keys())
    for s in (one, two):
        np.testing.assert_array_equal(
            rows_of(s.train)["input"][-160:], rows_of(one.train)["input"][-160:]
        )


def test_the_order_of_the_training_part_does_not_matter():
    data = synthetic.make(**SMALL)
    order = np.random.default_rng(0).permutation(len(data.train))
    shuffled = data._replace(train=source.Subset(data.train, order, "shuffled"))
    a, b = (rows_of(corrupt(d, **EVERYTHING).train) for d in (data, shuffled))
    for key in a:
        np.testing.assert_array_equal(a[key][: len(order)][order], b[key][: len(order)])
        np.testing.assert_array_equal(a[key][len(order) :], b[key][len(order) :])


def test_equal_seeds_give_equal_data_and_other_seeds_other_data():
    data = synthetic.make(**SMALL)
    a, b, c = (rows_of(corrupt(data, **EVERYTHING, seed=s).train) for s in (0, 0, 1))
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert (a[key] != c[key]).any() or key == "outlier"


def test_examples_hit_at_a_smaller_share_are_hit_at_a_larger_one():
    data = synthetic.make(**SIZES)
    few, many = (rows_of(corrupt(data, label_noise=p).train) for p in (0.2, 0.5))
    hit = few["label_noisy"] == 1
    assert hit.any() and (many["label_noisy"][hit] == 1).all()
    np.testing.assert_array_equal(few["label"][hit], many["label"][hit])


def test_random_teacher_damage_hits_every_part():
    data = corrupt(synthetic.make(**SIZES), teacher_damage=0.4)
    for part in PARTS:
        shift = rows_of(getattr(data, part))["teacher_shift"]
        counts = np.bincount(shift, minlength=K)
        assert len(counts) == K
        assert_share(counts[0], len(shift), 0.6)
        for count in counts[1:]:
            assert_share(count, len(shift), 0.4 / (K - 1))
    # Ids of training and test examples are equal, what happens to them is not.
    a, b = by_id(data.train, "teacher_shift"), by_id(data.test, "teacher_shift")
    assert sum(a[i] != b[i] for i in a.keys() & b.keys()) > 100


@pytest.mark.parametrize(("share", "hit"), [(0.01, 1), (0.4, 2), (0.7, 4), (0.99, 5)])
def test_class_damage_hits_whole_classes_by_their_clean_label(share, hit):
    clean = synthetic.make(**SIZES)
    data = corrupt(clean, teacher_damage=share, teacher_damage_kind="class", label_noise=0.3)
    shifts = {}
    for part in PARTS:
        shift = rows_of(getattr(data, part))["teacher_shift"]
        label = source.example_labels(getattr(clean, part))
        for c in range(K):
            shifts.setdefault(c, set()).update(shift[label == c].tolist())
    assert all(len(values) == 1 and max(values) < K for values in shifts.values())
    assert sum(values != {0} for values in shifts.values()) == hit


def test_seeds_choose_other_classes_and_shifts():
    data = synthetic.make(**SMALL)
    kwargs = {"teacher_damage": 0.4, "teacher_damage_kind": "class"}
    found = set()
    for seed in range(10):
        rows = rows_of(corrupt(data, **kwargs, seed=seed).test)
        found.add(tuple(rows["teacher_shift"][:K].tolist()))  # labels go round the classes
    assert len(found) > 5


@pytest.mark.parametrize("kind", ["random", "class"])
def test_with_two_classes_the_shift_is_one(kind):
    data = synthetic.make(**SIZES | {"num_classes": 2})
    shift = rows_of(corrupt(data, teacher_damage=0.5, teacher_damage_kind=kind).train)
    assert set(shift["teacher_shift"].tolist()) == {0, 1}


def test_outliers_are_clipped_noise_with_random_labels():
    data = synthetic.make(**SIZES | {"image_size": 8, "channels": 3})
    noisy, n = corrupt(data, outliers=0.25), len(data.train)
    rows = rows_of(noisy.train)
    assert len(noisy.train) == noisy.train.provenance.n == len(rows["label"]) == n + 400
    np.testing.assert_array_equal(rows["outlier"], np.arange(n + 400) >= n)
    np.testing.assert_array_equal(rows["input"][:n], rows_of(data.train)["input"])
    np.testing.assert_array_equal(rows["label"][:n], source.example_labels(data.train))
    images = rows["input"][n:].astype(np.float64)
    pixels = images.size
    assert rows["input"].dtype == np.uint8 and images.shape == (400, 8, 8, 3)
    # Black is what rounds to 0, as likely as white; a standard normal variate that is clipped to
    # +-1/2 has the variance 2 (int_0^(1/2) z^2 phi(z) dz + P(z > 1/2) / 4).
    normal = statistics.NormalDist()
    for value in (0, 255):
        assert_share((images == value).sum(), pixels, normal.cdf(1 / 510 - 0.5))
    tail = normal.cdf(-0.5)
    variance = 2 * (0.5 - tail - 0.5 * normal.pdf(0.5) + tail / 4)
    assert abs(images.mean() / 255 - 0.5) < 4 * (variance / pixels) ** 0.5
    assert abs(images.var() / 255**2 - variance) < 2e-3
    neighbours = np.corrcoef(images[..., :-1, 0].ravel(), images[..., 1:, 0].ravel())[0, 1]
    assert abs(neighbours) < 0.03 and len({image.tobytes() for image in images}) == 400
    for count in np.bincount(rows["label"][n:], minlength=K):
        assert_share(count, 400, 1 / K)


def test_outliers_have_ids_above_the_root_and_no_other_fault():
    data = synthetic.make(**SIZES)
    noisy = corrupt(data, **EVERYTHING)
    ids, rows = source.example_ids(noisy.train), rows_of(noisy.train)
    assert ids.dtype == np.int32 and len(np.unique(ids)) == len(ids)
    np.testing.assert_array_equal(ids[-160:], 2000 + np.arange(160))
    assert not set(ids) & set(source.example_ids(noisy.held_out))
    assert not rows["label_noisy"][-160:].any() and not rows["teacher_shift"][-160:].any()


def test_any_order_of_reading_gives_the_same_rows():
    part = corrupt(synthetic.make(**SMALL), **EVERYTHING).train
    whole = rows_of(part)
    for seed in range(5):
        indices = np.random.default_rng(seed).integers(0, len(part), 7)
        some = part.read(indices)
        for key in whole:
            np.testing.assert_array_equal(some[key], whole[key][indices])
    last = part.read(np.full(3, len(part) - 1))  # added examples alone
    np.testing.assert_array_equal(last["input"], np.stack([whole["input"][-1]] * 3))


def test_reading_leaves_what_the_parent_hands_out_alone():
    class Fixed(source.ArraySource):
        def read(self, indices):
            return {"input": self.inputs, "label": self.labels, "extra": {"x": np.ones(len(self))}}

    images = np.full((4, 2, 2, 1), 9, np.uint8)
    part = Fixed(images, np.arange(4) % 2, Provenance("toy", "", 4, ""))
    added = corrupt(Dataset(part, part, part, ("a", "b")), outliers=0.5).train
    rows = added.read(np.array([0, 4, 5, 1]))
    assert (images == 9).all() and rows["extra"]["x"].tolist() == [1, 0, 0, 1]


def test_a_subset_of_a_corrupted_part_keeps_ids_and_labels():
    part = corrupt(synthetic.make(**SMALL), **EVERYTHING).train
    indices = np.array([len(part) - 1, 0])
    subset = source.Subset(part, indices, "two")
    np.testing.assert_array_equal(source.example_ids(subset), part.ids[indices])
    np.testing.assert_array_equal(source.example_labels(subset), rows_of(subset)["label"])
    assert rows_of(subset)["outlier"].tolist() == [1, 0] and isinstance(part, Source)


def test_provenance_tells_what_was_done():
    data = synthetic.make(**SMALL)
    noisy = corrupt(data, **EVERYTHING, seed=3)
    before = data.train.provenance
    assert noisy.train.provenance._replace(sha256="") == before._replace(
        name=f"{before.name}, teacher damaged on 20% of examples (seed 3), "
        "30% uniform label noise (seed 3), 5 noise images added (seed 3)",
        n=before.n + 5,
        sha256="",
    )
    other = corrupt(data, teacher_damage=0.4, teacher_damage_kind="class").test.provenance
    assert other.name.endswith(", teacher damaged on 2 of 5 classes (seed 0)")
    assert (noisy.classes, noisy.cardinalities) == (data.classes, data.cardinalities)


def test_digests_differ_by_parent_and_arguments_alone():
    data = synthetic.make(**SMALL)
    variants = [
        {"label_noise": 0.3},
        {"label_noise": 0.3000001},
        {"label_noise": 0.3, "label_noise_kind": "pair"},
        {"label_noise": 0.3, "seed": 1},
        {"teacher_damage": 0.3},
        {"teacher_damage": 0.3, "teacher_damage_kind": "class"},
        {"outliers": 0.3},
        EVERYTHING,
    ]
    shas = [corrupt(data, **kwargs).train.provenance.sha256 for kwargs in variants]
    again = [corrupt(data, **kwargs).train.provenance.sha256 for kwargs in variants]
    other = corrupt(synthetic.make(**SMALL, seed=1), label_noise=0.3).train.provenance.sha256
    assert shas == again and len({*shas, other, data.train.provenance.sha256}) == len(shas) + 2


def test_parts_that_stay_as_they_were_keep_their_provenance():
    data = synthetic.make(**SMALL)
    noisy = corrupt(data, label_noise=0.3, outliers=0.2)
    assert noisy.test.provenance == data.test.provenance
    assert noisy.held_out.provenance == data.held_out.provenance
    damaged = corrupt(data, teacher_damage=0.3)
    assert damaged.test.provenance.sha256 != data.test.provenance.sha256


def test_loaders_and_evaluation_give_the_rows_of_the_source():
    pytest.importorskip("grain")
    data = corrupt(synthetic.make(**SMALL), **EVERYTHING)
    whole, b = rows_of(data.train), 8
    place = {i: row for row, i in enumerate(source.example_ids(data.train).tolist())}
    resident = loader.ResidentLoader(data.train, batch_size=b, seed=1)
    stream = loader.StreamLoader(data.train, batch_size=b, seed=1, num_threads=2)
    fetch = jax.jit(resident.fetch)
    for step in range(8):
        one = fetch(resident.data, resident.window(step), jnp.int32(step))
        two = stream.window(step)
        assert set(one) == set(two) == {*whole, "index", "epoch", "mask"}
        rows = [place[i] for i in np.asarray(two["index"]).tolist()]
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])
            assert one[key].dtype == two[key].dtype
        for key in whole:
            np.testing.assert_array_equal(two[key], whole[key][rows])
    stream.close()
    for part in PARTS:
        whole = rows_of(getattr(data, part))
        batches = list(loader.eval_batches(getattr(data, part), batch_size=b))
        real = np.concatenate([batch["mask"] for batch in batches]) == 1
        for key in whole:
            read = np.concatenate([batch[key] for batch in batches])[real]
            np.testing.assert_array_equal(read, whole[key])


@pytest.mark.parametrize("kind", ["random", "class"])
def test_shapes_alone_give_equal_keys_shapes_and_dtypes(kind):
    kwargs = EVERYTHING | {"teacher_damage_kind": kind}
    made, spec = (corrupt(f(**SMALL), **kwargs) for f in (synthetic.make, synthetic.spec))
    assert spec.classes == made.classes
    for part in PARTS:
        want, got = getattr(made, part), getattr(spec, part)
        assert len(got) == len(want)
        want, got = rows_of(want), rows_of(got)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(want)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), dict(got)
        )


def test_nothing_held_out_is_still_nothing():
    data = corrupt(synthetic.make(**SMALL | {"held_out": 0.0}), **EVERYTHING)
    assert len(data.held_out) == 0 and rows_of(data.held_out)["teacher_shift"].shape == (0,)
    assert source.example_ids(data.train).tolist() == list(range(66))


@pytest.mark.parametrize(
    ("kwargs", "where", "hint"),
    [
        ({"label_noise": 1.0}, "label_noise", "0 <= x < 1"),
        ({"teacher_damage": -0.1}, "teacher_damage", "0 <= x < 1"),
        ({"outliers": float("nan")}, "outliers", "0 <= x < 1"),
        ({"label_noise_kind": "unifrom"}, "label_noise_kind", "did you mean 'uniform'"),
        ({"teacher_damage_kind": "classes"}, "teacher_damage_kind", "did you mean 'class'"),
        ({"label_noise": 0.1, "seed": -1}, "seed", "at least 0"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, where, hint):
    with pytest.raises(ConfigError) as error:
        corrupt(synthetic.make(**SMALL), **kwargs)
    assert str(error.value).startswith(f"corrupt.{where}: ") and hint in error.value.hint


@pytest.mark.parametrize("fault", EVERYTHING)
@pytest.mark.parametrize("classes", [(), ("one",)])
def test_faults_need_classes(fault, classes):
    data = array_dataset(np.zeros((6, 2, 2, 1), np.uint8), classes)
    with pytest.raises(ConfigError, match=f"corrupt.{fault}: the data have {len(classes)} classes"):
        corrupt(data, **{fault: 0.4})


def test_labels_without_a_class_are_refused():
    data = array_dataset(np.zeros((6, 2, 2, 1), np.uint8), ("a", "b", "c"))
    with pytest.raises(ConfigError, match="label_noise: the data have 2 classes and a label 2"):
        corrupt(data._replace(classes=("a", "b")), label_noise=0.4)


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((6, 2, 2, 1), np.float32),
        np.zeros((6, 2), np.uint8),
        {"categorical": np.zeros((6, 1), np.int32), "numeric": np.zeros((6, 2), np.float32)},
    ],
)
def test_outliers_are_for_images_only_and_other_faults_are_not(inputs):
    data = array_dataset(inputs, ("a", "b"))
    with pytest.raises(ConfigError, match=r"corrupt\.outliers: the inputs are not images"):
        corrupt(data, outliers=0.4)
    faulty = corrupt(data, label_noise=0.4, teacher_damage=0.4)
    rows = rows_of(faulty.train)
    assert jax.tree.map(np.shape, rows["input"]) == jax.tree.map(np.shape, inputs)
    assert rows["label_noisy"].shape == rows["teacher_shift"].shape == (6,)
    assert faulty.cardinalities == (3,)


@pytest.mark.parametrize("kwargs", [{"labels_per_class": 3}, {"labels_percent": 10.0}])
def test_unlabelled_examples_can_be_left_out(kwargs):
    dataset = synthetic.make(n_train=150, n_test=20, held_out=0.2)
    hidden = corrupt(dataset, **kwargs, seed=2)
    shown = corrupt(dataset, **kwargs, seed=2, drop_unlabelled=True)
    flags = hidden.train.read(np.arange(len(hidden.train)))["labelled"]
    kept = source.example_ids(hidden.train)[flags > 0]
    np.testing.assert_array_equal(source.example_ids(shown.train), kept)
    rows = shown.train.read(np.arange(len(shown.train)))
    assert set(rows) == {"input", "label"}
    have = np.bincount(source.example_labels(dataset.train))
    want = np.full_like(have, 3) if "labels_per_class" in kwargs else np.round(have / 10)
    np.testing.assert_array_equal(np.bincount(rows["label"]), want)
    assert shown.test is dataset.test and shown.held_out is dataset.held_out
    assert shown.train.provenance.sha256 != dataset.train.provenance.sha256


@pytest.mark.parametrize(
    "kwargs",
    [
        {"labels_percent": 101.0},
        {"labels_percent": 1.0, "labels_per_class": 1},
        {"drop_unlabelled": True},
    ],
)
def test_what_labels_cannot_be_kept(kwargs):
    with pytest.raises(ConfigError):
        corrupt(synthetic.make(n_train=40, n_test=8), **kwargs)


def test_this_module_is_not_a_data_set():
    assert not hasattr(corruption, "make")


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_trains_is_no_longer_held_out(share):
    """The baseline of a method that learns from clean held-out examples trains on those alone."""
    data = synthetic.make(**SIZES)
    found = corrupt(data, label_noise=0.4, train_on_held_out=share, seed=3)
    held = set(source.example_ids(data.held_out).tolist())
    train, left = (set(source.example_ids(p).tolist()) for p in (found.train, found.held_out))
    assert train | left == held and not train & left
    assert len(train) == share * len(held)
    clean = by_id(data.held_out, "label")
    assert by_id(found.train, "label") == {i: clean[i] for i in train}
    again = corrupt(data, label_noise=0.4, train_on_held_out=share, seed=4)
    assert (set(source.example_ids(again.train).tolist()) == train) == (share == 1)


@pytest.mark.parametrize("sizes, share", [(SIZES, 1.5), (SIZES | {"held_out": 0.0}, 1.0)])
def test_training_on_a_held_out_part_that_is_not_there_is_refused(sizes, share):
    with pytest.raises(ConfigError, match=r"^corrupt\.train_on_held_out"):
        corrupt(synthetic.make(**sizes), train_on_held_out=share)
