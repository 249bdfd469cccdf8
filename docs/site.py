"""A hook of mkdocs: the README, the notebooks and linked files are part of the site, too.

In the repository links lead from file to file. The site has README.md as its first page, each
notebook as a page with its stored outputs, and every file that a page links to; links are
rewritten to where these lie on the site.
"""

import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "WORKSPACE.md", "CHANGELOG.md")]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LINK = re.compile(r"(?<=\]\()[^)#:\s]+")


def place(path: Path) -> str:
    """Where a file of the repository lies on the site: docs/x.md as x.md, README.md as index.md."""
    if path == ROOT / "README.md":
        return "index.md"
    path = path.with_suffix(".md") if path in NOTEBOOKS else path
    return path.relative_to(DOCS if DOCS in path.parents else ROOT).as_posix()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of `docs/`."""
    outside = {path: path.read_text(encoding="utf-8") for path in PAGES}
    outside |= {path: notebook_page(json.loads(path.read_text("utf-8"))) for path in NOTEBOOKS}
    for path, text in outside.items():
        files.append(File.generated(config, place(path), content=text))
    texts = outside | {path: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    linked = {
        (path.parent / target).resolve()
        for path, text in texts.items()
        for target in LINK.findall(text)
    }
    for path in sorted(linked - texts.keys()):
        if path.is_file() and DOCS not in path.parents and ROOT in path.parents:
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on the site."""
    here = page.file.src_uri
    sources = {place(path): path for path in (*PAGES, *NOTEBOOKS, *DOCS.glob("*.md"))}

    def rewrite(link: re.Match) -> str:
        target = (sources[here].parent / link[0]).resolve()
        if not target.is_file():
            return link[0]  # mkdocs says that it leads nowhere
        return os.path.relpath(place(target), os.path.dirname(here))

    return LINK.sub(rewrite, markdown)


def notebook_page(notebook: dict) -> str:
    """A notebook as Markdown: its texts, its code, and what it printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                image = "".join("".join(data["image/png"]).split())
                parts.append(f"![plot](data:image/png;base64,{image})")
            elif "text/html" in data:
                table = "".join(data["text/html"])
                # a table of pandas without its class is one of the site's, which scroll
                useless = r"<style.*?</style>|\n\s*| border=\"1\" class=\"dataframe\""
                parts.append(re.sub(useless, "", table, flags=re.DOTALL))
            else:
                parts.append(f"```text\n{''.join(data['text/plain'])}\n```")
    return "\n\n".join(parts) + "\n"
