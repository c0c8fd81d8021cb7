"""The short form of ``kill_sweep.py``, and that it would notice a loss."""

import pytest
from kill_sweep import Tally, keys_of, kill_once, prove, victims

from profiler.store import open_store


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prove")
    return prove(5, folder, seed=1), folder


def test_kills_lose_nothing_but_the_rows_in_flight(proven):
    tally, folder = proven
    assert tally.kills == 5 and tally.complete >= 1
    assert tally.faults == 0
    assert not (folder / "killed.sqlite").exists()


def test_a_second_call_goes_on_from_the_first(proven):
    tally, folder = proven
    again = prove(6, folder, seed=2)
    assert again.kills == 6 and again.complete > tally.complete


def test_rows_that_are_missing_or_foreign_and_stores_that_break_are_counted(proven):
    _, folder = proven
    whole = folder / "whole.sqlite"
    wanted = keys_of(whole)
    path = folder / "broken.sqlite"
    with open_store(whole)._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(whole.read_bytes())

    path.write_bytes(content)
    tally = Tally()
    kill_once(victims(), path, wanted - {min(wanted)}, 100, tally)
    assert tally.foreign == 1

    path.write_bytes(content[: len(content) // 2])
    assert keys_of(path) is None
