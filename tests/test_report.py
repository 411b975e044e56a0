"""The report: it stands alone, it hides what is not for reading, and its links lead somewhere."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from kdstudy.report import build_report, outside_references

PNG = base64.b64encode(b"\x89PNG not really").decode()
TABLE = """<div>
<style scoped>
  .dataframe td { color: red; }
</style>
<table class="dataframe"><tr><td>91.5</td></tr></table></div>"""


class Page(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.styles, self._is_style = [], "", "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._is_style = tag == "style"

    def handle_data(self, data):
        if self._is_style:
            self.styles += data
        else:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def output(kind: str, data: str):
    return v4.new_output("display_data", {kind: data, "text/plain": "a poor stand-in"})


def code(source: str, *outputs, tag: str | None = None):
    return v4.new_code_cell(source, outputs=list(outputs), metadata={"tags": [tag]} if tag else {})


def write_notebook(path: Path, *cells) -> Path:
    path.parent.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells)), path)
    return path


TEXT = r"""# Soft targets $p_t$

[Hinton et al.](https://arxiv.org/abs/1503.02531), <https://doi.org/10.1/x>,
[next](05_feature.ipynb), `a $literal$ dollar`

## The loss

$$\begin{aligned} L &= T^2 \mathrm{KL}(p_t \,\|\, p_s) \\ &= 0 \end{aligned}$$

## The loss

Inline $a_i < b_i$ and *emphasis*.
"""


@pytest.fixture
def notebook(tmp_path) -> Path:
    return write_notebook(
        tmp_path / "notebooks" / "response-digits.ipynb",
        v4.new_markdown_cell(TEXT),
        code("setting = 'declared'", tag="parameters"),
        code('# Parameters\nprofile = "quick"\nsetting = "digits"\n', tag="injected-parameters"),
        code("plot(x)\nif a < b: pass", output("image/png", PNG)),
        code("table", output("text/html", TABLE), output("image/svg+xml", "<svg viewBox='0 0 1 1'></svg>")),
        code("print(1)", v4.new_output("stream", name="stdout", text="1 < 2\n")),
    )


@pytest.fixture
def page(notebook, tmp_path) -> str:
    build_report([notebook], tmp_path / "report.html", "A study", "quick", summary="**Quick** proves $T^2$ nothing.")
    return (tmp_path / "report.html").read_text()


def test_the_page_loads_and_links_nothing_from_elsewhere(page):
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "iframe", "object", "embed"})
    assert all(value.startswith("data:image/") for value in parsed.values("src"))
    assert all(value.startswith("#") for value in parsed.values("href"))
    assert len(parsed.values("src")) == 2
    assert not re.search(r"url\(|@import", parsed.styles)
    assert f"data:image/png;base64,{PNG}" in parsed.values("src")


def test_links_become_text_that_can_be_typed(page):
    text = Page(page).text.replace("\n", " ")
    assert "Hinton et al. [arxiv.org/abs/1503.02531], doi.org/10.1/x, next, a $literal$ dollar" in text


def test_every_entry_of_the_contents_leads_to_one_place(page):
    parsed = Page(page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert [href.removeprefix("#") for href in parsed.values("href")] == [
        "top",
        "response-digits",
        "response-digits--the-loss",
        "response-digits--the-loss-2",
    ]
    assert {href.removeprefix("#") for href in parsed.values("href")} <= set(ids)


def test_equations_are_mathml(page):
    parsed = Page(page)
    displays = [attributes["display"] for tag, attributes in parsed.tags if tag == "math"]
    assert displays.count("block") == 1
    assert displays.count("inline") == 4  # the summary, the title (twice: contents and heading), the text
    assert "$" not in parsed.text.replace("$literal$", "")


def test_code_is_folded_parameters_are_hidden_outputs_are_shown(page):
    parsed = Page(page)
    folded = re.findall(r'<details class="code">.*?</details>', page, re.DOTALL)
    assert len(folded) == 3 and "plot" in folded[0]
    assert "declared" not in page and "# Parameters" not in page
    assert "response-digits.ipynb · setting digits" in parsed.text
    assert "1 < 2" in parsed.text and "91.5" in parsed.text
    assert "a poor stand-in" not in page and "<style scoped>" not in page


def test_figures_say_what_they_are(page):
    assert Page(page).values("alt") == ["Figure: The loss", "Figure: The loss"]


def test_equal_notebooks_give_equal_bytes(page, notebook, tmp_path):
    summary = "**Quick** proves $T^2$ nothing."
    build_report([notebook], tmp_path / "again.html", "A study", "quick", summary=summary)
    assert (tmp_path / "again.html").read_text() == page


def test_chapters_of_one_title_are_told_apart_by_their_parameters(tmp_path):
    paths = [
        write_notebook(
            tmp_path / f"teacher-{setting}.ipynb",
            v4.new_markdown_cell("# Teachers"),
            code(f'setting = "{setting}"', tag="injected-parameters"),
        )
        for setting in ("digits", "cifar10")
    ]
    build_report(paths, tmp_path / "report.html", "A study", "quick")
    contents = re.search("<nav.*?</nav>", (tmp_path / "report.html").read_text(), re.DOTALL)[0]
    assert Page(contents).text.split() == "A study Teachers setting digits Teachers setting cifar10".split()


@pytest.mark.parametrize(
    "html",
    [
        '<img src="https://example.org/x.png">',
        '<img src="x.png">',
        '<a href="//example.org">x</a>',
        "<script>1</script>",
        "<style>@import 'x.css';</style>",
        '<p style="background: url(http://example.org/x)">x</p>',
        '<svg><image xlink:href="http://example.org/x"/></svg>',
    ],
)
def test_what_would_be_loaded_from_elsewhere_is_refused_with_the_notebook(html, tmp_path):
    path = write_notebook(tmp_path / "bad.ipynb", code("x", output("text/html", html)))
    with pytest.raises(ValueError, match=r"bad\.ipynb: the report would load"):
        build_report([path], tmp_path / "report.html", "A study", "quick")
    assert not (tmp_path / "report.html").exists()


def test_what_the_page_carries_itself_is_no_outside_reference():
    assert outside_references('<a href="#x">x</a><img src="data:image/png;base64,AA"><p style="mask: url(#m)">') == []


def test_an_equation_that_cannot_be_set_is_named(tmp_path):
    path = write_notebook(tmp_path / "bad.ipynb", v4.new_markdown_cell(r"So $\sofmax(z)$."))
    with pytest.raises(ValueError, match=r"bad\.ipynb: cannot set the equation .*sofmax"):
        build_report([path], tmp_path / "report.html", "A study", "quick")
