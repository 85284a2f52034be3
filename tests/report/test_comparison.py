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


def rewrite(path, **values):
    """Changes values of a JSON file by dotted path, with "__" for the dot."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        node, *parts, last = content, *name.split("__")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def distilled(tmp_path):
    """Students of three seeds: of teachers by seed, of wide ones, and of nobody."""
    for seed in range(3):
        for kind in ("teacher", "wide"):
            write_run(tmp_path / f"{kind}-{seed}", seed=seed)
            change = {"roles__student__kwargs": {"width": len(kind)}, "roles__student__init": None}
            rewrite(tmp_path / f"{kind}-{seed}/config.json", **change)
        for name, kind in (("kd", "teacher"), ("kd_of_wide", "wide")):
            folder = tmp_path / f"{name}{seed}"
            write_run(folder, seed=seed, skill=1.8)
            init = f"{tmp_path}/{kind}-{seed}#student"
            changes = {"roles__teacher__init": init, "cache__dir": f"{tmp_path}/cache-{kind}{seed}"}
            rewrite(folder / "config.json", **changes)
            networks = {"teacher": f"sum of {kind}-{seed}"}
            rewrite(folder / "result.json", inputs__networks=networks)
    return tmp_path


def test_students_of_teachers_that_differ_in_the_seed_are_one_arm(distilled):
    study = compared(distilled, "kd[0-9]", "kd_of_wide*")
    assert {arm: [*study.seeds(arm)] for arm in study.arms} == {
        "kd": ["0", "1", "2"],
        "kd_of_wide": ["0", "1", "2"],
    }
    assert study.summaries[1].difference.n == 3
    assert study.summaries[0].value.interval is not None


def test_a_chain_of_teachers_is_followed_to_its_end(distilled):
    for seed in range(3):  # students whose teacher is a student
        for name in ("kd", "kd_of_wide"):
            write_run(distilled / f"{name}_twice{seed}", seed=seed)
            init = f"{distilled}/{name}{seed}/checkpoints/400"
            rewrite(distilled / f"{name}_twice{seed}/config.json", roles__teacher__init=init)
    study = compared(distilled, "kd_twice*", "kd_of_wide_twice*")
    assert [len(study.seeds(arm)) for arm in study.arms] == [3, 3]
    rewrite(distilled / "kd2/config.json", roles__teacher__init=f"{distilled}/kd_twice2")  # circle
    assert len(compared(distilled, "kd_twice*").arms) == 2


def test_teachers_that_are_gone_are_told_apart_by_checksum(distilled):
    for seed in range(3):
        for kind in ("teacher", "wide"):
            shutil.rmtree(distilled / f"{kind}-{seed}")
    assert len(compared(distilled, "kd[0-9]").arms) == 3
    for seed in range(3):  # one teacher, copied to three folders that are gone
        rewrite(distilled / f"kd{seed}/result.json", inputs__networks={"teacher": "same"})
    assert [*compared(distilled, "kd[0-9]", "kd_of_wide0").arms] == ["kd", "kd_of_wide0"]


def test_weights_beside_another_config_are_told_apart_by_path(distilled):
    for seed in range(2):
        (distilled / f"hf{seed}").mkdir()
        (distilled / f"hf{seed}/config.json").write_text('{"model_type": "vit", "seed": 1}')
        init = f"{distilled}/hf{seed}/model.safetensors"
        rewrite(distilled / f"kd{seed}/config.json", roles__teacher__init=init)
    assert len(compared(distilled, "kd[01]").arms) == 2


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["spam_a0", "spam_a1"], ["spam_a"]),
        (["kd-0", "kd-1"], ["kd"]),
        (["kd-seed0", "kd-seed11"], ["kd"]),
        (["kd_s0", "kd_s1"], ["kd"]),
        (["class0", "class1"], ["class"]),
        (["resnet18-1", "resnet18-2"], ["resnet18"]),
        (["kd/seed0", "kd/seed1"], ["kd"]),
        (["kd/0", "kd/1"], ["kd"]),
        (["seed0-kd", "seed1-kd"], ["kd"]),
    ],
)
def test_an_arm_is_called_as_its_folders_without_the_seed(folders, names, tmp_path):
    for seed, name in enumerate(folders):
        write_run(tmp_path / name, seed=seed)
    write_run(tmp_path / "other2", arm="alone")
    paths = [tmp_path / name for name in (*folders, "other2")]
    assert [*read(paths, tmp_path / "page").arms] == [*names, "other2"]


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
