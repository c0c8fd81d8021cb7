"""What a recipe's models compute, and which multiplication ``mult_fastest`` comes to."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from cost_models.latency_table import TableError
from reparam.recipe import MULT_FASTEST, load_recipe
from reparam.recipe_models import recipe_workloads, with_fastest_mult, written_out

FOR_ALL = {"mult": MULT_FASTEST, "shift": "shift_int8"}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("digits-quick")[1]


def _table(own_speeds=None, **slowness):
    """A table: time in proportion to the work, by form; others are unknown."""

    def lookup(workload):
        if workload.form not in slowness:
            raise TableError(f"{workload.form} is not in the table")
        latency_ms = workload.macs * slowness[workload.form]
        return SimpleNamespace(latency_ms=latency_ms, source="measured", lowering="some")

    speeds = {form: SimpleNamespace(mean=mean) for form, mean in (own_speeds or {}).items()}
    return SimpleNamespace(lookup=lookup, own_speeds=speeds)


@pytest.mark.parametrize(
    ("slowness", "expected"),
    [
        ({"mult_int8": 1.0, "mult_int7": 0.8}, "mult_int7"),
        ({"mult_int8": 1.0, "mult_int7": 0.98}, "mult_int8"),
        ({"mult_int8": 1.0}, "mult_int8"),
        ({"mult_int7": 1.0}, "mult_int7"),
        ({}, "mult_int8"),
        # Rows of different minutes say the contrary of interleaved rounds.
        ({"mult_int8": 1.0, "mult_int7": 1.2, "own_speeds": {"mult_int7": 1.3}}, "mult_int7"),
        ({"mult_int8": 1.0, "mult_int7": 0.8, "own_speeds": {"mult_int7": 1.01}}, "mult_int8"),
        ({"mult_int8": 1.0, "mult_int7": 0.8, "own_speeds": {"shift_int8": 1.3}}, "mult_int7"),
    ],
)
def test_fewer_bits_are_taken_only_where_they_are_faster(recipe, slowness, expected, capsys):
    assert recipe.experts == FOR_ALL
    chosen = with_fastest_mult(recipe, _table(**slowness), Console())
    assert chosen.experts == FOR_ALL | {"mult": expected}
    assert f"{MULT_FASTEST}: {expected}" in " ".join(capsys.readouterr().out.split())
    assert with_fastest_mult(chosen, _table(), Console()) is chosen
    assert not capsys.readouterr().out


def test_a_variants_own_experts_are_written_out_as_well(recipe):
    own = {"mult": "mult_fp32", "mult_other": MULT_FASTEST}
    first = recipe.variants[-1].model_copy(update={"experts": own})
    both = recipe.model_copy(update={"experts": {"mult_a": "mult_fp32", "mult_b": "mult_bf16"}})
    both = both.model_copy(update={"variants": (first,)})
    assert both.asks_for_fastest
    chosen = written_out(both, "mult_int7")
    assert chosen.variants[0].experts == own | {"mult_other": "mult_int7"}
    assert chosen.experts == both.experts and not chosen.asks_for_fastest


def test_a_sweep_measures_each_form_that_may_be_chosen(recipe):
    forms = {workload.form for workload in recipe_workloads(recipe)}
    assert {"mult_int8", "mult_int7", "shift_int8"} <= forms
