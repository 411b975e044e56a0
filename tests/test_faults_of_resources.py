"""Faults of files, disks, memory, clocks and losses: nothing is lost, nothing is wrong, and the user is told."""

import pytest
from faults import shortages, storage
from faults.outcome import Unable
from faults.study import Study

SCENARIOS = [
    *(storage.torn_checkpoint, storage.torn_checkpoints, storage.torn_record, storage.torn_only_record),
    *(storage.torn_weights, storage.torn_data, storage.torn_notebook),
    *(storage.full_store, storage.full_reports, storage.too_large_file),
    *(shortages.host_memory, shortages.host_memory_of_one, shortages.gpu_memory, shortages.gpu_memory_of_one),
    *(shortages.diverging, shortages.jumping_clock, shortages.files_from_the_future),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    study = Study(tmp_path_factory.mktemp("undisturbed") / "study")
    study.complete()
    return study.results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_ends_as_promised(scenario, undisturbed, tmp_path):
    try:
        outcome = scenario(tmp_path / "study", undisturbed)
    except Unable as reason:
        pytest.skip(str(reason))
    assert outcome.ok, outcome
