"""Build the documentation as a site: `python scripts/build_site.py site`. Every warning is an error.

docs/ is the only source, and nothing comes from the network. Four things differ from what GitHub shows: the front page is
README.md, links to files outside docs/ lead to the repository, mkdocstrings writes the members and the source of the API,
from the same docstrings as docs/api.md, and notebooks become pages with the outputs that are stored in them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/kd-logit-cache/kd/blob/main"
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)#\s]+)")
"""Where a link of a page leads: a file, without the anchor in it."""


def build_site(out: Path) -> None:
    """Write the site to `out`, which is replaced. Raises SystemExit with the warnings, or with what the site would fetch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pages(folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
        paths = os.pathsep.join([str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
        )
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        if done.returncode or re.search("warning|Traceback", said, flags=re.IGNORECASE):
            raise SystemExit(f"{said}\nthe site was not built (exit code {done.returncode})")
        outside = [f"{page.relative_to(folder / 'site')}: {address}" for page, address in fetched(folder / "site")]
        if outside:
            raise SystemExit("pages fetch from the network:\n" + "\n".join(outside))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "site", out)


def write_pages(folder: Path) -> None:
    """The configuration and `docs/` as Zensical reads them."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("PACKAGE", str(ROOT / ".typing")).replace("SCRIPTS", str(ROOT / "scripts"))
    folder.mkdir(exist_ok=True)
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.txt", "*.ipynb"))
    for source in [ROOT / "README.md", *sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")])]:
        target = (
            folder / "docs" / ("index.md" if source.name == "README.md" else page_of(source).relative_to(ROOT / "docs"))
        )
        text = source.read_text(encoding="utf-8")
        text = of_notebook(text) if source.suffix == ".ipynb" else text
        text = with_signatures(text) if source.name == "api.md" else text
        target.write_text(with_links(text, source, target.relative_to(folder / "docs")), encoding="utf-8")


def with_links(text: str, source: Path, page: Path) -> str:
    """Links to pages of docs/ as they are from `page`; links to other files of the repository lead there."""

    def linked(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)} links to {match[1]}, which is not there")
        if target == ROOT / "README.md":
            target = ROOT / "docs" / "index.md"
        if target.is_relative_to(ROOT / "docs"):
            return os.path.relpath(page_of(target), (ROOT / "docs" / page).parent)
        return f"{REPOSITORY}/{target.relative_to(ROOT)}"

    return LINK.sub(linked, text)


def page_of(source: Path) -> Path:
    """A notebook becomes a page of Markdown; other files keep their names."""
    return source.with_suffix(".md") if source.suffix == ".ipynb" else source


def of_notebook(text: str) -> str:
    """A notebook as a page: its code, and the outputs that are stored in it."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            shown = output.get("data", {"text/plain": output.get("text", "")})
            html = "".join(shown.get("text/html", ""))
            parts.append(f"<div>{html}</div>" if html else f"```text\n{''.join(shown['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def with_signatures(text: str) -> str:
    """docs/api.md with a line for mkdocstrings in place of each docstring and of the members of a class."""
    section = re.compile(r"^## `(kd\.\w+)`\n(.*?)(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)
    return section.sub(lambda m: f"## `{m[1]}`\n\n{signature(m[2])}::: {m[1]}\n\n{settings(m[2])}", text)


def signature(section: str) -> str:
    """The block of code with which a section begins."""
    return section[: section.index("```\n", section.index("```") + 3) + 4].lstrip() + "\n"


def settings(section: str) -> str:
    """What a section says beside the docstring: where the settings are."""
    return "".join(f"{line}\n\n" for line in section.splitlines() if line.startswith("Settings: "))


class Fetches(HTMLParser):
    """Addresses that a browser fetches for a page by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        known = {name: value or "" for name, value in attrs}
        if tag == "link" and known.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(known.get("href", ""))
        if tag != "a":
            self.addresses += [known[name] for name in ("src", "srcset", "data", "poster") if name in known]


def fetched(site: Path) -> Iterator[tuple[Path, str]]:
    """Every file of the site that makes a browser fetch something from another place, and the address."""
    for page in sorted(site.rglob("*.html")):
        addresses = Fetches(page.read_text(encoding="utf-8")).addresses
        yield from ((page, address) for address in addresses if re.match(r"(https?:)?//", address))
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text(encoding="utf-8")
        addresses = re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", text)
        yield from ((sheet, address) for address in addresses)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("out", type=Path)
    build_site(parser.parse_args().out)
