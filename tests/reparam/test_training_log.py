import csv

from reparam.results import Epoch
from reparam.training_log import log_epochs


def epoch(stage, number, loss=0.5):
    return Epoch(
        stage=stage,
        epoch=number,
        train_loss=loss,
        latency_loss=None,
        validation_top1=90.0,
        seconds=1.0,
    )


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_stage_is_written_anew_and_others_stay(tmp_path):
    path = tmp_path / "training.csv"
    log_epochs(path, "original", [epoch("original", 0), epoch("original", 1)])
    log_epochs(path, "moe", [epoch("moe", 0, 0.9)])
    log_epochs(path, "moe", [epoch("moe", 0), epoch("moe", 1)])
    log_epochs(path, "original", [epoch("original", 0), epoch("original", 1)])
    found = [(row["stage"], row["epoch"], row["train_loss"]) for row in rows(path)]
    assert found == [
        ("original", "0", "0.5"),
        ("original", "1", "0.5"),
        ("moe", "0", "0.5"),
        ("moe", "1", "0.5"),
    ]
    assert rows(path)[0]["latency_loss"] == ""
    assert not list(tmp_path.glob("*.part"))
