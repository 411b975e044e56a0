"""Faults that end processes: nothing is lost, nothing is wrong, nobody is left running, and the user is told."""

import pytest
from faults import interruptions, shortages
from faults.study import Study

SCENARIOS = [
    *(interruptions.killed, interruptions.terminated, interruptions.interrupted, interruptions.interrupted_at_start),
    *(interruptions.notebook_terminated, interruptions.notebook_interrupted),
    *(interruptions.kernel_died, interruptions.runner_killed),
    *(interruptions.worker_killed, interruptions.workers_killed_always, shortages.system_memory),
    *(interruptions.two_pipelines, interruptions.two_runs),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    study = Study(tmp_path_factory.mktemp("undisturbed") / "study")
    study.complete()
    assert len(study.results) == 6 and all(weights for weights, _ in study.results.values())
    return study.results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_ends_as_promised(scenario, undisturbed, tmp_path):
    outcome = scenario(tmp_path / "study", undisturbed)
    assert outcome.ok, outcome
