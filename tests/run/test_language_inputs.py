"""Bad text, tokens and networks of language configs, as typed in a shell: one message, code 2."""

import json

import numpy as np
import pytest

from distill_jax import main

IDS = np.random.default_rng(0).integers(50, size=8000)
TOKENS = "next_token|data.name=token_file|data.kwargs.path=ids.npy|data.kwargs.end=0"
FILE = f"{TOKENS}|data.kwargs.vocabulary=50"
TEXT = "next_token|data.name=text_folder|data.kwargs.path=text"
STUDENT = "roles.student.kwargs"
CASES = {
    "id outside": (f"{TOKENS}|data.kwargs.vocabulary=20", ("ids.npy", "20")),
    "end outside": (f"{TOKENS}|data.kwargs.vocabulary=50|data.kwargs.end=50", ("end", "50")),
    "negative length": (f"{FILE}|data.kwargs.length=-1", ("length",)),
    "float ids": (FILE.replace("ids", "floats"), ("floats.npy", "float")),
    "2-d ids": (FILE.replace("ids", "table"), ("table.npy", "[m]")),
    "no ids": (FILE.replace("ids", "none"), ("none.npy", "no token")),
    "cut file": (FILE.replace("ids", "cut"), ("cut.npy",)),
    "not an array": (FILE.replace("ids", "words"), ("words.npy",)),
    "missing file": (FILE.replace("ids", "absent"), ("absent.npy",)),
    "empty folder": (TEXT.replace("path=text", "path=empty"), ("empty",)),
    "not UTF-8": (TEXT.replace("path=text", "path=latin"), ("latin", "UTF-8")),
    "one document": (TEXT.replace("path=text", "path=one"), ("one",)),
    "empty documents": (TEXT.replace("path=text", "path=blank"), ("blank",)),
    "no such field": (
        TEXT.replace("path=text", "path=rows.jsonl") + "|data.kwargs.field=body",
        ("body", "text"),
    ),
    "numbers as text": (TEXT.replace("path=text", "path=numbers.jsonl"), ("numbers.jsonl",)),
    "cut JSON": (TEXT.replace("path=text", "path=cut.jsonl"), ("cut.jsonl",)),
    "no tokenizer": (f"{TEXT}|data.kwargs.tokenizer_path=absent.json", ("tokenizer",)),
    "short positions": (f"next_token|{STUDENT}.layout=gpt2|{STUDENT}.max_length=4", ("4",)),
    "other vocabulary": (f"next_token|{STUDENT}.vocabulary=100", ("100", "257")),
    "encoder": (
        f"gkd|roles.teacher.init=|roles.teacher.frozen=False|{STUDENT}.causal=False",
        ("student", "causal"),
    ),
    "negative temperature": (
        "gkd|roles.teacher.init=|roles.teacher.frozen=False|objective.kwargs.temperature=-1.0",
        ("temperature",),
    ),
    "steps 0": (
        "gkd|roles.teacher.init=|roles.teacher.frozen=False|objective.kwargs.new_tokens=0",
        ("new_tokens",),
    ),
    "prompt past the row": (
        "gkd|roles.teacher.init=|roles.teacher.frozen=False|objective.kwargs.prompt=5000",
        ("prompt",),
    ),
    "samples past positions": (
        f"gkd|roles.teacher.init=|roles.teacher.frozen=False|objective.kwargs.new_tokens=5000|{STUDENT}.layout=gpt2|{STUDENT}.max_length=128",
        ("128",),
    ),
    "top 0": (
        "kd|roles.teacher.init=|roles.teacher.frozen=False|roles.teacher.kwargs.top=-1",
        ("top",),
    ),
    "top above": (
        "kd|roles.teacher.init=|roles.teacher.frozen=False|roles.teacher.kwargs.top=300",
        ("top", "257"),
    ),
    "cut weights": ("next_token|roles.student.init=hf:folder", ("folder",)),
    "mlp": (
        "next_token|roles.student.model=mlp|roles.student.kwargs={}",
        ("roles.student", "dictionary", "tokens"),
    ),
    "wrong evaluator": ("next_token|evaluators={'classification': {}}", ("[n, k]", "next_token")),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    np.save(root / "ids.npy", IDS)
    np.save(root / "floats.npy", IDS.astype(np.float32))
    np.save(root / "table.npy", IDS.reshape(2, -1))
    np.save(root / "none.npy", IDS[:0])
    (root / "cut.npy").write_bytes((root / "ids.npy").read_bytes()[:500])
    (root / "words.npy").write_text("words")
    for name in ("empty", "latin", "one", "blank", "text", "folder"):
        (root / name).mkdir()
    for i in range(20):
        (root / "text" / f"{i}.txt").write_text(f"line {i}\n" * 200)
        (root / "blank" / f"{i}.txt").write_text("")
        (root / "latin" / f"{i}.txt").write_bytes(b"caf\xe9 " * 200)
    (root / "one" / "a.txt").write_text("alone " * 500)
    lines = [json.dumps({"text": f"line {i} " * 50}) for i in range(20)]
    (root / "rows.jsonl").write_text("\n".join(lines))
    (root / "cut.jsonl").write_text("\n".join(lines)[:-20])
    (root / "numbers.jsonl").write_text("\n".join(json.dumps({"text": i}) for i in range(20)))
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 257}
    (root / "folder" / "config.json").write_text(json.dumps(config))
    (root / "folder" / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    return root


@pytest.mark.parametrize("case", CASES)
def test_one_message_before_any_compile(case, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    typed, words = CASES[case]
    name, *changes = typed.split("|")
    flags = [f"--config.{change}" for change in changes]
    args = [f"--config=language/{name}:smoke", "--workdir=run", *flags]
    assert main.main(["", *args]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words), error
    assert not (place / "run").exists()
