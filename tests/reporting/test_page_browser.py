"""The page in a real browser: every figure drawn, no word on the console, nothing fetched, all toggles work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.reporting import palette
from equipoise.reporting.evidence import Evidence
from equipoise.reporting.report_parts import make_report
from reporting import report_cases as cases
from reporting.browser import open_page, start

pytest.importorskip("plotly", reason="plotly is not installed")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    yield from start(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def report():
    profile = cases.profile(cases.facts(stacks=True), scenarios=3)
    plans = {"rq": cases.rq_plan(profile), "<b>ranks</b>": cases.rank_plan(profile)}
    return make_report(Evidence(profile, plans, cases.evaluation(), cases.frontier()))


@pytest.fixture(scope="module")
def page(tmp_path_factory, report) -> Path:
    from equipoise.reporting.page import page

    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(report))
    return path


def words_colour(driver) -> str:
    """Colour of the words at a figure's axis, as #rrggbb."""
    script = "return getComputedStyle(document.querySelector('#lis .xtick text')).fill"
    channels = driver.execute_script(script).removeprefix("rgb(").removesuffix(")").split(",")
    return "#" + "".join(f"{int(c):02x}" for c in channels)


def requests(driver) -> list[str]:
    """What the page fetched since the last call, itself and what lies in it aside."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [own["request"]["url"] for own in sent if own["documentURL"] == driver.current_url]
    assert driver.current_url in urls, "the log has the page itself"
    return [url for url in urls if url != driver.current_url and not url.startswith("data:")]


@pytest.fixture
def opened(driver, page):
    """The page as it was first opened, on a wide screen in light colours."""
    if driver.current_url != page.resolve().as_uri() or driver.execute_script("return innerWidth < 1000"):
        open_page(driver, page)
    return driver


def press(driver, element) -> None:
    """Click as a user does, where nothing covers the element."""
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def test_every_figure_is_drawn_in_every_view_without_a_word_on_the_console(opened, report):
    assert opened.execute_script("return [window.equipoise.drawn, window.equipoise.wanted]") == [len(report.figures)] * 2
    shown = """
        const section = document.getElementById(arguments[0]), plot = section.querySelector(".plot");
        const marks = plot.querySelectorAll(".hm image, .scatterlayer .js-line, .scatterlayer .point, .barlayer .point");
        const box = plot.querySelector(".plot-container").getBoundingClientRect();
        return {
          marks: marks.length, width: box.width, height: box.height, texts: plot.querySelectorAll(".xtick text").length,
          note: section.querySelector(".note").textContent,
          badges: [...section.querySelectorAll(".badges .badge")].map((b) => b.textContent),
        };
    """
    for figure in report.figures:
        for i, view in enumerate(figure.views):
            buttons = opened.find_elements("css selector", f"#{figure.key} .views button")
            if buttons:
                assert buttons[i].text == view.name
                press(opened, buttons[i])
                assert [b.get_attribute("aria-pressed") for b in buttons] == [str(i == k).lower() for k in range(len(buttons))]
            found = opened.execute_script(shown, figure.key)
            where = f"{figure.key}, {view.name}: {found}"
            assert found["marks"] > 0, where
            assert found["texts"] > 1, where
            assert found["width"] > 900, where
            assert found["height"] >= 150, where
            assert found["badges"] == list(view.origins), where
            assert found["note"] == view.note, where
    assert opened.get_log("browser") == []
    assert requests(opened) == []


def test_names_are_words_not_markup(opened):
    assert opened.find_element("css selector", "h1").text == cases.NAME
    assert opened.execute_script("return document.querySelectorAll('.views b, h1 model').length") == 0


def test_tables_open_and_hold_the_figures(opened):
    press(opened, opened.find_element("css selector", "#lis summary"))
    cells = [c.text for c in opened.find_elements("css selector", "#lis table tr:nth-child(2) td")]
    assert cells[0] == "as it is"
    assert cells[-1] == "measured"


def test_pointing_at_a_cell_tells_expert_load_share_and_bits(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    after = next(b for b in opened.find_elements("css selector", "#load .views button") if b.text == "after rq")
    press(opened, after)
    layer = opened.find_element("css selector", "#load .plot .nsewdrag")
    size = layer.size
    to_expert_1 = (1.5 / cases.WIDE - 0.5) * size["width"]
    ActionChains(opened).move_to_element_with_offset(layer, to_expert_1, -size["height"] / 4).perform()
    words = opened.execute_script("return document.querySelector('#load .hovertext')?.textContent ?? ''")
    assert "layer enc 0, expert 1" in words
    assert "times the mean load" in words
    assert "selections" in words
    assert "%" in words
    assert "int8 33%" in words


def test_colours_follow_the_system_the_toggle_and_the_printer(opened):
    from selenium.webdriver.support.ui import WebDriverWait

    background = "return getComputedStyle(document.body).backgroundColor"
    assert words_colour(opened) == palette.LIGHT["soft"]
    light = opened.execute_script(background)
    dark_system = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark_system})
    WebDriverWait(opened, 10, 0.05).until(lambda d: words_colour(d) == palette.DARK["soft"])
    assert opened.execute_script(background) != light
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert words_colour(opened) == palette.LIGHT["soft"]
    opened.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert words_colour(opened) == palette.DARK["soft"]
    button = opened.find_element("id", "theme")
    for theme, other in (("light", "Dark"), ("dark", "Light")):
        press(opened, button)
        assert words_colour(opened) == (palette.LIGHT if theme == "light" else palette.DARK)["soft"]
        assert button.text == other
        assert (opened.execute_script(background) == light) == (theme == "light")
    assert opened.get_log("browser") == []


def test_a_phone_in_the_dark_scrolls_only_down(driver, page, report):
    open_page(driver, page, width=360, dark=True)
    assert words_colour(driver) == palette.DARK["soft"]
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    script = "return [...document.querySelectorAll('.main-svg')].map((svg) => svg.getBoundingClientRect().width)"
    widths = driver.execute_script(script)
    assert len(widths) >= len(report.figures)
    assert max(widths) <= 360
    assert driver.get_log("browser") == []


def test_sixty_one_layers_of_256_experts_are_drawn_whole(driver, tmp_path):
    from equipoise.reporting.page import page

    profile = cases.profile(cases.facts(layers=61, experts=256, narrow=256), scenarios=3)
    evidence = Evidence(profile, {"rq": cases.rq_plan(profile), "ranks": cases.rank_plan(profile, ranks=32)})
    html = page(make_report(evidence))
    assert len(html.encode()) < 6_000_000
    path = tmp_path / "large.html"
    path.write_text(html)
    open_page(driver, path)
    drawn, wanted = driver.execute_script("return [window.equipoise.drawn, window.equipoise.wanted]")
    assert drawn == wanted == 7
    assert driver.execute_script("return document.querySelectorAll('#load .hm image').length") == 1
    assert driver.get_log("browser") == []
