"""Comparisons of runs that no study planned."""

import json
import shutil

import numpy as np
import pytest

from distill_jax.main import main
from distill_jax.report import write_comparison_report
from distill_jax.report.of_comparison import read
from distill_jax.run import compare
from tests.report.test_report import checked, write_run, write_study


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"kd-{seed}", seed=seed, skill=1.8)
        write_run(tmp_path / f"alone-{seed}", seed=seed, skill=1.2, arm="alone")
    return tmp_path


def compared(folder, *given, metric=""):
    paths = compare.expand([str(folder / name) for name in given])
    return read(paths, folder / "comparison", metric=metric)


def test_runs_group_by_config_and_pair_by_seed(runs):
    study = compared(runs, "alone-*", "kd-*")
    assert list(study.arms) == ["alone", "kd"]
    assert [list(study.seeds(arm)) for arm in study.arms] == [["0", "1", "2"]] * 2
    assert (study.metric, study.mode, study.spec["reference"]) == ("test/accuracy", "max", "alone")
    stored = {
        (arm, seed): json.loads((runs / f"{arm}-{seed}/result.json").read_text())
        for arm in ("alone", "kd")
        for seed in range(3)
    }
    differences = [
        stored["kd", s]["metrics"]["test/accuracy"] - stored["alone", s]["metrics"]["test/accuracy"]
        for s in range(3)
    ]
    difference = study.summaries[1].difference
    assert difference.mean == pytest.approx(np.mean(differences), abs=1e-12)
    assert difference.n == 3


def test_the_page_opens_with_what_differs_and_names_files(runs):
    study = compared(runs, "alone-*", "kd-*")
    study.path.mkdir()
    text = checked(write_comparison_report(study))
    order = [text.index(f'id="{name}"') for name in ("config", "results", "curves", "classes")]
    assert order == sorted(order)
    assert "objective.kwargs.alpha" in text.partition('id="results"')[0]
    assert "../kd-1" in text
    assert "result.json" in text


def test_changes_are_counted_by_example(runs):
    study = compared(runs, "alone-0", "kd-0")
    logits = [np.load(runs / name / "predictions.npz") for name in ("alone-0", "kd-0")]
    right = [z["logits_student"].argmax(1) == z["label"] for z in logits]
    study.path.mkdir()
    text = checked(write_comparison_report(study))
    changed = text.partition('id="changes"')[2]
    assert f"{100 * (~right[0] & right[1]).mean():.2f} %" in changed
    assert f"{100 * (right[0] & ~right[1]).mean():.2f} %" in changed


def test_examples_without_a_class_count_in_nothing(runs):
    right = {}
    for name in ("alone-0", "kd-0"):
        with np.load(runs / name / "predictions.npz") as found:
            arrays = dict(found)
        known = arrays["labelled"] = (arrays["label"] != 0).astype(np.float32)
        np.savez(runs / name / "predictions.npz", allow_pickle=False, **arrays)
        right[name] = (arrays["logits_student"].argmax(1) == arrays["label"])[known > 0]
    study = compared(runs, "alone-0", "kd-0")
    study.path.mkdir()
    text = checked(write_comparison_report(study))
    mended = (~right["alone-0"] & right["kd-0"]).mean()
    assert f"{100 * mended:.2f} %" in text.partition('id="changes"')[2]
    by_class = text.partition('id="classes"')[2].partition('id="changes"')[0]
    names = json.loads((runs / "alone-0/result.json").read_text())["classes"]
    assert names[1] in by_class and f'<th scope="row">{names[0]}</th>' not in by_class


def test_studies_and_unfinished_runs_take_part(runs):
    write_study(runs / "study", skills={"distilled": 1.7, "none": 1.2}, seeds=2, failed=False)
    shutil.rmtree(runs / "alone-0")
    (runs / "alone-2/result.json").unlink()
    study = compared(runs, "study", "alone-2", "kd-2")
    assert {arm: list(study.seeds(arm)) for arm in study.arms} == {
        "distilled": ["0", "1", "2"],
        "none": ["0", "1", "2"],
    }
    assert [failure[:2] for failure in study.failures()] == [("none", "2")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no runs are given"),
        (["nothing"], "holds no run and no study"),
        (["nothing*"], "matches no run"),
        (["kd-0"], "two runs or more"),
        (["kd-0", "alone-0", "--metric=test/acuracy"], "did you mean 'test/accuracy'"),
        (["kd-0", "alone-0", "--config=kd"], "the runs hold"),
        (["kd-0", "alone-0", "--workdir=kd-0"], "holds a run"),
    ],
)
def test_wrong_command_lines_are_refused(runs, monkeypatch, capsys, given, said):
    monkeypatch.chdir(runs)
    before = sorted(p for p in runs.rglob("*"))
    code = main(["distill-jax", "--mode=compare", "--workdir=out", *given])
    assert code == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert sorted(p for p in runs.rglob("*")) == before


def test_the_command_line_prints_the_answer_and_can_be_repeated(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    line = ["distill-jax", "--mode=compare", "--workdir=out", "alone-*", "kd-*"]
    for _ in range(2):
        assert main(line) == 0
    printed = capsys.readouterr().out
    assert "excludes 0, better" in printed
    stored = json.loads((runs / "out/comparison.json").read_text())
    assert stored["arms"]["kd"]["seeds"]["1"]["run"] == "../kd-1"
    shutil.rmtree(runs / "out")
    assert main([*line, "--metric=test/nll"]) == 0
    assert "lower is better" in capsys.readouterr().out


def test_positional_arguments_elsewhere_are_refused(capsys):
    assert main(["distill-jax", "--mode=train", "--workdir=x", "kd-0"]) == 2
    assert "not a flag" in capsys.readouterr().err
