"""Choices of a study on the selecting examples: tuned arms, settings taken from them, fallbacks."""

import json

import numpy as np
import pytest

from distill_jax.configs import trust
from distill_jax.core.errors import ConfigError
from distill_jax.report import write_study_report
from distill_jax.run import arms, choices, study
from distill_jax.run import config as config_lib

CENTRE = "study.arms.tgeo.weighting.kwargs.centre"


def make_config(**overrides):
    """Constants, of which each seed has its own best, a ratio learned around it, and a fallback."""
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 240, "n_test": 60, "image_size": 6, "channels": 1}
    config.data.held_out, config.data.outer = 0.25, 0.5
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": (0.5,), "std": (0.25,)}}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(8,))
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.eval.every = 16, 12, 6
    config.log.tensorboard = False
    tgeo = trust.weighted("trilateral", temperature=4.0)
    tgeo["weighting"]["kwargs"] = {"centre": "setting:kd_tuned#objective.kwargs.alpha"}
    config.study.arms = {
        "tgeo": trust.with_network(tgeo, "ratio_mlp", hidden=(4,)),
        "kd_0": trust.kd(0.0, temperature=4.0),
        "kd_60": trust.kd(0.6, temperature=4.0),
        "teacher": {"roles": {"student": {"kwargs": {"hidden": (16,)}}}},
    }
    config.study.tuned = {"kd_tuned": ("kd_0", "kd_60")}
    config.study.tuned_by = "seed"
    config.study.fallback = {"safe": ("tgeo", "kd_tuned")}
    config.study.questions = {"is it safe": ("safe", "kd_tuned", "teacher")}
    config.study.reference = "kd_tuned"
    config.study.seeds = (0, 1)
    return config_lib.override(config, overrides)


def finished(accuracy=0.5, right=(), ids=None):
    ids = np.arange(len(right)) if ids is None else ids
    stored = choices.packed(np.asarray(right, bool), np.asarray(ids))
    selecting = {"last": stored, "best": stored}
    metrics = {"held_out/accuracy": accuracy}
    return {"status": "done", "metrics": metrics, "value": accuracy, "selecting": selecting}


DAMAGED = finished(0.5, [1, 0])
DAMAGED["selecting"]["last"] |= {"right": "8g"}


@pytest.mark.parametrize("n", [1, 7, 8, 250])
def test_right_answers_survive_packing(n):
    right = np.random.default_rng(n).random(n) < 0.7
    stored = json.loads(json.dumps(choices.packed(right, np.arange(n))))
    np.testing.assert_array_equal(choices.unpacked(stored), right)


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (2, 1), (9, 1), (12, 9), (3, 8)])
def test_the_fallback_is_left_where_the_paired_gain_exceeds_its_error(gained, lost, margin):
    config = make_config(**{"study.fallback_margin": margin})
    other = np.arange(40) >= 20
    learned = other.copy()
    learned[:gained], learned[20 : 20 + lost] = True, False
    made = {(arm, 0): finished(0.5, other) for arm in ("kd_0", "kd_60")}
    made["tgeo", 0] = finished(0.5, learned)
    found = choices.Chosen(config, made)
    decision = found.fallback["safe"]["seeds"]["0"]["value"]
    mean = (gained - lost) / 40
    se = np.sqrt((gained + lost - 40 * mean**2) / 39 / 40)
    assert decision["arm"] == ("tgeo" if mean > margin * se else "kd_tuned")
    assert decision["right"] == [20 + gained - lost, 20] and decision["examples"] == 40
    np.testing.assert_allclose([decision["difference"], decision["se"]], [mean, se])
    assert found.arm("safe", 0) == ("tgeo" if mean > margin * se else "kd_0")
    assert found.arm("safe", 1) is None


@pytest.mark.parametrize(
    "changes, arm, why",
    [
        ({("tgeo", 0): {"status": "failed"}}, "kd_tuned", "tgeo failed"),
        ({("tgeo", 0): {"status": "pending"}}, None, "tgeo has not finished"),
        ({("kd_0", 0): {"status": "pending"}}, None, "kd_tuned has not finished"),
        ({("tgeo", 0): {"status": "done"}}, None, "tgeo stored no right answers"),
        ({("tgeo", 0): finished(0.5, [1, 0], [3, 4])}, None, "different examples"),
        ({("tgeo", 0): DAMAGED}, None, "damaged entry"),
    ],
)
def test_a_fallback_says_why_it_cannot_compare(changes, arm, why):
    made = {(arm, 0): finished(0.5, [1, 0]) for arm in ("tgeo", "kd_0", "kd_60")} | changes
    found = choices.Chosen(make_config(), made).fallback["safe"]["seeds"]["0"]["value"]
    assert found["arm"] == arm and why in found["why"]


def test_each_seed_chooses_by_itself_or_all_by_the_mean():
    scores = {("kd_0", 0): 0.9, ("kd_60", 0): 0.8, ("kd_0", 1): 0.5, ("kd_60", 1): 0.7}
    made = {key: finished(value) for key, value in scores.items()}
    found = choices.tune(make_config(), made)["kd_tuned"]
    assert found["seeds"] == {"0": "kd_0", "1": "kd_60"} and "arm" not in found
    assert choices.settled(make_config(), ["kd_tuned"], 1, made) == {"kd_tuned": "kd_60"}
    by_mean = make_config(**{"study.tuned_by": "mean"})
    assert choices.tune(by_mean, made)["kd_tuned"]["arm"] == "kd_60"
    assert choices.settled(by_mean, ["kd_tuned"], 0, made) == {"kd_tuned": "kd_60"}
    del made["kd_60", 1]
    assert choices.settled(by_mean, ["kd_tuned"], 0, made) is None
    assert choices.settled(make_config(), ["kd_tuned"], 0, made) == {"kd_tuned": "kd_0"}


def test_an_arm_takes_the_setting_of_the_chosen_arm(tmp_path):
    config = make_config()
    assert arms.ordered_arms(config) == ["teacher", "kd_0", "kd_60", "tgeo"]
    for chosen, ratio in (("kd_0", 0.0), ("kd_60", 0.6)):
        single = arms.arm_config(config, "tgeo", 0, tmp_path, {"kd_tuned": chosen})
        assert single.weighting.kwargs.centre == ratio


@pytest.mark.parametrize(
    "overrides, where, word",
    [
        ({CENTRE: "setting:kd_tund#objective.kwargs.alpha"}, CENTRE, "did you mean 'kd_tuned'"),
        ({CENTRE: "setting:kd_tuned#objective.kwargs.alfa"}, CENTRE, "mean 'objective.kwargs.al"),
        ({CENTRE: "setting:kd_tuned"}, CENTRE, "setting:ARM#PATH"),
        ({CENTRE: "setting:tgeo#weighting.kwargs.centre"}, CENTRE, "from another arm itself"),
        ({CENTRE: "setting:kd_tuned#objective.kwargs.temperature"}, "tgeo", "kd_0: centre is 4.0"),
        ({"study.tuned.kd_tuned": ("kd_0", "tgeo")}, "study.arms", "in a circle"),
        ({"study.fallback.safe": ("tgeo", "kd_tund")}, "safe", "did you mean 'kd_tuned'"),
        ({"study.fallback.safe": ("tgeo",)}, "safe", "does not name two arms"),
        ({"study.fallback.tgeo": ("kd_0", "kd_60")}, "tgeo", "an arm has this name"),
        ({"study.fallback.safe": ("tgeo", "safe")}, "safe", "falls back on itself"),
        ({"study.fallback_margin": -1.0}, "fallback_margin", "0 or more"),
        ({"study.tuned_by": "best"}, "tuned_by", "mean, seed"),
        ({"study.seeds": ()}, "study", "set study.arms and study.seeds"),
        ({"study.reference": "safer"}, "reference", "did you mean 'safe'"),
        ({"data.outer": None}, "safe", "data.outer is 0.5 and 0.0"),
        ({"study.arms.kd_60.data.held_out": 0.5}, "safe", "data.held_out is"),
        ({"study.arms.tgeo.evaluators.classification": None}, "safe", "evaluator classification"),
        (
            {"study.arms.kd_60.data": {"held_out": 0.0, "outer": 0.0},
             "study.arms.kd_60.eval.metric": ""}, "safe", "kd_60 has no selecting part",
        ),
    ],
)  # fmt: skip
def test_wrong_choices_are_refused_before_anything_is_trained(overrides, where, word):
    with pytest.raises(ConfigError, match=word) as caught:
        config = make_config(**overrides)
        config_lib.validate(config)
        study.check(config)
    assert where in caught.value.where


@pytest.mark.slow
@pytest.mark.parametrize("replicas", ["no", "yes"])
def test_a_study_learns_around_the_tuned_constant_and_falls_back(tmp_path, replicas):
    config = make_config(**{"study.replicas": replicas})
    lines = []
    table = study.run_study(config, tmp_path, log_line=lines.append)
    stored = json.loads((tmp_path / "study.json").read_text())
    tuned, safe = stored["tuned"]["kd_tuned"], stored["fallback"]["safe"]
    for seed in "01":
        ratio = {"kd_0": 0.0, "kd_60": 0.6}[tuned["seeds"][seed]]
        own = json.loads((tmp_path / "tgeo" / f"seed{seed}" / "config.json").read_text())
        assert own["weighting"]["kwargs"]["centre"] == ratio
        decision = safe["seeds"][seed]["value"]
        taken = "tgeo" if decision["arm"] == "tgeo" else tuned["seeds"][seed]
        entry = stored["arms"]["safe"]["seeds"][seed]
        assert entry["arm"] == taken and entry["run"] == f"{taken}/seed{seed}"
        assert entry["value"] == stored["arms"][taken]["seeds"][seed]["value"]
        right = json.loads((tmp_path / "tgeo" / f"seed{seed}" / "result.json").read_text())
        assert right["selecting"]["last"]["n"] == decision["examples"]
        share = decision["right"][0] / decision["examples"]
        assert share == pytest.approx(right["metrics"]["held_out/accuracy"])
    assert "kd_tuned: " in table and "safe: " in table
    page = write_study_report(tmp_path).read_text()
    assert "Choices" in page and "by more than 1 standard error of the paired difference" in page
    assert study.run_study(config, tmp_path, log_line=lines.append) == table
