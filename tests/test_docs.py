"""What a reader copies: examples of docstrings run, and links of the site lead somewhere."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    path
    for room in ("pipeline", "samplers", "serving", "towers")
    for path in sorted(ROOT.glob(f"{room}/**/*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_docstring(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failures, tried = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert tried
    assert not failures  # pytest shows what doctest has printed


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "notebooks" / "1_quick_start" / "index.html").is_file()
