"""Evaluators of embeddings equal scikit-learn and transcriptions of their definitions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from distill_jax.core import spectrum
from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.evaluators import (
    _features,
    clustering,
    downstream,
    few_label_probe,
    knn,
    probe,
    representation,
)
from distill_jax.evaluators._features import fit_logistic
from tests.reference import softmax, unit

D, K = 6, 4


def blobs(n, seed, *, noise=1.2, start=0):
    """Outputs and facts of a split, classes of unequal size around fixed centres."""
    r = np.random.default_rng(seed)
    labels = r.choice(K, n, p=[0.4, 0.3, 0.2, 0.1])
    centres = np.random.default_rng(0).normal(size=(K, D)) * 1.3 + 0.5
    z = (centres[labels] + noise * r.normal(size=(n, D))).astype(np.float32)
    return {"student": {"embedding": z}}, {"label": labels, "index": start + np.arange(n)}


TRAIN, HELD, TEST = blobs(160, 1), blobs(60, 2, start=160), blobs(90, 3)
PARTS = {"train": TRAIN, "held_out": HELD}


def z_of(part):
    return np.asarray(part[0]["student"]["embedding"], np.float64)


def y_of(part):
    return part[1]["label"]


def ask(evaluator, part=TEST, *, parts=PARTS, split="test"):
    wanted = {name: parts[name] for name in evaluator.parts}
    return evaluator(*part, parts=wanted, split=split)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_scikit_learn(k):
    seen, asked = (unit(z_of(part)) for part in (TRAIN, TEST))
    sk = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    said = sk.fit(seen, y_of(TRAIN)).predict(asked)
    got = ask(knn.make(k=(k, 3)))
    assert got["knn_accuracy"] == pytest.approx(np.mean(said == y_of(TEST)))
    assert got["knn_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y_of(TEST), said))
    assert set(got) == {
        f"{n}_{m}" for n in ("knn", "knn3") for m in ("accuracy", "balanced_accuracy")
    }


def test_whitened_neighbours_equal_scikit_learn_and_the_held_out_part_chooses_the_floor():
    """Classes differ in a direction of little variance, and the smallest one is noise."""
    random, parts = np.random.default_rng(2), {}
    sizes = np.array([30.0, 20.0, 0.3, 0.3, 0.3, 1e-3])
    for name, n in (("train", 300), ("held_out", 100), ("test", 100)):
        labels = np.arange(n) % 2
        z = random.normal(size=(n, D))
        z[:, 2] += 3.0 * labels
        parts[name] = {"student": {"embedding": (z * sizes).astype(np.float32)}}, {"label": labels}
    seen, asked = (z_of(parts[name]).astype(np.float64) for name in ("train", "test"))
    pca = PCA(whiten=True, svd_solver="full").fit(seen)
    sk = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(pca.transform(seen), y_of(parts["train"]))
    want = sk.score(pca.transform(asked), y_of(parts["test"]))
    plain = ask(knn.make(k=10), parts["test"], parts=parts)
    # Below the smallest share there is: no direction is left smaller.
    full = ask(knn.make(k=(10, 5), whiten=1e-12), parts["test"], parts=parts)
    assert full["knn_whitened_accuracy"] == pytest.approx(want)
    assert full["knn_whitened_accuracy"] > plain["knn_accuracy"] + 0.1
    assert "knn5_whitened_balanced_accuracy" in full
    floors = (0.5, 1e-3, 1e-12)
    chosen = ask(knn.make(k=10, whiten=floors), parts["test"], parts=parts)
    held_out = {
        floor: ask(knn.make(k=10, whiten=floor), parts["held_out"], parts=parts) for floor in floors
    }
    best = max(floors, key=lambda floor: held_out[floor]["knn_whitened_accuracy"])
    assert chosen["knn_whitened_floor"] == best
    assert knn.make(whiten=floors).parts == {"train": 50_000, "held_out": 50_000}
    assert knn.make(whiten=0.1).parts == {"train": 50_000}


def test_a_query_is_never_its_own_neighbour(monkeypatch):
    """With one neighbour and random labels, a query in the bank would always be right."""
    outputs, example_info = TRAIN
    labels = np.random.default_rng(5).integers(0, K, len(example_info["label"]))
    part = outputs, {**example_info, "label": labels}
    monkeypatch.setattr(knn, "BLOCK", 37)
    got = ask(knn.make(k=1), part, parts={"train": part}, split="train")["knn_accuracy"]
    z = unit(z_of(part))
    similar = z @ z.T - 9 * np.eye(len(z))
    assert got == pytest.approx(np.mean(labels[similar.argmax(1)] == labels))
    assert ask(knn.make(k=1), part, parts={"train": part}, split="test")["knn_accuracy"] == 1
    shown = knn.own_positions(np.array([7, 3, 9]), np.array([3, 5, 7]))
    np.testing.assert_array_equal(shown, [2, 0, -1])


def test_a_bank_smaller_than_k_and_a_bounded_one():
    few = {"train": tuple({k: v for k, v in p.items()} for p in blobs(4, 9))}
    assert 0 <= ask(knn.make(k=20), parts=few)["knn_accuracy"] <= 1
    rows = np.linspace(0, 159, 40).round().astype(int)
    cut = {"student": {"embedding": z_of(TRAIN)[rows]}}, {k: v[rows] for k, v in TRAIN[1].items()}
    assert ask(knn.make(bank=40)) == ask(knn.make(), parts={"train": cut})
    assert knn.make(bank=40).parts == {"train": 40}


@pytest.mark.parametrize("c, balanced", [(0.1, False), (1.0, True)])
def test_the_probe_equals_scikit_learn(c, balanced):
    scaler = StandardScaler().fit(z_of(TRAIN))
    z, asked = scaler.transform(z_of(TRAIN)), scaler.transform(z_of(TEST))
    sk = LogisticRegression(
        C=c, tol=1e-8, max_iter=5000, class_weight="balanced" if balanced else None
    ).fit(z, y_of(TRAIN))
    weights = np.ones(len(z))
    if balanced:
        weights = (len(z) / (K * np.bincount(y_of(TRAIN))))[y_of(TRAIN)]
    found = fit_logistic(z, y_of(TRAIN), K, c=c, weights=weights, tolerance=1e-9)
    np.testing.assert_allclose(found.weight.T, sk.coef_, atol=1e-4)
    np.testing.assert_allclose(found.bias - found.bias.mean(), sk.intercept_, atol=1e-4)
    got = ask(probe.make(c=c, balanced=balanced))
    said = sk.predict(asked)
    assert got["probe_accuracy"] == pytest.approx(np.mean(said == y_of(TEST)), abs=1e-4)
    want = balanced_accuracy_score(y_of(TEST), said)
    assert got["probe_balanced_accuracy"] == pytest.approx(want, abs=1e-4)
    assert probe.make(c=c).parts == {"train": 20_000}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("c, scale", [(0.1, 0.0), (10.0, 0.0), (0.1, 100.0), (1000.0, 100.0)])
def test_the_probe_reaches_the_minimum_from_anywhere(c, scale, share, monkeypatch):
    """With a weak penalty few rows count, and from far away whole rounds of steps overshoot."""
    random = np.random.default_rng(0)
    y = random.integers(0, K, 400)
    z = random.normal(size=(400, 30)) + random.normal(size=(K, 30))[y]
    z[:, 20:] *= random.random((400, 10)) < 0.01
    z = StandardScaler().fit_transform(z)
    if share:
        monkeypatch.setattr(_features, "BLOCKS", 0)
    start = _features.Linear(scale * random.normal(size=(30, K)), np.zeros(K))
    found = fit_logistic(z, y, K, c=c, start=start, tolerance=1e-7)
    sk = LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(z, y)
    own, theirs = (
        c * log_loss(y, softmax(z @ weight + bias), normalize=False) + (weight**2).sum() / 2
        for weight, bias in ((found.weight, found.bias), (sk.coef_.T, sk.intercept_))
    )
    assert own <= theirs * (1 + 1e-6)


def test_the_held_out_part_chooses_the_penalty():
    grid = (1e-4, 1e-2, 1.0)
    scaler = StandardScaler().fit(z_of(TRAIN))
    z, held = scaler.transform(z_of(TRAIN)), scaler.transform(z_of(HELD))
    fits = [LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(z, y_of(TRAIN)) for c in grid]
    scores = [sk.score(held, y_of(HELD)) for sk in fits]
    assert scores[0] < max(scores)
    assert ask(probe.make(c=grid))["probe_c"] == grid[int(np.argmax(scores))]
    weakest = (HELD[0], {**HELD[1], "label": fits[0].predict(held)})
    assert ask(probe.make(c=grid), parts={**PARTS, "held_out": weakest})["probe_c"] == grid[0]
    shifted = {**PARTS, "held_out": ({"student": {"embedding": z_of(HELD) + 99}}, HELD[1])}
    one = ask(probe.make(c=1.0), parts=shifted)
    assert one == ask(probe.make(c=1.0)), "a single penalty or the scaler looked at held-out rows"


def test_few_labels_are_balanced_nested_and_averaged():
    labels = y_of(TRAIN)
    ranks = few_label_probe.draw(labels, seed=3, number=0)
    for c in range(K):
        assert sorted(ranks[labels == c]) == list(range(np.sum(labels == c)))
    assert not np.array_equal(ranks, few_label_probe.draw(labels, seed=3, number=1))
    evaluator = few_label_probe.make(per_class=(2,), percent=(10.0,), draws=3, seed=3, c=0.5)
    got = ask(evaluator)
    scaler = StandardScaler().fit(z_of(TRAIN))
    z, asked = scaler.transform(z_of(TRAIN)), scaler.transform(z_of(TEST))
    size = {"2_per_class": np.full(K, 2), "10_percent": np.round(np.bincount(labels) / 10)}
    for name, count in size.items():
        values = []
        for number in range(3):
            ranks = few_label_probe.draw(labels, seed=3, number=number)
            rows = ranks < count[labels]
            sk = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(z[rows], labels[rows])
            values.append(sk.score(asked, y_of(TEST)))
        np.testing.assert_allclose(got[f"few_label_draws_{name}"], values, atol=1e-4)
        assert got[f"few_label_accuracy_{name}"] == pytest.approx(np.mean(values), abs=1e-4)
        error = np.std(values, ddof=1) / math.sqrt(3)
        assert got[f"few_label_se_{name}"] == pytest.approx(error, abs=1e-4)


def test_clusters_are_mapped_to_classes_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    cluster = np.array([1, 1, 2, 0, 0, 2, 2, 1, 2])
    best = max(
        sum(np.sum((cluster == c) & (labels == m)) for c, m in enumerate(order))
        for order in itertools.permutations(range(3))
    )
    assert clustering.hungarian_accuracy(labels, cluster) == best / 9
    easy = blobs(90, 4, noise=0.05)
    assert clustering.make()(*easy) == {"clustering_accuracy": 1.0}
    same = {"student": {"embedding": np.ones((6, 2))}}, {"label": np.arange(6) % 2}
    assert clustering.make()(*same) == {"clustering_accuracy": 0.5}


def rank_by_svd(z, eps=1e-7):
    s = np.linalg.svd(z, compute_uv=False)
    p = s / s.sum() + eps
    return math.exp(-sum(x * math.log(x) for x in p))


@pytest.mark.parametrize("n, d", [(50, 12), (9, 20)])
def test_rankme_is_that_of_a_singular_value_decomposition(n, d):
    r = np.random.default_rng(n)
    z = r.normal(size=(n, d)) * np.exp(-np.arange(d) / 3) + 0.3
    assert float(spectrum.rankme(z)) == pytest.approx(rank_by_svd(z), rel=1e-6)
    padded = np.concatenate([z, 50 * np.ones((5, d))])
    mask = np.r_[np.ones(n), np.zeros(5)]
    inside = jax.jit(spectrum.rankme)(jnp.asarray(padded), jnp.asarray(mask))
    assert inside.dtype == jnp.float32
    assert float(inside) == pytest.approx(rank_by_svd(z), rel=2e-2)
    assert float(spectrum.rankme(padded, mask)) == pytest.approx(rank_by_svd(z), rel=1e-5)


def test_a_collapsed_embedding_has_rank_one_in_float32():
    """Rounding errors would give a thousand small singular values a share of the sum."""
    r = np.random.default_rng(0)
    z = jnp.asarray(np.outer(r.normal(size=128), r.normal(size=160)))
    assert float(jax.jit(spectrum.rankme)(z)) == pytest.approx(1, abs=1e-2)
    assert float(spectrum.rankme(np.zeros((8, 4)))) == pytest.approx(1, abs=1e-4)


def lidar_loop(views, delta, eps):
    v, n, d = views.shape
    grand = views.reshape(-1, d).mean(0)
    between, within = np.zeros((d, d)), delta * np.eye(d)
    for i in range(n):
        mean = views[:, i].mean(0)
        between += np.outer(mean - grand, mean - grand) / (n - 1)
        for j in range(v):
            e = views[j, i] - mean
            within += np.outer(e, e) / (n * (v - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    found = np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None)
    p = found / found.sum() + eps
    return math.exp(-sum(x * math.log(x) for x in p))


def test_measures_equal_their_definitions_with_padding_and_in_a_step():
    r = np.random.default_rng(4)
    n, d = 20, 5
    views = r.normal(size=(3, n, d)) * 0.3 + r.normal(size=(n, d))[None] * np.arange(1, d + 1)
    z = views[0]
    units, probs = unit(views), softmax(z)
    pairs = [
        np.exp(-2 * np.sum((units[0][i] - units[0][j]) ** 2)) for i in range(n) for j in range(i)
    ]
    values = np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1]
    apart = [np.sum((units[a] - units[b]) ** 2, 1) for a, b in itertools.combinations(range(3), 2)]
    mean = probs.mean(0)
    want = {
        "uniformity": math.log(np.mean(pairs)),
        "normalized_std": math.sqrt(d) * np.mean(units[0].std(0)),
        "feature_variance": np.mean(z.var(0)),
        "alpha_req": -np.polyfit(np.log([1, 2, 3]), np.log(values[:3]), 1)[0],
        "alignment": np.mean(apart),
        "lidar": lidar_loop(views, 1e-4, 1e-7),
        "prototype_entropy": -np.sum(mean * np.log(mean)),
    }
    np.testing.assert_allclose(spectrum.covariance_spectrum(z), values, rtol=1e-9)
    mask = np.r_[np.ones(n), np.zeros(4)]
    for name, value in want.items():
        x = {"alignment": views, "lidar": views, "prototype_entropy": probs}.get(name, z)
        fn = getattr(spectrum, name)
        assert float(fn(x)) == pytest.approx(value, rel=1e-6), name
        junk = np.full((*x.shape[:-2], 4, d), 7.0)
        padded = np.concatenate([x, junk], axis=-2)
        assert float(fn(padded, mask)) == pytest.approx(value, rel=1e-6), name
        inside = jax.jit(fn)(jnp.asarray(padded), jnp.asarray(mask))
        assert isinstance(inside, jax.Array) and inside.dtype == jnp.float32
        assert float(inside) == pytest.approx(value, rel=2e-3), name


def test_blocks_of_distances_change_nothing(monkeypatch):
    z = z_of(TRAIN)
    whole = spectrum.uniformity(z)
    monkeypatch.setattr(spectrum, "BLOCK", 17)
    assert spectrum.uniformity(z) == pytest.approx(whole, rel=1e-12)


def test_representation_reads_views_where_they_are_named():
    evaluator = representation.make(views="prediction/views_embedding", max_examples=50)
    views = np.random.default_rng(1).normal(size=(90, 2, D))
    outputs = {**TEST[0], "prediction": {"views_embedding": views}}
    assert evaluator.outputs == {"student": ("embedding",), "prediction": ("views_embedding",)}
    got = evaluator(outputs, TEST[1])
    rows = np.linspace(0, 89, 50).round().astype(int)
    assert got["lidar"] == float(spectrum.lidar(views[rows].swapaxes(0, 1)))
    assert got["rankme"] == pytest.approx(rank_by_svd(z_of(TEST)[rows]), rel=1e-6)
    assert got["spectrum"].shape == (D,)
    assert {"lidar", "alignment"} == set(got) - set(representation.make()(*TEST))


@pytest.mark.parametrize(
    "module, kwargs",
    [
        (knn, {"k": 0}),
        (knn, {"k": ()}),
        (knn, {"temperature": 0.0}),
        (probe, {"c": (1.0, -1.0)}),
        (few_label_probe, {"per_class": (0,)}),
        (few_label_probe, {"per_class": ()}),
        (few_label_probe, {"percent": (101.0,)}),
        (few_label_probe, {"seed": -1}),
        (representation, {"views": "prediction"}),
        (clustering, {"restarts": 0}),
    ],
)
def test_arguments_out_of_range_are_refused(module, kwargs):
    with pytest.raises(ConfigError):
        module.make(**kwargs)


def test_embeddings_that_cannot_be_evaluated_are_refused():
    bad = {"student": {"embedding": np.where(np.arange(90)[:, None] == 4, np.nan, z_of(TEST))}}
    with pytest.raises(NonFiniteError, match="position 4"):
        representation.make()(bad, TEST[1])
    with pytest.raises(ConfigError, match="no 'tokens'"):
        ask(knn.make(output="tokens"))
    with pytest.raises(ConfigError, match="train part"):
        knn.make()(*TEST)


def test_heads_are_those_of_scikit_learn_on_standardised_embeddings():
    scaler = StandardScaler().fit(z_of(TRAIN))
    z, asked = scaler.transform(z_of(TRAIN)), scaler.transform(z_of(TEST))
    trees = HistGradientBoostingClassifier(
        max_iter=7,
        learning_rate=0.3,
        l2_regularization=0.5,
        max_leaf_nodes=15,
        early_stopping=False,
        random_state=0,
    )
    mlp = MLPClassifier(
        (5,), early_stopping=True, validation_fraction=0.1, max_iter=200, random_state=0
    )
    got = ask(downstream.make(hidden=(5,), trees=7, rate=0.3, l2=0.5, max_examples=None))
    for name, head in (("trees", trees), ("mlp", mlp)):
        said = head.fit(z.astype(np.float32), y_of(TRAIN)).predict(asked.astype(np.float32))
        near = {"abs": 2 / len(said)}  # rounding may decide an example at a boundary
        assert got[f"{name}_accuracy"] == pytest.approx(np.mean(said == y_of(TEST)), **near)
        assert got[f"{name}_balanced_accuracy"] == pytest.approx(
            balanced_accuracy_score(y_of(TEST), said), abs=0.05
        )
    assert got["trees_accuracy"] > 0.5
    assert set(ask(downstream.make(heads=("trees",), trees=2))) == {
        "trees_accuracy",
        "trees_balanced_accuracy",
    }
    assert downstream.make().parts == {"train": 4_000}


def test_trees_do_not_diverge_where_a_class_has_two_examples():
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(5), (1000, 700, 100, 20, 2))
    z = random.normal(size=(len(label), 20))
    z[:, :5] += 1.5 * np.eye(5)[label]
    part = {"student": {"embedding": z}}, {"label": label, "index": np.arange(len(label))}
    got = [
        downstream.make(heads=("trees",), **kwargs)(*part, parts={"train": part})["trees_accuracy"]
        for kwargs in ({}, {"l2": 0.0})
    ]
    assert got[0] > 0.99
    assert got[1] < 0.9, "without a penalty they do"


@pytest.mark.parametrize("label", [[0, 1] * 4, [0] * 29 + [1], [0] * 30])
def test_heads_fit_few_examples_of_two_classes(label):
    rows = np.arange(len(label))
    z = np.cos(rows[:, None] * np.array([1.0, 2.0, 5.0]))
    part = {"student": {"embedding": z}}, {"label": np.array(label), "index": rows}
    got = downstream.make(trees=2)(*part, parts={"train": part})
    assert all(0 <= value <= 1 for value in got.values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heads": ("tree",)}, "no head 'tree'"),
        ({"heads": ()}, "heads are"),
        ({"hidden": (0,)}, "hidden is"),
        ({"trees": 0}, "trees"),
        ({"l2": -1.0}, "l2"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_heads_refuse_what_they_are_not(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        downstream.make(**kwargs)
