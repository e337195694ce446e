"""The documentation as a site: it builds without a warning, every page is in it, and it fetches nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from test_docs import ROOT, script

TOOLS = ("zensical", "mkdocstrings", "griffe")
MISSING = [name for name in TOOLS if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(
    bool(MISSING) and "CI" not in os.environ, reason=f"no {', '.join(MISSING)} here: pip install '.[docs]'"
)
"""CI installs the extra, and fails without it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in a process of its own, as `make docs` does. Warnings and foreign addresses end it."""
    out = tmp_path_factory.mktemp("site") / "site"
    script("build_site").build_site(out)
    return out


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two pages with the configuration of ours, in place of it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "README.md").write_text("# Front\n\n[One](docs/one.md#first), [Licence](LICENSE)\n", encoding="utf-8")
    (tmp_path / "docs" / "one.md").write_text("# One\n\n## First\n\n[Front](../README.md)\n", encoding="utf-8")
    (tmp_path / "LICENSE").write_text("", encoding="utf-8")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config[: config.index("nav:")].replace("extra_css: [stylesheets/site.css]\n", "")
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    return tmp_path


@needs_tools
def test_every_page_is_in_the_site_and_in_its_menu(site: Path) -> None:
    pages = {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        for kind in ("md", "ipynb")
        for path in (ROOT / "docs").rglob(f"*.{kind}")
    }
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    assert built == pages | {"index", "404"}
    menu = re.findall(r"([\w./-]+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(menu) == sorted(pages | {"index"})


@needs_tools
def test_pages_read_as_they_do_on_github(site: Path) -> None:
    """The two dialects of Markdown differ in lists right after a line of text, and in tables."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        body = text[text.index("<article") : text.index("</article>")] if "<article" in text else ""
        for paragraph in re.findall(r"<p>(.*?)</p>", body, flags=re.DOTALL):
            assert not re.search(r"\n\s*([-*|]|\d+\.) ", paragraph), f"{page.name}: {paragraph[:100]}"


@needs_tools
def test_the_api_has_signatures_and_docstrings_of_every_public_name(site: Path) -> None:
    import kd

    text = (site / "api.html").read_text(encoding="utf-8")
    parts = re.split(r'<h2 id="', text)[1:]
    assert len(parts) == len(kd.__all__) - 1
    for part in parts:
        name = re.sub(r"<[^>]+>", "", part.partition(">")[2].partition("<a ")[0]).removeprefix("kd.")
        assert f"{name}(" in re.sub(r"<[^>]+>", "", part), "the signature"
        assert "doc-contents" in part, part[:40]
    assert text.count("&gt;&gt;&gt;") >= len(parts), "the examples"
    assert "settings.html#kd-cache-build" in text


@needs_tools
def test_a_sound_repository_builds_and_links_out_of_docs_lead_to_the_repository(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = script("build_site")
    monkeypatch.setattr(writer, "ROOT", small)
    writer.write_pages(tmp_path / "pages")
    front = (tmp_path / "pages" / "docs" / "index.md").read_text(encoding="utf-8")
    assert front == f"# Front\n\n[One](one.md#first), [Licence]({writer.REPOSITORY}/LICENSE)\n"
    assert "[Front](index.md)" in (tmp_path / "pages" / "docs" / "one.md").read_text(encoding="utf-8")


@needs_tools
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[x](one.md#nowhere)", "anchor does not exist"),
        ('<img src="https://example.org/x.png">', "one.html: https://example.org/x.png"),
        ("::: kd.no_such_name", "Could not collect 'kd.no_such_name'"),
    ],
)
def test_a_faulty_page_ends_the_build_and_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    writer = script("build_site")
    monkeypatch.setattr(writer, "ROOT", small)
    (small / "docs" / "one.md").write_text(f"# One\n\n## First\n\n{line}\n", encoding="utf-8")
    (small / ".typing" / "kd").mkdir(parents=True)
    (small / ".typing" / "kd" / "__init__.py").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(said)):
        writer.build_site(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_file_that_is_not_there_is_refused() -> None:
    writer = script("build_site")
    with pytest.raises(SystemExit, match=r"README\.md links to docs/nowhere\.md"):
        writer.with_links("[x](docs/nowhere.md)", ROOT / "README.md", Path("index.md"))


def test_what_a_browser_fetches_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<link rel="canonical" href="https://a.example"><link rel="stylesheet" href="//b.example/x.css"><a href="https://c.example">'
        '<script src="https://d.example/x.js"></script><img src="here.png">',
        encoding="utf-8",
    )
    (tmp_path / "a.css").write_text('@import "https://e.example/x.css"; a { background: url(x.png) }', encoding="utf-8")
    addresses = [address for _, address in script("build_site").fetched(tmp_path)]
    assert addresses == ["//b.example/x.css", "https://d.example/x.js", "https://e.example/x.css"]


def test_the_settings_page_is_made_from_the_classes() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == script("write_settings_docs").render(), "run scripts/write_settings_docs.py"
