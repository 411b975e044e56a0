"""LaTeX equations as MathML, so that a page shows them without JavaScript and without network.

latex2mathml does the parsing. Its tree is then put right for MathML Core, the part of MathML that browsers draw: Core
ignores `columnalign` and most of `mathvariant`, and has no rule for the space around `\\log` or a plain bar.
"""

import re
import unicodedata
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

ENVIRONMENTS = {  # what may be written: what the converter is given for it
    "aligned": "split",
    "align": "align*",
    "align*": "align*",
    "split": "split",
    "equation": "equation*",
    "equation*": "equation*",
    "cases": "cases",
    "array": "array",
    "matrix": "matrix",
    "pmatrix": "pmatrix",
    "bmatrix": "bmatrix",
}
_LIMITS = {"max", "min", "sup", "inf", "lim", "argmax", "argmin", "Pr"}
_FUNCTIONS = _LIMITS | {"log", "ln", "exp", "sin", "cos", "tanh", "det", "dim"}
_BARS = {r"\|": "‖", r"\Vert": "‖", r"\vert": "|"}
_ACCENTS = set("^~¯˙¨ˇ˘→―")
_CLOSING = set(")]}|‖")
_LETTERLIKE = set("∂∇∞∅∀∃|")  # symbols without the space of an operator
_SYMBOLS = {"~": "\u223c", "\u29f5": "\u2216"}  # the operators for a tilde and a backslash
_SCRIPTS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
_SCRIPTED = {*_SCRIPTS, *_SCRIPTS.values()}
_STYLES = {"bold": ("BOLD",), "bold-italic": ("BOLD ITALIC", "BOLD"), "double-struck": ("DOUBLE-STRUCK",)}
_THIN = "0.167em"


def to_mathml(latex: str, display: bool = False) -> str:
    """A `<math>` element for the LaTeX between the dollars; `display` sets it as a block of its own.

    Raises ValueError, with the equation, for what would not be shown as LaTeX shows it: an unknown macro or
    environment, a brace that is not closed, an `&` outside of a table.
    """
    try:
        root = _parse(latex, display)
    except Exception as error:
        raise ValueError(f"cannot set the equation {latex.strip()!r}: {str(error) or type(error).__name__}") from error
    for element in root.iter():
        _repair(element)
    _space(root)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _parse(latex: str, display: bool) -> Element:
    from latex2mathml.converter import convert

    markup = convert(_prepare(latex), xmlns="", display="block" if display else "inline")
    if "<mi>&</mi>" in markup:
        raise ValueError("an & outside of a table")
    root = ElementTree.fromstring(markup)
    for element in root.iter():
        text = element.text or ""
        if re.match(r"\\[a-zA-Z]", text) and text not in _BARS:
            raise ValueError(f"unknown macro {text}")
    return root


def _prepare(latex: str) -> str:
    latex = re.sub(r"\\(begin|end)\{(.*?)\}", lambda found: f"\\{found[1]}{{{_environment(found[2])}}}", latex)
    latex = re.sub(r"\\operatorname\*?\{arg\\[,;]?\s*(max|min)\}", r"\\arg\1", latex)
    latex = re.sub(r"\\mathrm\{([A-Za-z0-9]+)\}", _upright, latex)
    # a bar that is not sized takes no space, which the converter knows of \Vert only; a sized one must be \| or |
    return re.sub(r"(\\(?:left|right|middle|[bB]igg?[lrm]?)\s*)?\\[lr]?([vV]ert)(?![a-zA-Z])", _bar, latex)


def _environment(name: str) -> str:
    if name not in ENVIRONMENTS:
        raise ValueError(f"environment {name!r} is none of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]


def _upright(found: re.Match[str]) -> str:
    # the converter cuts an upright word into letters and sets a single upright letter in italics
    return f"\\{'operatorname' if found[1] in _FUNCTIONS else 'text'}{{{found[1]}}}"


def _bar(found: re.Match[str]) -> str:
    size, name = found.groups()
    if size:
        return size + (r"\|" if name == "Vert" else "|")
    return f"\\{name} "


def _repair(element: Element) -> None:
    text = element.text or ""
    if element.tag == "mspace" and element.get("width") == "negativethinmathspace":
        element.set("width", f"-{_THIN}")
    elif element.tag == "mtd" and (side := element.attrib.pop("columnalign", None)):
        element.set("style", f"text-align: {side}")
    elif element.tag == "mtable" and element.attrib.pop("columnspacing", None):
        del element.attrib["rowspacing"]
        element.set("class", "aligned")
    elif element.tag == "mover" and element[1].text in _ACCENTS:
        element.set("accent", "true")
    elif element.tag in _SCRIPTS and element[0].tag == "mo" and _name(element[0]) in _LIMITS:
        element.tag = _SCRIPTS[element.tag]
        element[0].set("movablelimits", "true")
    elif element.tag in ("mi", "mo"):
        _repair_symbol(element, text)
    _repair_variant(element)


def _repair_symbol(element: Element, text: str) -> None:
    if text in _LETTERLIKE and "stretchy" not in element.attrib and "minsize" not in element.attrib:
        element.tag = "mi"
    elif len(text) == 1 and unicodedata.category(text) == "Sm":
        element.tag, element.text = "mo", _SYMBOLS.get(text, text)
    elif re.fullmatch("[\u0391-\u03a9]", text):  # Greek capitals
        element.set("mathvariant", "normal")
    if element.tag == "mo":
        element.text = _BARS.get(text, element.text)
        if "minsize" in element.attrib:
            element.set("stretchy", "true")
        if text == "/":
            element.attrib |= {"lspace": "0", "rspace": "0"}


def _repair_variant(element: Element) -> None:
    variant = element.get("mathvariant", "normal")
    if variant == "normal":
        return
    del element.attrib["mathvariant"]
    if element.tag == "mtext":
        element.set("style", "font-weight: bold" if variant == "bold" else "font-style: italic")
    elif variant in _STYLES:
        element.text = "".join(_letter(letter, _STYLES[variant]) for letter in element.text)


def _letter(letter: str, styles: tuple[str, ...]) -> str:
    name = re.sub("LATIN |GREEK |LETTER ", "", unicodedata.name(letter))
    for style in styles:
        try:
            return unicodedata.lookup(f"MATHEMATICAL {style} {name}")
        except KeyError:  # there is no bold italic digit
            continue
    return letter


def _space(parent: Element) -> None:
    """Set `\\log` and its like off from letters but not from brackets, and a sign after an operator as a sign."""
    for index, child in enumerate(parent):
        before = parent[index - 1] if index else None
        after = parent[index + 1] if index + 1 < len(parent) else None
        after_operator = before is not None and before.tag == "mo" and before.text not in _CLOSING
        name = child[0] if child.tag in _SCRIPTED else child
        if _is_function(name):
            name.tag = "mo"
            name.attrib |= {
                "form": "prefix",
                "lspace": "0" if before is None or after_operator else _THIN,
                "rspace": "0" if after is None or _is_bracket(after) else _THIN,
            }
        elif child.tag == "mo" and child.text in ("\u2212", "+", "±") and after_operator:
            child.set("form", "prefix")
        _space(child)


def _is_function(element: Element) -> bool:
    name = _name(element)
    return name in _FUNCTIONS or (element.tag == "mo" and len(name) > 1 and name.isalpha())


def _is_bracket(element: Element) -> bool:
    first = element[0] if element.tag == "mrow" and len(element) else element
    return first.tag == "mo" and not _is_function(first)


def _name(element: Element) -> str:
    return (element.text or "").replace("\u2009", "")  # argmin comes with a thin space in it
