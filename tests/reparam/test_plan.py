"""Plans: the model's results from flat lists of launches, in memory that lives share."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reparam.plan
from kernels.build import get_threads, set_threads
from kernels.launches import noted
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed_mlps import DeployedMoE
from reparam.plan import Plan, launches_of, planned
from reparam.plan_memory import Life, offsets
from reparam.plan_trace import PlanError

LIVES = st.dictionaries(
    st.integers(0, 30),
    st.builds(
        lambda size, first, steps: Life(size, first, first + steps),
        st.integers(1, 500),
        st.integers(0, 20),
        st.integers(0, 10),
    ),
    max_size=30,
)


@given(LIVES)
def test_what_lives_at_the_same_time_shares_no_byte(lives):
    places, end = offsets(lives)
    assert places.keys() == lives.keys()
    for name, life in lives.items():
        assert places[name] % 64 == 0 and places[name] + life.size <= end
        for other, beside in lives.items():
            if other != name and life.meets(beside):
                apart = (
                    places[name] + life.size <= places[other]
                    or places[other] + beside.size <= places[name]
                )
                assert apart


def test_a_chain_of_layers_needs_room_for_two():
    chain = {step: Life(640, step, step + 1) for step in range(50)}
    assert offsets(chain)[1] == 2 * 640


@pytest.fixture
def two_threads():
    before = get_threads()
    set_threads(2)
    yield
    set_threads(before)


def _deployed(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    reparameterize_(model, ReparamConfig(attention="add"))
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8", mlp="moe"))
    return deploy(model)


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("vit_tiny_patch16_224", 32, {"depth": 2, "img_size": 32}),
        ("pvt_v2_b0", 64, {}),
    ],
)
@pytest.mark.parametrize("images", [1, 5])
def test_a_plan_gives_what_the_model_gives(two_threads, name, side, options, images):
    model = _deployed(name, **options)
    x = torch.randn(images, 3, side, side)
    plan = Plan(model, x)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn_like(x)
            # A code may fall on the other side where sums are cut otherwise.
            torch.testing.assert_close(plan(x), model(x), rtol=1e-3, atol=2e-2)


def test_each_way_gives_the_same(two_threads, monkeypatch):
    model = _deployed("vit_tiny_patch16_224", depth=2, img_size=32)
    x = torch.randn(5, 3, 32, 32)
    found, out = [], {}
    monkeypatch.setattr(Plan, "_seconds", lambda self, way, example: found.append(way) or 0.0)
    Plan(model, x)
    assert len(found) == 3  # all at once, one image and two images a thread
    for place, way in enumerate(found):
        out[place] = torch.empty(5, 5)
        for _ in range(3):
            way(x, out[place])
    with torch.no_grad():
        for each in out.values():
            torch.testing.assert_close(each, model(x), rtol=1e-3, atol=2e-2)
    assert get_threads() == 2


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_inference_mode_is_kept_by_each_thread(
    two_threads, monkeypatch, made_in_inference_mode, apart
):
    model, number = _deployed("vit_tiny_patch16_224", depth=1, img_size=32), itertools.count()
    monkeypatch.setattr(
        Plan, "_seconds", lambda self, way, example: next(number) * (-1 if apart else 1)
    )
    with torch.inference_mode(made_in_inference_mode):
        x = torch.randn(4, 3, 32, 32)
        plan = Plan(model, x)
    assert (plan.images_at_once is not None) == apart
    with torch.no_grad():
        expected = model(x)
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            torch.testing.assert_close(plan(x), expected, rtol=1e-3, atol=2e-2)
            assert plan(x).is_inference() == inference


def test_no_module_is_called_and_nothing_is_allocated_between_the_layers():
    x, found = torch.randn(1, 3, 32, 32), []
    for depth in (1, 3):
        model = _deployed("vit_tiny_patch16_224", depth=depth, img_size=32)
        plan = Plan(model, x)
        for part in model.modules():
            part.forward = None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            plan(x)
        found.append(sorted(event.name for event in seen.events()))
    # Torch's part is the same however many blocks there are.
    assert found[0] == found[1]
    assert not any(name.startswith("shiftadd") for name in found[0])


def test_weights_that_are_written_in_place_are_followed():
    model = _deployed("vit_tiny_patch16_224", depth=1, img_size=32)
    x = torch.randn(1, 3, 32, 32)
    plan, before = Plan(model, x), copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias.add_(1.0)
        torch.testing.assert_close(plan(x), before(x) + 1.0)
        # Those of our kernels as well: a router, which then sends all tokens to the last expert,
        # and that one's packed bias.
        (mixture,) = (part for part in model.modules() if isinstance(part, DeployedMoE))
        changed = plan(x)
        for tensor in (mixture.gate_bias, mixture.linears[-1].packed[2]):
            assert tensor.dtype == torch.float32
            tensor.add_(torch.linspace(-9.0, 9.0, tensor.numel()))
            previous, changed = changed, plan(x)
            assert not torch.equal(changed, previous)
            torch.testing.assert_close(changed, model(x), rtol=1e-3, atol=2e-2)


def test_any_layers_of_torch_can_be_in_it():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AvgPool2d(2)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(Plan(model, x)(x), model(x))


class _Chooses(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class _Drops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


class _GivesTwo(nn.Module):
    def forward(self, x):
        return x, x


class _Attends(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        q = x[:, None, :, None].expand(-1, 1, -1, 8)
        found = nn.functional.scaled_dot_product_attention(q, q + 1, q, dropout_p=self.dropout)
        return found.sum((1, 3))


class _Picks(nn.Module):
    """As many results as the values say: another input has others."""

    def forward(self, x):
        return x.index_add(0, torch.nonzero(x[:, 0] > 0).squeeze(1), x[x[:, 0] > 0])


class _Looks(nn.Module):
    """By integers: as many results as there are of those."""

    def forward(self, x):
        return x[torch.arange(len(x) - 1, -1, -1), :]


def test_what_only_might_be_random_or_of_any_size_is_planned():
    x = torch.randn(4, 3)
    for model in (_Attends(0.0), _Looks()):
        plan = Plan(model, torch.randn(4, 3))
        torch.testing.assert_close(plan(x), model(x))


@pytest.mark.parametrize("model", [_Chooses(), _Drops(), _GivesTwo(), _Attends(0.5), _Picks()])
def test_what_is_no_matter_of_shape_is_refused(model):
    x = torch.randn(4, 3)
    with pytest.raises(PlanError):
        Plan(model, x)
    with pytest.warns(UserWarning, match="not planned"):
        assert planned(model, x) is model


def test_callers_from_several_threads_get_each_their_own(two_threads):
    model = _deployed("vit_tiny_patch16_224", depth=1, img_size=32)
    plan = Plan(model, torch.randn(2, 3, 32, 32))
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(20)]
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(plan, inputs))
    with torch.no_grad():
        for x, out in zip(inputs, found):
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=2e-2)


def test_the_threads_that_are_set_stay_set(two_threads, monkeypatch):
    told, tell = [], reparam.plan.kernels_of_this_thread
    monkeypatch.setattr(
        reparam.plan, "kernels_of_this_thread", lambda count: told.append(count) or tell(count)
    )
    plan = Plan(nn.Linear(3, 4).eval(), torch.randn(1, 3))
    set_threads(1)
    told.clear()
    plan(torch.randn(1, 3))
    assert told == [2, 1]


def test_what_is_elsewhere_is_refused():
    with pytest.raises(PlanError, match="meta"):
        Plan(nn.Linear(3, 4).eval(), torch.empty(2, 3, device="meta"))


def test_an_input_of_another_shape_is_refused():
    plan = Plan(nn.Linear(3, 4).eval(), torch.randn(2, 3))
    with pytest.raises(PlanError, match=r"\(3, 3\), planned for \(2, 3\)"):
        plan(torch.randn(3, 3))


def test_a_layer_is_launched_as_in_a_plan():
    layer = deploy(nn.Sequential(_deployed("vit_tiny_patch16_224", depth=1, img_size=32).blocks[0]))
    launch = launches_of(layer, torch.randn(1, 5, 192))
    seen = []
    with noted(seen.append):
        launch()
    # Straight to the kernels: nobody is told.
    assert seen == []
