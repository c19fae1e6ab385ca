"""The operators' page in a real browser: the Chromium of the system, headless."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from redis import Redis

from cli.dev.servers import free_port
from tests.support import http
from tests.support.deliveries import signed
from tests.support.payloads import body, user, user_event
from tests.support.queue import RqView
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until

CHROMIUM = shutil.which("chromium")
PASSWORD = "correct horse"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 60_000
DESK, PHONE = 1280, 360  # px

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def stack(make_settings: MakeSettings, tmp_path: Path) -> Iterator[Stack]:
    settings = make_settings(console_password=PASSWORD, port=free_port(), web_workers=1)
    with Stack(settings, tmp_path) as running:
        yield running


class Visit:
    """A page of the console, and what must not happen on it."""

    def __init__(self, context: BrowserContext, stack: Stack) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self._stack = stack

    def open(self, path: str = "/console") -> Page:
        self.page.goto(self._stack.base_url + path)
        return self.page

    def assert_harmless(self) -> None:
        """Fail when something was blocked, went wrong, or asked another host."""
        assert self.complaints == []
        assert self.hosts == {self._stack.base_url.removeprefix("http://")}

    def assert_fits(self) -> None:
        """Fail when one has to scroll sideways."""
        assert self.page.evaluate(TOO_WIDE) == []


@pytest.fixture
def visit(browser: Browser, stack: Stack) -> Iterator[Visit]:
    with _context(browser) as context:
        yield Visit(context, stack)


def _context(browser: Browser, **options: object) -> BrowserContext:
    return browser.new_context(
        http_credentials={"username": "anyone", "password": PASSWORD},
        **options,  # type: ignore[arg-type] # Playwright's own options, handed through
    )


def deliver(stack: Stack, *clerk_ids: object) -> None:
    """Deliver a user.created for each; one whose id is no text fails."""
    for clerk_id in clerk_ids:
        content = body(user_event(data=user(clerk_id)))
        answer = http.post(stack.url, content=content, headers=signed(content))
        assert answer.status_code == 202


def await_failed(redis_url: str, count: int) -> None:
    with Redis.from_url(redis_url) as redis:
        rq = RqView(redis)
        wait_until(lambda: len(rq.ids("failed")) == count and not rq.queue.count, 20)


def test_a_refresh_leaves_alone_what_is_ticked(visit: Visit, stack: Stack, redis_url: str) -> None:
    deliver(stack, 1, 2)
    await_failed(redis_url, 2)
    page = visit.open()
    page.locator("#failed input[type=checkbox]").first.check()
    page.evaluate("document.activeElement.blur()")
    deliver(stack, "user_new", 3)
    page.wait_for_selector("#newest >> text=user_new")
    assert page.locator("#failed input:checked").count() == 1
    assert page.locator("#failed tbody tr").count() == 2, "what is being worked on stays as it is"
    page.locator("#failed input:checked").uncheck()
    page.evaluate("document.activeElement.blur()")
    page.wait_for_selector("#failed tbody tr:nth-child(3)")
    visit.assert_harmless()


def test_a_page_that_gets_no_answer_says_so(visit: Visit, stack: Stack) -> None:
    page = visit.open()
    stack.web.end()
    page.wait_for_selector("body.stale")


def test_jobs_are_replayed_and_discarded_by_hand_with_and_without_javascript(
    browser: Browser, stack: Stack, redis_url: str
) -> None:
    for with_javascript in (True, False):
        deliver(stack, *range(5))
        await_failed(redis_url, 5)
        with _context(browser, java_script_enabled=with_javascript) as context:
            replay_and_discard(Visit(context, stack), redis_url)


def replay_and_discard(visit: Visit, redis_url: str) -> None:
    """Try each button; no job is left."""
    page = visit.open()
    assert page.locator("#failed tbody tr").count() == 5
    page.locator("#failed tbody tr").nth(0).get_by_role("button", name="Replay").click()
    page.get_by_text("1 replayed").wait_for()
    await_failed(redis_url, 5)  # it cannot be understood, so it comes back

    page = visit.open()
    for row in (0, 1):
        page.locator("#failed input[type=checkbox]").nth(row).check()
    page.get_by_role("button", name="Discard selected").click()
    page.get_by_role("heading", name="Discard 2 failed jobs?").wait_for()
    page.get_by_role("link", name="Cancel").click()
    await_failed(redis_url, 5)
    page.locator("#failed tbody tr").nth(0).get_by_role("button", name="Discard").click()
    page.get_by_role("button", name="Discard 1 failed job").click()
    page.get_by_text("1 discarded").wait_for()
    await_failed(redis_url, 4)

    page.get_by_role("button", name="Discard all").click()
    page.get_by_role("button", name="Discard 4 failed jobs").click()
    page.get_by_text("4 discarded").wait_for()
    await_failed(redis_url, 0)
    visit.assert_harmless()


def test_the_page_can_be_read_in_the_dark_at_a_desk_and_on_a_phone_in_the_light(
    browser: Browser, stack: Stack, redis_url: str
) -> None:
    deliver(stack, "user_" + "x" * 195, 1)
    await_failed(redis_url, 1)
    for scheme, width in (("dark", DESK), ("light", PHONE)):
        with _context(browser, color_scheme=scheme, viewport={"width": width, "height": 800}) as context:
            read(Visit(context, stack), is_dark=scheme == "dark")


def test_a_long_time_stays_within_its_tile(browser: Browser, stack: Stack) -> None:
    for width in (DESK, 1000, PHONE):
        with _context(browser, viewport={"width": width, "height": 800}) as context:
            page = Visit(context, stack).open()
            assert page.evaluate(OVERFLOWING_TILES, "59 min ago") == []


def read(visit: Visit, *, is_dark: bool) -> None:
    """Look at the page, and at the one that asks for confirmation."""
    page = visit.open("/console?user=user_" + "x" * 195)
    page.wait_for_selector("#newest >> text=user_xxx")
    visit.assert_fits()
    assert page.evaluate(DARK) is is_dark
    assert page.evaluate(PALE) == []
    page.get_by_role("button", name="Discard all").click()
    page.get_by_role("button", name="Discard 1 failed job").wait_for()
    page.wait_for_load_state()  # the button may be there before the style sheet is
    visit.assert_fits()
    assert page.evaluate(PALE) == []
    visit.assert_harmless()


TOO_WIDE = """() => [...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 0.5)
    .map((e) => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 40)}`)"""
OVERFLOWING_TILES = """(text) => [...document.querySelectorAll(".tile .value")]
    .map((value) => { value.textContent = text; return value; })
    .filter((value) => value.scrollWidth > value.clientWidth)
    .map((value) => value.parentElement.textContent.trim())"""
LUMINANCE = """
    const parse = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (rgb) => rgb.slice(0, 3)
        .map((c) => c / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
"""
DARK = f"""() => {{ {LUMINANCE}
    return luminance(parse(getComputedStyle(document.body).backgroundColor)) < 0.2;
}}"""
# Texts whose contrast to what is behind them is below 4.5, as WCAG 2 asks of small ones.
PALE = f"""() => {{ {LUMINANCE}
    const behind = (element) => {{
        for (let e = element; e; e = e.parentElement) {{
            const rgba = parse(getComputedStyle(e).backgroundColor);
            if (rgba.length === 3 || rgba[3] === 1) return rgba;
        }}
        return [255, 255, 255];
    }};
    const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
    return [...document.body.querySelectorAll("*")]
        .filter((e) => hasText(e) && !e.closest("svg") && e.getClientRects().length)
        .filter((e) => {{
            const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(behind(e))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
        }})
        .map((e) => `${{e.className}} ${{e.textContent.trim().slice(0, 40)}}`);
}}"""
