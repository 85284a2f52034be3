"""Damage, full disks and other meshes: what was saved is found again, or refused in words."""

import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import main
from distill_jax.core import partition, state, steps
from distill_jax.core.api import Provenance, TrainState
from distill_jax.core.errors import CheckpointError, ConfigError
from distill_jax.data import loader
from distill_jax.data.source import ArraySource
from distill_jax.objectives.supervised import Supervised
from distill_jax.run import build, flags, processes, workdir
from distill_jax.run import config as config_lib
from distill_jax.run.environment import Preempted
from distill_jax.run.train import loop
from distill_jax.run.train.run import Run
from distill_jax.trainer.io import _orbax, peers, step_folder, step_index
from distill_jax.trainer.io.checkpoint import Checkpointer
from distill_jax.trainer.io.network import read_network
from tests import harness

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
METRICS = {1: 0.9, 2: 0.5, 3: 0.4}


def make_state(step, n=8):
    return TrainState(
        step=jnp.int32(step),
        params={"student": {"w": jnp.full((n,), float(step))}},
        targets={},
        model_state={},
        opt_state={"m": jnp.ones(n)},
        memory={},
    )


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE), tree)


def restore(folder, **kwargs):
    checkpointer = Checkpointer(folder, keep=3, rescue=workdir.RESCUE)
    try:
        found = checkpointer.restore(like(make_state(0)), **kwargs)
        assert found is not None
        assert float(found.state.params["student"]["w"][0]) == found.meta["step"]
        return found.meta["step"], found.skipped, checkpointer.best()
    finally:
        checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpointer = Checkpointer(folder, keep=3)
    for step, metric in METRICS.items():
        checkpointer.save(make_state(step), {"note": "x"}, metric=metric)
        checkpointer.wait()
    checkpointer.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_a_role_under_its_former_name_is_restored(tmp_path):
    """Checkpoints of version 0.1 call the network of a weighting "weigher", in moments too."""

    def state(role):
        params = {"student": {"w": jnp.ones(3)}, role: {"v": jnp.arange(2.0)}}
        moments = {"outer": optax.adam(0.1).init({role: params[role]})}
        return make_state(4).replace(
            params=params, model_state={role: {"s": jnp.zeros(1)}}, opt_state=moments
        )

    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(state("weigher"), {}, metric=None)
    checkpointer.wait()
    assert (tmp_path / "checkpoints/4/role.weigher").is_dir()
    restored = checkpointer.restore(like(state("weighting")))
    checkpointer.close()
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, state("weighting"))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut off":
        del data[len(data) // 2 :]
    elif how == "flipped":
        data[len(data) // 2] ^= 4
    else:
        data.clear()
    path.write_bytes(data)


def files(folder):
    """One file of each kind of a step."""
    found = {p.name: p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size}
    data = max((p for p in found.values() if p.parent.name == "d"), key=lambda p: p.stat().st_size)
    return {"meta": found["metadata"], "digest": found["digest.json"], "arrays": data}


@pytest.mark.parametrize("how", ["cut off", "flipped", "emptied"])
@pytest.mark.parametrize("kind", ["meta", "digest", "arrays"])
def test_a_damaged_newest_step_gives_way_to_the_one_before(folder, kind, how):
    damage(files(folder / "3")[kind], how)
    step, skipped, best = restore(folder)
    assert (step, best) == (2, 1)
    assert len(skipped) == 1 and str(folder / "3") in skipped[0]
    assert (folder / "3.damaged").is_dir() and not (folder / "3").exists()


def reseal(folder, /, **changes):
    """Changes the metadata of a step, with the right checksums."""
    path = folder / "meta/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    step_folder.seal(folder)


def wrong_signatures():
    network = {"model": "mlp", "kwargs": {"hidden": [4]}}
    right = {
        "input": {"shape": [4, 4, 1], "dtype": "uint8"},
        "classes": ["0", "1"],
        "cardinalities": [],
        "image_size": 4,
        "statistics": [[0.5], [0.2]],
        "networks": {"student": network},
    }
    for whole in (right, right | {"statistics": None}):
        assert not step_folder.wrong_values({"signature": whole})
    wrong = {
        "classes": [3, [1]],
        "cardinalities": [None, ["x"]],
        "statistics": [3, [1], ["a", "b"]],
        "networks": [3, {"student": []}, {"student": {**network, "kwargs": []}}],
    }
    return [right | {name: value} for name, values in wrong.items() for value in values]


WRONG_META = {
    "step": ["three", -3, 3.0, True, None, 2, 2**70],
    "metric": ["high", [1], True, float("nan"), 10**400],
    "config": [None, "x", []],
    "inputs": [3, {"data": []}, {"data": {"test": 1}}, {"data": {"test": {"sha256": 1}}}],
    "signature": [None, [], {}, *wrong_signatures()],
    "environment": ["cpu"],
    "seconds": ["x", None],
    "skipped": [None, -1, 1.5],
    "metrics": [[1], {"a": "b"}],
    "unlogged": [{"a": 1}, [[1, 2]], [["inner", 1]], [["inner", ["x"]]]],
    "first_spread": [[3], {"a": None}],
}


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in WRONG_META.items() for value in values],
    ids=lambda x: str(x)[:40],
)
def test_metadata_of_a_wrong_type_are_damage(folder, name, value):
    reseal(folder / "3", **{name: value})
    with pytest.raises(CheckpointError, match=rf"checkpoints/3: .*{name}"):
        step_folder.read_meta(folder / "3")
    meta = step_index.newest_meta(folder)
    assert meta is not None and meta["step"] == 2


def test_a_step_with_damaged_metadata_gives_way_to_the_one_before(folder):
    reseal(folder / "3", seconds="x")
    assert "checkpoint of step 2 is complete" in workdir.intact(folder.parent)
    assert restore(folder)[0] == 2 and (folder / "3.damaged").is_dir()


def test_a_step_under_the_name_of_another_is_damaged(folder):
    (folder / "3").rename(folder / "5")
    step, skipped, best = restore(folder)
    assert (step, best) == (2, 1)
    assert any("5: holds the state of step 3" in line for line in skipped)
    assert (folder / "5.damaged").is_dir()


def test_metadata_of_another_state_are_refused(folder):
    (folder / "3").rename(folder / "5")
    reseal(folder / "5", step=5)
    with pytest.raises(CheckpointError, match="checkpoints/5: holds the state of step 3"):
        restore(folder)


@pytest.mark.parametrize("name", ["²", "03", "9" * 200, "-3"])
def test_a_folder_is_a_step_only_by_the_name_that_is_written(folder, name):
    shutil.copytree(folder / "3", folder / name)
    assert step_index.finished_steps(folder) == [1, 2, 3]
    assert restore(folder) == (3, (), 1)
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(make_state(4), {}, metric=0.1)
    checkpointer.close()
    assert sorted(p.name for p in folder.iterdir()) == sorted(["1", "4", "index.json", name])


@pytest.mark.parametrize("change", [{"²": 0.1}, {"9" * 200: 0.1}, {"7": "x"}, [3]])
def test_a_damaged_index_is_made_again(folder, change):
    (folder / "index.json").write_text(json.dumps({"saved": change, "lost": {}}))
    assert restore(folder) == (3, (), 1)
    index = json.loads((folder / "index.json").read_text())
    assert index["saved"] == {str(step): metric for step, metric in METRICS.items()}


def test_a_metric_that_is_nan_is_none(folder):
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(make_state(4), {}, metric=float("nan"))
    checkpointer.close()
    assert checkpointer.meta(4)["metric"] is None and checkpointer.best() == 1


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("kind", ["meta", "digest", "arrays", "no digest", "gone"])
def test_a_lost_best_step_is_set_aside_and_the_selection_is_marked(folder, kind, index):
    """Without `index.json`, as in version 0.1, a folder that is gone leaves no trace."""
    if not index:
        (folder / "index.json").unlink()
    if kind == "gone":
        shutil.rmtree(folder / "1")
    elif kind == "no digest":
        (folder / "1/digest.json").unlink()
    else:
        damage(files(folder / "1")[kind], "flipped")
    traceless = kind == "gone" and not index
    for again in (False, True):
        step, skipped, best = restore(folder)
        assert (step, best) == (3, 2)
        assert len(skipped) == (not again and not traceless)
        assert (folder / "1.damaged").is_dir() == (kind != "gone") and not (folder / "1").exists()
        checkpointer = Checkpointer(folder)
        lost = checkpointer.lost(METRICS[2])
        assert [row["step"] for row in lost] == ([] if traceless else [1])
        if index:
            assert lost[0]["metric"] == METRICS[1]
            assert checkpointer.lost(METRICS[1] + 0.01) == []


@pytest.mark.parametrize("how", ["flipped", "no digest", "gone"])
def test_with_every_step_damaged_nothing_starts_over_by_itself(folder, how):
    for step in "123":
        if how == "gone":
            shutil.rmtree(folder / step)
        elif how == "no digest":
            (folder / step / "digest.json").unlink()
        else:
            damage(files(folder / step)["arrays"], how)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"every checkpoint is damaged(.|\n)*--start_over"
        ):
            restore(folder)
    assert workdir.is_run(folder.parent)
    kept = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert kept == ([] if how == "gone" else ["1.damaged", "2.damaged", "3.damaged"])


def test_a_first_save_that_was_interrupted_counts_for_nothing(folder):
    for step in "23":
        shutil.rmtree(folder / step)
    (folder / "1/digest.json").unlink()
    (folder / "index.json").write_text('{"saved": {}, "lost": {}}')
    assert Checkpointer(folder).restore(like(make_state(0))) is None
    assert not workdir.is_run(folder.parent)
    checkpointer = Checkpointer(folder)
    checkpointer.save(make_state(1), {}, metric=0.5)
    checkpointer.close()
    assert restore(folder) == (1, (), 1)


def test_reading_beside_a_run_moves_nothing(folder):
    damage(files(folder / "3")["arrays"], "flipped")
    (folder / "1/digest.json").unlink()
    before = sorted(str(p) for p in folder.rglob("*"))
    checkpointer = Checkpointer(folder, read_only=True)
    found = checkpointer.restore(like(make_state(0)))
    checkpointer.close()
    assert found is not None and found.meta["step"] == 2 and len(found.skipped) == 2
    assert checkpointer.lost(METRICS[2]) == [{"step": 1, "metric": METRICS[1]}]
    assert sorted(str(p) for p in folder.rglob("*")) == before


def test_a_network_is_not_read_from_the_second_best_step_in_silence(folder):
    assert step_index.find_step(folder, where="here") == folder / "1"
    (folder / "1/digest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step 1 (.|\n)*it was the best(.|\n)*checkpoints/2"):
        step_index.find_step(folder, where="here")
    assert step_index.find_step(folder / "2", where="here") == folder / "2"


@pytest.fixture
def network(folder):
    """The folder of the network of a step."""
    return folder / "1/role.student"


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d", "_METADATA"])
def test_links_do_not_lead_out_of_a_step(network, name):
    """With right checksums; a link to a folder hides its files from them."""
    outside = (network / name).rename(network.parents[2] / "outside")
    (network / name).symlink_to(outside)
    step_folder.seal(network.parent)
    with pytest.raises(CheckpointError, match=f"role.student/{name} is a symbolic link"):
        read_network(network.parent, like=None, where="here")
    (network / name).unlink()
    outside.rename(network / "inside")
    (network / name).symlink_to(network / "inside")
    step_folder.seal(network.parent)
    read_network(network.parent, like=None, where="here")


def test_a_step_is_no_link(network, tmp_path):
    step = network.parent
    step.rename(tmp_path / "outside")
    step.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="step 1 is missing"):
        step_index.find_step(step.parent, where="here")
    assert step_index.find_step(step, where="here") == step  # named by the user


def test_names_of_arrays_do_not_lead_out_of_a_step(network, tmp_path):
    """Orbax joins a name to the folder where arrays are not in a database: it may be absolute."""
    found = json.loads((network / "_METADATA").read_text())
    name = str(tmp_path / "outside")
    leaf = {
        "key_metadata": [{"key": name, "key_type": 2}],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
    for is_database in (True, False):
        stored = found | {"use_ocdbt": is_database, "tree_metadata": {str((name,)): leaf}}
        (network / "_METADATA").write_text(json.dumps(stored))
        step_folder.seal(network.parent)
        with pytest.raises(CheckpointError) as error:
            read_network(network.parent, like=None, where="here")
        assert ("as this program stores them" in str(error.value)) == (not is_database)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("inside", "place"),
    [(True, "other/process_0/"), (False, "../outside_dir1/"), (False, "x/../../outside/")],
)
def test_databases_do_not_refer_to_files_outside(tmp_path, inside, place):
    """TensorStore sees to it; a step holds a database that refers to those of each process."""
    import tensorstore as ts

    def database(folder, context):
        config = {"compression": None, "max_inline_value_bytes": 0}
        base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "ocdbt", "base": base, "config": config}
        return ts.KvStore.open(spec, context=context).result()

    step, part, context = tmp_path / "step", "ocdbt.process_0/", ts.Context()
    source = database(step / part, context)
    source.write(b"w", b"weights" * 20).result()
    merged, transaction = database(step, context), ts.Transaction(atomic=True)
    source.experimental_copy_range_to(merged.with_transaction(transaction)).result()
    transaction.commit_async().result()

    (step / "x").mkdir()
    (step / place).resolve().parent.mkdir(exist_ok=True)
    (step / part).rename((step / place).resolve())
    [node] = [path for path in (step / "d").iterdir() if part.encode() in path.read_bytes()]
    body = node.read_bytes()[:-4].replace(part.encode(), place.encode())
    node.write_bytes(body + crc32c(body).to_bytes(4, "little"))

    read = lambda: database(step, ts.Context()).read(b"w").result().value  # noqa: E731
    if inside:
        assert read() == b"weights" * 20
    else:
        with pytest.raises(ValueError, match="Invalid key"):
            read()


def test_a_deletion_that_was_interrupted_leaves_no_step_behind(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("distill_jax.trainer.io.step_folder.shutil.rmtree", lambda *_, **__: None)
        checkpointer = Checkpointer(folder, keep=1)
        checkpointer.save(make_state(4), {}, metric=0.1)
        checkpointer.close()
    assert checkpointer.steps() == [1, 4]  # the best and the newest
    assert (folder / "2" / "meta").is_dir()
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(make_state(5), {}, metric=0.1)
    checkpointer.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "5", "index.json"]


def test_a_save_that_finds_no_room_is_told_and_the_earlier_step_is_whole(folder):
    # A limit on the size of files is the full disk of a single process.
    n = 200_000
    state = make_state(4, n)
    noise = {"student": {"w": jax.random.normal(jax.random.key(0), (n,))}}
    state = dataclasses.replace(state, params=noise)
    checkpointer = Checkpointer(folder, keep=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CheckpointError, match=r"could not be saved(.|\n)*disk full") as error:
            checkpointer.save(state, {}, metric=None)
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.exit_code == 2
    checkpointer.close()
    assert restore(folder) == (3, (), 1)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (f'Error writing "{"long/" * 200}": Too many open files [OS error 24]', "Too many open "),
        ("No space left on device", "No space left on device"),
        ("something else\nand more", "something else"),
    ],
)
def test_the_reason_of_the_operating_system_comes_first(text, reported):
    outer = RuntimeError("a save failed")
    outer.__cause__ = ValueError(text)
    found = _orbax.root_cause(outer)
    assert found.startswith(reported) and len(found) < 350 and "and more" not in found
    assert found.count(reported) == 1


def test_a_full_disk_ends_the_program_without_a_traceback(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(main, "_do", full)
    command = ["distill-jax", "--config=configs/distill/kd.py:smoke", "--mode=describe"]
    assert main.main(command) == 2
    reported = capsys.readouterr().err
    assert reported.startswith("error: runs/x/metrics.jsonl: the disk is full")
    monkeypatch.setattr(main, "_do", lambda parsed: os.stat("/nowhere/at/all"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main.main(command) == 1


@pytest.mark.parametrize("zeros", [np.zeros, jnp.zeros])
def test_too_little_memory_ends_the_program_without_a_traceback(monkeypatch, capsys, zeros):
    def greedy(parsed):
        zeros(2**56, np.int8)

    monkeypatch.setattr(main, "_do", greedy)
    command = ["distill-jax", "--config=configs/distill/kd.py:smoke", "--mode=describe"]
    assert main.main(command) == 2
    reported = capsys.readouterr().err
    assert (
        reported.startswith("error: not enough memory: ") and "allocat" in reported.splitlines()[0]
    )
    assert len(reported.splitlines()) == 2 and "batch_size" in reported


@pytest.mark.parametrize(
    "error, lost",
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (ValueError("could not broadcast input array"), False),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), False),
    ],
)
def test_the_loss_of_another_process_is_told_from_other_errors(error, lost):
    try:
        try:
            raise error
        except Exception as first:
            raise ValueError("while closing") from first
    except ValueError as last:
        assert processes.is_loss_of_peer(last) == lost


@pytest.mark.parametrize("when", ["save", "wait_until_finished", "restore"])
def test_a_process_that_is_lost_during_a_save_is_no_full_disk(folder, monkeypatch, when):
    lost = ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")

    class Lost:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == when:
                    raise lost

            return call

    checkpointer = Checkpointer(folder, keep=3)
    monkeypatch.setattr(checkpointer, "_checkpointer", Lost)
    with pytest.raises(ValueError) as error:
        if when == "restore":
            checkpointer.restore(like(make_state(0)))
        else:
            checkpointer.save(make_state(4), {}, metric=None)
            checkpointer.wait()
    assert error.value is lost


def test_the_first_process_says_what_a_folder_holds(saved, tmp_path, monkeypatch):
    """What is computed together hangs on it, so a listing of one's own must not decide."""
    reported = {}
    for module in (processes, peers):
        monkeypatch.setattr(module, "from_first", lambda decide, where: reported["here"])
    config = flags.load("configs/distill/supervised.py:smoke")
    reported["here"] = {"status": "done", "steps": 1, "changes": {}}
    assert loop.train(config, tmp_path, log_line=lambda line: None) is reported["here"]

    run = Run.__new__(Run)
    run.config, run.workdir = config, tmp_path
    run.checkpointer = Checkpointer(tmp_path / "stale")
    measured = {config.eval.metric: 0.5}
    reported["here"] = {"step": 1, "metric": 0.9, "metrics": {}}
    assert not run.improves(measured) and run.best() is reported["here"]
    reported["here"] = None
    run.checkpointer = Checkpointer(saved)
    assert run.improves(measured)

    reported["here"] = True
    run.checkpointer.save(make_state(5), {}, metric=None)
    assert not (saved / "5").exists()


SMALL = [
    "main",
    "--config=configs/distill/supervised.py:smoke",
    "--config.roles.student.model=mlp",
    "--config.roles.student.kwargs.hidden=(4,)",
    "--config.total=3",
    "--config.log.tensorboard=false",
]


def test_a_signal_before_training_ends_the_program_with_75(tmp_path, monkeypatch, capsys):
    def check(config, folder, allowed):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(workdir, "check_config", check)
    monkeypatch.setattr(loop.build_lib, "build", pytest.fail)
    assert main.main([*SMALL, f"--workdir={tmp_path}"]) == 75
    assert "stopped before the run began; the same command" in capsys.readouterr().err


def test_a_signal_after_the_last_step_of_a_run_ends_its_study(tmp_path, monkeypatch):
    def last(*_):
        signal.raise_signal(signal.SIGTERM)
        return [{"metrics": {"test/accuracy": 0.5}, "best": {}}]

    monkeypatch.setattr(loop, "finish", last)
    arms = "{'a': {}, 'b': {'optim.lr': 0.2}}"
    study = ["--mode=study", f"--config.study.arms={arms}", "--config.study.reference=a"]
    more = ["--config.study.seeds=(0,)", "--config.study.metric=test/accuracy"]
    args = [*SMALL, *study, *more, "--config.study.replicas=no", f"--workdir={tmp_path}"]
    assert main.main(args) == 75
    arms = json.loads((tmp_path / "study.json").read_text())["arms"]
    assert [arms[arm]["seeds"]["0"]["status"] for arm in arms] == ["done", "pending"]


def test_other_meshes_see_the_same_examples_in_the_same_order(tmp_path):
    """A digest of all ids in their order, and which step saw each example last."""
    n, b, stops = 40, 16, (3, 6, 9)
    r = np.random.RandomState(0)
    images, labels = r.randn(n, 6, 6, 1).astype(np.float32), np.arange(n) % harness.K
    source = ArraySource(images, labels, Provenance("random", "here", n, ""))
    models, tx = {"student": harness.tiny_model()}, optax.adam(0.01)

    class Recorder(Supervised):
        def memory(self, key, batch):
            return {"order": jnp.uint32(1), "seen": jnp.zeros(n, jnp.int32)}

        def loss(self, nets, batch, memory, step):
            terms = super().loss(nets, batch, memory, step)
            place = jnp.arange(b, dtype=jnp.uint32) ** 2 + jnp.uint32(1)
            ids = batch["index"].astype(jnp.uint32) + jnp.uint32(1)
            order = memory["order"] * jnp.uint32(1_000_003) + (ids * place).sum(dtype=jnp.uint32)
            seen = memory["seen"].at[batch["index"]].set(step + 1)
            return dataclasses.replace(terms, memory={"order": order, "seen": seen})

    objective = Recorder()
    shapes = state.infer_shapes(objective, models, harness.make_batch(b))
    init = state.make_init(objective, models, tx, shapes, trainable=("student",), ema={})
    take = steps.make_train_step(objective, models, tx)
    key = jax.random.key(3)

    def go(mesh, current, first, last):
        whole = partition.replicated(mesh)
        batches = loader.ResidentLoader(source, batch_size=b, seed=7, sharding=whole)

        def update(current, data, window):
            batch = batches.fetch(data, window, current.step)
            batch = jax.lax.with_sharding_constraint(batch, partition.over_batch(mesh))
            return take(current, {}, batch, key)[0]

        update = jax.jit(update)
        for step in range(first, last):
            current = update(current, batches.data, batches.window(step))
        return current

    def placed(mesh):
        abstract = jax.eval_shape(init, key)
        where = partition.infer(abstract, mesh, rules={}, min_size=1)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where
        )

    sizes = ((8, 2), (4, 1), (1, 1))
    meshes = [partition.make_mesh(fsdp=f, devices=jax.devices()[:m]) for m, f in sizes]
    want = go(meshes[2], jax.jit(init)(key), 0, stops[-1])
    current = jax.jit(init)(key)
    current = jax.device_put(current, jax.tree.map(lambda x: x.sharding, placed(meshes[0])))
    checkpointer = Checkpointer(tmp_path)
    for mesh, (first, last) in zip(meshes, itertools.pairwise((0, *stops)), strict=True):
        if first:
            found = checkpointer.restore(placed(mesh))
            assert found is not None and found.meta["step"] == first
            current = found.state
        current = go(mesh, current, first, last)
        checkpointer.save(current, {}, metric=None)
        checkpointer.wait()
    checkpointer.close()
    assert int(current.memory["order"]) == int(want.memory["order"])
    np.testing.assert_array_equal(current.memory["seen"], want.memory["seen"])
    assert int(current.step) == stops[-1] and len(np.unique(want.memory["seen"])) > 1
    assert harness.max_relative(want.params, current.params) < 1e-5


class Watched(Supervised):
    """Its logits are looked at for collapse."""

    def loss(self, nets, batch, memory, step):
        terms = super().loss(nets, batch, memory, step)
        logits, _ = nets("student", batch["input"], train=True)
        return terms.replace(embeddings={"logits": logits["logits"]})


def watched_config(*overrides):
    return flags.parse(
        [
            "main",
            "--config=configs/distill/supervised.py:smoke",
            "--workdir=unused",
            "--config.objective.name=tests.run.test_survival:Watched",
            "--config.roles.student.model=mlp",
            "--config.roles.student.kwargs.hidden=(4,)",
            "--config.total=7",
            "--config.log.every_steps=3",
            "--config.eval.every=4",
            "--config.log.tensorboard=false",
            *overrides,
        ]
    ).config


def stop_after_a_step(line):
    if line.startswith("step "):  # the first step of this start is done
        signal.raise_signal(signal.SIGTERM)


def test_a_run_that_stops_after_every_step_says_the_same(tmp_path):
    config = watched_config("--config.checkpoint.every=2")  # once before the first log
    experiment = build.build(config)

    def train(folder, log_line=lambda line: None):
        return loop.train(config, folder, make_experiment=lambda _: experiment, log_line=log_line)

    def rows(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]

    def says(result):
        return {k: v for k, v in result.items() if k != "compute"}

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    want = train(whole)
    assert "train/embedding/logits/rank" in rows(whole)[0]

    stops = 0
    while stops < 7:
        try:
            train(broken, stop_after_a_step)
            break
        except Preempted:
            stops += 1
    assert stops == 6
    # Killed after the last checkpoint and before the result, then once more with both.
    (broken / "result.json").unlink()
    for _ in range(2):
        assert says(train(broken)) == says(want)
    assert rows(broken) == rows(whole)


def test_what_is_logged_may_change_where_a_run_goes_on(tmp_path):
    with pytest.raises(Preempted):
        loop.train(watched_config(), tmp_path, log_line=stop_after_a_step)
    config = watched_config("--config.log.grad_norm=true")
    assert loop.train(config, tmp_path, log_line=lambda line: None)["steps"] == 7
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = lines[:2]
    assert first["step"] == 1 and second["step"] == 3 and "train/grad_norm" in second


def test_a_study_may_be_moved_whole(tmp_path):
    old, new, student = tmp_path / "old", tmp_path / "new", "kd/seed0"

    def config(init, **changes):
        found = config_lib.base()
        found.roles.student = config_lib.role("mlp")
        found.roles.teacher = config_lib.role("mlp")
        found.roles.teacher.init = str(init)
        return config_lib.override(found, changes)

    (new / student).mkdir(parents=True)
    stored = config_lib.to_json(config(f"{old}/teacher/seed0#student/head"))
    (new / student / "config.json").write_text(stored)
    moved = f"{new}/teacher/seed0#student/head"
    (new / student / "result.json").write_text('{"status": "done"}')
    workdir.check_config(config(moved), new / student)
    others = [
        config(f"{new}/teacher/seed1#student/head"),
        config(f"{new}/teacher/seed0"),
        config(f"{tmp_path}/teacher/seed0#student/head"),
        config(moved, **{"optim.lr": 0.3}),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="another config"):
            workdir.check_config(other, new / student)
    (old / "teacher/seed0").mkdir(parents=True)  # which may hold another network
    with pytest.raises(ConfigError, match="another config"):
        workdir.check_config(config(moved), new / student)
