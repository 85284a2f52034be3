"""Tables of studies that were run in pieces."""

import json
import pathlib
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def write_study(folder, runs, **more):
    """Writes what a study leaves: `runs` are accuracies by arm and seed, `more` other entries."""
    arms = {}
    for arm, seeds in runs.items():
        arms[arm] = {"seeds": {}}
        for seed, accuracy in seeds.items():
            at = folder / arm / f"seed{seed}"
            at.mkdir(parents=True)
            compute = {"phases": {"train": 90.0, "evaluate": 30.0}, "flops_per_step": 5e12}
            (at / "result.json").write_text(json.dumps({"steps": 100, "compute": compute}))
            run = {"run": f"{arm}/seed{seed}", "metrics": {"test/accuracy": accuracy}}
            arms[arm]["seeds"][seed] = run
    study = {"title": "Pieces", "metric": "test/accuracy", "mode": "max"}
    study |= {"reference": next(iter(runs)), "arms": arms} | more
    (folder / "study.json").write_text(json.dumps(study))


def test_arms_and_seeds_of_another_piece_stay(tmp_path, monkeypatch):
    pieces = {"a": {"1": 0.5}, "b": {"1": 0.6}}, {"c": {"1": 0.9}, "a": {"2": 0.7}}
    for name, runs in zip(("one", "two"), pieces, strict=True):
        folder = tmp_path / name / "study"
        folder.mkdir(parents=True)
        write_study(folder, runs)
        arguments = [f"--out={tmp_path / 'page'}", "--add", str(folder)]
        monkeypatch.setattr(sys, "argv", ["_", *arguments])
        runpy.run_path(str(ROOT / "tools/results_page.py"), run_name="__main__")
    found = json.loads((tmp_path / "page.json").read_text())["study"]
    by_seed = {arm: metrics["test/accuracy"] for arm, metrics in found["values"].items()}
    assert by_seed == {"a": {"1": 0.5, "2": 0.7}, "b": {"1": 0.6}, "c": {"1": 0.9}}
    assert found["spent"] == {"runs": 4, "minutes": 8.0, "petaflop": 2.0}
    page = (tmp_path / "page.md").read_text()
    assert "4 runs took 8 minutes and 2 petaflop" in page
    assert "| a | 0.6000 ± 0.1000 | reference |" in page


def test_metrics_of_other_evaluators_replace_those_of_the_run(tmp_path, monkeypatch):
    write_study(tmp_path, {"a": {"1": 0.5, "2": 0.7}})
    states = {"last": {"step": 9, "test/accuracy": 0.6, "test/knn_accuracy": 0.4}, "best": {}}
    (tmp_path / "a/seed1/eval-digits-abc.json").write_text(json.dumps({"states": states}))
    arguments = [f"--out={tmp_path / 'page'}", "--again=eval-*.json", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["_", *arguments])
    runpy.run_path(str(ROOT / "tools/results_page.py"), run_name="__main__")
    found = json.loads((tmp_path / "page.json").read_text())[tmp_path.name]["values"]["a"]
    assert found == {
        "test/accuracy": {"1": 0.6, "2": 0.7},
        "test/knn_accuracy": {"1": 0.4},
    }


def test_a_pattern_that_matches_two_measurements_is_refused(tmp_path, monkeypatch):
    write_study(tmp_path, {"a": {"1": 0.5}})
    for name in ("one", "two"):
        (tmp_path / f"a/seed1/eval-{name}.json").write_text("{}")
    arguments = [f"--out={tmp_path / 'page'}", "--again=eval-*.json", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["_", *arguments])
    with pytest.raises(SystemExit, match=r"matches .*eval-two.*name one"):
        runpy.run_path(str(ROOT / "tools/results_page.py"), run_name="__main__")


def test_what_pieces_tuned_is_joined(tmp_path, monkeypatch):
    def choice(arm):
        found = {"candidates": {f"{arm}_1": 0.5}, "arm": f"{arm}_1", "by": "held_out/accuracy"}
        return {arm: found}

    for name, tuned in {"one": choice("a"), "two": choice("b")}.items():
        folder = tmp_path / name / "study"
        folder.mkdir(parents=True)
        write_study(folder, {"alone": {"1": 0.5}}, tuned=tuned)
        arguments = [f"--out={tmp_path / 'page'}", "--add", str(folder)]
        monkeypatch.setattr(sys, "argv", ["_", *arguments])
        runpy.run_path(str(ROOT / "tools/results_page.py"), run_name="__main__")
    found = json.loads((tmp_path / "page.json").read_text())["study"]["tuned"]
    assert found == choice("a") | choice("b")
    assert "`a` is a_1, by held_out/accuracy (a_1 0.5000)." in (tmp_path / "page.md").read_text()


def test_a_folder_without_a_study_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["_", f"--out={tmp_path / 'page'}", str(tmp_path / "typo")])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "tools/results_page.py"), run_name="__main__")
    assert error.value.code == 2
    assert "no study.json in" in capsys.readouterr().err
