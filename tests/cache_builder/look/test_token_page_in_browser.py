"""The page of `kd cache show --html` in a real browser: mouse, keyboard, phone and desk, light and dark.

Skipped where there is no Chromium (`tests/chromium.py`). With KD_SCREENSHOTS=DIR the pictures are kept, to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import BINARY, Browser, contrast

from kd.cache_builder.look.cache_view import CacheView
from kd.cache_builder.look.example_view import ExamplePart
from kd.cache_builder.look.view_page import view_page, write_view_page
from kd.cache_builder.showing import show_cache

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium: apt-get install chromium-headless-shell")

HOSTILE = '<img src="https://example.org/x.png" onerror="console.error(1)"> & </script><script>document.title = "taken"</script>'
CONTROL = "<|im_start|>"
LOOKS = [(390, False), (390, True), (1280, False), (1280, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    tab = Browser(tmp_path_factory.mktemp("chromium"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def view(cache: Path) -> CacheView:
    """An example at its worst: markup as a prompt, as a token's text, as a piece, and as a candidate; every shade."""
    shown = show_cache(cache, 0)
    assert shown.example is not None
    part = shown.example.parts[-1]
    tokens = [replace(token, entropy_at_least=n % 7 * 0.9) for n, token in enumerate(part.tokens)]
    top = [
        replace(tokens[0].top[0], text=HOSTILE),
        replace(tokens[0].top[0], text=CONTROL + "%%script%%", probability=1e-9),
    ]
    tokens[0] = replace(tokens[0], text=HOSTILE, piece=HOSTILE, top=top, entropy_at_least=9.0)
    tokens[1] = replace(tokens[1], text="\n")
    tokens[2] = replace(tokens[2], text="")
    scored = ExamplePart("text", "".join(t.text for t in tokens), tokens)
    long = ExamplePart("prompt", HOSTILE + "x" * 300 + CONTROL)
    example = replace(shown.example, parts=[long, scored], id="a-long-name-" * 20)
    return replace(shown, example=example, picked=tokens[:1], notes=["A note. " * 20, HOSTILE])


@pytest.fixture(scope="module")
def page(view: CacheView, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_view_page(view, path)
    return path


@pytest.fixture(params=LOOKS, ids=["phone-light", "phone-dark", "desk-light", "desk-dark"])
def look(request: pytest.FixtureRequest, browser: Browser, page: Path) -> tuple[int, bool]:
    width, dark = request.param
    browser.show(page, width=width, dark=dark)
    return width, dark


def panel(browser: Browser) -> str:
    return str(browser.ask("document.getElementById('detail').textContent"))


def test_the_page_asks_for_nothing_and_the_console_is_silent(
    browser: Browser, page: Path, look: tuple[int, bool]
) -> None:
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]
    loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [e for e in browser.events if e.get("method") in loud] == []
    assert browser.ask("document.title") != "taken"
    assert browser.ask("document.querySelectorAll('img, main script').length") == 0


def test_nothing_is_wider_than_the_window(browser: Browser, look: tuple[int, bool]) -> None:
    width, _ = look
    assert browser.ask("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).length"
    assert browser.ask(outside) == 0
    assert browser.ask("document.querySelectorAll('.t').length") > 10


def test_text_stands_out_from_its_ground(browser: Browser, look: tuple[int, bool]) -> None:
    script = """[...document.querySelectorAll('h1, h2, h3, p, li, .role, .words, .t, .legend span, dt, dd, td')].map(e => {
        let ground = e;
        const clear = () => getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)';
        while (ground.parentElement && clear()) ground = ground.parentElement;
        return [e.className, getComputedStyle(e).color, getComputedStyle(ground).backgroundColor]; })"""
    checked = browser.ask(script)
    assert {f"l{level}" for level in range(1, 7)} <= {word for name, *_ in checked for word in name.split()}
    for name, text, ground in checked:
        assert contrast((text, ground)) >= 4.5, f"{name}: {text} on {ground}"


def test_a_token_under_the_mouse_shows_its_distribution(
    browser: Browser, view: CacheView, look: tuple[int, bool]
) -> None:
    assert HOSTILE in panel(browser)  # the picked token, as text
    box = "(b => [b.left + b.width / 2, b.top + b.height / 2])(document.querySelector('[data-t=\"5\"]').getBoundingClientRect())"
    browser.ask("document.querySelector('[data-t=\"5\"]').scrollIntoView({block: 'start'})")
    x, y = browser.ask(box)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert view.example is not None
    token = view.example.tokens[5]
    shown = panel(browser)
    assert shown.startswith("token 5: ")
    assert f"rank {token.rank:,}" in shown
    assert token.top[0].probability is not None
    assert f"{token.top[0].probability:.4f}" in shown
    assert "at T=1" in shown


def test_the_keyboard_reaches_every_token(browser: Browser, look: tuple[int, bool]) -> None:
    browser.ask("document.querySelector('[tabindex=\"0\"][data-t]').focus()")
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowDown", 11), ("ArrowUp", 1)):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert browser.ask("Number(document.activeElement.dataset.t)") == expected
        assert panel(browser).startswith(f"token {expected}: ")
    assert browser.ask("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1  # one stop for the Tab key


def test_the_panel_is_in_sight(browser: Browser, look: tuple[int, bool]) -> None:
    browser.ask("window.scrollTo(0, document.body.scrollHeight)")
    top, bottom, height = browser.ask(
        "(b => [b.top, b.bottom, innerHeight])(document.getElementById('detail').getBoundingClientRect())"
    )
    assert -1 <= top < bottom <= height + 1
    pixels = browser.picture()
    corner = pixels[2, 2].mean()
    assert corner < 0.2 if look[1] else corner > 0.95


def test_text_of_strangers_is_text_in_the_file(view: CacheView) -> None:
    page = view_page(view)
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "&lt;|im_start|&gt;" in page
    assert "\\u003c|im_start|\\u003e" in page
