"""Learned trust from config to folder: what a run does, stores, resumes and refuses."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from distill_jax import main
from distill_jax.core.errors import ConfigError
from distill_jax.data import loader
from distill_jax.run import build, choices, flags
from distill_jax.run import config as config_lib
from distill_jax.trainer.io import checkpoint
from tests.reference import softmax

pytestmark = pytest.mark.slow

TGEO = "configs/bilevel/tgeo_kd.py:smoke"
SUPERVISED = "configs/distill/supervised.py:smoke"
DEMO = "configs/studies/demo.py:smoke"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert main.main(["distill-jax", f"--config={SUPERVISED}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    workdir = tmp_path_factory.mktemp("tgeo") / "run"
    assert main.main(command(workdir, teacher)) == 0
    return workdir


def command(workdir, teacher, *overrides):
    start = ["distill-jax", f"--config={TGEO}", f"--workdir={workdir}"]
    start.append(f"--config.roles.teacher.init={teacher}")
    return start + [f"--config.{override}" for override in overrides]


def restored(workdir, step=12):
    config = config_lib.from_json((workdir / "config.json").read_text())
    experiment = build.build(config)
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints")
    found = checkpointer.restore(experiment.abstract_state, step=step)
    checkpointer.close()
    assert found is not None
    return experiment, found.state


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_measures_and_stores_what_the_weigher_does(finished):
    logged = {name for row in rows(finished) for name in row}
    assert {"train/outer_loss", "train/weight/distillation", "held_out/ratio_mean"} <= logged
    with np.load(finished / "trust.npz") as arrays:
        assert list(arrays["signals"]) == ["cross_entropy", "distillation"]
        weights, label = arrays["weights"], arrays["label"]
        assert weights.shape == (len(label), 2)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
        assert arrays["low_images"].shape[0] == len(arrays["low"]) == 12
        assert weights[arrays["low"], 1].max() <= weights[arrays["high"], 1].min()
    result = json.loads((finished / "result.json").read_text())
    assert result["parameters"]["weighting"] > 0 and result["compute"]["seconds_per_step"] > 0


def test_the_host_chooses_the_step(finished):
    experiment, _ = restored(finished)
    due = [experiment.variant(step) == "outer" for step in range(12)]
    assert due == [False] * 3 + [True, False] * 4 + [True]
    assert experiment.outer is not None
    assert experiment.outer.steps_before(12) == sum(due)
    assert experiment.share("outer") == sum(due) / experiment.total_steps
    assert [experiment.outer.count(step) for step in (3, 5, 7)] == [0, 1, 2]


def test_class_means_are_those_of_the_training_part(finished):
    experiment, state = restored(finished)
    config = experiment.config
    params, model_state = build.frozen_networks(experiment, config)["teacher"]
    transform = build.make_transform(config, experiment.dataset, train=False)
    sums, counts = np.zeros((4, 4)), np.zeros(4)
    for batch in loader.eval_batches(experiment.dataset.train, batch_size=32):
        batch = transform(jax.random.key(0), batch, 0)
        outputs, _ = experiment.models["teacher"].apply(
            params, model_state, batch["input"], train=False, rngs={}
        )
        probs = softmax(outputs["logits"])
        for p, label, real in zip(probs, batch["label"], batch["mask"], strict=True):
            sums[label] += real * p
            counts[label] += real
    assert counts.sum() == len(experiment.dataset.train)
    table = np.asarray(state.memory["class_means"])
    np.testing.assert_allclose(table, sums / counts[:, None], rtol=1e-4)


FAR = {
    "truncated": ("bilevel.horizon=2", {"past"}),
    "two_speed": ("bilevel.forget=0.9", {"tangent"}),
}


@pytest.mark.parametrize("method", ["exact", *FAR])
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    method, finished, teacher, tmp_path, monkeypatch
):
    more: tuple[str, ...] = ()
    kept: set[str] = set()
    if method != "exact":
        key, kept = FAR[method]
        more = (f"bilevel.method={method}", key)
        finished = tmp_path / "whole"
        assert main.main(command(finished, teacher, *more)) == 0
    saved = []
    save = checkpoint.Checkpointer.save

    def save_and_stop(self, state, *args, **kwargs):
        save(self, state, *args, **kwargs)
        saved.append(int(state.step))
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", save_and_stop)
    argv = command(tmp_path / "run", teacher, "checkpoint.every=4", *more)
    assert main.main(argv) == 75 and saved[-1] < 12
    monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
    assert main.main(argv) == 0
    (_, whole), (_, continued) = restored(finished), restored(tmp_path / "run")
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), whole, continued
    )
    assert all(jax.tree.leaves(same))
    assert set(whole.opt_state) == {"inner", "outer"} | kept


WRONG = [
    (["weighting.name=trilaterl"], ["unknown weighting 'trilaterl'", "'trilateral'"]),
    (["weighting.kwargs.edge_mod=abs"], ["does not accept 'edge_mod'", "'edge_mode'"]),
    (["weighting.kwargs.blocks=('sg','xy')"], ["unknown block 'xy'"]),
    (["weighting.control=shufled"], ["did you mean 'shuffled'"]),
    (["weighting.loss_terms=cross_entropy,destillation"], ["did you mean 'distillation'"]),
    (["roles.weighting.kwargs.outputs=2"], ["roles.weighting.kwargs.outputs", "set it to 1"]),
    (["bilevel.method=exat"], ["did you mean 'exact'"]),
    (["bilevel.jvp_fraction=0.3"], ["bilevel.jvp_fraction", "whole number"]),
    (["bilevel.outer_batch=4"], ["bilevel.outer_batch", "held-out"]),
    (["bilevel.outer_loss=cross_entropie"], ["did you mean 'cross_entropy'"]),
    (["bilevel.unroll=2"], ["bilevel.unroll", "outer_update=lookahead"]),
    (["bilevel.method=neumann", "bilevel.unroll=2"], ["bilevel.unroll", "method=exact"]),
    (["bilevel.horizon=3"], ["bilevel.horizon", "no horizon"]),
    (["bilevel.method=truncated", "bilevel.horizon=4"], ["bilevel.horizon", "every 2"]),
    (["bilevel.method=two_speed", "bilevel.low_memory=true"], ["bilevel.low_memory"]),
    (
        ["bilevel.method=two_speed", "roles.weighting.kwargs.hidden=(1,)"],
        ["bilevel.method", "last bias"],
    ),
    (["data.outer=1.5"], ["data.outer", "a share from 0"]),
    (["data.corrupt.train_on_outer=added"], ["from 0 held-out examples"]),
    (["bilevel.optim.name=adm"], ["unknown optimizer 'adm'"]),
    (["data.held_out=0", "eval.metric="], ["data.held_out", "held-out"]),
    (["accum_steps=2"], ["accum_steps", "low_memory"]),
    (["weighting.name=constant"], ["never calls the network 'weighting'"]),
    (["weighting.name="], ["roles.weighting", "delete the role"]),
    (["data.corrupt.label_nois=0.1"], ["does not accept 'label_nois'", "'label_noise'"]),
    (
        [
            "data.corrupt.label_noise=0.1",
            "data.train_transforms=random_crop,horizontal_flip,normalize,mixup",
        ],
        ["mixup", "data.corrupt"],
    ),
    (["data.corrupt.teacher_damage=1.5"], ["data.corrupt.teacher_damage", "0 <= x < 1"]),
]


@pytest.mark.parametrize("overrides, expected", WRONG, ids=[w[0][0] for w in WRONG])
def test_mistakes_are_refused(overrides, expected, teacher, tmp_path, capsys):
    assert main.main(command(tmp_path / "run", teacher, *overrides)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    for text in expected:
        assert text in err, err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_by_gradient_need_every_step(teacher, tmp_path, capsys):
    config = flags.load(TGEO)
    del config.roles["weighting"]
    config.weighting.name = "reweight"
    config.roles.teacher.init = str(teacher)
    config.evaluators = {"classification": {}}
    with pytest.raises(ConfigError, match="in every step"):
        build.build(config)
    config.bilevel.every, config.bilevel.warmup = 1, None
    assert build.build(config).variants == ("outer",)


def test_describe_shows_both_steps(teacher, tmp_path, capsys):
    assert main.main([*command(tmp_path, teacher), "--mode=describe"]) == 0
    out = capsys.readouterr().out
    assert "step in which the weighting learns, 41.7% of all" in out
    assert "step of the student alone, 58.3% of all" in out
    assert "every 2, exact: a held-out gradient" in out and " outer, " in out


def test_tuned_arms_are_chosen_on_the_held_out_part():
    config = flags.load(DEMO)
    config.study.tuned, config.study.tuned_by = {"best": ("alone", "kd_50")}, "mean"
    made = {
        ("alone", 0): {"metrics": {"held_out/accuracy": 0.5, "test/accuracy": 0.1}},
        ("alone", 1): {"metrics": {"held_out/accuracy": 0.7, "test/accuracy": 0.1}},
        ("kd_50", 0): {"metrics": {"held_out/accuracy": 0.4, "test/accuracy": 0.9}},
        ("kd_50", 1): {},
    }
    found = choices.tune(config, made)["best"]
    assert found["arm"] == "alone" and found["by"] == "held_out/accuracy"
    assert found["candidates"] == {"alone": pytest.approx(0.6), "kd_50": pytest.approx(0.4)}


@pytest.mark.parametrize(
    "path, value, word",
    [
        ("study.tuned.best", ("alone", "kd_5"), "did you mean 'kd_50'"),
        ("study.tuned.kd_50", ("alone",), "an arm has this name"),
        ("study.questions.q", ("alone", "kd_tund"), "did you mean 'kd_tuned'"),
        ("study.questions.q", ("alone",), "does not compare two arms"),
        ("study.questions.q", ("alone", "alone"), "does not compare two arms"),
        ("study.sources", ("techer",), "did you mean 'teacher'"),
        ("study.sources", ("alone",), "the reference"),
    ],
)
def test_wrong_studies_are_refused(path, value, word):
    config = config_lib.override(flags.load(DEMO), {path: value})
    with pytest.raises(ConfigError, match=word):
        config_lib.validate(config)


def test_freed_memory_can_be_given_back(monkeypatch):
    from distill_jax.run import environment

    monkeypatch.setenv("DISTILL_JAX_KEEP_MEMORY", "off")
    assert environment.keep_freed_memory() is False
