"""Mistakes that show when a config meets data and checkpoints: one message, exit code 2."""

import contextlib
import io
import json
import shutil

import jax
import numpy as np
import pytest

from distill_jax import main
from distill_jax.core import api
from distill_jax.core.errors import ConfigError
from distill_jax.models import mlp
from distill_jax.run import build, flags, study
from distill_jax.run import config as config_lib
from distill_jax.run.build import method
from distill_jax.run.preflight.data import of_parts
from distill_jax.run.train import loop
from distill_jax.trainer.io.network import read_network

pytestmark = pytest.mark.xdist_group("build errors")  # one run serves all

KD = "configs/distill/kd.py:smoke"
SUPERVISED = "configs/distill/supervised.py:smoke"
STUDY = "configs/studies/demo.py:smoke"

# (name, config, mode, flags, what the message must say)
CORPUS = [
    (
        "negative part",
        "configs/bilevel/tgeo_kd.py:smoke",
        "describe",
        ["data.kwargs.n_test=-64000"],
        ["data.kwargs: a part of -64000 examples"],
    ),
    (
        "no objective",
        SUPERVISED,
        "train",
        ["objective.name=collections:UserDict", "objective.kwargs={}"],
        ["objective.name: collections:UserDict returned a UserDict", "roles, loss"],
    ),
    (
        "no weighting",
        "configs/bilevel/tgeo_kd.py:smoke",
        "describe",
        ["weighting.name=collections:UserDict", "weighting.kwargs={}"],
        ["weighting.name: collections:UserDict returned a UserDict"],
    ),
    ("endless training", SUPERVISED, "train", ["total=4000000000000"], ["total", "32 bits"]),
    (
        "milestones",
        "configs/studies/kd_cifar100.py:smoke",
        "train",
        ["optim.schedule_kwargs.milestones=None,None"],
        ["milestone None is not a number"],
    ),
    (
        "average of another network",
        "configs/ssl/moco.py:smoke",
        "train",
        ["roles.target.model=resnet"],
        ["roles.target.model: a moving average of 'student' is a network like it"],
    ),
    (
        "wide positions",
        "configs/ssl/mae.py",
        "describe",
        ["roles.decoder.kwargs.width=64000000"],
        ["width: positions of 16 tokens, 64,000,000 wide"],
    ),
    (
        "huge images",
        "configs/ssl/simclr.py:smoke",
        "describe",
        ["data.kwargs.image_size=8000000000000"],
        ["data.kwargs: an example of", "below 2**31"],
    ),
    ("objective", KD, "train", ["objective.name=kdd"], ["unknown objective 'kdd'", "'kd'"]),
    ("objective path", KD, "train", ["objective.name=no.such:X"], ["no module named 'no.such'"]),
    (
        "objective keyword",
        KD,
        "train",
        ["objective.kwargs.temprature=2"],
        ["does not accept 'temprature'", "did you mean 'temperature'"],
    ),
    ("objective type", KD, "train", ["objective.kwargs.alpha=high"], ["'high'", "float"]),
    ("objective value", KD, "train", ["objective.kwargs.alpha=1.5"], ["alpha is 1.5", "[0, 1]"]),
    ("temperature", KD, "train", ["objective.kwargs.temperature=0.0"], ["temperature is 0.0"]),
    ("model", KD, "train", ["roles.student.model=resnt"], ["unknown model 'resnt'", "resnet"]),
    (
        "model keyword",
        KD,
        "train",
        ["roles.student.kwargs.width=3"],
        ["does not accept 'width'", "widths"],
    ),
    (
        "depth",
        SUPERVISED,
        "train",
        ["roles.student.model=resnet", "roles.student.kwargs.depth=21"],
        ["6n + 2", "nearest: 20"],
    ),
    (
        "missing role",
        SUPERVISED,
        "train",
        ["objective.name=kd"],
        ["needs a network 'teacher'", "roles"],
    ),
    (
        "missing network of a weighting",
        KD,
        "train",
        ["weighting.name=meta_weight_net"],
        ["roles: MetaWeightNet needs a network 'weighting'"],
    ),
    (
        "spare role",
        SUPERVISED,
        "train",
        ["roles.studnt.model=mlp"],
        ["never calls the network 'studnt'"],
    ),
    ("data", KD, "train", ["data.name=fashion_mnst"], ["unknown data", "fashion_mnist"]),
    (
        "data keyword",
        KD,
        "train",
        ["data.kwargs.chanels=3"],
        ["does not accept 'chanels'", "channels"],
    ),
    (
        "absent folder",
        KD,
        "train",
        ["data.name=idx_folder", "data.kwargs.root=/no/such/folder"],
        ["no such file or folder", "train-images-idx3-ubyte"],
    ),
    (
        "unprepared tfds",
        KD,
        "train",
        ["data.name=tfds", "data.kwargs.name=cifar10", "data.kwargs.data_dir=/no/such"],
        ["'cifar10' is not prepared", "download_and_prepare"],
    ),
    ("batch over data", KD, "train", ["batch_size=4096"], ["error: batch_size: a batch of 4096"]),
    (
        "batch over mesh",
        KD,
        "train",
        ["batch_size=31"],
        ["error: batch_size: ", "multiple of 8"],
    ),
    ("mesh", KD, "train", ["mesh.data=3"], ["does not fit 8 devices", "must be 8"]),
    (
        "micro-batch",
        KD,
        "train",
        ["accum_steps=16"],
        ["does not split evenly", "multiple of 128"],
    ),
    ("optimizer", KD, "train", ["optim.name=adm"], ["unknown optimizer 'adm'", "adam"]),
    ("schedule", KD, "train", ["optim.schedule=cosin"], ["cosin", "cosine"]),
    (
        "optimizer keyword",
        KD,
        "train",
        ["optim.kwargs.momentun=0.9"],
        ["momentun", "momentum"],
    ),
    (
        "uncovered decay",
        KD,
        "train",
        ["optim.decay_mask=(('kernel$', True),)"],
        ["optim.decay_mask"],
    ),
    (
        "partition rule",
        KD,
        "train",
        ["partition.rules=(('nothing', ('fsdp',)),)"],
        ["matches no parameter"],
    ),
    (
        "partition axis",
        KD,
        "train",
        ["partition.rules=(('Dense_0/kernel', ('modle',)),)"],
        ["unknown mesh axis 'modle'", "did you mean 'model'"],
    ),
    (
        "set of partition rules",
        KD,
        "train",
        ["partition.frozen_rules=transformers"],
        ["partition.frozen_rules: no set", "did you mean 'transformer'"],
    ),
    (
        "networks without rules",
        KD,
        "train",
        ["partition.rules=('networks',)"],
        ["partition.rules: no trained network", "transformer"],
    ),
    (
        "no rule for an axis",
        KD,
        "train",
        ["mesh.data=1", "mesh.model=8"],
        ["no rule", "mesh.model"],
    ),
    ("evaluator", KD, "train", ["evaluators.clasification.role=student"], ["classification"]),
    (
        "evaluator role",
        SUPERVISED,
        "train",
        ["evaluators.agreement.reference=teacher"],
        ["'teacher'", "does not have"],
    ),
    ("selection metric", KD, "train", ["eval.metric=held_out/acuracy"], ["held_out/accuracy"]),
    (
        "no held out",
        KD,
        "train",
        ["data.held_out=0.0"],
        ["held_out split, which is empty", "data.held_out"],
    ),
    ("transform", KD, "train", ["data.eval_transforms=normalise"], ["normalise", "normalize"]),
    (
        "transform keyword",
        KD,
        "train",
        ["data.transform_kwargs.random_crop.pading=1"],
        ["does not accept 'pading'", "padding"],
    ),
    ("teacher absent", KD, "train", ["roles.teacher.init=runs/no_such"], ["does not exist"]),
    ("teacher without weights", KD, "train", ["roles.teacher.init=none"], ["without weights"]),
    (
        "a duration by its unit",
        KD,
        "train",
        ["total.epochs=2"],
        ["total.epochs", 'write --config.total="2 epochs"'],
    ),
    ("study metric", STUDY, "study", ["study.metric=test/acuracy"], ["test/accuracy"]),
    ("study reference", STUDY, "study", ["study.reference=alon"], ["'alon'", "alone"]),
    ("no study", KD, "study", [], ["defines no study"]),
    (
        "study source",
        STUDY,
        "study",
        ["study.arms.kd_50.roles.teacher.init=arm:techer"],
        ["'techer'", "'teacher'"],
    ),
    ("eval without run", KD, "eval", [], ["does not exist"]),
]


def refused(argv, capsys, expected, code=2):
    found = main.main(["distill-jax", *argv])
    out, err = capsys.readouterr()
    assert found == code, (found, out, err)
    assert [line[:7] for line in err.splitlines()].count("error: ") == 1
    assert "Traceback" not in out + err
    for text in expected:
        assert text in err, err


@pytest.mark.parametrize(
    "config, mode, overrides, expected", [c[1:] for c in CORPUS], ids=[c[0] for c in CORPUS]
)
def test_refused(config, mode, overrides, expected, tmp_path, capsys, teacher):
    argv = [f"--config={config}", f"--mode={mode}", f"--workdir={tmp_path / 'run'}"]
    if "kd.py" in config:
        argv.append(f"--config.roles.teacher.init={teacher}")
    argv += [f"--config.{o}" for o in overrides]
    refused(argv, capsys, expected)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("batch_size=5000", "study.arms.kd_50: batch_size: a batch of 5000"),
        ("objective.kwargs={'alpah': 0.5}", "study.arms.kd_50: objective.kwargs"),
    ],
)
def test_a_study_is_refused_before_its_first_run(change, expected, tmp_path, capsys):
    argv = [f"--config={STUDY}", "--mode=study", f"--workdir={tmp_path / 'study'}"]
    refused([*argv, f"--config.study.arms.kd_50.{change}"], capsys, [expected])
    assert not list(tmp_path.rglob("checkpoints"))


def test_what_an_earlier_arm_will_write_is_not_missed(tmp_path):
    """A moving average names no network of its own: its shape is known once its run is there."""
    config = flags.load("configs/studies/paper_fst.py:smoke")
    teacher = {"init": "arm:deep_1#teacher", "frozen": True}
    config.study.arms.kd = {"objective": {"name": "kd"}, "roles": {"teacher": teacher}}
    single = study.arm_config(config, "kd", 1, tmp_path)
    study._check_parts([study.Member("kd", 1, single, tmp_path / "kd" / "seed1", "")], None)


def test_a_batch_is_not_compared_with_a_size_that_is_a_guess():
    config = flags.load("configs/language/next_token.py")
    config.data.name, config.data.kwargs, config.batch_size = "text_folder", {"path": "x"}, 2048
    experiment = build.build(config, shapes_only=True)
    assert not list(of_parts(experiment.dataset))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main.main(["distill-jax", f"--config={SUPERVISED}", f"--workdir={workdir}"])
    assert code == 0
    return workdir


# Code that a config names and that leaves the program, by the slot that it stands in.


def leave(**kwargs):
    raise SystemExit(0)


def leaves_later(num_classes):
    """A network that leaves while it is traced."""
    net = mlp.make(num_classes=num_classes, hidden=(4,))
    return api.Model(lambda key, *inputs: leave(), lambda *args, **kwargs: net)


@pytest.mark.parametrize(
    ("slot", "name"),
    [
        ("roles.student.model", "leave"),
        ("roles.student.model", "leaves_later"),
        ("data.name", "leave"),
        ("objective.name", "leave"),
        ("data.train_transforms", "leave"),
    ],
)
def test_code_of_a_config_cannot_leave_the_program(slot, name, tmp_path, capsys):
    argv = [f"--config={SUPERVISED}", f"--workdir={tmp_path / 'run'}"]
    if slot == "data.train_transforms":
        argv += ["--config.data.transform_kwargs={}", "--config.data.eval_transforms=scale"]
    refused(
        [*argv, f"--config.{slot}={__name__}:{name}"],
        capsys,
        ["SystemExit: 0", "raise SystemExit(0)"],
    )


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(), GeneratorExit()])
def test_leaving_at_any_later_time_is_a_mistake(error, tmp_path, capsys, monkeypatch):
    def leaves(*_, **__):
        raise error

    monkeypatch.setattr(loop, "train", leaves)
    argv = [f"--config={SUPERVISED}", f"--workdir={tmp_path / 'run'}"]
    refused(argv, capsys, ["test_build_errors.py:", type(error).__name__, "left the program"])


def test_teacher_of_another_shape(tmp_path, capsys, teacher):
    argv = [f"--config={KD}", f"--workdir={tmp_path}", f"--config.roles.teacher.init={teacher}"]
    expected = ["another structure", "in the checkpoint", "in this run"]
    refused([*argv, "--config.roles.teacher.kwargs.widths=4,8"], capsys, expected)


def test_teacher_of_other_classes(tmp_path, capsys, teacher):
    argv = [f"--config={KD}", f"--workdir={tmp_path}", f"--config.roles.teacher.init={teacher}"]
    refused([*argv, "--config.roles.teacher.kwargs.num_classes=3"], capsys, ["teacher", "3", "4"])


def test_damaged_teacher(tmp_path, capsys, teacher):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    for path in copy.rglob("role.student/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    argv = [f"--config={KD}", f"--workdir={tmp_path / 'run'}"]
    refused(
        [*argv, f"--config.roles.teacher.init={copy}"], capsys, ["differ from what was written"]
    )


def test_teacher_architecture_is_taken_from_its_run(tmp_path, teacher):
    config = flags.load(KD)
    config.roles.teacher.model = ""
    config.roles.teacher.init = str(teacher)
    config.mesh.data = 8
    experiment = build.build(config, shapes_only=True)
    assert experiment.shapes.roles["teacher"].outputs["logits"].shape == (32, 4)


def test_changed_config_is_refused_on_resume(capsys, teacher):
    before = (teacher / "result.json").read_text()
    argv = [f"--config={SUPERVISED}", f"--workdir={teacher}", "--config.optim.lr=0.3"]
    refused(argv, capsys, ["holds a run of another config", "optim.lr: 0.1 -> 0.3"])
    assert (teacher / "result.json").read_text() == before


def _shapes(workdir):
    config = config_lib.from_json((workdir / "config.json").read_text())
    found = build.build(config, shapes_only=True).shapes.roles["student"]
    return found.params, found.state


def test_nan_loss_is_refused(tmp_path, capsys):
    argv = [f"--config={SUPERVISED}", f"--workdir={tmp_path}", "--config.optim.lr=1e30"]
    argv += ["--config.optim.warmup=1", "--config.log.every_steps=12"]
    argv += ["--config.eval.every=12"]
    refused(argv, capsys, ["at step 3", "last finite losses were 1.", "optim.lr"], code=3)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, capsys):
    argv = [f"--config={SUPERVISED}", f"--workdir={tmp_path}", "--config.optim.lr=1e30"]
    argv += ["--config.optim.warmup=1", "--config.log.every_steps=2"]
    argv += ["--config.checkpoint.every=1"]
    refused(argv, capsys, ["last finite losses were", "optim.lr", "of step"], code=3)
    kept = sorted(p.parent.name for p in (tmp_path / "checkpoints").glob("*/digest.json"))
    assert kept
    for step in kept:  # what is kept can be continued from
        arrays = read_network(tmp_path / "checkpoints" / step, like=_shapes(tmp_path), where="test")
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays[0]))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row) for row in rows)


@pytest.mark.parametrize("made", [3, None, "text", int])
def test_what_is_no_evaluator_is_refused(made):
    with pytest.raises(ConfigError, match=rf"x returned a {type(made).__name__}\n") as error:
        method.check_made(made, "x", "Evaluator", ("outputs", "__call__"), where="evaluators.x")
    assert error.value.where == "evaluators.x" and "api.Evaluator" in error.value.hint
