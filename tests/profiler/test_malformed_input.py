"""100 malformed configurations and 100 damaged stores: one line and exit code 2, no traceback.

Each is a valid one that a seed has damaged; what stays valid after that does not count.
"""

import random
import sqlite3
from contextlib import closing

import pytest

from cost_models import fit
from kernels.workload import linear
from profiler import compare, export, sweep
from profiler.device import DeviceInfo
from profiler.store import Measurement, create_store

DEVICE = DeviceInfo(kind="cpu", name="Synthetic CPU", threads=1)
TOML = """description = "valid"
forms = ["mult_fp32", "shift_int8"]
threads = [1]
cache = ["hot", "cold"]
timing = "quick"
energy = false
[[shapes]]
m = [16, 64]
k = 64
n = 32
[[shapes]]
kind = "attention"
b = 4
tokens = [49, 197]
bits = 16
n = 16
alphabet = "pm1"
"""
VALUES = (
    *("-1", "0", "1.5", "nan", "inf", "true", '""', '"many"', "'\\'", "[]", "[[]]", "[0]"),
    *('["hot", "hot"]', "{}", "{m = 1}", "1979-05-27", "99999999999999999999", "2147483648"),
    *('"""', "[1, 'a']", "''", "=", "\x00", "[-1]", '["mult_fp33"]', "[100000]", '"01 "'),
)
# One device's models, carried over by each damaged store; by default it would be all that ship.
PRIOR = "amd-zen4-avx512-2c-1t"
JUNK = (None, "", "text", b"\xff\xfe\x00", -1, 0, 1e400, "{", "[]", "{}", "null", '{"m": 0}', 2**62)


def damaged_text(chance, text):
    """A configuration with one to three changes."""
    for _ in range(chance.randint(1, 3)):
        lines = text.split("\n")
        place = chance.randrange(len(lines))
        key = lines[place].partition("=")[0]
        change = chance.choice(
            ("value", "value", "value", "delete", "twice", "name", "cut", "byte")
        )
        if change == "value":
            lines[place] = f"{key}= {chance.choice(VALUES)}"
        elif change == "delete":
            del lines[place]
        elif change == "twice":
            lines.insert(place, lines[place])
        elif change == "name":
            lines[place] = f"x{lines[place]}"
        text = "\n".join(lines)
        if change == "cut":
            text = text[: chance.randrange(len(text) + 1)]
        elif change == "byte":
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chr(chance.randrange(1, 1000)) + text[at:]
    return text


def test_100_malformed_configurations(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "report", lambda setting, location: [])
    path = tmp_path / "bad.toml"
    refused = 0
    for seed in range(1000):
        path.write_bytes(damaged_text(random.Random(seed), TOML).encode(errors="replace"))
        code, errors = command(sweep.app, "--config", "bad.toml", "--store", f"{seed}.sqlite")
        assert code in (0, 2), seed
        if code == 2:
            refused += 1
            assert errors.startswith(("error: bad.toml: ", "error: --threads: ")), errors
            assert errors.count("\n") == 1, errors
            assert not (tmp_path / f"{seed}.sqlite").exists()
        if refused == 100:
            return
    pytest.fail(f"only {refused} were malformed")


def rows():
    for m in (8, 16, 32, 64):
        workload = linear("mult_fp32", m, 16, 32)
        yield Measurement(
            workload=workload,
            subject=workload.label,
            device=DEVICE,
            lowering="mult.panels",
            latency_ms=m / 8,
            latency_low_ms=m / 9,
            latency_high_ms=m / 7,
            samples_ms=(m / 8,) * 50,
            bursts_ms=(m / 8, None) * 5,
            energy_reason="no meter",
            details={"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6},
        )


@pytest.fixture
def sound_store(tmp_path):
    """The bytes of a valid store."""
    path = tmp_path / "sound.sqlite"
    store = create_store(path)
    store.put(*rows())
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    return path.read_bytes()


def damage_bytes(chance, path):
    content = bytearray(path.read_bytes())
    change = chance.choice(("flip", "cut", "zero", "insert", "text"))
    start = chance.randrange(len(content))
    if change == "flip":
        for _ in range(chance.randint(1, 400)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif change == "cut":
        del content[start:]
    elif change == "zero":
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    elif change == "insert":
        content[start:start] = chance.randbytes(chance.randint(1, 99))
    else:
        content = bytearray(b"not a database at all\n" * 9)
    path.write_bytes(content)


def damage_values(chance, path):
    """Writes something else into a column, or takes away what belongs there."""
    with closing(sqlite3.connect(path)) as connection, connection:
        table = chance.choice(("measurements", "measurements", "devices", "samples", "meta"))
        columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
        column, junk = chance.choice(columns), chance.choice(JUNK)
        change = chance.choice(("value", "value", "value", "value", "drop", "rename", "delete"))
        if change == "value":
            connection.execute(f'UPDATE OR IGNORE {table} SET "{column}" = ?', (junk,))
        elif change == "drop":
            connection.execute(f"DROP TABLE {table}")
        elif change == "rename":
            connection.execute(f'ALTER TABLE {table} RENAME COLUMN "{column}" TO other')
        else:
            connection.execute(f"DELETE FROM {table}")


def test_100_damaged_stores(command, tmp_path, monkeypatch, sound_store):
    """Every reader, and the writer, on each store."""
    monkeypatch.chdir(tmp_path)

    def rewrite(setting, store, ready):
        store.finished_keys()
        store.put(*rows())
        return list(store.rows(samples=True))

    monkeypatch.setattr(sweep, "sweep", rewrite)
    (tmp_path / "valid.toml").write_text(TOML)
    path = tmp_path / "bad.sqlite"
    commands = (
        (export.app, "--store", "bad.sqlite", "--to", "rows.csv", "--timm", "timm.csv"),
        (compare.app, "sound.sqlite", "bad.sqlite"),
        (compare.app, "bad.sqlite", "sound.sqlite"),
        (fit.app, "--store", "bad.sqlite", "--out", "fitted", "--prior", PRIOR),
        (sweep.app, "--config", "valid.toml", "--store", "bad.sqlite"),
    )
    refused = 0
    for seed in range(1000):
        chance = random.Random(seed)
        path.write_bytes(sound_store)
        try:
            chance.choice((damage_bytes, damage_values))(chance, path)
        except (sqlite3.Error, OverflowError):
            continue
        damaged, codes = path.read_bytes(), []
        for app, *arguments in commands:
            path.write_bytes(damaged)
            code, errors = command(app, *arguments)
            codes.append(code)
            assert code in (0, 1, 2), (seed, arguments)
            if code == 2:
                assert errors.startswith("error: ") and errors.count("\n") == 1, (seed, errors)
                assert "bad.sqlite" in errors or app is compare.app, (seed, errors)
        refused += any(code == 2 for code in codes[1:])
        if refused == 100:
            return
    pytest.fail(f"only {refused} were damaged")


def test_the_undamaged_ones_are_accepted(command, tmp_path, monkeypatch, sound_store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "report", lambda setting, location: [])
    (tmp_path / "good.toml").write_text(TOML)
    assert command(sweep.app, "--config", "good.toml") == (0, "")
    assert command(export.app, "--store", "sound.sqlite", "--to", "rows.csv") == (0, "")
