"""The CIFAR-100 benchmark: every pair builds on shapes, one trains, figures fit the pairs."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill_jax.configs.distillation import METHODS
from distill_jax.configs.studies import kd_cifar100

from distill_jax import main
from distill_jax.configs import published
from distill_jax.core import partition, state
from distill_jax.core.api import Model
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import cifar100
from distill_jax.models.adapters import as_model
from distill_jax.run import build, study
from distill_jax.run import config as config_lib
from distill_jax.run.resolve import bind, resolve
from tests import harness

CONFIG = "configs/studies/kd_cifar100.py"
MILLIONS = {
    # Trainable parameters at 100 classes, as the distillation literature prints them.
    "wrn-40-2": 2.26, "wrn-16-2": 0.70, "wrn-40-1": 0.57, "resnet20": 0.28, "resnet32": 0.47,
    "resnet56": 0.86, "resnet110": 1.74, "resnet8x4": 1.23, "resnet32x4": 7.43, "resnet50": 23.71,
    "vgg8": 3.97, "vgg13": 9.46, "mobilenet_v2": 0.81, "shufflenet_v1": 0.95, "shufflenet_v2": 1.36,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pair", kd_cifar100.PAIRS)
def test_every_pair_builds_on_shapes_with_the_published_sizes(pair):
    config = kd_cifar100.get_config(pair)
    config_lib.validate(config)
    study.check(config)
    config.mesh.data = 8
    teacher, student = kd_cifar100.PAIRS[pair]
    single = study.arm_config(config, "kd", 0, pathlib.Path("runs"))
    shapes = build.build(single, shapes_only=True).shapes.roles
    for role, name in (("teacher", teacher), ("student", student)):
        leaves = partition.named_leaves(shapes[role].params).values()
        size = sum(int(np.prod(x.shape)) for x in leaves)
        assert size / 1e6 == pytest.approx(MILLIONS[name], abs=0.0075)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["resnet56-resnet20", "vgg13-mobilenet_v2"])
def test_every_method_is_an_arm(pair):
    config = kd_cifar100.get_config(f"{pair},all")
    config_lib.validate(config)
    study.check(config)
    missing = set(published.CIFAR100[pair]) - set(config.study.published)
    assert missing <= {"tgeo_kd"}  # which learns on two levels: configs/bilevel/
    config.mesh.data = 8
    for name in ("at", "crd", "review_kd"):
        single = study.arm_config(config, name, 0, pathlib.Path("runs"))
        assert build.build(single, shapes_only=True).shapes.terms.values


@pytest.mark.parametrize(
    ("pair", "beta"),
    [
        ("resnet56-resnet20", 2),
        ("resnet110-resnet32", 2),
        ("resnet110-resnet20", 8),
        ("vgg13-vgg8", 6),
        ("vgg13-mobilenet_v2", 6),
        ("wrn-40-2-wrn-16-2", 6),
        ("wrn-40-2-wrn-40-1", 6),
        ("resnet32x4-resnet8x4", 8),
        ("wrn-40-2-shufflenet_v1", 8),
    ],
)
def test_arms_have_the_published_recipes(pair, beta):
    arms = kd_cifar100.get_config(f"{pair},all").study.arms
    assert arms.dkd.objective.kwargs.beta == beta
    assert arms.dkd.objective.kwargs.warmup == "20 epochs"
    assert arms.cc.objective.kwargs.to_dict() == {"weight": 0.02, "form": "successive"}
    for role in ("projector", "projector_of_teacher"):
        assert arms.cc.roles[role].kwargs.features == 128
    wide = tuple(f"stage{i}_raw" for i in (1, 2, 3))
    plain = {"vgg": (2, 3, 4, 5), "mobilenet_v2": (1, 2, 3, 4)}
    for role, name in zip(("teacher", "student"), kd_cifar100.PAIRS[pair], strict=True):
        numbers = plain.get(kd_cifar100.NETWORKS[name][0], (1, 2, 3))
        raw = name.startswith("wrn")
        found = wide if raw else tuple(f"stage{i}" for i in numbers)
        for arm in ("at", "nst", "vid"):
            assert arms[arm].objective.kwargs[f"{role}_stages"] == found
        assert arms.sp.objective.kwargs[f"{role}_stages"] == found[-1:]
        assert arms.fitnet.objective.kwargs[f"{role}_stage"] == found[1]
        assert arms.ft.objective.kwargs[f"{role}_stage"] == found[-1]
        if "fsp" in published.CIFAR100[pair]:
            stem = "stem_raw" if raw else "stage1" if "vgg" in name else "stem"
            assert arms.fsp.objective.kwargs[f"{role}_stages"] == (stem, *found)


@functools.cache
def like(name):
    """A network without parameters whose outputs have the shapes of those of a network."""
    model, kwargs = kd_cifar100.NETWORKS[name]
    net = resolve("models", model, where="")(num_classes=100, **kwargs)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    made = lambda key, x: net.apply(*net.init(key, x), x, train=False, rngs={})[0]  # noqa: E731
    shapes = jax.eval_shape(made, jax.random.key(0), images)

    def apply(params, state, x, *, train, rngs):
        return {name: jnp.zeros(out.shape) for name, out in shapes.items()}, state

    return Model(lambda key, x: ({}, {}), apply)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [pair for pair in kd_cifar100.PAIRS if "vgg" in pair or "wrn" in pair]
)
def test_every_arm_that_reads_maps_fits_its_networks(pair):
    teacher, student = kd_cifar100.PAIRS[pair]
    config = kd_cifar100.get_config(f"{pair},all")
    batch = {"input": jnp.zeros((2, 32, 32, 3)), "mask": jnp.zeros(2)}
    batch |= dict.fromkeys(("label", "index", "epoch"), jnp.zeros(2, jnp.int32))
    provided = {**harness.PROVIDED, "num_classes": 100, "num_examples": 50_000}
    for name in [n for n in config.study.arms if n in METHODS and METHODS[n].maps]:
        single = study.arm_config(config, name, 0, pathlib.Path("runs"))
        make = resolve("objectives", single.objective.name, where="")
        kwargs = single.objective.kwargs.to_dict()
        objective = bind(make, kwargs, where=name, provided=provided)()
        models = {"student": like(student), "teacher": like(teacher)}
        for role in set(objective.roles) - set(models):
            spec = single.roles[role]
            connector = resolve("models", spec.model or "linear_head", where=role)
            bound = bind(connector, spec.kwargs.to_dict(), where=role, provided=provided)
            models[role] = as_model(bound())
        models = {role: models[role] for role in objective.roles}
        assert state.infer_shapes(objective, models, batch).terms.values
    second = {"vgg": "stage3", "wrn": "stage2_raw"}.get(teacher[:3], "stage2")
    assert config.study.arms.fitnet.objective.kwargs.teacher_stage == second
    stages = config.study.arms.review_kd.objective.kwargs
    assert stages.teacher_stages[0] == ("stage2_pre" if "vgg" in teacher else "stage1_pre")
    last = {"vgg": "stage5", "mob": "stage4"}.get(student[:3], "stage3")
    assert stages.student_stages[-2:] == (last, "embedding")


@pytest.mark.slow
def test_rates_fall_after_the_published_epochs():
    single = study.arm_config(
        kd_cifar100.get_config("resnet32x4-shufflenet_v1"), "alone", 0, pathlib.Path("runs")
    )
    single.mesh.data = 8
    experiment = build.build(single, shapes_only=True)
    per_epoch = experiment.steps_per_epoch
    assert per_epoch == 50_000 / 64
    assert experiment.total_steps == round(240 * per_epoch)
    rates = [float(experiment.schedule(round(e * per_epoch))) for e in (149.9, 150, 180, 210, 239)]
    np.testing.assert_allclose(rates, [0.01, 1e-3, 1e-4, 1e-5, 1e-5], rtol=1e-5)


@pytest.mark.slow
def test_published_figures_name_the_pairs_and_agree_on_each_network():
    assert set(published.CIFAR100) == set(kd_cifar100.PAIRS)
    alone = {}
    for pair, row in published.CIFAR100.items():
        teacher, student = kd_cifar100.PAIRS[pair]
        assert {"teacher", "alone", "kd", "crd"} <= set(row)
        for name, value in ((teacher, row["teacher"]), (student, row["alone"])):
            assert alone.setdefault(name, value) == value


@pytest.mark.slow
def test_one_pair_trains_on_generated_images(tmp_path, capsys):
    argv = ["main", f"--config={CONFIG}:vgg13-vgg8,smoke", f"--workdir={tmp_path}", "--mode=study"]
    narrow = [f"--config.roles.student.kwargs.width_multiplier={1 / 16}", "--config.mesh.data=8"]
    assert main.main([*argv, *narrow]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "kd" / "seed0" / "result.json").read_text())
    assert found["steps"] == 12 and len(found["classes"]) == 100
    assert not found["best"]
    table = (tmp_path / "table.txt").read_text().splitlines()
    figures = published.CIFAR100["vgg13-vgg8"]
    column = {row.split()[0]: row.split()[-1] for row in table[3:]}
    assert column["alone"] == f"{figures['alone'] / 100:.4f}"
    assert "published" in (tmp_path / "report.html").read_text()
    assert 0 <= found["metrics"]["test/agreement"] <= 1


@pytest.mark.slow
def test_cifar100_reads_the_original_layout(tmp_path, monkeypatch):
    monkeypatch.setitem(cifar100.SIZES, "train", 300)
    monkeypatch.setitem(cifar100.SIZES, "test", 100)
    rng = np.random.default_rng(0)
    images = {}
    for part, n in (("train", 300), ("test", 100)):
        labels = np.arange(n) % 100
        planes = images[part] = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        rows = np.concatenate([np.zeros((n, 1)), labels[:, None], planes.reshape(n, -1)], axis=1)
        (tmp_path / f"{part}.bin").write_bytes(rows.astype(np.uint8).tobytes())
    found = cifar100.make(root=str(tmp_path), held_out=0.0)
    rows = found.test.read(np.array([3, 7]))
    assert list(rows["label"]) == [3, 7]
    np.testing.assert_array_equal(rows["input"][1, 5, 9], images["test"][7, :, 5, 9])
    assert len(found.train) == 300 and len(found.held_out) == 0
    assert cifar100.spec().test.read(np.arange(2))["input"].shape == rows["input"].shape
    (tmp_path / "test.bin").write_bytes(b"short")
    with pytest.raises(DataUnavailable, match="holds 5 bytes"):
        cifar100.make(root=str(tmp_path))
    monkeypatch.setenv("DISTILL_JAX_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    with pytest.raises(DataUnavailable, match="cifar-100-binary"):
        cifar100.make()
