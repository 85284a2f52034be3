"""Of what kind the bytes of Python's sources are, by its own tokenizer and parser."""

import ast
import functools
import io
import keyword
import tokenize

import numpy as np

from distill_jax.data import stdlib_bytes

TOKENS = (
    "space",
    "indent",
    "name",
    "attribute",
    "call",
    "definition",
    "keyword",
    "number",
    "string",
    "comment",
    "operator",
)
STATEMENTS: dict[str, tuple[type[ast.stmt], ...]] = {
    "none": (),
    "function": (ast.FunctionDef, ast.AsyncFunctionDef),
    "class": (ast.ClassDef,),
    "assignment": (ast.Assign, ast.AugAssign, ast.AnnAssign),
    "return": (ast.Return,),
    "import": (ast.Import, ast.ImportFrom),
    "if": (ast.If,),
    "loop": (ast.For, ast.While, ast.AsyncFor),
    "block": (ast.With, ast.AsyncWith, ast.Try),
    "raise": (ast.Raise, ast.Assert),
    "expression": (ast.Expr,),
    "other": (ast.stmt,),
    "docstring": (),
}
UNKNOWN = 255


def token_kinds(text: bytes) -> np.ndarray:
    """Returns for each byte the kind of its token, an index of `TOKENS`, `[n]`."""
    found, lines = np.zeros(len(text), np.uint8), text.decode().split("\n")
    starts = np.cumsum([0, *(len(line.encode()) + 1 for line in lines)])
    read = [
        token
        for token in tokenize.tokenize(io.BytesIO(text).readline)
        if token.string.strip() and token.type != tokenize.ENCODING
    ]
    before = ""
    for token, after in zip(read, [*(t.string for t in read[1:]), ""], strict=True):
        (row, column), (last, until) = token.start, token.end
        begin = starts[row - 1] + len(lines[row - 1][:column].encode())
        end = starts[last - 1] + len(lines[last - 1][:until].encode())
        if not lines[row - 1][:column].strip():
            found[starts[row - 1] : begin] = TOKENS.index("indent")
        kind = {"OP": "operator"}.get(name := tokenize.tok_name[token.type], name.lower())
        if kind == "name":
            named = {".": "attribute", "def": "definition", "class": "definition"}
            kind = named.get(before, "call" if after == "(" else "name")
            kind = "keyword" if keyword.iskeyword(token.string) else kind
        found[begin:end] = TOKENS.index(kind if kind in TOKENS else "string")
        before = token.string
    return found


def statement_kinds(text: bytes) -> np.ndarray:
    """Returns for each byte its innermost statement, an index of `STATEMENTS`, `[n]`."""
    found, names = np.zeros(len(text), np.uint8), list(STATEMENTS)
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split(b"\n"))])
    for node in ast.walk(ast.parse(text)):  # parents first
        if isinstance(node, ast.stmt):
            kind = next(i for i, kinds in enumerate(STATEMENTS.values()) if isinstance(node, kinds))
            value = getattr(node, "value", None)
            if isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str):
                kind = names.index("docstring")
            begin = starts[node.lineno - 1] + node.col_offset
            found[begin : starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)] = kind
    return found


@functools.cache
def labels() -> dict[str, np.ndarray]:
    """Returns the kinds of all bytes in the order of `stdlib_bytes.read`, or `UNKNOWN`."""
    found: dict[str, list[np.ndarray]] = {"token": [], "statement": []}
    for document in stdlib_bytes.read():
        for name, kinds in (("token", token_kinds), ("statement", statement_kinds)):
            try:
                made = kinds(document.text)
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
                made = np.full(len(document.text), UNKNOWN, np.uint8)
            found[name].append(made)
    return {name: np.concatenate(rows) for name, rows in found.items()}
