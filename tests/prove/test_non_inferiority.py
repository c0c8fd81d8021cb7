import pytest
from non_inferiority import differences, image_differences, verdict

from reparam.ablation_results import AblationRow, AblationUnit


def unit(variant, seed, fold, correct, shift_share=None):
    none = dict.fromkeys(
        name for name, field in AblationRow.model_fields.items() if field.annotation is not str
    )
    row = AblationRow.model_construct(
        **none
        | {
            "variant": variant,
            "seed": seed,
            "fold": fold,
            "top1": 100 * sum(correct) / len(correct),
            "shift_share": shift_share,
        }
    )
    return AblationUnit.model_construct(identity={}, row=row, correct=correct)


def pairs(lost, shift_share=0.5, images=400):
    """Five folds of three seeds; the variant loses ``lost`` images in each run."""
    found = []
    for fold in range(5):
        for seed in range(3):
            wrong = [(i * 7 + seed) % images < lost + seed - 1 for i in range(images)]
            original = unit("original", seed, fold, [True] * images)
            changed = unit("moe", seed, fold, [not w for w in wrong], shift_share)
            found.append((original, changed))
    return found


def test_differences_by_run_and_by_image():
    found = pairs(lost=4)
    assert sorted(set(differences(found))) == [-1.25, -1.0, -0.75]
    by_image = image_differences(found)
    assert len(by_image) == 5 * 400
    assert sum(by_image) / len(by_image) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("lost", "share", "margin", "shown"),
    [(1, 0.5, 0.5, True), (4, 0.5, 0.5, False), (4, 0.5, 2.0, True), (1, 0.2, 0.5, False)],
)
def test_it_takes_both_bounds_and_the_shifts(lost, share, margin, shown):
    assert verdict(pairs(lost, share), margin)[0] is shown


def test_one_run_shows_nothing():
    assert not verdict(pairs(0)[:1], 0.5)[0]
