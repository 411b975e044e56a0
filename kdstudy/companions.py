"""The networks of a run beside the deployed one: what they reach, and what all of them cost."""

import json

import pandas as pd

from kdstudy.tables import label

DEPLOYED, TOGETHER = "deployed", "ensemble"
NETWORK_COLUMNS = ("method", "seed", "network", "test_accuracy")


def networks(results: pd.DataFrame) -> pd.DataFrame:
    """Every network that the finished final runs of results.csv scored: the deployed one, then the others by name.

    Columns: method, seed, network ("deployed", "peer_1", "exit_1", "booster", "ensemble"), test_accuracy (percent).
    """
    final = results[(results.purpose == "final") & (results.status == "finished")]
    rows = [
        (run.method, run.seed, name, accuracy)
        for run in final.itertuples()
        for name, accuracy in ({DEPLOYED: run.test_accuracy} | json.loads(run.further)).items()
    ]
    return pd.DataFrame(rows, columns=list(NETWORK_COLUMNS))


def means(scores: pd.DataFrame) -> dict[str, pd.Series]:
    """By method, the mean test accuracy over seeds of each of its `networks`, in their order."""
    grouped = scores.groupby("method", sort=False)
    return {method: rows.groupby("network", sort=False).test_accuracy.mean() for method, rows in grouped}


def accuracies(results: pd.DataFrame) -> pd.DataFrame:
    """What is deployed, and what all networks of a row reach, one by one and together: a row per method, in percent.

    Means over seeds; only methods that score more than the deployed network.
    """
    roles = results.groupby("method").deployed.first()
    rows = [
        (label(method), roles[method], mean[DEPLOYED], _listed(mean), _together(mean))
        for method, mean in means(networks(results)).items()
        if len(mean) > 1
    ]
    return pd.DataFrame(rows, columns=["row", "deployed is", "deployed (%)", "the others (%)", "all together (%)"])


def _together(mean: pd.Series) -> str:
    return f"{mean[TOGETHER]:.2f}" if TOGETHER in mean else "-"


def _listed(mean: pd.Series) -> str:
    others = mean.drop([DEPLOYED, TOGETHER], errors="ignore")
    return ", ".join(f"{name.replace('_', ' ')}: {accuracy:.2f}" for name, accuracy in others.items())


def costs(results: pd.DataFrame) -> pd.DataFrame:
    """What each row costs in epochs of one network, forward and back; means over the finished final runs.

    "With its teachers" counts every run that taught it, and their teachers, once; "x CE student" is that as a multiple.
    """
    final = results[(results.purpose == "final") & (results.status == "finished")]
    spent = final.groupby("method", sort=False)[["epochs", "network_epochs", "all_network_epochs"]].mean()
    unit = spent.all_network_epochs.get("ce")
    table = pd.DataFrame(
        {
            "row": [label(method) for method in spent.index],
            "epochs": spent.epochs,
            "network-epochs": spent.network_epochs,
            "with its teachers": spent.all_network_epochs,
        }
    ).reset_index(drop=True)
    return table.assign(**{"x CE student": (spent.all_network_epochs / unit).to_numpy()}) if unit else table
