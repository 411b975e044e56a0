"""One self-contained HTML page from executed notebooks: no script, no request, nothing that time can break."""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from nbconvert.exporters import HTMLExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from kdstudy.equations import to_mathml
from kdstudy.files import write_text

_HERE = Path(__file__).parent
_HIDDEN = {"parameters", "injected-parameters"}
_DISPLAY_PRIORITY = [
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/html",
    "text/markdown",
    "text/latex",
    "text/plain",
]


@dataclass(frozen=True)
class Heading:
    """A heading within a chapter, for the table of contents."""

    level: int  # as in the notebook
    anchor: str
    html: str


@dataclass
class Chapter:
    """One notebook on the page."""

    source: str  # file name
    anchor: str
    subtitle: str = ""  # the parameters it ran with
    title: str = ""
    body: str = ""
    headings: list[Heading] = field(default_factory=list)


def build_report(notebooks: Sequence[Path], output: Path, title: str, profile: str, summary: str = "") -> None:
    """Write the executed `notebooks`, in this order, as one HTML page at `output`.

    `summary` is Markdown and opens the page. Code is folded, parameter cells are left out, equations become MathML,
    links become text, figures are inlined. Equal notebooks give equal bytes. Raises ValueError, with the notebook's
    name, for an equation that cannot be set, or for anything that the page would load from elsewhere.
    """
    template = _environment().get_template("report_page.html.j2")
    page = template.render(
        title=title,
        profile=profile,
        summary=_markdown(Chapter(source="summary", anchor="summary"))(summary),
        chapters=[_chapter(Path(path), profile) for path in notebooks],
        style=_style(),
    )
    _require_self_contained(page)
    write_text(Path(output), page)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def _style() -> str:
    light = HtmlFormatter(style="default", nobackground=True).get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark", nobackground=True).get_style_defs(".highlight")
    css = (_HERE / "report.css").read_text(encoding="utf-8")
    scheme = "(prefers-color-scheme: dark)"
    return f"{css}\n@media not {scheme} {{\n{light}\n}}\n@media {scheme} {{\n{dark}\n}}"


def _chapter(path: Path, profile: str) -> Chapter:
    notebook = nbformat.read(path, as_version=4)
    chapter = Chapter(source=path.name, anchor=_slug(path.stem), subtitle=_ran_with(notebook, profile))
    notebook.cells = [cell for cell in notebook.cells if not _HIDDEN & set(cell.metadata.get("tags", []))]
    _describe_figures(notebook)
    try:
        chapter.body, _ = _exporter(chapter).from_notebook_node(notebook)
        _require_self_contained(chapter.body)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    chapter.title = chapter.title or escape(path.stem)
    return chapter


def _ran_with(notebook: nbformat.NotebookNode, profile: str) -> str:
    """`setting digits`, from the injected parameters; the page's own profile goes without saying."""
    values = {}
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            for node in ast.parse(cell.source).body:
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return ", ".join(f"{name} {value}" for name, value in values.items() if (name, value) != ("profile", profile))


def _describe_figures(notebook: nbformat.NotebookNode) -> None:
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+\s*(.+)$", cell.source, re.MULTILINE) or [heading])[-1]
        else:
            cell.metadata.setdefault("alt", f"Figure: {heading}" if heading else "Figure")


def _exporter(chapter: Chapter) -> HTMLExporter:
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        config=Config({"NbConvertBase": {"display_data_priority": _DISPLAY_PRIORITY}}),
    )
    exporter.raw_template = (_HERE / "report_cells.html.j2").read_text(encoding="utf-8")
    exporter.filters = {
        "highlight_code": Highlight2HTML(pygments_lexer="ipython3"),
        "markdown2html": _markdown(chapter),
        "plain_table": _plain_table,
    }
    return exporter


def _plain_table(html: str) -> str:
    return re.sub(r"<style scoped>.*?</style>\s*", "", html, flags=re.DOTALL)  # pandas styles every table on the page


def _markdown(chapter: Chapter) -> Callable[[str], str]:
    return MarkdownWithMath(renderer=_Renderer(chapter)).render


class _Renderer(IPythonRenderer):
    """Markdown for a page without links: headings get anchors, equations become MathML, links become text."""

    def __init__(self, chapter: Chapter) -> None:
        super().__init__(escape=False)
        self.chapter = chapter

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        if level == 1 and not self.chapter.title:
            self.chapter.title = text  # the page sets it, over the chapter
            return ""
        anchor = f"{self.chapter.anchor}--{_slug(re.sub('<[^>]*>', '', text))}"
        repeats = sum(heading.anchor.startswith(anchor) for heading in self.chapter.headings)
        anchor += f"-{repeats + 1}" if repeats else ""
        self.chapter.headings.append(Heading(level, anchor, text))
        return f'<h{level + 1} id="{anchor}">{text}</h{level + 1}>\n'

    def inline_math(self, body: str) -> str:
        return to_mathml(body)

    def block_math(self, body: str) -> str:
        return f'<span class="equation">{to_mathml(body, display=True)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        address = re.sub(r"^https?://(www\.)?|/$", "", url)
        if address == url:
            return text  # a file or a heading, which is not on this page under that name
        shown = f'<span class="url">{escape(address)}</span>'
        return shown if text == escape(url) else f"{text} [{shown}]"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def _require_self_contained(html: str) -> None:
    if outside := outside_references(html):
        raise ValueError(f"the report would load or link what is not in it: {', '.join(outside)}")


def outside_references(page: str) -> list[str]:
    """Whatever an HTML page would load or link from elsewhere, as `tag attribute=value`, in the order of the page."""
    finder = _Finder()
    finder.feed(page)
    return finder.found


class _Finder(HTMLParser):
    ATTRIBUTES = frozenset({"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"})
    TAGS = frozenset({"script", "link", "iframe", "object", "embed", "base"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_style = tag == "style"
        if tag in self.TAGS:
            self.found.append(tag)
        for name, value in attrs:
            value = (value or "").strip()
            if name in self.ATTRIBUTES and not value.startswith(("#", "data:")):
                self.found.append(f"{tag} {name}={value}")
            if name == "style":
                self._scan_style(value)

    def handle_endtag(self, tag: str) -> None:
        self._is_style = False

    def handle_data(self, data: str) -> None:
        if self._is_style:
            self._scan_style(data)

    def _scan_style(self, style: str) -> None:
        loads = re.findall(r"@import[^;]*|url\(\s*['\"]?(?!data:|#)[^)]*\)", style)
        self.found += [f"style {load}" for load in loads]
