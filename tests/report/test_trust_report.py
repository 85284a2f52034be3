"""Learned trust in reports: what was stored is drawn, whatever is missing or damaged."""

import html
import json
import re

import numpy as np
import pytest

from distill_jax.evaluators import trust as evaluator
from distill_jax.report import (
    compute,
    distributions,
    figures,
    trust,
    write_run_report,
    write_study_report,
)
from tests.report.test_report import CLASSES, EVIL, checked, write_run, write_study

FLAGS = ("teacher_shift", "label_noisy", "outlier")
TIMES = "\u00d7"


def example_weight_arrays(seed=0, *, n=600, k=6, constant=None):
    """Returns the arrays of trust.npz: a ratio that follows the teacher's margin, with noise."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n).astype(np.int32)
    student, teacher = (rng.normal(size=(n, k)).astype(np.float32) * 2 for _ in range(2))
    teacher[np.arange(n), label] += 3
    shift = np.where(label == 3, 2, 0).astype(np.int32)
    teacher = np.stack([np.roll(row, by) for row, by in zip(teacher, shift, strict=True)])
    margin = evaluator.teacher_margin(teacher.astype(np.float64), label)
    ratio = 1 / (1 + np.exp(-1.5 * margin - 0.4 * rng.normal(size=n)))
    ratio = np.full(n, constant) if constant is not None else ratio
    order = np.argsort(ratio, kind="stable")
    images = rng.integers(0, 256, (n, 6, 5, 1)).astype(np.uint8)
    return {
        "weights": np.stack([1 - ratio, ratio], axis=1).astype(np.float32),
        "signals": np.array(["cross_entropy", EVIL]),
        "student": student,
        "teacher": teacher,
        "label": label,
        "index": np.arange(n) + 7000,
        "teacher_shift": shift,
        "label_noisy": (rng.random(n) < 0.2).astype(np.int32),
        "outlier": (np.arange(n) > n - 40).astype(np.int32),
        "low": order[:12],
        "low_images": images[:12],
        "high": order[::-1][:12],
        "high_images": images[12:24],
    }


def add_trust(run, seed=0, *, flags=FLAGS, curves=True, control="none", **kwargs):
    """Gives a run folder what a run with a weighting leaves, and returns the arrays."""
    arrays = example_weight_arrays(seed, **kwargs)
    arrays = {name: x for name, x in arrays.items() if name not in FLAGS or name in flags}
    np.savez_compressed(run / "trust.npz", allow_pickle=False, **arrays)
    if curves:
        final = evaluator.make()({"example_weights": arrays}, arrays)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["step"] % 50 == 0:
                moved = 1 - np.exp(-line["step"] / 100)
                line |= {f"held_out/{name}": 0.5 + (v - 0.5) * moved for name, v in final.items()}
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = json.loads((run / "config.json").read_text())
    config["weighting"] = {"name": "trilateral", "control": control}
    (run / "config.json").write_text(json.dumps(config))
    return arrays


def add_compute(study, arm, **facts):
    for folder in (study / arm).iterdir():
        path = folder / "result.json"
        if path.exists():
            result = json.loads(path.read_text())
            result["compute"] |= facts
            path.write_text(json.dumps(result))


def trust_section(text):
    return re.search(r'<section id="trust">.*?</section>', text, re.DOTALL)[0]


def test_run_report_holds_the_numbers(tmp_path):
    write_run(tmp_path / "run")
    arrays = add_trust(tmp_path / "run")
    text = trust_section(checked(write_run_report(tmp_path / "run")))
    metrics = evaluator.make()({"example_weights": arrays}, arrays)
    for name, title in trust._NAMES.items():
        row = rf'{html.escape(title)}</th><td class="n">{metrics[name]:.3f}</td>'
        assert row.replace("-", "\u2212") in text.replace("-", "\u2212"), name
    mean = arrays["weights"].astype(np.float64).mean(axis=0)[1]
    assert f'mean weight of {html.escape(EVIL)}</th><td class="n">{mean:.3f}</td>' in text
    for name, _ in trust.GROUPS.values():
        end = 0.5 + (metrics[f"ratio_{name}"] - 0.5) * (1 - np.exp(-4))
        assert f"ends at {end:.4g}" in text
    for area in ("teacher_wrong_auc", "damaged_auc"):
        assert f"AUC {metrics[area]:.2f}<" in text
    ratio = arrays["weights"][:, 1] / arrays["weights"].sum(axis=1)
    for c, name in enumerate(CLASSES):
        part = arrays["label"] == c
        assert f"{name}: mean {ratio[part].mean():.3f}, n = {part.sum()}" in text
    outliers = arrays["outlier"] > 0
    assert f"outlier: mean {ratio[outliers].mean():.3f}, n = 39" in text
    assert f"usual example: mean {ratio[~outliers].mean():.3f}, n = 561" in text
    assert "Please note" not in text


def test_extreme_examples_are_shown_with_what_was_said(tmp_path):
    write_run(tmp_path / "run")
    arrays = add_trust(tmp_path / "run")
    text = trust_section(checked(write_run_report(tmp_path / "run")))
    assert text.count("<img") == 24
    ratio = arrays["weights"][:, 1] / arrays["weights"].sum(axis=1)
    cards = re.findall(r'<div class="example">.*?</p>(?:<span class="badge">.*?</span>)*', text)
    rows = [*arrays["low"], *arrays["high"]]
    images = [*arrays["low_images"], *arrays["high_images"]]
    for card, row, image in zip(cards, rows, images, strict=True):
        assert figures.png(image) in card
        assert f"index {7000 + row}<" in card
        assert f"<b>{ratio[row]:.3f}</b>" in card
        said = CLASSES[arrays["teacher"][row].argmax()]
        right = arrays["teacher"][row].argmax() == arrays["label"][row]
        assert f"{'✓' if right else '✗'} {said}" in card.partition("teacher</span>")[2]
        for flag, (_, name) in trust.FLAGS.items():
            assert (f'class="badge">{name}<' in card) == (arrays[flag][row] != 0)


def test_study_report_compares_the_arms_that_have_trust(tmp_path):
    write_study(tmp_path, seeds=2, failed=False)
    stored = {
        arm: [add_trust(tmp_path / arm / f"seed{s}", s, **kw) for s in range(2)]
        for arm, kw in (("distilled", {}), ("self", {"constant": 0.25, "control": "shuffled"}))
    }
    text = trust_section(checked(write_study_report(tmp_path)))
    found = {
        arm: [evaluator.make()({"example_weights": a}, a)["teacher_wrong_auc"] for a in arrays]
        for arm, arrays in stored.items()
    }
    mean, spread = np.mean(found["distilled"]), np.std(found["distilled"], ddof=1)
    cells = f'<td class="n">{mean:.3f} ± {spread:.3f}</td><td class="n">0.500 ± 0.000</td>'
    assert cells in text
    assert "label only" not in text
    assert "self: ratios are shown as the weighting gives them" in text
    assert "shuffled within the batch" in text
    assert text.count('class="band c') == 2 * 4 + 2 * 2  # groups, and areas, by arm
    assert [len(re.findall(f"index {7000 + r}<", text)) for r in stored["distilled"][0]["low"]] == (
        [1] * 6 + [0] * 6
    )
    assert text.count("<details") == 2
    assert text.count("<img") == 24
    assert "Examples of distilled, seed 0" in text


@pytest.mark.parametrize("flag", FLAGS)
def test_what_is_missing_is_absent(tmp_path, flag):
    write_run(tmp_path / "run")
    assert 'id="trust"' not in checked(write_run_report(tmp_path / "run"))
    arrays = add_trust(tmp_path / "run", flags=(flag,), curves=False)
    kept = {n: x for n, x in arrays.items() if n not in ("signals", "low", "high_images")}
    np.savez(tmp_path / "run/trust.npz", allow_pickle=False, **kept)
    text = trust_section(checked(write_run_report(tmp_path / "run")))
    for name, titles in trust.FLAGS.items():
        assert (titles[0] in text) == (name == flag)
    assert "Mean ratio over time" not in text
    assert "mean weight of 1" in text
    assert "<img" not in text


def test_interrupted_run_shows_its_curves(tmp_path):
    write_run(tmp_path / "run")
    add_trust(tmp_path / "run")
    (tmp_path / "run/trust.npz").unlink()
    page = checked(write_run_report(tmp_path / "run"))
    text = trust_section(page)
    assert "Mean ratio over time" in text
    assert "finds the damaged teacher" in text
    assert "Ratio by class" not in text
    assert "held_out/ratio" not in page.partition('id="curves"')[2].partition("</section>")[0]


def test_damaged_files_are_noted(tmp_path):
    write_study(tmp_path, seeds=2, failed=False)
    run = tmp_path / "distilled/seed0"
    for seed in range(2):
        arrays = add_trust(tmp_path / f"distilled/seed{seed}", seed)
    data = (run / "trust.npz").read_bytes()
    (run / "trust.npz").write_bytes(data[: len(data) // 2])
    assert "trust.npz is damaged" in checked(write_run_report(run))
    text = trust_section(checked(write_study_report(tmp_path)))
    assert "distilled, seed 0: trust.npz is damaged" in text
    assert "Examples of distilled, seed 1" in text
    (tmp_path / "distilled/seed1/trust.npz").unlink()
    for change, words in (
        ({"weights": arrays["weights"][:-1]}, "weights have shape (599, 2)"),
        ({"student": np.full_like(arrays["student"], np.nan)}, "not finite"),
        ({"label": arrays["label"] + 1}, "labels span"),
        ({"index": arrays["index"][:4]}, "index has shape (4,)"),
        ({"weights": None}, "weights is missing"),
    ):
        changed = {n: x for n, x in {**arrays, **change}.items() if x is not None}
        np.savez(run / "trust.npz", allow_pickle=False, **changed)
        for page in (write_run_report(run), write_study_report(tmp_path)):
            text = trust_section(checked(page))
            assert "trust.npz cannot be used: " in text
            assert words in text
            assert "Ratio by class" not in text


@pytest.mark.parametrize("constant", [0.0, 0.5, 1.0])
def test_a_constant_ratio_is_drawn(tmp_path, constant):
    write_run(tmp_path / "run", steps=50)
    add_trust(tmp_path / "run", constant=constant)
    text = trust_section(checked(write_run_report(tmp_path / "run")))
    assert "AUC 0.50" in text
    assert "rank correlation" not in text


def test_many_arms_classes_and_signals_stay_small(tmp_path):
    many = tuple(f"class number {i}" for i in range(100))
    skills = {f"arm number {i}": 2 + i / 9 for i in range(14)}
    write_study(tmp_path, skills=skills, seeds=1, failed=False, classes=many, n=200)
    for i in range(14):
        add_trust(tmp_path / f"arm number {i}/seed0", i, n=800, k=100)
    text = trust_section(checked(write_study_report(tmp_path)))
    assert text.count("Arms without a colour in the results are left out") == 1
    assert text.count("Examples of arm number") == 12
    areas = text.partition("Does a low ratio")[2].partition("Ratio over")[0]
    assert len(re.findall("<title>arm number [^<]*</title>", areas)) == 8 * 2 * 2
    assert "figures show the first 12 of 14 arms" in text
    assert text.count("The 84 classes in between are left out") == 1
    assert text.count('<th scope="col" class="n">arm number') == 14


def test_sample_is_spread_over_margins():
    rng = np.random.default_rng(0)
    margin, ratio = np.concatenate([rng.uniform(0.9, 1, 5000), rng.uniform(-1, 1, 60)]), None
    ratio = rng.random(len(margin))
    rows = trust._spread(margin, ratio)
    assert len(rows) == len(set(rows.tolist())) <= 400
    crowded = (margin >= 0.9) & np.isin(np.arange(len(margin)), rows)
    assert crowded.sum() == 20
    assert ratio[rows][margin[rows] >= 0.9].max() == ratio[margin >= 0.9].max()
    lonely = np.flatnonzero(margin < 0.9)
    assert set(lonely.tolist()) <= set(rows.tolist())


def test_bands_are_quantiles_and_break_at_gaps():
    margin = np.repeat([-0.95, -0.85, 0.55, 0.95], [40, 40, 3, 40])
    ratio = np.tile(np.arange(41) / 40, 3)
    counts, lines = trust._bands(margin, ratio)
    assert counts.tolist() == [40, 40, *[0] * 13, 3, *[0] * 3, 40]
    assert [line.x.round(2).tolist() for line in lines] == [[-0.95, -0.85], [0.95]]
    np.testing.assert_allclose(lines[1].y, np.median(ratio[-40:]))
    np.testing.assert_allclose(lines[1].low, np.quantile(ratio[-40:], 0.1))
    np.testing.assert_allclose(lines[1].high, np.quantile(ratio[-40:], 0.9))


@pytest.mark.parametrize("values", [np.zeros(5), np.ones(3), np.linspace(0, 1, 1000)])
def test_density_keeps_its_total(values):
    x, share = distributions.density(values, (0.0, 1.0))
    assert share.sum() == pytest.approx(1)
    assert (x @ share) == pytest.approx(values.mean(), abs=0.03)


def test_cost_is_relative_to_plain_distillation(tmp_path):
    write_study(tmp_path, skills={"label only": 1, "kd": 1.5, "tgeo": 1.6}, failed=False)
    assert "kd, FLOPs: 1.00" in checked(write_study_report(tmp_path))
    for arm, scale in (("label only", 0.5), ("kd", 1), ("tgeo", 1.75)):
        add_compute(tmp_path, arm, flops_per_step=2e9 * scale, seconds_per_step=0.03 * scale**2)
    text = checked(write_study_report(tmp_path))
    for said in ("label only, FLOPs: 0.50", "tgeo, FLOPs: 1.75", "tgeo, time: 3.06"):
        assert said + TIMES in text
    assert "relative to kd" in text
    assert "91.9 ms" in text
    add_compute(tmp_path, "tgeo", seconds_per_step=None, flops_per_step=None)
    text = checked(write_study_report(tmp_path))
    assert "label only, time: 0.25" in text
    assert "tgeo, time" not in text
    add_compute(tmp_path, "kd", seconds_per_step=None, flops_per_step=None)
    assert "Cost of a step" not in checked(write_study_report(tmp_path))


def test_cost_is_relative_to_the_reference_without_plain_distillation(tmp_path):
    study = write_study(tmp_path, seeds=1, failed=False)
    add_compute(tmp_path, "self", flops_per_step=3 * 2.31e9)
    text = checked(write_study_report(tmp_path))
    assert "relative to label only" in text
    assert "self, FLOPs: 3.00" in text
    (tmp_path / "study.json").write_text(json.dumps(study | {"reference": "unheard of"}))
    assert "Cost of a step" not in checked(write_study_report(tmp_path))
    assert compute.section({}) is None


def test_of_many_arms_those_that_matter_are_drawn(tmp_path):
    skills = {f"arm{i}": 0.5 + i / 9 for i in range(12)}
    study = write_study(tmp_path, skills=skills, seeds=1, failed=False)
    (tmp_path / "study.json").write_text(json.dumps(study | {"reference": "arm8"}))
    add_trust(tmp_path / "arm9/seed0", curves=False)
    best = max(study["arms"], key=lambda arm: study["arms"][arm]["seeds"]["0"]["value"])
    others = [arm for arm in skills if arm not in ("arm8", "arm9", best)]
    want = ["arm8", "arm9", best]
    want += others[: 8 - len(set(want))]
    text = checked(write_study_report(tmp_path))
    curves = re.search(r'<section id="curves">.*?</section>', text, re.DOTALL)[0]
    for arm in skills:
        dot = re.search(rf'class="dot (\w+)"></span>{arm}<', text)[1]
        assert (dot != "pale") == (arm in want)
        assert (f"</svg>{arm}</li>" in curves) == (arm in want)
    assert "show 8 of 12, which have a colour" in text
    assert "arm9" in trust_section(text)


def test_metrics_of_trust_stand_only_where_they_are_explained(tmp_path):
    study = write_study(tmp_path, seeds=1, failed=False)
    path = tmp_path / "self/seed0/result.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {"test/ratio_mean": 0.25, "test/damaged_auc": 0.75}
    path.write_text(json.dumps(result))
    text = checked(write_study_report(tmp_path))
    assert "test/ratio_mean" not in text
    assert "test/damaged_auc" not in text
    (tmp_path / "study.json").write_text(json.dumps(study | {"metric": "test/damaged_auc"}))
    assert '<th scope="row">test/damaged_auc</th>' in checked(write_study_report(tmp_path))
