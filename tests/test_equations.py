"""Equations: what the tree of elements must say for a browser to draw what LaTeX would."""
# ruff: noqa: RUF001 (the letters of mathematics look like other letters)

import re
from xml.etree import ElementTree

import pytest

from kdstudy.equations import ENVIRONMENTS, to_mathml

USED = [
    r"\mathcal{L}_{\mathrm{KD}} = T^2\, \mathrm{KL}\left(\sigma\!\left(\frac{z_t}{T}\right) \,\middle\|\, q\right)",
    r"\begin{aligned} L &= \lambda_{\text{ce}}\,\mathrm{CE}(y, p) \\ &= \sum_{i=1}^{B} \hat{z}_i \end{aligned}",
    r"\begin{cases} \tfrac{1}{2} d^2 & \text{if } \lvert d\rvert \le \delta \\ 0 & \text{otherwise} \end{cases}",
    r"\hat{\theta} = \operatorname*{arg\,min}_\theta \mathbb{E}_{x\sim\mathcal{D}}[-\log \operatorname{softmax}(z)_y]",
    r"\mathbf{p} = \boldsymbol{\sigma}(\mathbf{W}\mathbf{h}), \quad \mathbf{1}^\top \boldsymbol{p}, \mathbb{1}[\hat y]",
    r"\left\lVert \frac{Q_s}{\lVert Q_s\rVert_2} \right\rVert_p^2 + \tau^2 \mathrm{KL}\bigl(p \,\big\Vert\, q\bigr)",
    r"G = \begin{pmatrix} f_1^\top f_1 & \cdots \\ \vdots & \ddots \end{pmatrix} \in \mathbb{R}^{B \times B}",
    r"\underbrace{a+b}_{\text{ce}}, \overline{p}, \bar q - \vec{x}, \tilde{x}, 95\,\%, \partial L / \partial z \pm 1",
]


def tree(latex: str, display: bool = False):
    return ElementTree.fromstring(to_mathml(latex, display))


def find(latex: str, tag: str, text: str):
    (element,) = [element for element in tree(latex).iter(tag) if element.text == text]
    return element


@pytest.mark.parametrize("latex", USED)
def test_nothing_is_left_that_browsers_ignore(latex):
    for display in (False, True):
        for element in tree(latex, display).iter():
            assert "columnalign" not in element.attrib
            assert element.get("mathvariant", "normal") == "normal"
            assert re.fullmatch(r"-?[\d.]+em", element.get("width", "0em"))
            assert "\\" not in (element.text or "") and "&" not in (element.text or "")


def test_the_distillation_loss_reads_as_written():
    root = tree(USED[0], display=True)
    assert "".join(root.itertext()) == "ℒKD=T2KL(σ(ztT)‖q)"
    assert root.get("display") == "block"
    assert [element.text for element in root.iter("mtext")] == ["KD", "KL"]
    fences = [element.text for element in root.iter("mo") if element.get("stretchy") == "true"]
    assert fences == ["(", "(", ")", "‖", ")"]
    assert [space.get("width") for space in root.iter("mspace")] == ["0.167em", "-0.167em", "0.167em", "0.167em"]


def test_lines_are_aligned_at_their_sign():
    root = tree(r"\begin{aligned} a &= b \\ &= c \end{aligned}")
    (table,) = root.iter("mtable")
    assert table.get("class") == "aligned"
    cells = [[("".join(cell.itertext()), cell.get("style")) for cell in row] for row in table]
    assert cells == [
        [("a", "text-align: right"), ("=b", "text-align: left")],
        [("", "text-align: right"), ("=c", "text-align: left")],
    ]


def test_cases_are_a_stretched_brace_and_a_table():
    root = tree(USED[2])
    (table,) = root.iter("mtable")
    assert [len(row) for row in table] == [2, 2]
    assert find(USED[2], "mo", "{").get("stretchy") == "true"


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\mathbf{p}", "𝐩"),
        (r"\boldsymbol{p}", "𝒑"),
        (r"\boldsymbol{\sigma}", "𝝈"),
        (r"\mathbf{1}", "𝟏"),
        (r"\bm{1}", "𝟏"),
        (r"\mathbb{1}", "𝟙"),
        (r"\mathbb{E}", "𝔼"),
        (r"\mathrm{d}", "d"),
    ],
)
def test_variants_are_letters_of_their_own(latex, text):
    assert "".join(tree(latex).itertext()) == text


def test_upright_letters_stay_upright():
    assert [element.tag for element in tree(r"\mathrm{d}").iter()][-1] == "mtext"
    assert find(r"\Delta x", "mi", "Δ").get("mathvariant") == "normal"


def test_functions_stand_off_from_letters_but_not_from_brackets():
    assert find(r"T \log p", "mo", "log").get("lspace") == find(r"T \log p", "mo", "log").get("rspace") == "0.167em"
    assert find(r"- \log(p)", "mo", "log").get("lspace") == find(r"- \log(p)", "mo", "log").get("rspace") == "0"
    assert find(r"2 \operatorname{softmax}(z)", "mo", "softmax").get("rspace") == "0"


def test_limits_go_below_in_a_block():
    (under,) = tree(r"\max_{c \ne y} z_c", display=True).iter("munder")
    assert under[0].text == "max" and under[0].get("movablelimits") == "true"


def test_a_plain_bar_has_no_space_of_its_own_and_a_sized_one_stretches():
    bars = [element for element in tree(r"\lVert x \rVert_2").iter() if element.text == "‖"]
    assert [bar.tag for bar in bars] == ["mi", "mi"]
    assert find(r"p \,\big\Vert\, q", "mo", "‖").get("stretchy") == "true"


def test_a_sign_after_an_operator_is_a_sign():
    assert find(r"\exp(-x)", "mo", "\u2212").get("form") == "prefix"
    assert find(r"f(x)-x", "mo", "\u2212").get("form") is None


def test_relations_and_letterlike_symbols_are_told_apart():
    assert find(r"x \sim p", "mo", "\u223c") is not None
    assert find(r"2 \pm 1", "mo", "±") is not None
    assert find(r"\partial x", "mi", "∂") is not None


@pytest.mark.parametrize(
    ("latex", "reason"),
    [
        (r"\sofmax(z)", r"unknown macro \\sofmax"),
        (r"\begin{gathered} a \\ b \end{gathered}", "environment 'gathered' is none of aligned"),
        (r"\frac{1}{", "NoAvailableTokensError"),
        ("a & b", "an & outside of a table"),
    ],
)
def test_what_cannot_be_set_is_refused_with_the_equation(latex, reason):
    with pytest.raises(ValueError, match=f"cannot set the equation .*{reason}"):
        to_mathml(latex)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_named_is_set(name):
    columns = "{l}" if name == "array" else ""
    root = tree(rf"\begin{{{name}}}{columns} x \end{{{name}}}")
    assert "".join(root.itertext()).strip("{([])}") == "x"
