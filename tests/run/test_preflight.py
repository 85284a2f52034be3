"""Silent mistakes are refused before anything is compiled, and shipped configs are not."""

import pathlib

import jax
import pytest

from distill_jax import main
from distill_jax.core import partition
from distill_jax.core.errors import ConfigError
from distill_jax.run import build, flags, preflight, study, unused
from distill_jax.run import config as config_lib
from distill_jax.run.preflight import constants, data, step, unread
from distill_jax.run.preflight.teachers import differs, teacher_saw
from tests import faulty, silent_faults

STUDY = "configs/studies/demo.py:smoke"
REFUSED = [fault for fault in silent_faults.FAULTS if fault.expected == "refused"]


@pytest.fixture(autouse=True, scope="module")
def one_device():
    make, devices = partition.make_mesh, jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "make_mesh", lambda **kwargs: make(**kwargs, devices=devices))
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    silent_faults.make(folder)
    return folder


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.name)
def test_a_silent_fault_is_refused(fault, teachers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "compile_step", None)
    monkeypatch.setattr(build, "initial_state", None)
    argv = silent_faults.argv(fault, teachers, tmp_path / "run")
    code = main.main(["distill-jax", *argv])
    out, err = capsys.readouterr()
    assert silent_faults.outcome(fault, code, out, err) == "refused", err
    assert err.startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_enough_faults_are_refused():
    assert len(silent_faults.FAULTS) >= 25
    assert len(REFUSED) >= 23


def experiment_of(spec, overrides=None, *, shapes_only=True):
    config = config_lib.override(flags.load(spec), overrides or {})
    return build.build(config, shapes_only=shapes_only)


def warnings_of(experiment, *, alone=True):
    said = []
    preflight.warn(experiment, said.append, alone=alone)
    return said


@pytest.mark.parametrize("spec", [silent_faults.SUPERVISED, silent_faults.TGEO])
def test_a_shipped_config_raises_no_doubt(spec):
    assert warnings_of(experiment_of(spec)) == []


AVERAGE = {
    "roles.teacher.frozen": False,
    "roles.teacher.init": "none",
    "roles.teacher.ema_of": "student",
    "roles.teacher.model": "",
}


def test_what_a_study_compares_is_a_doubt_in_its_arm():
    still = {**AVERAGE, "roles.teacher.decay": 1.0}
    with pytest.raises(ConfigError, match="never move"):
        warnings_of(experiment_of(silent_faults.KD, still))
    said = warnings_of(experiment_of(silent_faults.KD, still), alone=False)
    assert said == ["warning: roles.teacher.decay: the average would never move"]


def test_doubts_are_said_once():
    slow = {**AVERAGE, "roles.teacher.decay": 0.999}
    experiment = experiment_of(silent_faults.KD, slow)
    [line] = warnings_of(experiment)
    assert line.startswith("warning: roles.teacher.decay: after 12 steps")
    assert warnings_of(experiment) == []


def test_repeated_examples_are_counted():
    dataset = faulty.some_repeated()
    [finding] = data.of_parts(dataset)
    assert (finding.kind, "8 of 64 examples of the test part" in finding.what) == ("warning", True)


def test_a_smaller_share_held_out_by_a_teacher_is_a_doubt():
    config = flags.load(silent_faults.SUPERVISED)
    stored = config.data.to_dict()
    assert not list(teacher_saw({"data": stored}, config, where="x"))
    [finding] = teacher_saw({"data": {**stored, "held_out": 0.05}}, config, where="x")
    assert finding.kind == "warning"


def test_an_arm_may_leave_unread_what_it_inherits_alone():
    config = flags.load(STUDY)
    unused.check(config)
    arm = next(iter(config.study.arms))
    wrong = config_lib.override(config, {f"study.arms.{arm}.bilevel.every": 3})
    with pytest.raises(ConfigError, match=rf"study\.arms\.{arm}\.bilevel\.every: nothing reads it"):
        unused.check(wrong)
    by_none = config_lib.override(config, {"cache.top_k": 3})
    with pytest.raises(ConfigError, match=r"^cache\.top_k: nothing reads it"):
        unused.check(by_none)


def test_a_command_line_may_switch_off_what_the_file_sets():
    argv = ["x", f"--config={silent_faults.TGEO}", "--mode=describe", "--config.weighting.name="]
    assert flags.parse(argv).config.bilevel.every == 2
    with pytest.raises(ConfigError, match=r"^bilevel\.every: nothing reads it"):
        flags.parse([*argv, "--config.bilevel.every=3"])


def test_arms_of_the_demo_pass():
    config = flags.load(STUDY)
    for arm in config.study.arms:
        single = study.arm_config(config, arm, config.study.seeds[0], pathlib.Path("runs"))
        warnings_of(build.build(single, shapes_only=True), alone=False)


def test_a_field_that_only_the_host_reads_counts_as_read():
    config = flags.load("configs/studies/paper_rad.py:smoke")
    names = unread.named_in(type(build.build(_arm(config, "robust"), shapes_only=True).objective))
    assert "policy" in names


def _arm(config, arm):
    single = study.arm_config(config, arm, config.study.seeds[0], pathlib.Path("runs"))
    return single


def test_class_means_of_a_teacher_that_moves_are_refused():
    moving = experiment_of(silent_faults.TGEO, AVERAGE)
    with pytest.raises(ConfigError, match=r"^weighting\.name: .*teacher changes"):
        warnings_of(moving)
    without = {"weighting.kwargs.blocks": ("sg", "tg", "st", "s", "t", "g")}
    warnings_of(experiment_of(silent_faults.TGEO, AVERAGE | without))


HIDDEN = {"data.corrupt.labels_percent": 50.0}


@pytest.mark.parametrize(
    "spec, who",
    [
        (silent_faults.KD, ""),
        (silent_faults.SUPERVISED, "TfKD"),
        (silent_faults.TGEO, "KD weighted by Trilateral"),
    ],
)
def test_hidden_labels_are_refused_by_who_reads_them(spec, who):
    own = {"objective.name": "tf_kd"} if who == "TfKD" else {}
    experiment = experiment_of(spec, HIDDEN | own)
    if not who:
        assert warnings_of(experiment) == []
        return
    with pytest.raises(ConfigError, match=rf"^data\.corrupt\.labels_percent: {who} reads labels"):
        warnings_of(experiment)


def dkd(classes, **kwargs):
    changes = {f"objective.kwargs.{name}": value for name, value in kwargs.items()}
    return experiment_of(
        silent_faults.KD,
        {
            "objective.name": "dkd",
            "objective.kwargs.warmup": 0,
            "data.kwargs.num_classes": classes,
            **changes,
        },
    )


def test_a_term_that_is_constant_on_these_data_is_found():
    """With two classes one class is left beside the label's, and its share of the rest is 1."""
    assert constants.constant_terms(dkd(2)) == {"nckd": 0.0}
    assert constants.constant_terms(dkd(3)) == {}
    with pytest.raises(ConfigError, match="'nckd' is 0 for all outputs of the networks"):
        warnings_of(dkd(2))
    assert any("'nckd'" in line for line in warnings_of(dkd(2), alone=False))
    assert warnings_of(dkd(2, beta=0.0)) == [
        "warning: objective.kwargs: 'nckd' has weight 0 at every step"
    ]


def test_a_constant_loss_is_refused():
    with pytest.raises(ConfigError, match=r"the loss is constant.*'nckd' is 0"):
        warnings_of(dkd(2, alpha=0.0, label_weight=0.0), alone=False)


def test_an_empty_queue_is_no_constant_term():
    assert constants.constant_terms(experiment_of("configs/ssl/moco.py:smoke")) == {}


@pytest.mark.parametrize(
    ("mean", "std", "alike"),
    [(0.29, 0.35, True), (0.5, 0.35, False), (0.29, 0.2, False), ([0.3] * 3, [0.3] * 3, True)],
)
def test_statistics_of_a_teacher_are_compared(mean, std, alike):
    told = differs([[0.286], [0.353]], (mean, std))
    assert (told == "") is alike
    assert alike or "mean (0.286) and std (0.353), and these have" in told


@pytest.mark.parametrize("read", [True, False])
def test_a_network_beside_must_be_read_by_an_evaluator(read):
    ceiling = {"model": "mlp", "init": "runs/ceiling", "frozen": True}
    changes = {"roles.ceiling": ceiling, "objective.kwargs.beside": ("ceiling",)}
    if read:
        changes["evaluators.gap_recovered"] = {}
    experiment = experiment_of("weak_to_strong:smoke", changes)
    found = [f.what for f in step.findings(experiment) if f.kind == "comparison"]
    assert any("ceiling" in what for what in found) == (not read)
