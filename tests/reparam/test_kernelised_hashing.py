import timm
import torch

from reparam.add_attention import AddAttention
from reparam.convert import ReparamConfig, reparameterize_
from reparam.hashing import SignHash
from reparam.kernelised_hashing import KernelisedHash, pair_targets, refit_hashing_

CONFIG = ReparamConfig(attention="add", hashing="kernelised", hash_bits=8)


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=2
    )


def heads(seed=0):
    """Queries and keys whose attention does not follow from the signs of their features."""
    torch.manual_seed(seed)
    return torch.rand(2, 2, 40, 8) * 3, torch.rand(2, 2, 40, 8) * 3


def separation(hashing, q, k):
    """Share of equal bits in the pairs attended to most, less that in those attended to least."""
    q_bits, k_bits = (source > 0 for source in hashing(q, k))
    equal = (q_bits[..., :, None, :] == k_bits[..., None, :, :]).float().mean(-1)
    target = pair_targets(q @ k.transpose(-2, -1))
    return float(equal[target > 0].mean() - equal[target < 0].mean())


def test_pairs_are_the_top_and_bottom_of_each_query():
    scores = torch.randn(2, 5, 30)
    target = pair_targets(scores)
    assert ((target == 1).sum(-1) == 10).all() and ((target == -1).sum(-1) == 10).all()
    lowest = torch.where(target == 1, scores, torch.inf).amin(-1)
    assert (lowest > torch.where(target == 0, scores, -torch.inf).amax(-1)).all()
    assert (pair_targets(torch.randn(1, 3, 4)).abs().sum(-1) == 4).all()


def test_fitted_codes_follow_the_attention_map_better_than_random_ones_and_signs():
    q, k = heads()
    hashing = KernelisedHash(2, 8, bits=16)
    random = separation(hashing, q, k)
    hashing.fit_(q, k)
    fitted = separation(hashing, q, k)
    assert fitted > 0.15 and fitted > random + 0.1
    assert fitted > separation(SignHash("01"), q, k)
    # Others from the same distribution, which were not fitted to.
    assert separation(hashing, *heads(1)) > 0.5 * fitted


def test_equal_seeds_give_equal_functions_and_the_state_dict_holds_them():
    q, k = heads()
    first, second = KernelisedHash(2, 8), KernelisedHash(2, 8)
    first.fit_(q, k)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(q, k)[0], second(q, k)[0])
    second.fit_(q, k)
    assert torch.equal(first.weight, second.weight)


def test_codes_have_their_own_number_of_bits_in_linear_attention():
    model = vit()
    example = torch.randn(2, 3, 32, 32)
    done = reparameterize_(model, CONFIG, example=example)
    attention = model.blocks[0].attn
    assert isinstance(attention, AddAttention) and isinstance(attention.hashing, KernelisedHash)
    seen = []
    attention.add_products.register_forward_pre_hook(lambda m, args: seen.append(args))
    model(example).square().sum().backward()
    q, k, v = seen[0]
    assert q.shape[-1] == k.shape[-1] == 8 and v.shape[-1] == attention.head_dim
    assert attention.qkv.weight.grad.chunk(3)[0].abs().sum() > 0
    assert "8 bits by kernelised hashing" in done.converted["blocks.0.attn"]
    assert "not fitted" in reparameterize_(vit(), CONFIG).converted["blocks.0.attn"]


def test_refitting_follows_the_queries_and_leaves_all_else():
    model = vit().train()
    example = torch.randn(2, 3, 32, 32)
    reparameterize_(model, CONFIG, example=example)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:16] *= -1
    assert refit_hashing_(model, example) == ("blocks.0.attn.hashing", "blocks.1.attn.hashing")
    after = model.state_dict()
    assert not torch.equal(
        before["blocks.0.attn.hashing.weight"], after["blocks.0.attn.hashing.weight"]
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("hashing" in name or name == "blocks.0.attn.qkv.weight" for name in changed)
    assert model.training and refit_hashing_(timm.create_model("resnet10t"), example) == ()
