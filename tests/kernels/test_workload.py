import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.forms import FORMS
from kernels.workload import Workload, WorkloadError, attention, linear

sizes = st.integers(1, 10_000)
linear_forms = st.sampled_from([name for name, form in FORMS.items() if form["w_layout"] == "nk"])


@given(linear_forms, sizes, sizes, sizes)
def test_a_workload_survives_json_and_knows_its_form(form, m, k, n):
    workload = linear(form, m, k, n)
    assert Workload.from_dict(workload.to_dict()) == workload
    assert (workload.form, workload.kind) == (form, "linear")
    assert workload.family == linear(form, 1, k, n)


@given(sizes, sizes, sizes, sizes, st.sampled_from(["pm1", "01"]))
def test_attention_products_chain(b, tokens, bits, n, alphabet):
    kv, qkv, both = attention(b, tokens, bits, n, alphabet)
    assert (kv.kind, qkv.kind, both.kind) == ("kv", "qkv", "attention")
    assert kv.tokens == qkv.tokens == both.tokens == tokens
    assert both.macs == kv.macs + qkv.macs
    # KᵀV is neither written nor read again.
    between = 2 * b * bits * n * 4
    assert both.traffic_bytes == kv.traffic_bytes + qkv.traffic_bytes - between
    assert (kv.m, kv.n) == (qkv.k, qkv.n)
    assert kv.macs == qkv.macs == b * tokens * bits * n


def test_keys_differ_wherever_workloads_differ():
    forms = [linear(form, 8, 16, 32) for form in FORMS if FORMS[form]["w_layout"] == "nk"]
    attentions = [
        workload
        for alphabet in ("pm1", "01")
        for dtype in ("float32", "bfloat16")
        for workload in attention(2, 8, 16, 32, alphabet, dtype)
    ]
    keys = [workload.key for workload in (*forms, *attentions)]
    assert len(set(keys)) == len(keys)


def test_forms_of_one_linear_share_its_product():
    assert linear("mult_fp32", 8, 16, 32).product == linear("shift_int8", 8, 16, 32).product


def test_shift_stores_a_quarter_of_the_bytes_of_fp32():
    shift, mult = linear("shift_int8", 1, 1024, 1024), linear("mult_fp32", 1, 1024, 1024)
    assert 3.9 < mult.weight_bytes / shift.weight_bytes < 4.1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"m": 0}, "m"),
        ({"k": -1}, "k"),
        ({"n": 1.5}, "n"),
        ({"m": True}, "m"),
        ({"primitive": "divide"}, "primitive"),
        ({"x_dtype": "float99"}, "x_dtype"),
        ({"alphabet": "pow2"}, "alphabet"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_impossible_workload_is_refused_by_its_key(change, key):
    with pytest.raises(WorkloadError) as error:
        Workload.from_dict(linear("mult_fp32", 2, 3, 4).to_dict() | change)
    assert error.value.key == key


def test_an_unknown_form_is_refused():
    with pytest.raises(WorkloadError, match="shift_int8"):
        linear("shift_int9", 1, 1, 1)
    with pytest.raises(WorkloadError, match="alphabet"):
        attention(1, 1, 1, 1, "ternary")
    with pytest.raises(WorkloadError, match="dtype"):
        attention(1, 1, 1, 1, dtype="float64")
