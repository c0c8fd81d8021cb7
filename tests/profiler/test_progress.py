import pytest

from profiler import progress


@pytest.fixture
def lines(monkeypatch):
    """What is printed, on a simulated clock that each step advances by 10 s."""
    now, printed = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.console, "print", lambda text, **_: printed.append(text))

    def step(item):
        now[0] += 10.0
        return 2 * item

    return step, printed


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(lines):
    step, printed = lines
    assert list(progress.track("double", [1, 2, 3, 4, 5], step)) == [2, 4, 6, 8, 10]
    assert printed == [
        "double: 2 of 5, 30 s left",
        "double: 4 of 5, 10 s left",
        "double: 5 of 5 in 50.0 s",
    ]


def test_nothing_to_do_is_not_worth_a_line(lines):
    step, printed = lines
    assert list(progress.track("double", [], step)) == [] and printed == []


def test_a_worker_says_which_it_is(lines, monkeypatch):
    step, printed = lines
    monkeypatch.setattr(progress, "parent_process", lambda: object())
    list(progress.track("double", [1], step))
    assert printed == [f"{progress.current_process().name}: double: 1 of 1 in 10.0 s"]
