"""Shows and certifies weights.

`python -m distill_jax.weights FILE` prints the tensors of a file. `python -m distill_jax.weights
certify SOURCE REFERENCE` runs the network that they are of and compares it with another library.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from distill_jax.core.errors import UserError
from distill_jax.weights import read, summary


def main(args: Sequence[str] | None = None) -> int:
    """Prints names, shapes and dtypes, or certifies.

    Returns:
      0; 1 for a network that differs from its reference; 2 for a file that cannot be read, after
      one line on stderr.
    """
    args = list(sys.argv[1:] if args is None else args)
    run = _certify if args[:1] == ["certify"] else _show
    try:
        code, text = run(args[1:] if run is _certify else args)
    except UserError as error:
        print("; ".join(str(error).split("\n  ")), file=sys.stderr)
        return error.exit_code
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except BrokenPipeError:  # the reader, for example `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _show(args: Sequence[str]) -> tuple[int, str]:
    parser = argparse.ArgumentParser(
        prog="python -m distill_jax.weights",
        description="Shows the tensors of a file of weights.",
        epilog="`certify SOURCE REFERENCE` compares a network with another library.",
    )
    parser.add_argument("file", help="safetensors, .pth, .pt, .bin, .npz, an index, or a folder")
    parser.add_argument("--sha256", default="", help="checksum that the file must have")
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and infinity")
    given = parser.parse_args(args)
    weights = read(given.file, sha256=given.sha256, check_finite=given.check_finite)
    return 0, summary(weights)


def _certify(args: Sequence[str]) -> tuple[int, str]:
    parser = argparse.ArgumentParser(
        prog="python -m distill_jax.weights certify",
        description="Compares an imported network with the library that it comes from.",
    )
    parser.add_argument("source", help="a file, hf:<folder> or package:<name>")
    parser.add_argument("reference", help=".npz of input and outputs there, by their names here")
    parser.add_argument("--out", default="", help="JSON file to write the certificate to")
    given = parser.parse_args(args)
    from distill_jax.weights import certificates, pretrained  # networks take time to import

    reference = certificates.read_reference(given.reference)
    certificate = certificates.certify(pretrained.open_pretrained(given.source), reference)
    if given.out:
        certificates.write(certificate, given.out)
    rows = certificate["outputs"].items()
    lines = [f"{name:12} {r['max_difference']:.2e} (at most {r['bound']:.2e})" for name, r in rows]
    verdict = "agrees with" if certificate["passed"] else "DIFFERS from"
    library = " ".join(certificate["reference"].values()) or "the reference"
    lines.append(f"{certificate['family']} {verdict} {library}")
    return int(not certificate["passed"]), "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
