"""Prints what a file of weights has: `python -m distill_jax.weights FILE`."""

import argparse
import os
import sys
from collections.abc import Sequence

from distill_jax.core.errors import UserError
from distill_jax.weights import read, summary


def main(args: Sequence[str] | None = None) -> int:
    """Prints names, shapes and dtypes.

    Returns:
      0, or 2 for a file that cannot be read, after one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m distill_jax.weights", description="Shows the tensors of a file of weights."
    )
    parser.add_argument("file", help="safetensors, .pth, .pt, .bin, .npz, an index, or a folder")
    parser.add_argument("--sha256", default="", help="checksum that the file must have")
    parser.add_argument("--check-finite", action="store_true", help="refuse NaN and infinity")
    given = parser.parse_args(args)
    try:
        text = summary(read(given.file, sha256=given.sha256, check_finite=given.check_finite))
    except UserError as error:
        print("; ".join(str(error).split("\n  ")), file=sys.stderr)
        return error.exit_code
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except BrokenPipeError:  # the reader, for example `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
