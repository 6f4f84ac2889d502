"""The page in a real browser, headless, as people use it: on a desk, on a phone, two at once.

Needs the extra `demo`, playwright, and a Chromium: playwright's own (`playwright install chromium`), or
one that is on PATH, such as Debian's package of that name; CHROMIUM names any other.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from igpt_jax.demo.limits import Limits
from support import demo_server

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("quick_compile")]

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def skip_loudly(why: str):
  """Skips, and says so in the summary's warnings too, where it can't be taken for a pass."""
  message = f"the page is NOT tested in a browser: {why}"
  warnings.warn(pytest.PytestWarning(message), stacklevel=2)
  pytest.skip(message)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  demo_server.need_extra()
  with demo_server.running(
    tmp_path_factory.mktemp("demo"),
    Limits(samples=4, upload_bytes=500_000),
    resolution=6,
    names=("small", "larger", "bert"),
  ) as server:
    yield server


@pytest.fixture(scope="module")
def browser(server):
  if importlib.util.find_spec("playwright") is None:
    skip_loudly("no playwright; fix: pip install playwright")
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright:
    own = playwright.chromium.executable_path
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [os.environ.get("CHROMIUM"), own if os.path.exists(own) else None]
    path = next((path for path in [*found, *map(shutil.which, names)] if path), None)
    if path is None:
      skip_loudly("no Chromium; fix: playwright install chromium, or apt-get install chromium")
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield browser
    browser.close()


@contextlib.contextmanager
def person(browser, server, **device):
  """Someone's page; what goes wrong in its script fails the test."""
  with browser.new_context(**device) as context:
    page = context.new_page()
    page.set_default_timeout(30_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
      "request",
      lambda request: (
        None
        if request.url.startswith((server.url, "blob:", "data:"))
        else wrong.append(request.url)
      ),
    )
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert not wrong


def photo(side=60, seed=0) -> dict:
  blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
  pixels = blocks.repeat(side // 6, 0).repeat(side // 6, 1)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="PNG")
  return {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def choose(page, file):
  page.set_input_files("#file", file)
  page.wait_for_selector("#preview:visible")


def results(page) -> list[np.ndarray]:
  """Pixels of all the images shown, [R, R, 3] each."""
  read = """canvases => canvases.map(canvas => [canvas.width, Array.from(
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)])"""
  return [
    np.asarray(data, np.uint8).reshape(width, width, 4)[..., :3]
    for width, data in page.eval_on_selector_all("#results canvas", read)
  ]


def wait_until_done(page):
  page.wait_for_selector("#download:visible")


def hidden_pixels(page) -> str:
  return page.inner_text("#masked-shown")


def test_the_newest_choice_counts_whichever_is_ready_first(browser, server):
  held = []
  with person(browser, server) as page:
    page.wait_for_selector("#examples button")
    page.route("**/examples/astronaut.jpg", lambda route: held.append(route))
    page.evaluate("""() => {
      const [slow, quick] = document.querySelectorAll("#examples button");
      slow.click();
      quick.click();
    }""")
    page.wait_for_selector("#preview:visible")
    opacity = "document.getElementById('seen').getContext('2d').getImageData(0, 0, 1, 1).data[3]"
    # Its own wait_for_function evaluates text in the page, which refuses that.
    for _ in range(1_000):
      if page.evaluate(opacity):
        break
      page.wait_for_timeout(20)
    assert page.evaluate(opacity)
    seen = page.evaluate("document.getElementById('preview').toDataURL()")
    assert held, "the one that was chosen first is still on its way"
    with page.expect_response("**/examples/astronaut.jpg"):
      held.pop().continue_()
    page.wait_for_timeout(500)
    assert page.evaluate("document.getElementById('preview').toDataURL()") == seen


def test_upload_complete_and_save(browser, server, tmp_path):
  with person(browser, server) as page:
    assert page.is_disabled("#complete") and page.is_hidden("#take")
    choose(page, photo())
    page.click("#complete")
    wait_until_done(page)
    *samples, original = results(page)
    assert len(samples) == 4 and original.shape == (6, 6, 3)
    for sample in samples:
      np.testing.assert_array_equal(sample[:3], original[:3])
      assert (sample[3:] != original[3:]).any()
    assert (samples[0] != samples[1]).any()
    caption = page.inner_text("#results figcaption >> nth=0")
    assert caption.startswith("sample 1: ") and caption.endswith(" nats/pixel")

    page.click("#complete")  # once more: the same
    page.wait_for_selector("#complete:enabled")
    np.testing.assert_array_equal(results(page)[:4], samples)
    page.click("#again")  # the next seed: others
    page.wait_for_selector("#again:enabled")
    assert page.is_visible("#download") and page.input_value("#seed") == "1"
    assert (np.stack(results(page)[:4]) != np.stack(samples)).any()

    with page.expect_download() as download:
      page.click("#download")
    download.value.save_as(tmp_path / "all.png")
    assert Image.open(tmp_path / "all.png").size == (3 * (258 + 8) + 8, 2 * (258 + 8) + 8)
    page.click("#results button >> nth=1")
    assert page.locator("#large canvas").bounding_box()["width"] >= 400
    with page.expect_download() as download:
      page.click("#large-save")
    download.value.save_as(tmp_path / "one.png")
    page.keyboard.press("Escape")
    assert page.is_hidden("#large")
    np.testing.assert_array_equal(
      np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))[::43, ::43], results(page)[1]
    )


def test_rows_appear_while_they_are_drawn(browser, server, monkeypatch):
  demo_server.Slow(monkeypatch, seconds=0.5)
  with person(browser, server) as page:
    choose(page, photo())
    page.click("#complete")
    page.wait_for_selector("#status:has-text('Row 4 of 6')")
    sample, *_, original = results(page)
    np.testing.assert_array_equal(sample[:3], original[:3])
    assert (sample[3] != 200).any() and (sample[4:] == 200).all()
    assert page.is_disabled("#complete")
    wait_until_done(page)
    assert (results(page)[0][4:] != 200).any()


def test_settings_are_heeded(browser, server):
  with person(browser, server) as page:
    choose(page, photo())
    page.select_option("#model", index=1)
    assert page.inner_text("#hidden-shown") == "4 of 8 rows"
    box = page.locator("#preview").bounding_box()
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(middle, box["y"] + box["height"] * 0.26)
    page.mouse.up()
    assert page.inner_text("#hidden-shown") == "6 of 8 rows"
    page.focus("#preview")
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#hidden-shown") == "7 of 8 rows"
    page.fill("#temperature", "0")
    page.fill("#n", "2")
    page.click("#complete")
    wait_until_done(page)
    *samples, original = results(page)
    assert len(samples) == 2 and original.shape == (8, 8, 3)
    np.testing.assert_array_equal(samples[0], samples[1])  # temperature 0
    np.testing.assert_array_equal(samples[0][0], original[0])


def test_a_dropped_picture_is_taken(browser, server):
  with person(browser, server) as page:
    handed_over = page.evaluate_handle(
      """bytes => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
        return data;
      }""",
      list(photo()["buffer"]),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": handed_over})
    page.wait_for_selector("#preview:visible")
    assert page.is_enabled("#complete")


def test_errors_are_shown_and_the_next_try_goes_well(browser, server):
  with person(browser, server) as page:
    page.set_input_files(
      "#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"}
    )
    page.wait_for_selector("#error:has-text('this file: unreadable image')")
    page.click("#complete")
    page.wait_for_selector("#status:has-text('Not completed.')")
    page.wait_for_selector("#error:has-text('this file: unreadable image')")
    assert page.inner_text("#status") == "Not completed."

    page.set_input_files("#file", {**photo(), "name": "huge.png", "buffer": bytes(600_000)})
    page.wait_for_selector("#error:has-text('huge.png is too large: 0.572 MB; at most 0.477 MB')")
    assert page.is_disabled("#complete")

    choose(page, photo())
    assert page.is_hidden("#error")
    page.click("#complete")
    wait_until_done(page)
    assert page.is_hidden("#error")


def test_an_example_is_shown_as_the_model_sees_it(browser, server):
  with person(browser, server) as page:
    assert page.locator("#examples button").count() == 6
    with page.expect_response("**/look?*"):
      page.click("#examples button >> nth=1")
    page.wait_for_selector("#complete:enabled")
    page.fill("#n", "1")
    page.click("#complete")
    wait_until_done(page)
    seen = page.evaluate(
      "() => Array.from(document.querySelector('#seen').getContext('2d').getImageData(0, 0, 6, 6).data)"
    )
    original = results(page)[-1]
    np.testing.assert_array_equal(np.asarray(seen).reshape(6, 6, 4)[..., :3], original)
    with page.expect_response("**/look?*"):  # another model sees another image
      page.select_option("#model", index=1)
    assert page.get_attribute("#seen", "width") == "8"


def test_a_format_of_the_models_side_alone_is_shown_as_the_model_sees_it(browser, server):
  buffer = io.BytesIO()
  Image.open(io.BytesIO(photo()["buffer"])).save(buffer, format="TIFF")
  tiff = {"name": "photo.tif", "mimeType": "image/tiff", "buffer": buffer.getvalue()}
  with person(browser, server) as page:
    with page.expect_response("**/look?*"):
      page.set_input_files("#file", tiff)
    page.wait_for_selector("#error:has-text('The browser can\\'t show photo.tif')")
    page.click("#complete")
    wait_until_done(page)


def test_a_brush_hides_any_pixels(browser, server):
  """By the pointer, by keys, and by a list; a stroke that begins on a hidden pixel shows again."""
  with person(browser, server) as page:
    choose(page, photo())
    page.select_option("#model", index=2)
    assert page.is_hidden("#hidden") and hidden_pixels(page) == "50 of 100"
    page.select_option("#region", "nothing")
    assert hidden_pixels(page) == "0 of 100" and page.is_disabled("#complete")
    box = page.locator("#preview").bounding_box()

    def stroke(first, last):  # rows and columns
      for i, (row, column) in enumerate((first, last)):
        place = [box["x"] + (column + 0.5) / 10 * box["width"]]
        page.mouse.move(*place, box["y"] + (row + 0.5) / 10 * box["height"])
        if i == 0:
          page.mouse.down()
      page.mouse.up()

    stroke((2, 1), (2, 8))
    assert hidden_pixels(page) == "8 of 100"
    assert page.input_value("#region") == "by the brush"
    stroke((2, 8), (2, 6))
    assert hidden_pixels(page) == "5 of 100"
    page.fill("#brush", "3")
    page.focus("#preview")  # at row 2, column 6
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "Space"):
      page.keyboard.press(key)
    assert hidden_pixels(page) == "14 of 100"
    assert page.inner_text("#cursor") == "row 6, column 6: hidden"
    page.click("#complete")
    wait_until_done(page)
    *samples, original = results(page)
    hidden = np.zeros((10, 10), bool)
    hidden[2, 1:6] = hidden[4:7, 4:7] = True
    for sample in samples:
      np.testing.assert_array_equal(sample[~hidden], original[~hidden])
    assert any((sample[hidden] != original[hidden]).any() for sample in samples)
    page.select_option("#model", index=0)  # back to rows
    assert page.is_visible("#hidden") and page.get_attribute("#preview", "role") == "slider"
    assert page.inner_text("#hidden-shown").endswith("of 6 rows")


def test_a_finger_paints(browser, server):
  with person(browser, server, **PHONE) as page:
    choose(page, photo())
    page.select_option("#model", index=2)
    page.select_option("#region", "nothing")
    box = page.locator("#preview").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.45)
    assert hidden_pixels(page) == "1 of 100"


def test_preparation_is_shown(browser, server, monkeypatch):
  monkeypatch.setattr(server.service, "_compiled", 2)
  with person(browser, server) as page:
    page.wait_for_selector("#status:has-text('Preparing: 2 of 6 programs are compiled')")
    assert page.is_visible("#progress")
    choose(page, photo())  # meanwhile
    monkeypatch.undo()
    page.wait_for_selector("#status:has-text('Ready.')")
    assert page.is_hidden("#progress")


def test_the_button_is_above_the_fold(browser, server):
  with person(browser, server, viewport={"width": 1280, "height": 800}) as page:
    for index in (0, 2):
      page.select_option("#model", index=index)
      box = page.locator("#complete").bounding_box()
      assert box["y"] + box["height"] <= 800


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, server, scheme):
  """Rules of accessibility that can be checked automatically, on every kind of the page's states."""
  if importlib.util.find_spec("axe_playwright_python") is None:
    skip_loudly("its accessibility: no axe; fix: pip install axe-playwright-python")
  from axe_playwright_python.sync_playwright import Axe

  def check(page, state):
    found = Axe().run(page).response["violations"]
    assert not found, (state, [(each["id"], each["nodes"][0]["html"]) for each in found])

  with person(browser, server, color_scheme=scheme, **PHONE) as page:
    check(page, "begin")
    page.click("summary")
    choose(page, photo())
    for index in (0, 2):
      page.select_option("#model", index=index)
      check(page, f"chosen, model {index}")
    page.click("#complete")
    wait_until_done(page)
    check(page, "done")
    page.click("#results button >> nth=0")
    check(page, "enlarged")
    page.keyboard.press("Escape")
    page.set_input_files("#file", {**photo(), "buffer": bytes(600_000)})
    page.wait_for_selector("#error:visible")
    check(page, "error")


def test_a_server_that_has_gone_is_told(browser, server):
  with person(browser, server) as page:
    choose(page, photo())
    page.route("**/complete?*", lambda route: route.abort())
    page.click("#complete")
    page.wait_for_selector("#error:has-text('The server can\\'t be reached')")
    assert page.is_enabled("#complete")


def test_two_people_at_once(browser, server, monkeypatch):
  slow = demo_server.Slow(monkeypatch, seconds=0.4)
  with person(browser, server) as first, person(browser, server) as second:
    choose(first, photo(seed=1))
    choose(second, photo(seed=2))
    first.click("#complete")
    first.wait_for_selector("#status:has-text('Row')")
    second.click("#complete")
    second.wait_for_selector("#status:has-text('In line: 1 before you.')")
    wait_until_done(first)
    wait_until_done(second)
    for page in (first, second):
      sample, *_, original = results(page)
      np.testing.assert_array_equal(sample[:3], original[:3])
    assert (results(first)[-1] != results(second)[-1]).any()
  assert slow.finished == 2


def test_who_stops_can_begin_again(browser, server, monkeypatch):
  with person(browser, server) as page:
    choose(page, photo())
    with monkeypatch.context() as patch:
      demo_server.Slow(patch, seconds=1)
      page.click("#complete")
      page.wait_for_selector("#status:has-text('Row')")
      page.click("#stop")
      page.wait_for_selector("#status:has-text('Stopped.')")
      assert page.is_hidden("#error")
    page.click("#complete")
    wait_until_done(page)


def test_on_a_phone(browser, server, tmp_path):
  """Nothing is wider than the screen, buttons are large enough for a thumb, results are scrolled to."""
  with person(browser, server, **PHONE) as page:
    choose(page, photo())
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width == 390
    for name in ("#complete", "#take", "#model", "label.button >> nth=0"):
      box = page.locator(name).bounding_box()
      assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390, name
    box = page.locator("#preview").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.67)
    assert page.inner_text("#hidden-shown") == "2 of 6 rows"
    page.tap("#complete")
    wait_until_done(page)
    page.wait_for_function("() => scrollY > 100")
    page.wait_for_function(  # in view, without a thumb's help
      "() => document.querySelector('#results figure:nth-child(2)').getBoundingClientRect().bottom <= innerHeight"
    )
    figures = [page.locator("#results figure").nth(i).bounding_box() for i in range(5)]
    assert figures[0]["y"] >= 0
    assert all(each["x"] >= 0 and each["x"] + each["width"] <= 390 for each in figures)
    assert figures[1]["x"] > figures[0]["x"] and figures[2]["x"] == figures[0]["x"]  # two a row
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    # What goes wrong is seen, wherever the page was scrolled to.
    page.evaluate("() => scrollTo(0, 0)")
    page.set_input_files("#file", {**photo(), "buffer": bytes(600_000)})
    page.wait_for_selector("#error:visible")
    page.wait_for_function(
      "() => document.querySelector('#error').getBoundingClientRect().bottom <= innerHeight"
    )
    assert Image.open(tmp_path / "phone.png").width == 390
