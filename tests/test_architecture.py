"""The house rules: who may import whom, who may import Transformers, and how long a file gets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import longswift

ROOT = Path(longswift.__file__).parent
FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))
CHAIN = ["core", "kernels", "mechanisms", "memory", "hf", "eval", "cli"]
ALLOWED = {layer: {*CHAIN[: i + 1], "extend"} for i, layer in enumerate(CHAIN)}
ALLOWED |= {
    "core": {"core"},
    "extend": {"extend", "core"},
    "tiny": {"tiny", "core", "hf"},
    "eval": ALLOWED["eval"] | {"tiny"},
    "cli": ALLOWED["cli"] | {"tiny"},
    "__main__": {"cli"},
    "__init__": {"core", "mechanisms"},
}
# What a backend hands its rarer cases to.
BUILDS_ON = {"native": {"eager"}}
HUGGING_FACE = {"transformers", "peft", "accelerate"}
MAX_LINES = 400


def imports(path: str) -> list[tuple[str, bool]]:
    """Absolute module names a file imports, and whether at module level."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full module name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, id(node) in top) for name in names]
    return found


def layer(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES)
def test_imports_point_down(path: str) -> None:
    own = layer(path)
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "longswift" and len(parts) > 1 and (ROOT / parts[1]).is_dir():
            assert parts[1] in ALLOWED[own], f"{own} may not import longswift.{parts[1]}"


@pytest.mark.parametrize("path", [p for p in FILES if p.startswith("kernels/")])
def test_backends_do_not_know_each_other(path: str) -> None:
    parts = path.split("/")
    if len(parts) < 3:
        return
    for name, _ in imports(path):
        if name.startswith("longswift.kernels."):
            known = {parts[1]} | BUILDS_ON.get(parts[1], set())
            assert name.split(".")[2] in known, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES)
def test_only_hf_imports_transformers(path: str) -> None:
    for name, at_module_level in imports(path):
        if name.split(".")[0] in HUGGING_FACE:
            lazily_in_tiny = layer(path) == "tiny" and not at_module_level
            assert layer(path) == "hf" or lazily_in_tiny, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES)
def test_files_stay_short(path: str) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; split it by subject"


@pytest.mark.parametrize("path", FILES)
def test_files_have_a_docstring_and_future_annotations(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    if not text.strip():
        return
    assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is"
    code = [node for node in ast.parse(text).body if not isinstance(node, ast.Expr)]
    if code:
        assert "from __future__ import annotations" in text
