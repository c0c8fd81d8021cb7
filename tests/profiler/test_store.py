import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kernels.forms import FORMS
from kernels.workload import Workload, attention, linear
from profiler.device import DeviceInfo
from profiler.store import Measurement, StoreError, create_store, open_store

DEVICE = DeviceInfo(kind="cpu", name="Some CPU", threads=2, cores=2)
WORKLOAD = linear("mult_fp32", 8, 16, 32)

texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
positive = st.floats(1e-9, 1e9)
counts = st.integers(0, 2**62)
dimensions = st.integers(1, 4096)
finite = st.floats(allow_nan=False, allow_infinity=False)


def optional(values):
    return st.none() | values


workloads = st.one_of(
    st.builds(
        linear,
        st.sampled_from([name for name, form in FORMS.items() if form["w_layout"] == "nk"]),
        dimensions,
        dimensions,
        dimensions,
    ),
    st.builds(
        lambda sizes, alphabet, which: attention(*sizes, alphabet)[which],
        st.tuples(*[dimensions] * 4),
        st.sampled_from(["pm1", "01"]),
        st.integers(0, 1),
    ),
)
devices = st.builds(
    DeviceInfo,
    kind=st.sampled_from(["cpu", "cuda"]),
    name=texts,
    uuid=optional(texts),
    isa=texts,
    threads=st.integers(0, 256),
    cores=st.integers(0, 256),
    memory_bytes=counts,
    last_level_cache_bytes=optional(counts),
    sm_clock_mhz=optional(positive),
    memory_clock_mhz=optional(positive),
    power_limit_w=optional(positive),
    ecc=optional(st.booleans()),
    mig=optional(st.booleans()),
    driver=optional(texts),
    cuda=optional(texts),
    governor=optional(texts),
    os=texts,
    software=st.dictionaries(texts, texts, max_size=3),
)


@st.composite
def measurements(draw):
    latency_ms = draw(optional(positive))
    failed = st.sampled_from(["contended", "failed", "skipped"])
    energy_mj = draw(optional(positive))
    return Measurement(
        kind=draw(st.sampled_from(["primitive", "layer", "model"])),
        workload=draw(optional(workloads)),
        subject=draw(texts),
        device=draw(devices),
        lowering=draw(texts),
        is_baseline=draw(st.booleans()),
        cache=draw(st.sampled_from(["hot", "cold"])),
        latency_ms=latency_ms,
        **{
            name: draw(optional(positive))
            for name in ("latency_low_ms", "latency_high_ms", "latency_p10_ms", "latency_p90_ms")
        },
        samples_kept=draw(counts),
        samples_discarded=draw(counts),
        samples_ms=draw(st.lists(positive, max_size=20)),
        bursts_ms=draw(st.lists(optional(positive), max_size=6)),
        stop_reason=draw(optional(texts)),
        noise_floor=draw(optional(positive)),
        energy_mj=energy_mj,
        energy_net_mj=draw(optional(finite)),
        energy_window_s=draw(optional(positive)),
        energy_source=draw(optional(texts)),
        energy_reason=draw(optional(texts)) if energy_mj else draw(texts.filter(bool)),
        weight_bytes=draw(optional(counts)),
        peak_memory_bytes=draw(optional(counts)),
        max_abs_error=draw(optional(positive)),
        relative_error=draw(optional(positive)),
        status="ok" if latency_ms else draw(failed),
        reason=draw(optional(texts)) if latency_ms else draw(texts.filter(bool)),
        run=draw(texts),
        created_at=draw(texts),
        details=draw(
            st.dictionaries(texts, st.none() | texts | finite | counts | st.booleans(), max_size=4)
        ),
    )


def row(**fields):
    figures = {"latency_ms": 1.5, "energy_reason": "no counter"}
    about = {"workload": WORKLOAD, "subject": WORKLOAD.label, "device": DEVICE, "lowering": "x"}
    return Measurement(**about | figures | fields)


@pytest.fixture
def store(tmp_path):
    opened = create_store(tmp_path / "measurements.sqlite")
    yield opened
    opened.close()


@settings(max_examples=50)
@given(written=measurements())
def test_every_field_comes_back(written):
    # In memory: each example starts from an empty store.
    store = create_store("sqlite://")
    store.put(written)
    assert list(store.rows(samples=True)) == [written]
    without = {"samples_ms": (), "bursts_ms": ()}
    assert list(store.rows()) == [written.model_copy(update=without)]
    store.close()


def test_rows_survive_closing_and_opening(tmp_path):
    path = tmp_path / "measurements.sqlite"
    written = [row(lowering="a"), row(lowering="b", latency_ms=None, status="failed", reason="no")]
    store = create_store(path)
    for each in written:
        store.put(each)
    store.close()
    for reopen in (open_store, create_store):
        again = reopen(path)
        assert sorted(again.rows(), key=lambda each: each.lowering) == written
        again.close()


def test_put_replaces_the_row_of_the_same_key(store):
    store.put(row(latency_ms=None, status="contended", reason="2 of 9 samples clean"))
    assert store.finished_keys() == set()
    for samples_ms in ((1.0, 2.0, 3.0), (2.0,), ()):
        store.put(row(latency_ms=2.0, samples_ms=samples_ms))
        assert [each.samples_ms for each in store.rows(samples=True)] == [samples_ms]
    assert [each.latency_ms for each in store.rows()] == [2.0]
    assert store.finished_keys() == {row().key}


@pytest.mark.parametrize(
    "other",
    [
        {"workload": linear("mult_fp32", 8, 16, 33)},
        {"workload": linear("shift_fp32", 8, 16, 32)},
        {"lowering": "y"},
        {"cache": "cold"},
        {"device": DEVICE.model_copy(update={"threads": 1})},
        {"device": DEVICE.model_copy(update={"kind": "cuda", "uuid": "GPU-1"})},
        {"workload": None},
    ],
)
def test_what_differs_in_its_identity_is_kept_beside(store, other):
    store.put(row())
    store.put(row(**other))
    assert len(list(store.rows())) == 2


LATER = DEVICE.model_copy(update={"driver": "580", "software": {"torch": "2.14"}})


def test_a_row_keeps_the_state_that_its_device_was_in(store):
    written = [row(lowering="a"), row(lowering="b", device=LATER), row(lowering="c", device=LATER)]
    store.put(*written)
    assert list(store.rows()) == sorted(written, key=lambda each: each.key)
    store.put(again := row(lowering="a", device=LATER))
    assert again in list(store.rows()) and len(list(store.rows())) == 3
    assert DEVICE.fingerprint == LATER.fingerprint
    assert set(store.frame()["fingerprint"]) == {DEVICE.fingerprint}
    assert len(store.frame()) == 3


def test_a_store_of_before_is_read_and_added_to(tmp_path):
    """It has one state a device, keyed by the fingerprint alone."""
    path = tmp_path / "old.sqlite"
    with closing(create_store(path)) as store:
        store.put(first := row(lowering="a"))
    with closing(sqlite3.connect(path)) as old, old:
        for table in ("devices", "measurements"):
            old.execute(f"UPDATE {table} SET fingerprint = ?", (DEVICE.fingerprint,))
    with closing(open_store(path)) as store:
        assert list(store.rows()) == [first]
        assert store.finished_keys() == {first.key}
        store.put(second := row(lowering="b", device=LATER))
        assert {each.lowering: each.device for each in store.rows()} == {
            "a": DEVICE,
            "b": second.device,
        }
        assert set(store.frame()["fingerprint"]) == {DEVICE.fingerprint}


def test_a_path_may_look_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd?x=1").mkdir()
    with closing(create_store("odd?x=1/a%20b.sqlite")) as store:
        store.put(written := row())
    assert [path.name for path in tmp_path.iterdir()] == ["odd?x=1"]
    with closing(open_store("odd?x=1/a%20b.sqlite")) as store:
        assert list(store.rows()) == [written]


def test_the_frame_can_be_queried_by_form_and_device(store):
    store.put(row(latency_ms=2.0))
    store.put(row(latency_ms=None, status="failed", reason="no"))
    store.put(row(workload=None, kind="model", subject="vit", details={"batch": 4}))
    frame = store.frame().set_index("kind")
    assert frame.loc["primitive", "form"] == "mult_fp32"
    assert frame.loc["primitive", ["b", "m", "k", "n"]].tolist() == [1, 8, 16, 32]
    assert frame.loc["primitive", "device"] == DEVICE.label
    assert frame["latency_ms"].isna().tolist().count(True) == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latency_ms": None}, "latency_ms"),
        ({"status": "failed", "reason": "no"}, "latency_ms"),
        ({"latency_ms": None, "status": "failed"}, "reason"),
        ({"latency_ms": None, "status": "failed", "reason": ""}, "reason"),
        ({"energy_reason": None}, "energy_reason"),
        ({"latency_ms": 0.0}, "latency_ms"),
        ({"energy_mj": 0.0}, "energy_mj"),
        ({"speed": 3.0}, "speed"),
    ],
)
def test_a_missing_figure_is_none_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        row(**fields)


def test_absent_stores_are_not_created_by_opening(tmp_path):
    path = tmp_path / "absent.sqlite"
    with pytest.raises(StoreError, match=r"absent\.sqlite: no such store"):
        open_store(path)
    assert not path.exists()


def test_an_empty_file_becomes_a_store_only_when_created(tmp_path):
    path = tmp_path / "empty.sqlite"
    path.touch()
    with pytest.raises(StoreError, match=r"empty\.sqlite"):
        open_store(path)
    store = create_store(path)
    store.put(row())
    assert len(list(store.rows())) == 1
    store.close()


def test_another_schema_version_is_refused(tmp_path):
    path = tmp_path / "old.sqlite"
    create_store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '999' WHERE name = 'schema_version'")
    connection.close()
    for opening in (open_store, create_store):
        with pytest.raises(StoreError, match=r"old.sqlite: schema_version is 999, .* reads 2"):
            opening(path)


def test_a_foreign_database_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "foreign.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photos (name TEXT)")
    connection.close()
    before = path.read_bytes()
    for opening in (open_store, create_store):
        with pytest.raises(StoreError, match=r"foreign\.sqlite"):
            opening(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["foreign.sqlite"]


def test_a_text_file_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("shopping list\n" * 100)
    for opening in (open_store, create_store):
        with pytest.raises(StoreError, match=r"notes\.txt"):
            opening(path)
    assert path.read_text() == "shopping list\n" * 100


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        create_store(tmp_path / "nowhere" / "measurements.sqlite")


def test_a_row_of_an_unknown_form_names_its_key(tmp_path):
    path = tmp_path / "measurements.sqlite"
    store = create_store(path)
    store.put(row())
    with sqlite3.connect(path) as connection:
        connection.execute('UPDATE measurements SET workload = \'{"primitive": "mult"}\'')
    connection.close()
    with pytest.raises(StoreError, match=f"row {row().key}: m: is missing"):
        list(store.rows())
    store.close()


WRITER = textwrap.dedent(
    """
    import sys
    from kernels.workload import linear
    from profiler.device import DeviceInfo
    from profiler.store import Measurement, create_store

    path, lowering, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    for m in range(1, rows + 1):
        # A new device with every row: both writers find it missing at the same time.
        device = DeviceInfo(kind="cpu", name=f"CPU {m}")
        workload = linear("mult_fp32", m, 8, 8)
        store = create_store(path)
        store.put(
            Measurement(
                workload=workload, subject=workload.label, device=device, lowering=lowering,
                latency_ms=1.0, energy_reason="no counter",
            )
        )
        store.close()
    """
)


def test_two_writers_at_once_lose_nothing(tmp_path):
    path, rows = tmp_path / "measurements.sqlite", 60
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, lowering, str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for lowering in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    store = open_store(path)
    written = [(each.lowering, each.workload.m) for each in store.rows()]
    store.close()
    assert sorted(written) == [(name, m) for name in ("a", "b") for m in range(1, rows + 1)]


@given(workloads)
def test_a_workload_is_its_key(workload):
    assert Workload.from_dict(workload.to_dict()) == workload
