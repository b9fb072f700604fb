"""The report's page in a real browser: the latent explorer computes what torch does, and can be used by everyone.

Where no Chromium is found these tests are skipped, but not in CI: there (CI or PYRO_VAE_BROWSER set) they fail.
"""

import base64
import io
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import LIKELIHOODS, make_vae
from matplotlib.image import imread
from torch import nn

from pyro_vae import VAE, MLPDecoder, MLPEncoder, load_preset
from pyro_vae.report.explorer import decoder_record
from pyro_vae.report.page import read_run, render
from pyro_vae.runs.folder import new_run, save_weights, write_config

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("PYRO_VAE_BROWSER")
    path = named or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if not path or find_spec("playwright") is None:
        lacking = "playwright (pip install playwright)" if path else "Chromium (apt-get install chromium)"
        (pytest.fail if named or os.environ.get("CI") else pytest.skip)(f"the page in a browser needs {lacking}")
    from playwright.sync_api import sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox does not run as root
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])


@pytest.fixture
def problems():
    """What a page says on its console, and what it asks the network for."""
    return []


@pytest.fixture
def open_page(browser, problems, tmp_path):
    """Open HTML offline in a browser of the given kind; fails where there are problems at the end."""
    contexts = []

    def open_(html, **options):
        path = tmp_path / "page.html"
        path.write_text(html)
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def lively(vae):
    """Random weights large enough that images differ from latent to latent."""
    for parameter in vae.parameters():
        parameter.data *= 2
    return vae


@pytest.fixture
def record(tmp_path):
    """A record of a run whose explorer tests replace."""
    settings = load_preset("bernoulli-z10", hidden=(16,), latent_dim=2)
    folder = new_run(tmp_path / "a run", name="test")
    write_config(folder, settings, event_shape=(1, 8, 8), dataset="digits", seed=0)
    save_weights(folder, lively(settings.build_vae((1, 8, 8))))
    return read_run(folder)


def with_explorer(record, vae, *, points=0):
    labels = [i % 3 for i in range(points)]
    means = torch.randn(points, vae.latent_dim) + torch.tensor(labels)[:, None]
    explorer = {**decoder_record(vae), "axes": list(range(min(2, vae.latent_dim))), "points": means.tolist()}
    return replace(record, explorer={**explorer, "labels": labels, "classes": ["a", "<b>", "c"] if points else None})


def tanh_vae():
    sizes = {"event_shape": (1, 6, 5), "latent_dim": 2, "hidden": (12, 9), "activation": nn.Tanh}
    return VAE(MLPEncoder(**sizes), MLPDecoder(**sizes), latent_dim=2, event_shape=(1, 6, 5))


def image(page):
    return page.evaluate("document.querySelector('canvas').toDataURL()")  # a PNG


def settled(page):
    """Once the frame that a change asked for has been drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def position(page):
    return page.evaluate("pyroVaeExplorer.position()")


def test_values_are_those_of_torch(record, open_page):
    vaes = [
        make_vae(latent_dim=1),
        make_vae(latent_dim=2, hidden=(16, 7)),
        make_vae(latent_dim=20, event_shape=(1, 28, 28), hidden=(400,)),
        make_vae(latent_dim=3, event_shape=(3, 5, 4)),
        make_vae(latent_dim=2, event_shape=(7, 4), hidden=()),
        make_vae(latent_dim=2, likelihood=LIKELIHOODS["normal-sigmoid"]),
        make_vae(latent_dim=2, likelihood=LIKELIHOODS["normal-identity"]),
        tanh_vae(),
        load_preset("bernoulli-z20", likelihood="learned-normal", latent_dim=3, hidden=(9,)).build_vae(
            (3, 4, 4), moments=(torch.rand(3, 4, 4), torch.rand(3, 4, 4) + 0.1)
        ),
    ]
    page = open_page(render([with_explorer(record, lively(vae)) for vae in vaes]))
    for i, vae in enumerate(vaes):
        z = 2 * torch.randn(20, vae.latent_dim)
        z[0] *= 50  # far out, where a careless sigmoid overflows
        found = page.evaluate("([i, z]) => z.map((one) => pyroVaeExplorer.all[i].decode(one))", [i, z.tolist()])
        expected = vae.decode(z).mean.detach().flatten(1)
        assert expected[1:].std(0).max() > 1e-3
        difference = (torch.tensor(found) - expected).abs() / expected.abs().clamp(min=1)  # relative where means are large
        assert difference.max() < 1e-4
    wrong = "() => { try { pyroVaeExplorer.decode([1, 2]) } catch (error) { return error.message } }"
    assert page.evaluate(wrong) == "decode: expected 1 numbers, found 2"


def test_the_image_is_drawn_as_decoded(record, open_page):
    """Grey and colour, channel by channel."""
    for vae in (make_vae(latent_dim=2), make_vae(latent_dim=2, event_shape=(3, 5, 4))):
        page = open_page(render([with_explorer(record, lively(vae))]))
        drawn = torch.from_numpy(imread(io.BytesIO(base64.b64decode(image(page).split(",")[1]))))  # (height, width, 4)
        expected = vae.decode(torch.zeros(2)).mean.detach().expand(3, -1, -1)
        assert (drawn[..., :3].permute(2, 0, 1) - expected).abs().max() <= 0.51 / 255  # rounded to whole steps
        assert (drawn[..., 3] == 1).all()


def test_mouse(record, open_page):
    page = open_page(render([with_explorer(record, lively(make_vae(latent_dim=2)), points=6)]))
    page.locator(".plane").scroll_into_view_if_needed()
    assert page.locator(".plane .dot").count() == 6
    assert page.locator(".legend li").all_inner_texts() == ["a", "<b>", "c"]
    before, box = image(page), page.locator(".plane").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + box["width"] / 4, middle[1] - box["height"] / 4)
    settled(page)
    across, up = position(page)
    reach = page.evaluate("document.querySelector('.plane').viewBox.baseVal.width") / 200
    assert across == pytest.approx(reach / 2, abs=0.05)
    assert up == pytest.approx(reach / 2, abs=0.05)
    assert image(page) != before
    assert f"z1 = {across:.2f}, z2 = {up:.2f}" in page.locator(".readout").inner_text()
    page.mouse.move(box["x"] + 2 * box["width"], middle[1])  # beyond the edge, button still down
    assert position(page)[0] == pytest.approx(reach)
    page.mouse.up()
    page.mouse.move(*middle)
    assert position(page)[0] == pytest.approx(reach)  # let go


def test_keyboard(record, open_page):
    page = open_page(render([with_explorer(record, lively(make_vae(latent_dim=2)))]))
    before = image(page)
    while page.evaluate("document.activeElement.getAttribute('data-part')") != "plane":  # by Tab alone
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement !== document.body")
    for key, expected in (
        ("ArrowRight", (0.1, 0)),
        ("ArrowUp", (0.1, 0.1)),
        ("Shift+ArrowLeft", (-0.4, 0.1)),
        ("ArrowDown", (-0.4, 0)),
    ):
        page.keyboard.press(key)
        assert position(page) == pytest.approx(expected)
    settled(page)
    assert image(page) != before
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # one sees where one is
    page.keyboard.press("Home")
    settled(page)
    assert image(page) == before
    slider = page.locator("input[type=range]").nth(1)
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert position(page) == pytest.approx((0, 0.01))
    settled(page)
    assert slider.get_attribute("aria-valuetext") == "0.01"


def test_touch(record, open_page):
    vae = lively(make_vae(latent_dim=2))
    page = open_page(
        render([with_explorer(record, vae)]), viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True
    )
    page.locator(".plane").scroll_into_view_if_needed()
    before, box, scrolled = image(page), page.locator(".plane").bounding_box(), page.evaluate("scrollY")
    touch = page.context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, points in (
        ("touchStart", [{"x": x, "y": y}]),
        ("touchMove", [{"x": x + 20, "y": y + 20}]),
        ("touchMove", [{"x": x + 40, "y": y + 80}]),
        ("touchEnd", []),
    ):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settled(page)
    assert position(page) == pytest.approx((40 * 7 / box["width"], -80 * 7 / box["height"]), abs=0.1)
    assert image(page) != before
    assert page.evaluate("scrollY") == scrolled


def test_more_dimensions(record, open_page):
    explorer = with_explorer(record, lively(make_vae(latent_dim=5)), points=9)
    page = open_page(render([explorer]))
    first, second = page.locator("select[data-axis]").all()
    assert (first.input_value(), second.input_value()) == ("0", "1")
    first.select_option("3")
    page.locator(".plane").focus()
    page.keyboard.press("ArrowRight")
    assert position(page) == pytest.approx((0, 0, 0, 0.1, 0))
    second.select_option("3")  # the other one's: they change places
    assert (first.input_value(), second.input_value()) == ("1", "3")
    page.locator("[data-part=random]").click()
    drawn = position(page)
    assert len(set(drawn)) == 5
    start = page.locator("[data-part=start]")
    start.select_option("1")
    assert start.input_value() == "1"
    mean = torch.tensor(explorer.explorer["points"], dtype=torch.float64)[1::3].mean(0)
    assert position(page) == pytest.approx(mean.tolist())
    page.locator("[data-part=reset]").click()
    assert position(page) == [0] * 5
    assert start.input_value() == ""
    page.locator("input[type=range]").nth(4).fill("1.5")
    assert position(page) == [0, 0, 0, 0, 1.5]


def test_random_draws_are_of_the_prior(record, open_page):
    page = open_page(render([with_explorer(record, make_vae(latent_dim=20))]))
    draws = page.evaluate(
        "() => Array.from({ length: 200 }, () => { document.querySelector('[data-part=random]').click(); "
        "return pyroVaeExplorer.position(); })"
    )
    z = torch.tensor(draws).flatten()  # 4,000
    assert abs(z.mean()) < 4 / 4000**0.5
    assert abs(z.var() - 1) < 4 * (2 / 4000) ** 0.5


def test_one_dimension_has_a_slider_alone(record, open_page):
    page = open_page(render([with_explorer(record, lively(make_vae(latent_dim=1)), points=6)]))
    before = image(page)
    assert page.locator(".plane").count() == 0
    page.locator("input[type=range]").fill("-2")
    settled(page)
    assert image(page) != before
    assert page.locator(".readout").inner_text() == "z1 = -2.00"


CONTRAST = """() => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const color = element ? getComputedStyle(element).backgroundColor : "rgb(255, 255, 255)";
    return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
  };
  const texts = "p, h1, h2, h3, td, th, dt, dd, li, small, figcaption, label, button, select, summary";
  return Array.from(document.querySelectorAll(texts), (element) => {
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_readable(record, open_page, scheme, width):
    record = with_explorer(record, make_vae(latent_dim=20), points=9)
    record = replace(record, name="x" * 90, warnings=(("Collapsed latents", "z1" * 60),))  # long words, too
    other = replace(record, conditions={**record.conditions, "data set": "another"})
    page = open_page(render([record, other]), viewport={"width": width, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    assert page.evaluate("scrollTo(100, 0), scrollX") == 0
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 60
    assert min(contrasts) >= 4.5  # WCAG 2.1, level AA
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")


def test_nothing_of_a_run_becomes_code(record, open_page):
    evil = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    record = replace(record, name=evil, facts={evil: evil}, no_explorer=evil)
    explorer = {**record.explorer, "classes": [f"</script>{evil}"], "labels": [0], "points": [[0.0, 0.0]]}
    page = open_page(render([replace(record, explorer=explorer)], title=evil))
    assert page.evaluate("window.pwned") is None
    assert page.locator("h1").inner_text() == page.title() == evil
    assert page.locator(".legend li").inner_text() == f"</script>{evil}"


def test_the_policy_stops_other_scripts(record, open_page, problems):
    """Even HTML that got in would not run: only explorer.js is let through."""
    page = open_page(render([record]).replace("</main>", "<script>window.pwned = 1</script></main>"))
    assert page.evaluate("window.pwned") is None
    assert len(page.evaluate("pyroVaeExplorer.decode([0, 0])")) == 64
    assert "Content Security Policy" in problems.pop()


def test_a_decoder_that_takes_context_is_told():
    shape = {"event_shape": (1, 4, 4), "hidden": (16,), "latent_dim": 3}
    vae = VAE(MLPEncoder(**shape), MLPDecoder(context_dim=2, **shape), latent_dim=3, event_shape=(1, 4, 4))
    with pytest.raises(ValueError, match="its decoder takes context"):
        decoder_record(vae)
