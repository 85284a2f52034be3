"""Damaged and hostile files of the classes h to j, with outcomes that were written beforehand."""

import json
import os
import random
from collections.abc import Callable
from typing import Any

from _hostile_box import Box, Case, Step
from _hostile_commands import evaluate, plain, study, train

CASES: list[Case] = []
SEED = 0

EVIL = """\
import pathlib

pathlib.Path(__file__).with_name("CANARY-import").touch()


def make(*args, **kwargs):
    pathlib.Path(__file__).with_name("CANARY-call").touch()
    raise ValueError


def get_config(arg=""):
    pathlib.Path(__file__).with_name("CANARY-config").touch()
    raise ValueError
"""


def case(id: str, about: str, *steps: Step, start: str) -> None:
    CASES.append(Case(id=id, about=about, start=start, steps=steps))


# h: stored files that choose code or reach outside.


def _put(tree: Any, path: str, value: Any) -> None:
    *parents, key = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[key] = value


def _evil(box: Box) -> None:
    box.write("evil.py", EVIL)
    box.foreign("precious/thesis.txt")


TOUCH = "touch {box}/CANARY"

# Where a config names code, and keyword arguments of what it names.
SLOTS = {
    "data": ("data/name", "data/kwargs"),
    "objective": ("objective/name", "objective/kwargs"),
    "model": ("roles/student/model", "roles/student/kwargs"),
    "weighting": ("weighting/name", "weighting/kwargs"),
}

SYMBOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "module": ("evil:make", {}),
    "walk-os": ("distill_jax.run.environment:os.system", {"command": TOUCH}),
    "walk-popen": ("distill_jax.run.environment:os.popen", {"cmd": TOUCH}),
    "walk-import": ("distill_jax.run.resolve:importlib.import_module", {"name": "evil"}),
    "walk-runpy": ("distill_jax.run.flags:runpy.run_path", {"path_name": "{box}/evil.py"}),
    "own-load": ("distill_jax.run.flags:load", {"spec": "{box}/evil.py"}),
    "own-resolve": (
        "distill_jax.run.resolve:resolve",
        {"package": "models", "name": "evil:make", "where": "x"},
    ),
    "walk-rmtree": ("distill_jax.trainer.io.step_folder:shutil.rmtree", {"path": "{box}/precious"}),
    "own-write": (
        "distill_jax.run.workdir:write_json",
        {"path": "{box}/precious/thesis.txt", "value": 1},
    ),
    "own-main": (
        "distill_jax.main:main",
        {"argv": ["x", "--config={box}/evil.py", "--workdir={box}/CANARY"]},
    ),
    "walk-builtins": ("distill_jax.models.mlp:make.__globals__", {}),
    "walk-module": ("distill_jax.models.mlp:make.__builtins__", {}),
    "walk-dict": ("distill_jax.data.synthetic:np.load", {"file": "{box}/evil.npy"}),
    "package-walk": ("distill_jax:main.os.system", {"command": TOUCH}),
    "relative": ("distill_jax...evil:make", {}),
    "prefix": ("distill_jax_evil:make", {}),
    "name-path": ("..evil", {}),
    "name-slash": ("../../evil", {}),
}


def _spell(box: Box, value: Any) -> Any:
    text = json.dumps(value).replace("{box}", str(box.root))
    return json.loads(text)


def _stored() -> None:
    pick = random.Random(f"{SEED}/slots")
    slots = sorted(SLOTS)
    for i, (name, (symbol, kwargs)) in enumerate(SYMBOLS.items()):
        slot = slots[i % len(slots)] if name != "module" else "data"
        where, arguments = SLOTS[slot]

        def change(box: Box, where=where, arguments=arguments, symbol=symbol, kwargs=kwargs):
            _evil(box)
            box.write("distill_jax_evil.py", EVIL)
            import pickle

            class Touch:
                def __reduce__(self):
                    return os.system, (f"touch {box.root}/CANARY",)

            box.write("evil.npy", pickle.dumps(Touch()))

            def edit(config):
                _put(config, where, symbol)
                _put(config, arguments, _spell(box, kwargs))

            box.edit("runs/a/config.json", edit)
            for step in sorted(os.listdir(box / "runs/a/checkpoints")):
                if not step.isdigit():
                    continue
                meta = f"runs/a/checkpoints/{step}/meta/metadata"
                box.edit(meta, lambda stored: edit(stored["config"]))
                box.seal(f"runs/a/checkpoints/{step}")

        says = (symbol, symbol.partition(":")[0], symbol.partition(":")[2], where.replace("/", "."))
        case(
            f"h-config-{name}",
            f"config.json and metadata name {symbol} as {slot}; evaluation without a config",
            change,
            evaluate(out="refused", says=says),
            start="clean",
        )
    for slot in slots:
        where, arguments = SLOTS[slot]

        def only(box: Box, where=where, arguments=arguments):
            _evil(box)
            box.edit("runs/a/config.json", lambda c: (_put(c, where, "evil:make"), None)[1])

        case(
            f"h-config-slot-{slot}",
            f"config.json alone names evil:make as {slot}",
            only,
            evaluate(out="refused", says=("evil",)),
            start="clean",
        )

    others = {
        "evaluator": ("evaluators", {"evil:make": {}}),
        "cache": ("cache", {"dir": "{box}/cache", "teacher": "evil:make", "roles": ["student"]}),
        "transform": ("data/train_transforms", ["evil:make"]),
        "optimizer": ("optim/name", "evil:make"),
        "schedule": ("optim/schedule", "evil:make"),
        "rules": ("partition/rules", ["evil:make"]),
        "lookalike": ("data/name", "distill_j\u0430x.evil:make"),
    }
    for name, (where, value) in others.items():

        def set_it(box: Box, where=where, value=value):
            _evil(box)

            def edit(config):
                if isinstance(value, dict):
                    for key, v in value.items():
                        _put(config, f"{where}/{key}", _spell(box, v))
                else:
                    _put(config, where, value)

            box.edit("runs/a/config.json", edit)

        case(
            f"h-config-{name}",
            f"config.json names evil:make for {where}",
            set_it,
            evaluate(out="refused", says=("evil", where.rpartition("/")[2])),
            start="clean",
        )
    for name in [*pick.sample(sorted(SYMBOLS), 8), "module"]:
        symbol, kwargs = SYMBOLS[name]
        for mode in ("train", "describe") if name == "module" else ("train",):

            def poison(box: Box, symbol=symbol, kwargs=kwargs):
                _evil(box)
                for step in filter(str.isdigit, os.listdir(box / "teacher/checkpoints")):
                    folder = f"teacher/checkpoints/{step}"

                    def edit(meta):
                        _put(meta["config"], "roles/student/model", symbol)
                        _put(meta["config"], "roles/student/kwargs", _spell(box, kwargs))

                    box.edit(f"{folder}/meta/metadata", edit)
                    box.seal(folder)

                def edit_config(config):
                    _put(config, "roles/student/model", symbol)
                    _put(config, "roles/student/kwargs", _spell(box, kwargs))

                box.edit("teacher/config.json", edit_config)

            says = (symbol, symbol.partition(":")[0], symbol.partition(":")[2])
            run = (
                train(config="tiny.py:bare", out="refused", says=says)
                if mode == "train"
                else plain("--mode=describe", "--config=tiny.py:bare", out="refused", says=says)
            )
            case(
                f"h-teacher-{name}-{mode}",
                f"a teacher's metadata name {symbol} as its network; {mode}",
                poison,
                run,
                start="teacher",
            )
    case(
        "h-teacher-init",
        "a teacher's metadata name another folder to start from",
        lambda box: box.edit(
            "teacher/config.json", lambda c: _put(c, "roles/student/init", "/etc/passwd")
        ),
        train(config="tiny.py:bare", out="trains|refused", says=("config.json", "teacher")),
        start="teacher",
    )
    case(
        "h-orbax-handlers",
        "a checkpoint's own description names a class as handler",
        lambda box: (_evil(box), _handlers(box)),
        train(out="resumes|refused", says=("checkpoint",), equal="clean"),
        start="half",
    )
    case(
        "h-study-json",
        "study.json holds markup and other figures",
        lambda box: box.write(
            "runs/s/study.json",
            json.dumps({"title": "<script>alert(1)</script>", "arms": {"evil:make": {}}}),
        ),
        study(without=("runs/s/report.html", "<script>alert(1)")),
        start="study",
    )
    for field in ("arm", "classes", "metrics"):

        def mark(box: Box, field=field):
            value = {
                "arm": "<script>alert(1)</script>",
                "classes": ["<script>alert(1)</script>"] * 4,
            }
            change = (
                (lambda r: r["metrics"].update({"test/<script>alert(1)</script>": 0.5}))
                if field == "metrics"
                else (lambda r: r.update({field: value[field]}))
            )
            box.edit("runs/a/result.json", lambda r: change(r))

        case(
            f"h-result-markup-{field}",
            f"a finished run's result.json has markup as {field}",
            mark,
            train(
                out="finished|refused",
                says=("result.json",),
                without=("runs/a/report.html", "<script>alert(1)"),
            ),
            start="clean",
        )
    # Links out of a folder.
    for file in (
        "metrics.jsonl",
        "heartbeat.json",
        "env.json",
        "report.html",
        "result.json.tmp",
        "env.json.tmp",
        "heartbeat.json.tmp",
        "predictions.npz",
        "alarms.jsonl",
    ):

        def link(box: Box, file=file):
            path = box / "runs/a" / file
            content = path.read_bytes() if path.exists() else b"precious\n"
            box.foreign("precious.txt", content)
            if path.exists():
                path.unlink()
            box.link(f"runs/a/{file}", "{box}/precious.txt")

        case(
            f"h-link-{file.replace('.', '-')}",
            f"{file} of a run is a link to a file outside of it",
            link,
            train(out="resumes|refused", says=(file, "link"), equal="clean"),
            start="half",
        )
    case(
        "h-link-step",
        "a step is a link to a folder outside, with other content",
        lambda box: (
            box.foreign("precious/3/model.bin"),
            box.foreign("precious/3/digest.json", b"{}"),
            box.remove("runs/a/checkpoints/3"),
            box.link("runs/a/checkpoints/3", "{box}/precious/3"),
        ),
        train(out="resumes|refused", says=("checkpoints/3", "link")),
        start="half",
    )
    case(
        "h-link-checkpoints",
        "the checkpoints of a fresh run are a link to a folder outside",
        lambda box: (
            box.foreign("precious/1/model.bin"),
            box.foreign("precious/7/digest.json", b"{}"),
            (box / "runs/a").mkdir(parents=True),
            box.link("runs/a/checkpoints", "{box}/precious"),
        ),
        train(out="trains|refused", says=("checkpoints", "link"), writes=("precious",)),
        start="empty",
    )
    case(
        "h-cache-key",
        "the key of stored answers is another program's",
        lambda box: box.write(
            "cache/teacher/key.json", json.dumps({"key": {"teacher": "evil:make"}})
        ),
        train(
            config="tiny.py:kd,cached",
            out="refused",
            says=("cache", "key.json"),
            workdir="runs/b",
            writes=("cache",),
        ),
        start="cached",
    )
    case(
        "h-cache-chunk-size",
        "the key of stored answers says chunks of 0 and of a billion rows",
        lambda box: box.edit("cache/teacher/key.json", lambda k: k.update({"chunk": -4})),
        train(
            config="tiny.py:kd,cached",
            out="refused",
            says=("cache", "chunk"),
            workdir="runs/b",
            writes=("cache",),
        ),
        start="cached",
    )


def _handlers(box: Box) -> None:
    folder = "runs/a/checkpoints/6"

    def edit(meta):
        meta["item_handlers"] = {"role.student": "evil.Handler", "meta": "evil.Handler"}

    box.edit(f"{folder}/_CHECKPOINT_METADATA", edit)
    box.seal(folder)


# i: damaged files.


def _damaged() -> None:
    r = random.Random(f"{SEED}/damage")

    def half(
        name: str,
        about: str,
        change: Callable[[Box], Any],
        out="resumes|refused",
        says=("damaged", "checkpoint", "differ"),
        equal="clean",
    ) -> None:
        case(f"i-{name}", about, change, train(out=out, says=says, equal=equal), start="half")

    for i in range(5):
        at, bit, step = r.random(), r.randrange(8), r.choice(["3", "6"])
        half(
            f"bit-{i}",
            f"bit {bit} of the arrays of step {step} flipped at {at:.2f}",
            lambda box, at=at, bit=bit, step=step: box.flip(
                box.largest(f"runs/a/checkpoints/{step}"), at, bit
            ),
        )
    for i in range(3):
        share, step = r.random(), r.choice(["3", "6"])
        half(
            f"cut-{i}",
            f"the arrays of step {step} cut to {share:.2f}",
            lambda box, share=share, step=step: box.truncate(
                box.largest(f"runs/a/checkpoints/{step}"), share
            ),
        )

    def swap(box: Box) -> None:
        a, b = (box / f"runs/a/checkpoints/{s}/role.student" for s in ("3", "6"))
        for source, target in ((a, box / "tmp/x"), (b, a), (box / "tmp/x", b)):
            os.rename(source, target)

    half("swapped", "the network of two steps exchanged", swap)
    half(
        "copied",
        "step 6 copied to 8, checksums and all",
        lambda box: __import__("shutil").copytree(
            box / "runs/a/checkpoints/6", box / "runs/a/checkpoints/8"
        ),
        says=("step", "8", "differ"),
    )
    half(
        "renamed",
        "step 6 renamed to 7",
        lambda box: os.rename(box / "runs/a/checkpoints/6", box / "runs/a/checkpoints/7"),
        says=("step", "7", "differ"),
    )
    half(
        "superscript",
        "a step named by a superscript",
        lambda box: __import__("shutil").copytree(
            box / "runs/a/checkpoints/6", box / "runs/a/checkpoints/²"
        ),
        says=("checkpoints",),
    )
    half(
        "arabic",
        "a step named by an Arabic digit",
        lambda box: __import__("shutil").copytree(
            box / "runs/a/checkpoints/6", box / "runs/a/checkpoints/\u0667"
        ),
        says=("checkpoints",),
    )
    half(
        "zeros",
        "a step named with zeros",
        lambda box: os.rename(box / "runs/a/checkpoints/6", box / "runs/a/checkpoints/006"),
        says=("checkpoints",),
    )
    half(
        "huge-step",
        "a step of 400 digits",
        lambda box: box.write("runs/a/checkpoints/" + "9" * 200 + "/digest.json", "{}"),
        says=("checkpoints", "damaged"),
    )
    digest = "runs/a/checkpoints/6/digest.json"
    for name, text in {
        "number": "7",
        "text": '"x"',
        "empty": "{}",
        "values": '{"meta/metadata": 7}',
        "deep": "[" * 100_000,
        "bytes": b"\xff\xfe{}",
        "zero": b"",
        "null-bytes": bytes(200),
        "constant": "Infinity",
    }.items():
        half(
            f"checksums-{name}",
            f"checksums of step 6 are {name}",
            lambda box, text=text: box.write(digest, text),
        )
    for name, change in {
        "step-text": lambda m: m.update(step="six"),
        "step-negative": lambda m: m.update(step=-6),
        "metric-nan": lambda m: m.update(metric=float("nan")),
        "metric-text": lambda m: m.update(metric="high"),
        "metric-list": lambda m: m.update(metric=[1]),
        "config-null": lambda m: m.update(config=None),
        "config-text": lambda m: m.update(config="x"),
        "seconds": lambda m: m.update(seconds="x"),
        "list": lambda m: [m],
        "empty": lambda m: {},
        "metrics": lambda m: m.update(metrics=[1]),
        "unlogged": lambda m: m.update(unlogged={"a": 1}),
        "spread": lambda m: m.update(first_spread=[3]),
        "skipped": lambda m: m.update(skipped=None),
    }.items():

        def edit(box: Box, change=change):
            box.edit("runs/a/checkpoints/6/meta/metadata", lambda m: change(m))
            box.seal("runs/a/checkpoints/6")

        half(
            f"meta-{name}",
            f"metadata of step 6 have a wrong {name}, with right checksums",
            edit,
            says=("meta", "checkpoint", "damaged", "step"),
            equal="clean" if name not in ("metrics", "skipped", "seconds") else "",
        )
    for name, text in {
        "cut": None,
        "list": "[]",
        "null": "null",
        "deep": "[" * 100_000 + "]" * 100_000,
        "utf16": json.dumps({"seed": 0}).encode("utf-16"),
        "huge": '{"seed": 1e999}',
        "long-number": '{"seed": ' + "9" * 5000 + "}",
        "roles": '{"roles": [1]}',
        "types": '{"optim": 3, "roles": {"student": 4}}',
        "bytes": b"\x00" * 64,
        "role-name": '{"roles": {"a.b": {"model": "mlp"}, "": {}}}',
        "empty": "",
    }.items():
        for mode in ("train", "eval"):
            if mode == "train" and name in ("deep", "huge", "types", "empty"):
                continue

            def spoil(box: Box, text=text):
                if text is None:
                    box.truncate("runs/a/config.json", 0.5)
                else:
                    box.write("runs/a/config.json", text)

            run = (
                train(out="refused|resumes", says=("config",), equal="clean")
                if mode == "train"
                else evaluate(out="refused|evaluates", says=("config",), equal="clean")
            )
            case(
                f"i-config-{name}-{mode}",
                f"config.json is {name}; {mode}",
                spoil,
                run,
                start="half",
            )
    for name, change in {
        "status-only": lambda r: {"status": "done"},
        "list": lambda r: [],
        "text": lambda r: "done",
        "metrics-null": lambda r: r.update(metrics=None),
        "metrics-text": lambda r: r["metrics"].update({"test/accuracy": "high"}),
        "metrics-nan": lambda r: r["metrics"].update({"test/accuracy": float("nan")}),
        "best-list": lambda r: r.update(best=[]),
        "steps-text": lambda r: r.update(steps="nine"),
        "compute-null": lambda r: r.update(compute=None),
        "alarms": lambda r: r.update(alarms=[1]),
        "provenance": lambda r: r.update(provenance=[]),
        "parameters": lambda r: r.update(parameters=3),
    }.items():
        case(
            f"i-result-{name}",
            f"result.json of a finished run has a wrong {name}",
            lambda box, change=change: box.edit("runs/a/result.json", lambda r: change(r)),
            train(out="refused|resumes|finished", says=("result.json",)),
            start="clean",
        )
    for name, text in {
        "deep": "[" * 100_000,
        "bytes": b"\xff\xfe\x00",
        "huge": '{"status": "done", "metrics": 1e999}',
        "cut": '{"status": "done", "metr',
    }.items():
        case(
            f"i-result-{name}",
            f"result.json of a finished run is {name}",
            lambda box, text=text: box.write("runs/a/result.json", text),
            train(out="refused|resumes", says=("result.json",)),
            start="clean",
        )

    def rows(name, about, change, out="resumes|refused", equal=""):
        half(
            f"rows-{name}",
            about,
            lambda box: box.write(
                "runs/a/metrics.jsonl", change((box / "runs/a/metrics.jsonl").read_bytes())
            ),
            out,
            ("metrics.jsonl",),
            equal,
        )

    rows("cut", "the last row of the log was cut", lambda b: b[:-7], "resumes", "clean")
    rows("no-newline", "the last line break is missing", lambda b: b[:-1], "resumes", "clean")
    rows(
        "garbage", "a line of the log that is none", lambda b: b.replace(b"\n", b"\ngarbage{\n", 1)
    )
    rows("list", "a row that is a list", lambda b: b"[1, 2]\n" + b)
    rows("step-text", "a row whose step is text", lambda b: b'{"step": "two"}\n' + b)
    rows("no-step", "a row without a step", lambda b: b'{"train/loss": 1}\n' + b)
    rows("nulls", "a block of null bytes, as after a power failure", lambda b: b + bytes(4096))
    rows(
        "nulls-inside",
        "a block of null bytes between rows",
        lambda b: b.replace(b"\n", b"\n" + bytes(512) + b"\n", 1),
    )
    rows("deep", "a row of nested brackets", lambda b: b + b"[" * 100_000 + b"\n")
    rows("long", "a row of 5 MB", lambda b: b'{"step": 1, "x": "' + b"y" * 5_000_000 + b'"}\n' + b)
    rows("empty", "an empty log", lambda b: b"")
    rows("carriage", "line breaks of DOS", lambda b: b.replace(b"\n", b"\r\n"), "resumes|refused")
    half(
        "heartbeat",
        "heartbeat.json is garbage",
        lambda box: box.write("runs/a/heartbeat.json", b"\xff{"),
        "resumes",
        (),
        "clean",
    )
    half(
        "alarms",
        "alarms.jsonl has rows of another kind",
        lambda box: box.write("runs/a/alarms.jsonl", '[]\n{"step": "x"}\n3\n'),
        says=("alarms.jsonl",),
    )
    half(
        "env",
        "env.json is a list",
        lambda box: box.write("runs/a/env.json", "[]"),
        "resumes",
        (),
        "clean",
    )
    case(
        "i-study-json",
        "study.json of a finished study is cut",
        lambda box: box.truncate("runs/s/study.json", 0.5),
        study(),
        start="study",
    )
    case(
        "i-arm-result",
        "an arm's result.json is a list",
        lambda box: box.write("runs/s/alone/seed0/result.json", "[]"),
        study(out="studies|refused", says=("result.json",)),
        start="study",
    )
    case(
        "i-predictions",
        "predictions.npz of a finished run is cut; its report is drawn anew",
        lambda box: box.truncate("runs/a/predictions.npz", 0.5),
        train(out="finished|resumes|refused", says=("predictions.npz",)),
        start="clean",
    )
    for name, change in {
        "cut": lambda box, f: box.truncate(f, 0.5),
        "empty": lambda box, f: box.write(f, b""),
        "list": lambda box, f: box.write(f, "[]"),
        "bytes": lambda box, f: box.write(f, b"\xff"),
    }.items():
        case(
            f"i-cache-key-{name}",
            f"the key of stored answers is {name}",
            lambda box, change=change: change(box, "cache/teacher/key.json"),
            train(
                config="tiny.py:kd,cached",
                workdir="runs/b",
                out="refused",
                says=("key.json", "cache"),
                writes=("cache",),
            ),
            start="cached",
        )
    case(
        "i-cache-row",
        "a bit of the stored answers is another",
        lambda box: box.flip(box.largest("cache/teacher"), 0.9),
        train(
            config="tiny.py:kd,cached",
            workdir="runs/b",
            out="refused|trains",
            says=("cache", "differ"),
            equal="cached",
            writes=("cache",),
        ),
        start="cached",
    )


# j: files of other programs.


def _foreign() -> None:
    hugging = json.dumps({"architectures": ["Bert"], "hidden_size": 768})
    for name, content in {
        "config.json": hugging,
        "config.json/": "config of others",
        "metrics.jsonl": '{"epoch": 1}\n',
        "report.html": "<h1>My thesis</h1>",
        "result.json": '{"score": 0.9}',
        "env.json": '{"PATH": "/bin"}',
        "heartbeat.json": '{"alive": true}',
        "predictions.npz": b"PK\x03\x04somebody's",
        "alarms.jsonl": "not ours\n",
        "stall.txt": "my notes on a stall",
        "trust.npz": b"somebody's",
        "eval.json": "{}",
        "result.json.tmp": "theirs",
        "config.json.tmp": "theirs",
        "checkpoints": "a file",
        "events.out.tfevents.1.host": b"theirs",
        "embeddings.npz": b"theirs",
        ".git/HEAD": "ref: x",
        "checkpoints/100/model.bin": b"theirs",
        "checkpoints/3/model.bin": b"theirs",
        "checkpoints/last.ckpt": b"theirs",
        "checkpoints/6": b"a file of theirs",
        "checkpoints/a.orbax-checkpoint-tmp-1/x": b"theirs",
        "checkpoints/3.orbax-checkpoint-tmp/x": b"theirs",
        "checkpoints/12/digest.json": "{}",
        "checkpoints/3/digest.json": '{"model": "sha256:12"}',
        "checkpoints/2.damaged/x": "theirs",
    }.items():
        file = name.rstrip("/") + ("/inner.txt" if name.endswith("/") else "")
        slug = file.replace("/", "-").replace(".", "-")
        case(
            f"j-fresh-{slug}",
            f"a workdir in which another program left {file}",
            lambda box, file=file, content=content: box.foreign(f"runs/a/{file}", content),
            train(out="trains|refused", says=(file.split("/")[0], "runs/a"), equal="clean"),
            start="empty",
        )
    for name, content in {
        "checkpoints/99/model.bin": b"theirs",
        "checkpoints/2/model.bin": b"theirs",
        "checkpoints/5": b"a file",
        "checkpoints/notes.txt": b"theirs",
        "notes/thesis.txt": b"theirs",
        "checkpoints/4.orbax-checkpoint-tmp-7/x": b"theirs",
        "checkpoints/6/notes.txt": b"theirs",
    }.items():
        slug = name.replace("/", "-").replace(".", "-")
        case(
            f"j-half-{slug}",
            f"a run that goes on, in which another program left {name}",
            lambda box, name=name, content=content: box.foreign(f"runs/a/{name}", content),
            train(out="resumes|refused", says=(name.split("/")[0], "runs/a"), equal="clean"),
            start="half",
        )
    for name in (
        "study.json",
        "table.txt",
        "report.html",
        "alone",
        "alone/seed0/notes.txt",
        "alone/seed0/checkpoints/3/model.bin",
    ):
        slug = name.replace("/", "-").replace(".", "-")
        case(
            f"j-study-{slug}",
            f"a study in a folder in which another program left {name}",
            lambda box, name=name: box.foreign(f"runs/s/{name}"),
            study(out="studies|refused", says=(name.split("/")[0], "runs/s")),
            start="empty",
        )
    for name in (
        "teacher/00000-00000/model.bin",
        "teacher/key.json",
        "teacher/notes.txt",
        "teacher/00000-00000.abc/x",
    ):
        slug = name.replace("/", "-").replace(".", "-")
        case(
            f"j-cache-{slug}",
            f"stored answers where another program left {name}",
            lambda box, name=name: box.foreign(f"cache/{name}"),
            train(
                config="tiny.py:kd,cached",
                out="trains|refused",
                says=("cache",),
                writes=("cache",),
                equal="cached",
            ),
            start="teacher",
        )


for _add in (_stored, _damaged, _foreign):
    _add()
