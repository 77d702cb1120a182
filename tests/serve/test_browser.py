"""The page in Chromium: draws, previews, edits, cancels, links, history, errors; on a desk and on a phone."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip3o_rt.serve.client import Limits
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.server import ServerOptions
from tests.serve.conftest import RunningServer

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.exhaustive]

CIRCLE = "a red circle on a blue background"
SIZES = {"desktop": (1280, 900), "phone": (375, 720)}
SHOTS = os.environ.get("BLIP3O_SCREENSHOTS")  # a folder to leave screenshots in


@pytest.fixture(scope="module")
def real() -> Iterator[RunningServer]:
    server = RunningServer(ServerOptions(EngineOptions({}), port=0, limits=Limits())).wait_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Any, real: RunningServer) -> Iterator[Any]:
    width, height = SIZES[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if request.param == "phone" else "light",
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if "Content Security" in line.text else None)
    page.goto(real.url)
    page.size = request.param
    yield page
    context.close()
    assert not faults


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}-{page.size}.png", full_page=True)


def draw(page: Any, prompt: str, **fields: Any) -> None:
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.press("#prompt", "Control+Enter")


def pixels(page: Any, number: int = 0) -> np.ndarray:
    source = page.locator("#grid img").nth(number).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))


def wait_done(page: Any, count: int) -> None:
    playwright.expect(page.locator("#grid li[data-seed]")).to_have_count(count, timeout=60_000)
    playwright.expect(page.locator("#draw")).to_be_enabled()


def assert_accessible(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    assert not found, [(rule["id"], [node["html"][:90] for node in rule["nodes"]]) for rule in found]
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_draws_with_a_preview_a_grid_a_link_and_a_history(page: Any, real: RunningServer) -> None:
    assert_accessible(page)
    playwright.expect(page.locator("#model")).to_contain_text("64x64")
    draw(page, CIRCLE, n=3, seed=7, steps=12)
    page.wait_for_selector("#grid img.preview")
    assert page.locator("#progress").is_visible()
    shot(page, "drawing")
    wait_done(page, 3)
    shot(page, "drawn")
    assert_accessible(page)
    seeds = [item.get_attribute("data-seed") for item in page.locator("#grid li").all()]
    assert sorted(seeds) == ["7", "8", "9"]
    body = {"prompt": CIRCLE, "seed": 7, "steps": 12}
    answer = real.http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    expected = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer))))
    assert np.array_equal(pixels(page, seeds.index("7")), expected)

    page.locator('li[data-seed="7"] >> text=Copy the link').click()
    link = page.evaluate("navigator.clipboard.readText()")
    other = page.context.new_page()
    other.size, other.url_ = page.size, link
    other.goto(link)
    wait_done(other, 1)
    assert np.array_equal(pixels(other), expected)
    assert other.locator("#history li").count() == 3
    with page.expect_download() as download:
        page.locator('li[data-seed="7"] >> text=Download').click()
    assert download.value.suggested_filename == "a-red-circle-on-a-blue-background-7.png"


def test_edits_by_drop_and_from_the_last_result(page: Any) -> None:
    draw(page, CIRCLE, seed=7, steps=4)
    wait_done(page, 1)
    first = pixels(page)
    file = io.BytesIO()
    Image.fromarray(first).save(file, "PNG")
    page.evaluate(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true });
            document.getElementById("drop").dispatchEvent(drop);
        }""",
        base64.b64encode(file.getvalue()).decode(),
    )
    playwright.expect(page.locator("#reference-name")).to_have_text("dropped.png")
    draw(page, "make the circle green", seed=7, steps=4)
    wait_done(page, 2)
    dropped = pixels(page)
    shot(page, "edited")
    assert_accessible(page)
    assert not np.array_equal(dropped, first)
    assert (
        page.locator("#grid li").first.locator("text=Copy the link").count() == 0
    )  # nobody else has the file

    page.locator("#grid li").nth(1).locator("text=Edit this").click()
    draw(page, "make the circle green", seed=7, steps=4)
    wait_done(page, 3)
    assert np.array_equal(pixels(page), dropped)
    link = page.locator("#grid li").first.locator("a.again").get_attribute("href")
    other = page.context.new_page()
    other.goto(link)
    wait_done(other, 1)
    assert np.array_equal(pixels(other), dropped)


def test_cancels_and_says_what_is_wrong_where_it_is(page: Any, real: RunningServer) -> None:
    draw(page, CIRCLE, n=10, steps=100)
    page.wait_for_selector("#progress:not([hidden])")
    real.wait_until(lambda: real.health()["running"] > 0)
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#draw")).to_be_enabled()
    real.wait_until(lambda: real.health()["running"] == 0, 10)
    draw(page, CIRCLE, n=1, steps=5000)
    playwright.expect(page.locator("#steps-error")).to_contain_text(re.compile("1000|100"))
    assert page.locator("#steps").get_attribute("aria-invalid") == "true"
    shot(page, "wrong")
    assert_accessible(page)
    draw(page, " ", steps=4)
    playwright.expect(page.locator("#prompt-error")).to_contain_text("words")
    page.set_input_files("#file", files=[{"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}])
    draw(page, CIRCLE, steps=4)
    playwright.expect(page.locator("#image-error")).to_contain_text("not an image")


def test_keyboard_alone_and_the_description_of_the_api(page: Any, real: RunningServer) -> None:
    page.focus("#prompt")
    page.keyboard.type(CIRCLE)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"file", "n", "seed", "steps", "SUMMARY", "draw"} <= set(reached)
    page.goto(real.url + "/docs")
    page.wait_for_selector("article")
    assert page.locator("article").count() >= 10
    assert_accessible(page)
    shot(page, "docs")
