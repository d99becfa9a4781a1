"""The console in a real browser: what people see, by mouse and by keyboard, and what an accessibility check says."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.fakes.console_stack import Guarded, guarded_gateway
from tests.fakes.gateway_stack import Stack, by_sentence, wait_for, words
from tests.fakes.gateway_upstreams import MARKER

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
VIEWS = ("chat", "decisions", "policy", "health")
expect.set_options(timeout=15_000)  # a loaded machine is no failure
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the console is not tested in a browser: no Chromium here (Debian: apt install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page. After the test it must have complained of nothing but answers that are errors."""
    yield from new_page(browser)


def new_page(browser: Browser, **options: Any) -> Iterator[Page]:
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
    assert complaints == []


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_gateway(tmp_path_factory.mktemp("guarded")) as gateway:
        yield gateway


def open_console(page: Page, url: str, view: str = "") -> None:
    page.goto(f"{url}/console#{view}")
    expect(page.locator("main > section:visible")).to_have_count(1)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key or token").fill(key)
    page.get_by_role("button", name="Sign in").click()


def ended(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator(".turn footer .chip")).to_be_visible()


def test_allowed_chat_shows_the_answer_and_its_checks(stack: Stack, page: Page) -> None:
    stack.answer(["All is well. ", "Really."])
    open_console(page, stack.url)
    ask(page, "How are things?")
    ended(page)
    expect(page.locator(".answer")).to_have_text("All is well. Really.")
    expect(page.locator("footer .chip")).to_contain_text("Allowed")
    expect(page.locator(".check").first).to_contain_text("Prompt 15 characters")
    expect(page.locator(".check").first).to_contain_text("score 0.10")
    expect(page.get_by_text("20 characters released, 0 held")).to_be_visible()
    expect(page.locator("#status")).to_have_text("Answered. 20 characters released.")


def test_conversation_goes_along_with_the_next_message(stack: Stack, page: Page) -> None:
    stack.answer(["All is well."])
    open_console(page, stack.url)
    ask(page, "How are things?")
    ended(page)
    ask(page, "And tomorrow?")
    expect(page.locator(".turn footer .chip")).to_have_count(2)
    roles = [message["role"] for message in stack.inference.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_label("Message")).to_be_focused()
    page.get_by_role("button", name="What is federated learning?").click()
    ended(page)
    expect(page.get_by_label("Message")).to_be_focused()
    assert [message["role"] for message in stack.inference.requests[-1]["messages"]] == ["user"]


def test_held_text_is_counted_and_never_reaches_the_page(stack: Stack, page: Page) -> None:
    waiting = True
    stack.answer(["All is well. "])
    stack.safety.hold_prompt_while = lambda: waiting
    open_console(page, stack.url)
    ask(page, "How are things?")
    expect(page.locator(".held")).to_contain_text("13 characters held back")
    expect(page.get_by_text("0 characters released, 13 held")).to_be_visible()
    assert "well" not in page.content()
    waiting = False
    ended(page)
    expect(page.locator(".answer")).to_have_text("All is well.")
    expect(page.locator(".held")).to_be_hidden()


def test_blocked_prompt_shows_the_refusal_and_the_category(stack: Stack, page: Page) -> None:
    open_console(page, stack.url)
    ask(page, f"Where is the {MARKER}?")
    ended(page)
    expect(page.locator(".refusal")).to_contain_text("I can't help with that")
    expect(page.locator("footer")).to_contain_text("Violent crimes (S1)")
    expect(page.locator(".check.refuse")).to_contain_text("score 0.90")
    stack.answer(["All is well."])
    ask(page, "Something else")
    expect(page.locator(".turn footer .chip")).to_have_count(2)
    assert MARKER not in str(stack.inference.requests[-1]), "what was blocked does not go along"


def test_answer_blocked_in_the_middle_keeps_what_was_released(stack: Stack, page: Page) -> None:
    stack.answer(words(60, 25, sentence=6), pause=by_sentence(6))
    open_console(page, stack.url)
    ask(page, "Count")
    ended(page)
    expect(page.locator(".answer")).to_contain_text("word0 word1")
    expect(page.locator(".refusal")).to_have_text("The rest of the answer was blocked.")
    expect(page.locator("footer .chip")).to_contain_text("Blocked")
    assert MARKER not in page.locator("#log").inner_html()
    assert "word26" not in page.content()


def test_redacted_parts_are_marked(guarded: Guarded, page: Page) -> None:
    guarded.inference.pieces = ["It says [removed] here. ", f"Here is the {MARKER}. ", "Good bye."]
    open_console(page, guarded.url)
    sign_in(page, guarded.keys["mild"])
    ask(page, "Hello")
    ended(page)
    expect(page.locator(".answer")).to_have_text("It says [removed] here. [removed] Good bye.")
    expect(page.locator(".answer mark")).to_have_count(1)
    expect(page.locator("footer .chip")).to_contain_text("Redacted")
    expect(page.locator(".check.redact").first).to_contain_text("Violent crimes (S1)")
    assert MARKER not in page.locator("#log").inner_html()


def test_markup_in_an_answer_stays_text(stack: Stack, page: Page) -> None:
    bad = "<script>window.hacked = 1</script> <img src=x onerror='window.hacked = 1'> done."
    stack.answer([bad])
    open_console(page, stack.url)
    ask(page, bad)
    ended(page)
    expect(page.locator(".answer")).to_have_text(bad)
    expect(page.locator(".turn img, .turn script")).to_have_count(0)
    assert page.evaluate("window.hacked") is None


def test_failed_check_says_what_happened_and_what_to_do(stack: Stack, page: Page) -> None:
    stack.break_safety("500", "prompt")
    open_console(page, stack.url)
    ask(page, "How are things?")
    ended(page)
    alert = page.get_by_role("alert").filter(has_text="safety")
    expect(alert).to_contain_text("Without a verdict nothing is released. Try again in 1 s.")
    expect(page.locator("footer .chip")).to_contain_text("Error")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_answer_that_breaks_off_keeps_what_was_checked(stack: Stack, page: Page) -> None:
    stack.answer(words(40, sentence=5), pause=by_sentence(5), fault="reset", fault_at=30)
    open_console(page, stack.url)
    ask(page, "Count")
    ended(page)
    expect(page.locator(".answer")).to_contain_text("word4.")
    expect(page.get_by_role("alert").filter(has_text="inference")).to_contain_text("was checked before it left")


def test_whole_way_by_keyboard(stack: Stack, page: Page) -> None:
    stack.answer(["All is well. "] * 50, pause=lambda _: 0.05)
    open_console(page, stack.url)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    tab_to(page, "#prompt")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    expect(page.locator(".prompt")).to_have_text("You: One\nTwo")
    expect(page.locator(".answer")).to_contain_text("All is well.")
    page.keyboard.press("Escape")
    ended(page)
    expect(page.locator("footer .chip")).to_contain_text("Stopped")
    wait_for(lambda: stack.inference.cancelled == 1)
    page.locator("#prompt").focus()
    page.keyboard.press("Shift+Tab")
    tab_to(page, "nav a[href='#decisions']", back=True)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Recent decisions")).to_be_focused()
    expect(page.locator("#records summary").first).to_be_visible()
    tab_to(page, "#records summary")
    page.keyboard.press("Enter")
    expect(page.locator("#records details[open] dl")).to_contain_text("Request")


def tab_to(page: Page, selector: str, *, back: bool = False) -> None:
    """Press Tab until something that fits is focused; all of it has to be in sight then."""
    for _ in range(20):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            expect(page.locator(":focus")).to_be_in_viewport()
            return
    raise AssertionError(f"{selector} cannot be reached")


def test_decisions_are_listed_filtered_and_kept_up_to_date(stack: Stack, page: Page) -> None:
    stack.answer(["All is well."])
    ids = [stack.ask(text).headers["x-request-id"] for text in ("Hello", f"The {MARKER}")]
    open_console(page, stack.url, "decisions")
    first = page.locator("#records > li").first
    expect(first).to_contain_text("Blocked")
    expect(first).to_contain_text("Violent crimes (S1) 0.90")
    first.locator("summary").click()
    expect(first.locator("dl")).to_contain_text(ids[1])
    allowed = page.locator("#records > li", has_text=ids[0])
    page.get_by_label("Action").select_option("blocked")
    expect(allowed).to_be_hidden()
    page.get_by_label("Action").select_option("all")
    expect(allowed).to_be_visible()
    page.get_by_label("Category").select_option("Violent crimes (S1)")
    expect(allowed).to_be_hidden()
    expect(first).to_be_visible()
    fresh = stack.ask(f"The {MARKER} again").headers["x-request-id"]
    expect(page.locator("#records > li").first).to_contain_text(fresh)
    expect(page.locator("#records details[open]")).to_contain_text(ids[1])


def test_older_decisions_are_loaded_on_demand(guarded: Guarded, page: Page) -> None:
    for _ in range(51):
        guarded.client.post("/v1/moderations", headers=guarded.header("strict"), json={"input": "Hello"})
    open_console(page, guarded.url, "decisions")
    sign_in(page, guarded.keys["strict"])
    expect(page.locator("#records > li")).to_have_count(50)
    page.get_by_role("button", name="Load older").click()
    expect(page.locator("#records > li")).to_have_count(51)
    expect(page.get_by_role("button", name="Load older")).to_be_hidden()


def test_sign_in_with_a_wrong_and_a_right_key(guarded: Guarded, page: Page) -> None:
    open_console(page, guarded.url)
    expect(page.get_by_label("API key or token")).to_be_visible()
    expect(page.get_by_role("navigation")).to_be_hidden()
    sign_in(page, "fw-wrong")
    expect(page.get_by_role("alert").filter(has_text="this API key is not known")).to_be_visible()
    expect(page.get_by_label("API key or token")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    sign_in(page, guarded.keys["plain"])
    expect(page.locator("#who")).to_contain_text("Tenant plain, key test")
    ask(page, "Hello")
    ended(page)
    page.reload()
    expect(page.get_by_label("Message")).to_be_visible()
    assert page.context.cookies() == []
    assert page.evaluate("localStorage.length") == 0
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key or token")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_next_session_sees_nothing_of_the_one_before(guarded: Guarded, page: Page) -> None:
    open_console(page, guarded.url)
    sign_in(page, guarded.keys["plain"])
    ask(page, "A word of plain")
    ended(page)
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, guarded.keys["trial"])
    expect(page.get_by_text("Nothing is shown here before it has been checked.")).to_be_visible()
    assert "A word of plain" not in page.content()


def test_shadow_mode_is_shown_loudly_and_the_policy_with_its_hash(guarded: Guarded, page: Page) -> None:
    open_console(page, guarded.url, "policy")
    sign_in(page, guarded.keys["trial"])
    expect(page.locator("#shadow")).to_contain_text("Shadow mode: for tenant trial nothing is blocked on chat")
    expect(page.locator("#in-force")).to_contain_text("Shadow: nothing is blocked")
    expect(page.locator("#in-force")).to_contain_text(guarded.get("policy", "trial")["routes"]["chat"]["sha256"])
    page.get_by_role("link", name="Chat").click()
    guarded.inference.pieces = [f"Here is the {MARKER}."]
    ask(page, "Hello")
    ended(page)
    expect(page.locator(".answer")).to_contain_text(MARKER)
    expect(page.locator(".check.refuse").first).to_contain_text("Would block")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible(stack: Stack, guarded: Guarded, browser: Browser, scheme: Any) -> None:
    stack.answer([*words(12, sentence=6), MARKER], pause=by_sentence(6))
    for page in new_page(browser, color_scheme=scheme, reduced_motion="reduce"):
        open_console(page, guarded.url)
        sign_in(page, "fw-wrong")
        expect(page.locator("#key-error")).not_to_be_empty()
        assert_accessible(page)
        open_console(page, stack.url)
        assert_accessible(page)
        ask(page, "Hello")
        ended(page)
        for view in VIEWS:
            page.goto(f"{stack.url}/console#{view}")
            page.locator(f"#{view}:visible :is(.turn, .record, .card)").first.click()
            assert_accessible(page)


def assert_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", [320, 640])
def test_nothing_is_cut_off_on_narrow_screens_and_at_200_percent(stack: Stack, browser: Browser, width: int) -> None:
    stack.answer(["averyveryverylongword" * 20 + ". ", *words(30, sentence=6), MARKER], pause=by_sentence(6))
    for page in new_page(browser, viewport={"width": width, "height": 400}):
        open_console(page, stack.url)
        ask(page, "Hello")
        ended(page)
        for view in VIEWS:
            page.goto(f"{stack.url}/console#{view}")
            page.locator(f"#{view}:visible :is(.turn, .record, .card)").first.click()
            assert page.evaluate("document.documentElement.scrollWidth") == width, view


def test_page_asks_nobody_but_its_gateway(stack: Stack, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for view in VIEWS:
        open_console(page, stack.url, view)
    assert asked
    assert all(url.startswith(stack.url) for url in asked)


def test_without_the_gateway_the_page_says_so(tmp_path: Path, page: Page) -> None:
    with guarded_gateway(tmp_path, auth="none", keys_file=None) as gateway:
        open_console(page, gateway.url)
    ask(page, "Hello")
    expect(page.locator(".turn").get_by_role("alert")).to_contain_text("The gateway cannot be reached.")
