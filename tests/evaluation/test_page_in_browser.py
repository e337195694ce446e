"""The page in a real browser: nothing wider than a phone, no request, no complaint on the console, readable in the dark.

Skipped where there is no Chromium (`tests/chromium.py`). With KD_SCREENSHOTS=DIR the pictures are kept, to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import BINARY, Browser, contrast

from kd.evaluation.report.page import Sample, Section, Table, render_page

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium: apt-get install chromium-headless-shell")

HOSTILE = '<img src="https://example.org/x.png" onerror="console.error(1)"> & <script>document.title = "taken"</script>'
LONG = "a-very-long-model-name-without-any-place-to-break-it-" * 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    tab = Browser(tmp_path_factory.mktemp("chromium"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything a report may hold, at its worst: many columns, long names, hostile text, a picture."""
    from kd.evaluation.report.figures import Bar, draw_bars

    folder = tmp_path_factory.mktemp("page")
    picture = draw_bars(folder / "bars.png", {"accuracy [share]": [Bar("one", 0.4, 0.1), Bar(LONG, 0.5, None)]})
    wide = Table(
        ["model", *(f"exact match: task number {n} ↑" for n in range(12))],
        [[name, *["0.123 ± 0.045"] * 12] for name in ("teacher", LONG, HOSTILE)],
        frozenset({(1, 3)}),
    )
    sections = [
        Section("Models and metrics", text="Some words. " * 30, table=wide, note="A note. " * 20),
        Section(
            "Side by side", samples=[Sample(HOSTILE, "yes\n  indented", [("teacher", "x" * 400), (LONG, HOSTILE)])]
        ),
        Section("Figures", image=picture, note="Bars."),
        Section(LONG, table=wide, folded=True),
    ]
    path = folder / "report.html"
    path.write_text(render_page(f"Report {HOSTILE}", ["An introduction.", LONG], sections), encoding="utf-8")
    return path


LOOKS = [(390, False), (390, True), (1280, False), (1280, True)]


@pytest.fixture(params=LOOKS, ids=["phone-light", "phone-dark", "desk-light", "desk-dark"])
def look(request: pytest.FixtureRequest, browser: Browser, page: Path) -> tuple[int, bool]:
    width, dark = request.param
    browser.show(page, width=width, dark=dark)
    return width, dark


def test_the_page_asks_for_nothing_and_the_console_is_silent(
    browser: Browser, page: Path, look: tuple[int, bool]
) -> None:
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [u for u in asked if not u.startswith("data:image/png;base64,")] == [page.as_uri()]
    said = [
        e
        for e in browser.events
        if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    assert said == []
    assert browser.ask("document.title").startswith("Report <img")


def test_nothing_is_wider_than_the_window_but_tables_that_scroll(browser: Browser, look: tuple[int, bool]) -> None:
    width, _ = look
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("window.innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName)"""
    assert browser.ask(outside) == []
    reach = "[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth, getComputedStyle(e).overflowX])"
    assert all(scrolls == "auto" for _, scrolls in browser.ask(reach))
    assert width > 600 or all(wide for wide, _ in browser.ask(reach))  # the worst table does need it on a phone
    moved = """[...document.querySelectorAll('nav a')].map(a => { a.click(); const at = document.getElementById(
        a.getAttribute('href').slice(1)); return at !== null && at.tagName === 'SECTION'; })"""
    assert browser.ask(moved) == [True] * 4, "the contents lead to their sections"


def test_a_table_that_goes_on_has_a_shadow_until_its_end_is_seen(browser: Browser, page: Path) -> None:
    browser.show(page, width=390, dark=False)
    browser.ask("document.documentElement.scrollTop = document.querySelector('.scroll').offsetTop - 20")

    def right_edge() -> float:
        box = browser.ask(
            "(b => [b.right, b.top, b.height])(document.querySelector('.scroll').getBoundingClientRect())"
        )
        shot = browser.picture()
        top = int(browser.ask("window.scrollY") + box[1])
        return float(shot[top : top + int(box[2]), int(box[0]) - 2].mean())

    before = right_edge()
    browser.ask("document.querySelector('.scroll').scrollLeft = 1e6")
    assert before < right_edge() - 0.02


def test_tables_are_readable(browser: Browser, look: tuple[int, bool]) -> None:
    sizes = browser.ask("[...document.querySelectorAll('td, th')].map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    one_line = "[...document.querySelectorAll('section:first-of-type td:nth-child(2)')].map(e => e.clientHeight)"
    browser.ask("document.querySelector('.scroll').scrollLeft = 300")
    first = browser.ask("(b => [b.left, b.right])(document.querySelector('.scroll td').getBoundingClientRect())")
    assert 0 <= first[0] < 20 * 16 or look[0] > 600  # the model's name stays in sight when the table is scrolled
    assert first[1] < 0.6 * look[0]
    assert min(browser.ask(one_line)) > 0


def test_text_stands_out_from_its_ground(browser: Browser, look: tuple[int, bool]) -> None:
    """WCAG 2.1 asks for a contrast of 4.5 between text and its ground."""
    script = """[...document.querySelectorAll('h1, p, td, th, figcaption, dt, dd, td.best, summary h2')].map(e => {
        let ground = e;
        const clear = () => getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)';
        while (ground.parentElement && clear()) ground = ground.parentElement;
        return [e.tagName + '.' + e.className, getComputedStyle(e).color, getComputedStyle(ground).backgroundColor]; })"""
    checked = browser.ask(script)
    assert len(checked) > 80
    for name, text, ground in checked:
        assert contrast((text, ground)) >= 4.5, f"{name}: {text} on {ground}"


def test_the_picture_is_dark_where_the_reader_wants_it_dark(browser: Browser, look: tuple[int, bool]) -> None:
    width, dark = look
    pixels = browser.picture()
    assert width - 20 < pixels.shape[1] <= width  # a desk's scroll bar is 15 wide
    corner = pixels[2, 2].mean()
    assert corner < 0.2 if dark else corner > 0.95
    assert pixels.std() > 0.03


def test_hostile_text_is_shown_as_it_is(browser: Browser, page: Path) -> None:
    browser.show(page, width=1280, dark=False)
    assert browser.ask("document.querySelectorAll('script').length") == 0
    assert browser.ask("[...document.querySelectorAll('dd')].some(e => e.textContent.startsWith('<img src='))")
    assert browser.ask("getComputedStyle(document.querySelectorAll('dd.given')[1]).whiteSpaceCollapse") == "preserve"
