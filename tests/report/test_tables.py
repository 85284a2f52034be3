"""Training and evaluation print one table; one number of operations stands everywhere."""

import json
import re

import jax
import pytest

from distill_jax import report
from distill_jax.core import partition
from distill_jax.report import tables
from distill_jax.run import build, describe
from distill_jax.run import config as config_lib
from distill_jax.run.train import evaluation, loop
from distill_jax.run.train.result import format_result


def test_what_a_run_is_judged_by_comes_first_and_controls_last():
    last = {
        "step": 12,
        "test/aurc": 0.25,
        "held_out/nll": 1.0,
        "held_out/accuracy": 0.5,
        "test/accuracy": 0.25,
        "test/knn_accuracy_raw": 1.0,
        "test/knn_accuracy": 1e-5,
        "test/nll": 123456.0,
    }
    text = tables.metrics(
        {"last": last, "best": {"step": 4, "held_out/nll": 0.5}}, chosen_by="held_out/nll"
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines == [
        ["last", "best"],
        ["step", "12", "4"],
        ["held_out/nll", "1.0000", "0.5000"],
        ["test/nll", "1.235e+05", "-"],
        ["held_out/accuracy", "0.5000", "-"],
        ["test/accuracy", "0.2500", "-"],
        [],
        ["test/aurc", "0.2500", "-"],
        ["test/knn_accuracy", "1e-05", "-"],
        ["test/knn_accuracy_raw", "1.0000", "-"],
    ]
    assert "best" not in tables.metrics({"last": last, "best": {}})


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 FLOP"), (950.0, "950 FLOP"), (2.052e9, "2.05 GFLOP")]
)
def test_operations_have_a_prefix(value, text):
    assert tables.flop(value) == text


def make_config():
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 80, "n_test": 32, "image_size": 6, "channels": 1}
    config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": (0.5,), "std": (0.25,)}}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(64,))
    config.evaluators = {"classification": {}}
    config.batch_size, config.total, config.log.every_steps = 64, 2, 1
    config.eval.every = 1
    config.log.tensorboard = False
    return config


def test_console_result_report_and_description_count_the_operations_of_all_devices(
    tmp_path, monkeypatch
):
    said, config = [], make_config()
    config.eval.every = config.total
    result = loop.train(config, tmp_path, log_line=said.append)
    shown = tables.flop(result["compute"]["flops_per_step"])
    assert jax.device_count() == 8
    [begin] = [line for line in said if line.startswith("step 1 after")]
    assert begin.endswith(f", {shown} a step")
    trained = format_result(result)
    assert f"\n{shown} a step, " in trained
    text = describe.describe(config)
    assert f"cost        {shown} a step" in text and f"operations {shown}, over" in text
    page = report.write_run_report(tmp_path).read_text()
    assert f">{shown.removesuffix('FLOP')}<" in page
    # Of all devices: what one device alone computes, but for what each does for itself, which in a
    # network of this size is not little: the optimizer, and looking for what is not finite.
    mesh = partition.make_mesh(devices=jax.devices()[:1])
    alone = build.build(config).on_mesh(mesh)
    build.compile_step(alone, build.feed_shapes(alone))
    assert alone.flops_per_step == pytest.approx(result["compute"]["flops_per_step"], rel=0.2)
    measured, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *args: measured.append(args[-1]) or evaluate(*args)
    )
    evaluated = evaluation.evaluate_run(config, tmp_path)
    assert evaluated == "\n".join(trained.splitlines()[: len(evaluated.splitlines())])
    states = json.loads((tmp_path / "eval.json").read_text())
    assert list(states) == ["last", "best"]
    assert measured == ["held_out", "test"], "the last state is the best, and measured once"


def test_a_description_begins_with_a_summary_and_ends_with_the_config():
    text = describe.describe(make_config())
    titles = re.findall(r"^== (.*)$", text, re.M)
    assert titles == ["summary", "step", "state", "config"]
    summary = text.split("== step")[0]
    parameters = 36 * 64 + 64 + 64 * 4 + 4
    for line in (
        "method      supervised on synthetic, examples: 72 train, 8 held_out, 32 test",
        "length      2 steps of 64 examples",
        f"parameters  {parameters:,}, of which {parameters:,} are learned by gradient",
    ):
        assert line in summary
    assert re.search(r"memory +[\d.]+ KiB at most in a step, on each device", summary)
