"""Pages: what values are on them, and the same plot whatever matplotlib is set to."""

import jinja2
import matplotlib
import pytest

from pipeline.contract.pages import BLUE, render, svg_plot


def test_a_page_escapes_its_values(tmp_path):
    template = tmp_path / "page.html"
    template.write_text(
        '{% extends "frame.html" %}{% from "parts.html" import section, table %}'
        "{% block content %}{% call section(title) %}"
        '{{ table(["name", "rows"], rows, kind="text", marked=[1]) }}'
        '{{ share|number(".1%") }}{% endcall %}{% endblock %}'
    )
    text = render(template, title="A & B", rows=[("<b>", 1), ("c", 2)], share=0.5)
    assert "<title>A &amp; B</title>" in text
    assert "<h2>A &amp; B</h2>" in text
    assert "<tr><td>&lt;b&gt;</td><td>1</td></tr>" in text
    assert '<table class="text">' in text
    assert '<tr class="marked"><td>c</td><td>2</td></tr>' in text
    assert "50.0%" in text
    with pytest.raises(jinja2.UndefinedError, match="rows"):
        render(template, title="", share=0.5)


def test_a_plot_is_always_the_same():
    def plot():
        return svg_plot(
            "a < b",
            "name",
            lambda axes: axes.plot([1, 2], [1, 3], color=BLUE),
            left=0.1,
        )

    text = plot()
    assert text.startswith('<figure><figcaption>a &lt; b</figcaption>\n<svg role="img" aria-label=')
    assert ' id="name-' in text
    assert "#name-" in text
    assert "stroke: var(--blue)" in text  # the page knows light and dark
    assert "#0102" not in text
    assert "width=" not in text.split(">", 4)[3]
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert plot() == text
        assert matplotlib.rcParams["font.size"] == 30
