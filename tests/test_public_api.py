"""The public names are frozen, importing is harmless, and every mechanism has its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import longswift
from longswift.mechanisms import list_mechanisms

REPO = Path(__file__).parents[1]
PUBLIC = [
    "AttentionResult",
    "AttentionStats",
    "ConfigError",
    "Full",
    "InputError",
    "LongSwiftError",
    "MSSwift",
    "Mechanism",
    "SlidingWindow",
    "UnsupportedError",
    "__version__",
    "from_dict",
    "get_mechanism",
    "list_mechanisms",
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_are_frozen() -> None:
    assert sorted(longswift.__all__) == PUBLIC
    assert dir(longswift) == PUBLIC
    for name in PUBLIC:
        assert getattr(longswift, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = longswift.Nonsense


@pytest.mark.parametrize("module", ["longswift", "longswift.mechanisms.ms_swift"])
def test_import_loads_no_transformers(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('transformers', 'peft', 'accelerate', "
    assert run(code + "'matplotlib', 'typer') if m in sys.modules])") == "[]"


def test_import_patches_nothing() -> None:
    code = """
import torch, torch.nn.functional as F
before = {m.__name__: {k: id(v) for k, v in vars(m).items()} for m in (torch, F, torch.Tensor)}
state = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import longswift, longswift.mechanisms.ms_swift, longswift.mechanisms.sliding_window
for m in (torch, F, torch.Tensor):
    now = vars(m)
    changed = [k for k, v in before[m.__name__].items() if k not in now or id(now[k]) != v]
    assert not changed, changed
assert torch.equal(state[0], torch.random.get_rng_state())
assert state[1:] == (torch.get_num_threads(), torch.get_default_dtype())
"""
    run(code)


@pytest.mark.parametrize("name", list_mechanisms())
def test_every_mechanism_has_a_page(name: str) -> None:
    page = REPO / "docs" / "mechanisms" / f"{name}.md"
    assert page.is_file(), f"write {page.relative_to(REPO)}: maths, complexity, when to use it"
    index = (REPO / "docs" / "index.md").read_text(encoding="utf-8")
    assert f"mechanisms/{name}.md" in index


def documents() -> list[Path]:
    return [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", documents(), ids=lambda p: p.relative_to(REPO).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
