"""What the notebook on networks that learn together shows: who teaches whom, what is shared, what comes of it."""

from collections.abc import Mapping

import pandas as pd
from IPython.display import Markdown

from kdstudy.companions import DEPLOYED, TOGETHER, means, networks
from kdstudy.image_set import ImageSet
from kdstudy.launch import share_convolutions
from kdstudy.lesson import results_table, table
from kdstudy.literature import ONLINE_TITLE, online_places, online_table
from kdstudy.models import build_model
from kdstudy.peers import PeerOptions
from kdstudy.study import Planner, RunSpec
from kdstudy.tables import label

STAGE = "online"
BATCHES = {"shared": "the same crops", "own_crops": "own crops", "own_images": "own images"}
SAME_GRADIENT = ("mutual_4", "mutual_4_ensemble")  # two values of one training


def roles_table(planner: Planner, setting: str) -> Markdown:
    """Who teaches whom in the rows that a setting trains online, read off their runs; a sentence if there are none."""
    specs = [planner.final(setting, STAGE, row, {})[0] for row in planner.rows(setting, STAGE)]
    if not specs:
        return Markdown(f"The setting `{setting}` trains no networks together.")
    heads = ["row", "networks", "who follows whom", "each sees", "deployed"]
    return table(pd.DataFrame([_roles(spec) for spec in specs], columns=heads))


def _roles(spec: RunSpec) -> tuple[str, ...]:
    options = spec.build_options()
    count = 1 + len(spec.partners) if spec.partners else getattr(options, "count", 1)
    names = ", ".join((spec.network, *spec.partners)) if spec.partners else f"{count} x {spec.network}"
    if spec.scheme_name == "launch":
        return f"`{spec.row}`", names, "the light net follows the booster", BATCHES["shared"], "light net"
    if spec.scheme_name == "rivals":
        return f"`{spec.row}`", names, "each follows the one before it, in a cycle", BATCHES["shared"], "first peer"
    role = "leader" if options.leader else "first peer"
    if options.shared_stages:
        names += f", stem and {options.shared_stages} stages shared"
    return f"`{spec.row}`", names, _teaching(spec, options), BATCHES[options.batches], role


def _teaching(spec: RunSpec, options: PeerOptions) -> str:
    method = spec.build_method()
    if not (options.together or "members" in method.reads):
        text = "each follows every other one"
    elif options.leader:
        text = "all but the leader follow each other; the leader follows their mean"
    else:
        text = f"each follows all {'as one, itself among them' if method.counts_itself else 'others as one'}"
    notes = [
        *(["one steps after the other"] if options.alternate else []),
        *([f"labels alone for {options.burn_in:.0%} of the epochs"] if options.burn_in else []),
        *([f"copies, anew every {options.exchange_interval} steps"] if options.exchange_interval else []),
    ]
    return "; ".join([text, *notes])


def shared_table(planner: Planner, setting: str, images: ImageSet) -> Markdown:
    """Which convolutions light nets and boosters of a setting's rows share; a sentence if it has no such row."""
    specs = [planner.final(setting, STAGE, row, {})[0] for row in planner.rows(setting, STAGE)]
    rows = [_shared(spec, images) for spec in specs if spec.scheme_name == "launch" and spec.build_options().share]
    if not rows:
        return Markdown(f"The setting `{setting}` trains no light net within a booster.")
    return table(pd.DataFrame(rows, columns=["row", "light net", "booster", "shared", "of its parameters"]))


def _shared(spec: RunSpec, images: ImageSet) -> tuple[str, ...]:
    size = {"classes": images.classes, "channels": images.channels, "image_size": images.image_size}
    light, booster = (build_model(name, **size) for name in (spec.network, *spec.partners))
    names = share_convolutions(light, booster)
    theirs = {id(parameter) for parameter in booster.parameters()}
    own = list(light.parameters())
    share = sum(p.numel() for p in own if id(p) in theirs) / sum(p.numel() for p in own)
    return f"`{spec.row}`", spec.network, spec.partners[0], f"{len(names)} convolutions", f"{share:.0%}"


def beside_published(results: pd.DataFrame, setting: str) -> Markdown:
    """`literature.online_table` where it is about this setting, else a sentence that names the settings."""
    places = online_places()
    if setting in places:
        return results_table(online_table(results), ONLINE_TITLE)
    named = ", ".join(f"`{place}`" for place in places)
    return Markdown(f"No published number is about the networks and images of `{setting}`. They stand under {named}.")


def together_reading(results: pd.DataFrame, planner: Planner) -> Markdown:
    """What networks that learned together reach one by one and all at once, and what that cost."""
    found = {method: mean for method, mean in means(networks(results)).items() if len(mean) > 1}
    if not found:
        return Markdown("- No networks that learned together have finished.")
    lines = [_as_one(found), _first_or_best(found, planner), _spent(results), _rounding(results)]
    return Markdown("\n".join(line for line in lines if line))


def _as_one(found: Mapping[str, pd.Series]) -> str:
    gains = {method: mean[TOGETHER] - mean[DEPLOYED] for method, mean in found.items() if TOGETHER in mean}
    if not gains:
        return ""
    mean, most = sum(gains.values()) / len(gains), max(gains, key=gains.__getitem__)
    return (
        f"- All networks of a row together score {mean:+.2f} points against the deployed one alone, in the mean over "
        f"{len(gains)} rows; at most {gains[most]:+.2f} ({label(most)}). Whoever wants that has to run all of them on "
        "every image."
    )


def _first_or_best(found: Mapping[str, pd.Series], planner: Planner) -> str:
    rows = planner.params.methods[STAGE]
    alike = {
        method: mean.drop([DEPLOYED, TOGETHER], errors="ignore")
        for method, mean in found.items()
        if method in rows and not rows[method].partners
    }
    if not alike:
        return ""
    ahead = sum(mean.max() > found[method][DEPLOYED] for method, mean in alike.items())
    flattery = [max(mean.max() - found[method][DEPLOYED], 0) for method, mean in alike.items()]
    return (
        f"- Which network is deployed is said before training. In {ahead} of {len(alike)} rows with networks of one "
        "kind another one is ahead of it. Who reports the best of them, by test accuracy, adds "
        f"{sum(flattery) / len(flattery):.2f} points in the mean over rows, for nothing."
    )


def _spent(results: pd.DataFrame) -> str:
    final = results[(results.purpose == "final") & (results.status == "finished")]
    cost = final.groupby("method", sort=False).all_network_epochs.mean()
    own = final[final.stage == STAGE].method.unique()
    if "ce" not in cost or not len(own):
        return ""
    times = cost[own] / cost["ce"]
    kd = f", vanilla KD with its teacher {cost['kd'] / cost['ce']:g}" if "kd" in cost else ""
    return (
        f"- In network-epochs these rows cost {times.min():g} to {times.max():g} times as much as the CE student{kd}. "
        "So a row that is ahead of the CE student has still to be held against one that trains for longer."
    )


def _rounding(results: pd.DataFrame) -> str:
    first, second = SAME_GRADIENT
    finals = results[(results.purpose == "final") & results.method.isin(SAME_GRADIENT)]
    table = finals.pivot_table(index="seed", columns="method", values="test_accuracy")
    if set(table) != set(SAME_GRADIENT) or table.dropna().empty:
        return ""
    gaps = (table[second] - table[first]).dropna()
    each = ", ".join(f"{gap:+.2f}" for gap in gaps)
    return (
        f"- {label(second)} and {label(first)} have the same gradients; only rounding tells them apart. Their "
        f"accuracies differ by {each} points, seed by seed. That far chance alone can carry two runs of one method."
    )
