"""Reports: one offline, well-formed, escaped file each, whatever a run left behind."""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from distill_jax.core.errors import UserError
from distill_jax.evaluators import calibration, classification
from distill_jax.report import curves, figures, quality, write_run_report, write_study_report
from distill_jax.report.html import el

EVIL = "<script>alert('x')</script>&\"quoted\""
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal")


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order, on external resources and on repeated ids."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href"}:
                self.links.append(value)
            assert not name.startswith("on")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(path):
    text = path.read_text(encoding="utf-8")
    assert path.name == "report.html"
    assert len(text.encode()) < 2_000_000
    page = Balanced()
    page.feed(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert page.tags.count("h1") == 1
    assert "http://" not in text
    assert "https://" not in text
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,")) or "//" not in link
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    assert text.count("<img") == len(re.findall(r"<img [^>]*alt=\"[^\"]", text))
    assert text.count('class="plot"') == len(re.findall(r"<svg [^>]*aria-label=\"[^\"]", text))
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"data:[^\"]*", "", text))
    return text


def fake_logits(labels, skill, k, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(labels), k))
    logits[np.arange(len(labels)), labels] += skill
    return (1.6 * logits).astype(np.float32)


def write_run(path, *, seed=0, skill=1.5, arm="distilled", classes=CLASSES, n=300, steps=400):
    """Writes a run folder as docs/architecture.md defines it."""
    path.mkdir(parents=True)
    k = len(classes)
    labels = np.random.default_rng(7).integers(0, k, n).astype(np.int32)
    logits = {
        "student": fake_logits(labels, skill, k, seed),
        "teacher": fake_logits(labels, 3, k, 9),
    }
    batch = {"label": labels}
    metrics = {}
    for module in (classification, calibration):
        found = module.make()({"student": {"logits": logits["student"]}}, batch)
        metrics |= {f"test/{n}": v for n, v in found.items() if isinstance(v, float)}
    config = {
        "seed": seed,
        "batch_size": 128,
        "objective": {"name": "kd", "kwargs": {"alpha": 0.9 if arm == "distilled" else 0.0}},
        "data": {"name": "fashion_mnist", "note": EVIL},
        "eval": {"metric": "held_out/accuracy", "mode": "max"},
    }
    env = {
        "versions": {"jax": "0.10.2", "numpy": "2.4.0"},
        "devices": ["TFRT_CPU_0"],
        "command": ["python", "-m", "distill_jax.main", f"--config.seed={seed}"],
    }
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(10, steps + 1, 10):
        line = {"step": step, "epoch": step / 100, "seconds": step / 20}
        line["train/loss"] = 0.3 + 2 * np.exp(-step / (80 + 20 * skill)) + rng.normal() / 40
        line["train/match"] = line["train/loss"] / 2
        if step % 50 == 0:
            at = metrics["test/accuracy"] * (1 - np.exp(-step / 90))
            line["held_out/accuracy"] = at + rng.normal() / 200
            line["held_out/nll"] = 2.3 - at
        lines.append(json.dumps(line))
    provenance = {
        split: {
            "name": f"Fashion-MNIST-5k/1k ({split})",
            "origin": "fashion package, idx files",
            "n": count,
            "sha256": f"{split:x<64}",
            "licence": "MIT",
        }
        for split, count in (("train", 4500), ("held_out", 500), ("test", n))
    }
    result = {
        "status": "done",
        "steps": steps,
        "seed": seed,
        "arm": arm,
        "metrics": metrics,
        "best": {"step": steps - 50, "held_out/accuracy": metrics["test/accuracy"]},
        "provenance": provenance,
        "parameters": {"student": 61_706, "teacher": 1_240_778},
        "compute": {"seconds": 93.0 + seed, "flops_per_step": 2.31e9},
        "classes": list(classes),
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "env.json").write_text(json.dumps(env))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "result.json").write_text(json.dumps(result))
    yy, xx = np.mgrid[:28, :28]
    images = [
        128 + 127 * np.sin((1 + y) * (xx * (1 + i % 3) + yy * y) / 40 + i)
        for i, y in enumerate(labels[:64])
    ]
    arrays = {
        **{f"logits_{role}": values for role, values in logits.items()},
        "label": labels,
        "index": np.arange(n),
        "images": np.array(images).astype(np.uint8)[..., None],
        "images_index": np.arange(64),
    }
    np.savez(path / "predictions.npz", allow_pickle=False, **arrays)
    return metrics["test/accuracy"]


def write_study(path, *, skills=None, seeds=3, failed=True, **run):
    """Writes a study folder; seed 1 of the last arm has failed if `failed`."""
    skills = skills or {"label only": 1.2, "distilled": 1.7, "self": 1.25}
    arms = {}
    for arm, skill in skills.items():
        entries = {}
        for seed in range(seeds):
            where = f"{arm}/seed{seed}"
            kwargs = {"seed": seed, "skill": skill + seed / 50, "arm": arm, **run}
            value = write_run(path / where, **kwargs)
            entries[str(seed)] = {"status": "done", "value": value, "run": where}
        arms[arm] = {"overrides": {"arm": arm}, "description": f"{EVIL} {arm}", "seeds": entries}
    if failed:
        last = next(reversed(arms))
        for name in ("result.json", "predictions.npz"):
            (path / last / "seed1" / name).unlink()
        arms[last]["seeds"]["1"] |= {
            "status": "failed",
            "value": None,
            "error": f"loss became NaN at step 12 {EVIL}",
        }
    study = {
        "name": "kd",
        "title": "Does a teacher help on 4 500 images?",
        "metric": "test/accuracy",
        "mode": "max",
        "reference": next(iter(skills)),
        "arms": arms,
        "summary": [],
    }
    (path / "study.json").write_text(json.dumps(study))
    return study


def shown(value):
    return f"{value:.4f}"


def test_study_report_compares_the_best_states_too(tmp_path):
    study = write_study(tmp_path, failed=False)
    assert "best on held-out data" not in checked(write_study_report(tmp_path))
    bests = {}
    for arm, entry in study["arms"].items():
        for seed, run in entry["seeds"].items():
            run["best"] = run["value"] / 2 + int(seed) / 100
        bests[arm] = np.mean([run["best"] for run in entry["seeds"].values()])
    (tmp_path / "study.json").write_text(json.dumps(study))
    text = checked(write_study_report(tmp_path))
    assert "best on held-out data" in text
    assert all(shown(mean) in text for mean in bests.values())


def test_run_report_holds_the_numbers(tmp_path):
    accuracy = write_run(tmp_path / "run")
    text = checked(write_run_report(tmp_path / "run"))
    result = json.loads((tmp_path / "run/result.json").read_text())
    for value in result["metrics"].values():
        assert shown(value) in text
    assert accuracy == result["metrics"]["test/accuracy"]
    needles = ("Fashion-MNIST-5k/1k (test)", "x" * 20, "MIT", "0.10.2", "--config.seed=0", "61.7 k")
    for needle in (*needles, "2.31 G", "Reliability diagram", "objective.kwargs.alpha"):
        assert needle in text
    assert "student wrong, teacher right" in text
    assert "Please note" not in text
    assert "Pullover" in text


def test_run_report_opens_with_the_answer(tmp_path):
    accuracy = write_run(tmp_path / "run")
    top, _, rest = checked(write_run_report(tmp_path / "run")).partition("<nav")
    arrays = np.load(tmp_path / "run/predictions.npz")
    right = [arrays[f"logits_{r}"].argmax(1) == arrays["label"] for r in ("student", "teacher")]
    difference = float(right[0].mean() - right[1].mean())
    guess = np.bincount(arrays["label"]).max() / 300
    assert f"test/accuracy (higher is better) is {accuracy:.4f} after the last step" in top
    assert f"student minus teacher {difference:+.4f}".replace("-", "\u2212") in top
    assert f"the most frequent class {guess:.4f}" in top
    assert rest.index("Set on the command line") < rest.index("From the config file")
    heads = rest.partition('id="result"')[2].partition("</thead>")[0]
    assert "test, teacher" in heads


def test_alarms_are_shown(tmp_path):
    write_run(tmp_path / "a")
    write_study(tmp_path / "b")
    found = {"step": 60, "rule": "collapse", "metric": "train/embedding/x", "message": EVIL}
    line = json.dumps(found)
    for run in ("a", "b/distilled/seed0"):
        lines = f'{line}\n{{"step": 70}}\n{line[:20]}'  # an older row, and one cut short
        (tmp_path / run / "alarms.jsonl").write_text(lines)
    said = html.escape(f"alarm (collapse) at step 60: train/embedding/x {EVIL}")
    assert said in checked(write_run_report(tmp_path / "a"))
    text = checked(write_study_report(tmp_path / "b"))
    assert "Alarms: 1" in text and said in text


def test_study_report_holds_the_statistics(tmp_path):
    study = write_study(tmp_path)
    text = checked(write_study_report(tmp_path))
    reference, distilled = (
        np.array([s["value"] for s in study["arms"][a]["seeds"].values()])
        for a in ("label only", "distilled")
    )
    difference = distilled - reference
    assert shown(reference.mean()) in text
    assert shown(distilled.mean()) in text
    se = difference.std(ddof=1) / np.sqrt(3)
    assert f"+{shown(difference.mean())} ± {shown(se)}" in text
    assert "2 / 3" in text
    assert "8 of 9" in text
    assert html.escape(f"self, seed 1 failed: loss became NaN at step 12 {EVIL}") in text
    for needle in ("objective.kwargs.alpha", "Paired difference to label only"):
        assert needle in text


def test_a_study_with_questions_opens_with_the_answers(tmp_path):
    study = write_study(tmp_path, failed=False)
    study["questions"] = {"few labels": ["distilled", "self"], "gone": ["distilled", "absent"]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    text = checked(write_study_report(tmp_path))
    one, two = (
        [r["value"] for r in study["arms"][a]["seeds"].values()] for a in ("distilled", "self")
    )
    mean = np.mean(np.subtract(one, two))
    sentence = f"few labels: test/accuracy {shown(np.mean(one))} with distilled, "
    sentence += f"{shown(np.mean(two))} with self; difference +{shown(mean)}"
    assert 0 < text.index(sentence) < text.index("Differences are paired by seed")
    assert "gone" not in text and "Paired difference to" not in text


def test_strings_are_escaped(tmp_path):
    write_study(tmp_path, seeds=1, failed=False)
    run_text = checked(write_run_report(tmp_path / "self/seed0"))
    study_text = checked(write_study_report(tmp_path))
    for text in (run_text, study_text):
        assert "<script" not in text
        assert html.escape(EVIL) in text


def test_one_seed_claims_no_interval(tmp_path):
    write_study(tmp_path, seeds=1, failed=False)
    text = checked(write_study_report(tmp_path))
    assert "one seed only, so no interval: label only, distilled, self" in text
    assert "on one common seed: no interval" in text
    assert "excludes 0" not in text


def test_runs_are_linked_where_they_have_a_report(tmp_path):
    write_study(tmp_path, seeds=1, failed=False)
    write_run_report(tmp_path / "label only/seed0")
    text = checked(write_study_report(tmp_path))
    assert 'href="label%20only/seed0/report.html"' in text
    assert "distilled/seed0/report.html" not in text


@pytest.mark.parametrize(
    "missing", ["config.json", "env.json", "metrics.jsonl", "result.json", "predictions.npz"]
)
@pytest.mark.parametrize("damaged", [False, True])
def test_every_file_may_be_missing_or_damaged(tmp_path, missing, damaged):
    write_study(tmp_path, seeds=1, failed=False)
    run = tmp_path / "distilled/seed0"
    if damaged:
        data = (run / missing).read_bytes()
        (run / missing).write_bytes(data[: len(data) // 2])
    else:
        (run / missing).unlink()
    text = checked(write_run_report(run))
    assert "Please note" in text
    assert missing in text
    checked(write_study_report(tmp_path))


def test_interrupted_run_shows_its_curve(tmp_path):
    write_run(tmp_path / "run")
    for name in ("result.json", "predictions.npz", "env.json"):
        (tmp_path / "run" / name).unlink()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "train/loss": NaN}\n{"step": 420, "train/lo')
    text = checked(write_run_report(tmp_path / "run"))
    assert "the run was interrupted or still goes; the last record is of step 410" in text
    assert "damaged lines of metrics.jsonl, left out: 1" in text
    assert "train/loss over step" in text


def test_study_without_any_result_still_reports(tmp_path):
    study = write_study(tmp_path, seeds=1, failed=False)
    for arm in study["arms"].values():
        arm["seeds"]["0"] = {"status": "pending", "value": None, "run": "nowhere"}
    study["reference"] = "unheard of"
    (tmp_path / "study.json").write_text(json.dumps(study))
    text = checked(write_study_report(tmp_path))
    assert "Runs without a value: 3" in text
    assert "0 of 3" in text
    assert "is not an arm: no differences" in text


def test_different_data_are_pointed_out(tmp_path):
    write_study(tmp_path, seeds=1, failed=False)
    path = tmp_path / "self/seed0/result.json"
    result = json.loads(path.read_text())
    result["provenance"]["test"]["sha256"] = "f" * 64
    path.write_text(json.dumps(result))
    text = checked(write_study_report(tmp_path))
    assert "runs read different test data: they cannot be compared" in text


def test_not_a_classifier(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run/predictions.npz"
    arrays = dict(np.load(path))
    arrays["logits_student"][3] = np.nan
    np.savez(path, allow_pickle=False, **arrays)
    assert "Reliability diagram of teacher" in checked(write_run_report(tmp_path / "run"))
    np.savez(path, allow_pickle=False, **{**arrays, "label": arrays["label"] / 2})
    assert "Reliability diagram" not in checked(write_run_report(tmp_path / "run"))


def test_many_classes_arms_and_steps_stay_small(tmp_path):
    many = tuple(f"class number {i}" for i in range(100))
    skills = {f"arm number {i}": 2 + i / 9 for i in range(10)}
    write_study(tmp_path, skills=skills, seeds=1, failed=False, classes=many, n=400, steps=20_000)
    checked(write_study_report(tmp_path))
    checked(write_run_report(tmp_path / "arm number 0/seed0"))


def test_folders_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run to report"):
        write_run_report(tmp_path)
    with pytest.raises(UserError, match=r"study\.json is missing"):
        write_study_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pooled_reliability_is_that_of_all_examples():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, (3, 40))
    correct = (rng.uniform(size=(3, 40)) < confidence).astype(float)
    parts = [
        calibration.reliability_table(*pair, 15) for pair in zip(confidence, correct, strict=True)
    ]
    whole = calibration.reliability_table(confidence.ravel(), correct.ravel(), 15)
    np.testing.assert_allclose(quality.pooled(parts), whole, rtol=1e-12)


def test_band_spans_the_seeds_over_their_common_steps():
    first = np.arange(0, 101.0, 10), np.arange(0, 101.0, 10)
    second = np.arange(0, 61.0, 20), 10 + np.arange(0, 61.0, 20)

    def band(*parts):
        got = curves.band("arm", parts)
        assert got is not None
        return got

    got = band(first, second, (np.zeros(0), np.zeros(0)))
    assert got.low is not None
    assert got.high is not None
    np.testing.assert_array_equal(got.x, np.arange(0, 61, 10))
    np.testing.assert_allclose(got.low, got.x)
    np.testing.assert_allclose(got.high, got.x + 10)
    np.testing.assert_allclose(got.y, got.x + 5)
    assert band(first).low is None
    assert curves.band("arm", []) is None
    x = np.arange(100_000.0)
    long = band((x, x))
    assert len(long.x) == 240
    np.testing.assert_allclose(long.x, long.y)


def test_figures_draw_every_number(tmp_path):
    write_study(tmp_path, failed=False)
    text = checked(write_study_report(tmp_path))
    results = text.partition('id="results"')[2].partition("<section")[0]
    assert results.count('class="ring') == 3 * 3 + 2 * 3
    assert text.count('class="band') == 4 * 3
    run = tmp_path / "distilled/seed0"
    arrays = np.load(run / "predictions.npz")
    wrong = arrays["logits_student"].argmax(1)[arrays["label"] == 2] == 4
    page = checked(write_run_report(run))
    assert f"Pullover as Coat: {wrong.sum()} (" in page


def test_lower_is_better_is_respected(tmp_path):
    study = write_study(tmp_path, failed=False)
    (tmp_path / "study.json").write_text(json.dumps(study | {"mode": "min"}))
    text = checked(write_study_report(tmp_path))
    assert "test/accuracy, lower is better" in text
    assert "label only (reference), sum of 3 seeds" in text
    assert "excludes 0, worse" in text
    assert "excludes 0, better" not in text


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_decodes_to_its_pixels(channels):
    image = pytest.importorskip("matplotlib.image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    data = base64.b64decode(figures.png(pixels).partition(",")[2])
    got = np.round(255 * image.imread(io.BytesIO(data))).astype(np.uint8)
    np.testing.assert_array_equal(got.reshape(5, 7, -1)[..., :channels], pixels)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.03, 0.021), (12, 95_000), (0.5, 0.5001)])
def test_ticks_are_round_and_inside(low, high):
    got = figures.ticks(low, high)
    assert 2 <= len(got) <= 7
    assert all(low <= v <= high for v in got)
    np.testing.assert_allclose(np.diff(got), got[1] - got[0], rtol=1e-6)
    assert figures.log_ticks(0.3, 25) == [0.5, 1, 2, 5, 10, 20]


def test_elements_escape_what_is_not_html():
    got = el("p", "a<b", [el("b", 1), None], class_='x"y', data_n=0.5)
    assert got == '<p class="x&quot;y" data-n="0.50">a&lt;b<b>1</b></p>'
