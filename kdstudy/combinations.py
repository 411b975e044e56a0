"""What schemes are, and which methods they can serve: both read off the code and tried on tiny networks."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from IPython.display import Markdown
from torch import Tensor

from kdstudy.core import Method, Phase
from kdstudy.lesson import table
from kdstudy.models import build_model
from kdstudy.params import Params, Row
from kdstudy.schemes import Batch, Cast, Scheme, Turn
from kdstudy.study import METHODS, SCHEMES, build_method, build_options, scheme_of

STUDENT, TEACHER, BOOSTER = "wrn_10_0.25", "wrn_10_0.5", "wrn_16_0.25"
# student, teacher and number of teachers of methods that are not defined for the pair above
CASTS: Mapping[str, tuple[str, str, int]] = {
    "ensemble": (STUDENT, TEACHER, 3),
    "aekd": (STUDENT, TEACHER, 3),
    "born_again_ensemble": (STUDENT, STUDENT, 3),
    "own_teacher": (STUDENT, STUDENT, 1),  # its heads are as wide as the last stage of what teaches them
    "fitnets": ("cnn_small", TEACHER, 1),
    "lit": (STUDENT, BOOSTER, 1),
    "heads": (f"{TEACHER}+heads", TEACHER, 1),
    "tofd": (STUDENT, f"{TEACHER}+sepheads", 1),
    "relative_heads": (STUDENT, f"{TEACHER}+heads", 1),
    "few_sample": (f"{TEACHER}_pruned0.5", TEACHER, 1),
    "fsp": ("resnet8x0.25", "resnet14x0.25", 1),
    "quantised": (f"{STUDENT}_int8", STUDENT, 1),
    "soft_tree": ("tree_3", "tree_4", 1),
}
SHARED = ("peers", "launch", "snapshot", "zero_shot", "impressions", "munged")  # schemes that could serve many methods
SMALL_OPTIONS: Mapping[str, Mapping[str, int]] = {"impressions": {"count": 16, "batch": 16, "iterations": 1}}


def combinations(params: Params) -> pd.DataFrame:
    """Every method under every scheme of `SHARED`, really put together from tiny networks, which take one step.

    Columns: method, kind, scheme, possible, refusal (what the code says against it, "" if nothing), rows (of
    params.yaml that train the pair, comma-separated).
    """
    tried = defaultdict(list)
    for rows in params.methods.values():
        for name, row in rows.items():
            tried[row.method, row.scheme or scheme_of(METHODS[row.method])].append(name)
    cells = [
        (key, METHODS[key].kind, scheme, not refusal, refusal, ", ".join(tried[key, scheme]))
        for key in METHODS
        for scheme in SHARED
        for refusal in [refusal_of(key, scheme)]
    ]
    return pd.DataFrame(cells, columns=["method", "kind", "scheme", "possible", "refusal", "rows"])


def refusal_of(key: str, scheme: str) -> str:
    """Why a method cannot be trained under a scheme, in the words of the code; "" if it can."""
    try:
        method = build_method(key)
        if not method.phases():
            raise ValueError(f"{type(method).__name__} trains nothing in steps")
        tiny = _tiny_scheme(scheme, key, method, SMALL_OPTIONS.get(scheme, {}))
        for phase, turn in _turns(tiny):
            _loss(tiny, phase, turn, _tiny_batch())
    except ValueError as error:
        return str(error).replace(METHODS[key].__name__, "the method")
    return ""


def _tiny_scheme(scheme: str, key: str, method: Method, options: Mapping[str, object]) -> Scheme:
    torch.manual_seed(0)
    cls, (student, teacher, count) = SCHEMES[scheme], CASTS.get(key, (STUDENT, TEACHER, 1))
    build = partial(build_model, classes=4, channels=1, image_size=8)
    partners = ((BOOSTER if student == STUDENT else student),) if scheme == "launch" else ()
    teachers = [build(teacher) for _ in range(count)] if cls.needs_teacher else []
    cast = Cast(build, student, partners, teachers)
    return cls.assemble(cast, method, _tiny_batch(), build_options(key, scheme, options))


def _tiny_batch() -> Batch:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 4
    return Batch(images, labels, torch.arange(16), images, labels)


def _turns(scheme: Scheme) -> list[tuple[Phase, Turn]]:
    return [(phase, turn) for phase in scheme.phases() for turn in scheme.turns(phase)]


def _loss(scheme: Scheme, phase: Phase, turn: Turn, batch: Batch) -> Tensor:
    scheme.set_modes(phase)
    scheme.begin_step(0)
    return sum(scheme.losses(phase, turn, batch, None).terms.values())


def refusals_table(cells: pd.DataFrame) -> Markdown:
    """What speaks against combinations: each reason once, with the schemes and methods that it is about."""
    refused = cells[~cells.possible]
    rows = []
    for reason, those in refused.groupby("refusal", sort=False):
        keys = those.method.unique()
        named = ", ".join(f"`{key}`" for key in keys) if len(keys) <= len(METHODS) / 2 else f"{len(keys)} methods"
        rows.append((", ".join(those.scheme.unique()), named, reason))
    return table(pd.DataFrame(rows, columns=["under", "methods", "what the code says"]))


def combinations_reading(cells: pd.DataFrame) -> Markdown:
    """How many pairs there are, how many are possible, and which were tried, scheme by scheme."""
    lines = [
        f"- {cells.method.nunique()} methods under {cells.scheme.nunique()} schemes are {len(cells)} pairs. "
        f"{cells.possible.sum()} are possible, {(cells.rows != '').sum()} of them have a row."
    ]
    for scheme, those in cells.groupby("scheme", sort=False):
        rows = ", ".join(f"`{name}`" for names in those.rows[those.rows != ""] for name in names.split(", "))
        lines.append(f"- `{scheme}`: {those.possible.sum()} of {len(those)} methods. Tried: {rows or 'none'}.")
    return Markdown("\n".join(lines))


def schemes_table(params: Params) -> Markdown:
    """All schemes: what their docstrings say of who teaches whom, what they train and deploy, and what they need.

    What is trained, and whether labels are heard, is seen on the scheme's first row of params.yaml, with tiny networks.
    """
    rows = []
    for name, cls in SCHEMES.items():
        row = next(row for row in _all_rows(params) if (row.scheme or scheme_of(METHODS[row.method])) == name)
        tiny = _tiny_row(name, row)
        trained = tiny.trained_networks(part for phase in tiny.phases() for part in phase.trains)
        who = " ".join(inspect.getdoc(cls).partition("\n\n")[0].split())
        rows.append((f"`{name}`", cls.family.replace("_", "-"), who, _counted(trained), tiny.role, _needs(tiny)))
    return table(
        pd.DataFrame(rows, columns=["scheme", "family", "who teaches whom", "is trained", "is deployed", "needs"])
    )


def _all_rows(params: Params) -> list[Row]:
    return [row for rows in params.methods.values() for row in rows.values()]


def _tiny_row(scheme: str, row: Row) -> Scheme:
    options = {**row.scheme_options, **SMALL_OPTIONS.get(scheme, {})}
    return _tiny_scheme(scheme, row.method, build_method(row.method, **row.hyperparameters), options)


def _counted(names: Sequence[str]) -> str:
    """ "2 peers" of "peers.0" and "peers.1"."""
    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items()) or "nothing"


def _needs(scheme: Scheme) -> str:
    needs = ["a trained teacher"] if scheme.needs_teacher else []
    if scheme.phases():
        needs += ["the images' number and size" if scheme.data_free else "images"]
        needs += ["labels"] if _hears_labels(scheme) else []
    return ", ".join(needs)


def _hears_labels(scheme: Scheme) -> bool:
    """Whether any loss changes if all labels do."""
    batch, losses = _tiny_batch(), []
    for labels in (batch.labels, batch.labels.roll(1)):
        torch.manual_seed(0)
        turns = _turns(scheme)
        losses.append([_loss(scheme, *turn, batch._replace(labels=labels)).item() for turn in turns])
    return losses[0] != losses[1]
