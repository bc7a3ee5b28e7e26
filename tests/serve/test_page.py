"""The page in a browser: Debian's chromium, driven by playwright."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.serving import serving

import phi4mm_jax
from phi4mm_jax.engine import EngineConfig
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.engine_process import EngineThread

EXAMPLES = Path(__file__).parents[2] / "assets" / "tiny" / "examples"
CHROMIUM = shutil.which("chromium")
SHOTS = os.environ.get("PHI4MM_SCREENSHOTS")  # a folder for pictures of the page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.subprocess,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    model = phi4mm_jax.load(EXAMPLES.parent, dtype="float32")
    config = EngineConfig(slots=2, cache_tokens=4096, page_size=64, chunk=64, steps=4, top_logprobs=3)
    settings = ServerSettings(
        "tiny", tmp_path_factory.mktemp("files"), instructions={"transcribe": "hear"}, warm_up=False
    )
    with serving(create_app(EngineThread(lambda: model.engine(config)), model.processor.tokenizer, 2, settings)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(params=["phone", "desktop"])
def page(request, browser, url):
    size = {"desktop": {"width": 1100, "height": 800}, "phone": {"width": 390, "height": 844}}[request.param]
    context = browser.new_context(
        viewport=size, permissions=["microphone", "camera"],
        color_scheme="light" if request.param == "desktop" else "dark",
    )  # fmt: skip
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else problems.append(asked.url)
    )
    page.set_default_timeout(60_000)
    page.goto(url)
    yield page
    assert problems == [], "errors of the page, or what it loads from elsewhere"
    context.close()


def shoot(page, name):
    if SHOTS is not None:
        kind = "desktop" if page.viewport_size["width"] > 500 else "phone"
        page.screenshot(path=f"{SHOTS}/{name}_{kind}.png")


def test_an_image_and_a_sound_are_answered(page):
    page.get_by_text("Ready.").wait_for()
    page.locator("#image").set_input_files(EXAMPLES / "images" / "asked_111.jpg")
    page.locator("#sound").set_input_files(EXAMPLES / "clips" / "asked_111.ogg")
    page.locator("#attached li").nth(1).wait_for()
    page.get_by_label("Message", exact=True).fill("find")
    page.get_by_role("button", name="Send").click()
    answer = page.locator("#messages .assistant")
    answer.locator(".figures").wait_for()
    assert answer.locator("span").first.text_content() == "key 7048"
    assert "tokens in, 9 out" in answer.locator(".figures").text_content()
    shoot(page, "chat")
    page.get_by_label("Message", exact=True).fill("number five two")
    page.keyboard.press("Enter")
    answer.nth(1).locator(".figures").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"


def test_a_transcript_with_times(page):
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#clip").set_input_files(EXAMPLES / "clips" / "speech_119.ogg")
    page.get_by_role("button", name="Write it down").click()
    page.locator("#heard").wait_for()
    assert page.locator("#heard td").all_text_contents() == ["0:00.0 – 0:03.3", "rabbit three king lemon"]
    shoot(page, "transcript")


def test_microphone_camera_and_errors(page):
    record = page.get_by_role("button", name="Record").first
    record.click()
    page.get_by_role("button", name="Stop recording").wait_for()
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Stop recording").click()
    page.locator("#attached audio").wait_for()
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Take picture").click()
    page.locator("#attached img").wait_for()
    assert page.locator("#attached img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    for _ in range(2):
        page.get_by_role("button", name="Remove").first.click()
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Most tokens").fill("-1")
    page.get_by_label("Message", exact=True).fill("number one")
    page.get_by_role("button", name="Send").click()
    page.locator("#messages .error").wait_for()
    assert "expected a positive whole number" in page.locator("#messages .error").text_content()


def test_every_control_has_a_name_and_contrast(page):
    """By the browser's own view of the page; the ratio of WCAG AA, 4.5, of texts to what is behind them."""
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea, audio, video')]
        .filter((e) => !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim())
        .map((e) => e.outerHTML)""")
    assert unnamed == []
    low = page.evaluate("""() => {
        const rgb = (s) => s.match(/[\\d.]+/g).map(Number);
        const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = (c) => { const [r, g, b] = c.map((v) => linear(v / 255));
            return .2126 * r + .7152 * g + .0722 * b; };
        const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } };
        return [...document.querySelectorAll('h1, h1 span, p, label, button, summary')].map((e) => {
            const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(behind(e))].sort((x, y) => y - x);
            return [e.outerHTML.slice(0, 60), (a + .05) / (b + .05)]; }).filter(([, ratio]) => ratio < 4.5); }""")
    assert low == []
