import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.energy_rules import (
    RULES,
    released_energy,
    released_with_accumulations,
    released_with_equal_memory,
    saving_table,
    savings,
)
from kernels.forms import FORMS
from kernels.workload import Workload, linear

DENSE = linear("mult_fp32", 3136, 32, 256)
SHIFT = linear("shift_fp32", 3136, 32, 256)
ADD = Workload(m=3136, k=32, n=256, **FORMS["add_qkv_pm1"])


def saving(rule, other):
    return 1 - rule(other).with_memory_mj / rule(DENSE).with_memory_mj


def test_the_release_as_it_was_read():
    figures = [released_energy(w).with_memory_mj for w in (DENSE, SHIFT, ADD)]
    assert figures == pytest.approx([1.342, 0.393, 0.605], abs=5e-4)
    assert saving(released_energy, SHIFT) == pytest.approx(0.71, abs=5e-3)
    assert saving(released_energy, ADD) == pytest.approx(0.55, abs=5e-3)


def test_with_equal_memory_rules_little_is_left_of_it():
    assert saving(released_with_equal_memory, SHIFT) == pytest.approx(0.068, abs=5e-4)
    assert saving(released_with_equal_memory, ADD) == pytest.approx(0.054, abs=5e-4)


def test_sizes_of_many_divisors_do_not_fill_the_memory():
    """840³ has 11 million tilings, most of which fit no accelerator."""
    tracemalloc.start()
    released_energy(linear("mult_fp32", 840, 840, 840))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_accumulations_cost_the_same_in_a_mult_and_a_shift_and_are_all_that_an_add_does():
    for workload in (DENSE, SHIFT):
        free, charged = (
            rule(workload).compute_mj
            for rule in (released_with_equal_memory, released_with_accumulations)
        )
        assert charged - free == pytest.approx(workload.macs * 0.9e-9)
    assert released_with_accumulations(ADD) == released_with_equal_memory(ADD)


@pytest.mark.parametrize("other", [SHIFT, ADD])
def test_what_the_rules_make_up_adds_up(other):
    steps = savings(DENSE, other)
    assert [step.rule for step in steps] == list(RULES)
    made_up = sum(step.made_up for step in steps if step.made_up is not None)
    assert steps[0].saving == pytest.approx(made_up + steps[-1].saving)
    assert steps[0].made_up > 45


sizes = st.sampled_from([1, 7, 16, 49, 64, 96, 197])


@given(sizes, sizes, sizes)
@settings(max_examples=25)
def test_a_shift_never_costs_more_than_a_mult_by_any_rule(m, k, n):
    for step in savings(linear("mult_fp32", m, k, n), linear("shift_fp32", m, k, n)):
        # A scale for each output channel is more than nothing in this suite's rule.
        assert step.saving > -10 if step.rule == "stored_widths" else step.saving > 0
        assert step.compute_saving < 100


def test_attention_is_two_products():
    both = Workload(b=2, m=64, k=16, n=16, **FORMS["add_attention_pm1"])
    one = Workload(b=2, m=64, k=16, n=16, **FORMS["add_qkv_pm1"])
    ratio = released_energy(both).with_memory_mj / released_energy(one).with_memory_mj
    assert ratio == pytest.approx(2)


def test_the_table_has_a_line_for_each_rule():
    table = saving_table(DENSE, SHIFT)
    assert table.row_count == len(RULES)
    assert list(table.columns[3].cells)[:2] == ["70.7", "6.8"]
