"""The page and the Markdown as files: whole by themselves, the same each time, with every name as words."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
import subprocess
import sys

import pytest

from equipoise.reporting.charts_matplotlib import pictures
from equipoise.reporting.evidence import Evidence
from equipoise.reporting.page_markdown import markdown
from equipoise.reporting.report_parts import make_report
from reporting import report_cases as cases


@pytest.fixture(scope="module")
def report():
    profile = cases.profile(scenarios=3)
    plans = {"rq": cases.rq_plan(profile), "a|b": cases.rank_plan(profile)}
    return make_report(Evidence(profile, plans, cases.evaluation(), cases.frontier()))


@pytest.fixture(scope="module")
def html(report) -> str:
    pytest.importorskip("plotly", reason="plotly is not installed")
    from equipoise.reporting.page import page

    return page(report)


def test_the_page_holds_all_it_needs_and_names_no_other_place(html):
    code = re.search(r'id="plotly">([^<]+)<', html)
    assert code is not None
    assert b"Plotly" in gzip.decompress(base64.b64decode(code[1]))
    outside = re.sub(r'<script type="application/gzip".*?</script>', "", html, flags=re.S)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside)
    assert "http" not in outside


def test_the_page_is_the_same_each_time(html, report):
    from equipoise.reporting.page import page

    assert page(report) == html


def test_the_figures_in_the_page_are_those_of_the_report(html, report):
    found = re.search(r'id="figures">([^<]+)<', html)
    assert found is not None
    specs = json.loads(gzip.decompress(base64.b64decode(found[1])))
    assert [spec["key"] for spec in specs] == [figure.key for figure in report.figures]
    assert [len(spec["views"]) for spec in specs] == [len(figure.views) for figure in report.figures]


def test_names_are_words_in_the_page(html):
    assert "some/[odd] &lt;model&gt;" in html
    assert "<model>" not in html


def test_findings_tables_and_the_next_command_need_no_script(html, report):
    from html import escape

    for finding in report.findings:
        assert escape(finding.text) in html
    assert escape(report.next_step.command) in html
    assert html.count("<table>") == len(report.figures) + 1


def test_markdown_has_the_same_findings_and_tables(report):
    text = markdown(report)
    assert text.startswith("# some/\\[odd\\] \\<model\\>\n")
    for finding in report.findings:
        assert finding.text in text.replace("\\", "")
    assert report.next_step.command in text
    for figure in report.figures:
        assert f"## {figure.title} (" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    assert len(tables) == len(report.figures) + 2
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table


def test_views_become_pictures(report):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    kinds = {type(figure.views[0].chart).__name__ for figure in report.figures}
    assert kinds == {"Grid", "Lines", "Points", "Bars", "Intervals"}
    for figure in report.figures:
        drawn = pictures(dataclasses.replace(figure, views=figure.views[:1]))
        assert list(drawn) == [figure.views[0].name]
        assert drawn[figure.views[0].name].startswith(b"\x89PNG")


def test_a_picture_shows_what_it_is_given(report):
    """The map of one scenario's load is not that of another's, and is the same each time."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    load = next(figure for figure in report.figures if figure.key == "load")
    two = dataclasses.replace(load, views=[view for view in load.views if view.name in ("c", "d")])
    first, again = pictures(two), pictures(two)
    assert first == again
    assert first["c"] != first["d"]


def test_reports_need_neither_torch_nor_the_drawing_libraries():
    modules = "report_parts, page, page_markdown, charts_matplotlib"
    code = f"from equipoise.reporting import {modules}; import sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    wanted = ["torch", "transformers", "plotly", "matplotlib", "scipy.stats"]
    done = subprocess.run([sys.executable, "-c", code, *wanted], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
