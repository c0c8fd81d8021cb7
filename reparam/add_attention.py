"""AddAttention: linear attention whose queries and keys are binary codes."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.coded_attention import CodedAttention
from reparam.hashing import SignHash, binarise

TOKEN_WINDOW = 9

_CARRIED = {"qkv", "q", "kv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop"}
# A linear attention costs the same for any number of keys: what shortens their list is dropped.
_SPATIAL_REDUCTION = {"pool", "sr", "norm", "act"}


class AddProducts(nn.Module):
    """The two products of linear attention, ``q·(kᵀ·v)`` with binary q and k.

    The one part of ``AddAttention`` that deployment replaces by kernels. Kernels see only the
    sign, so the L2 normalisation, which shapes the gradient, happens here and costs them nothing.
    It is to length √bits: a feature is then about as large as the code that it becomes, and the
    straight-through estimator has the right slope and clips what is beyond.

    Args:
        alphabet: ``pm1`` or ``01``.
    """

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sums of values selected by codes, not scaled.

        Args:
            q: Source of the query codes, fp32 ``(b * heads, tokens, bits)``; a bit is set where
                it is above 0.
            k: The same for the keys.
            v: ``(b * heads, tokens, head_dim)``.

        Returns:
            ``(b * heads, tokens, head_dim)``.
        """
        length = math.sqrt(q.shape[-1])
        q_codes = binarise(F.normalize(q, dim=-1) * length, self.alphabet)
        k_codes = binarise(F.normalize(k, dim=-1) * length, self.alphabet)
        return q_codes @ (k_codes.transpose(1, 2) @ v)

    def extra_repr(self) -> str:
        """Alphabet."""
        return f"alphabet={self.alphabet}"


def linear_angular(
    q: Tensor, k: Tensor, v: Tensor, add_products: nn.Module, token_conv: nn.Module
) -> tuple[Tensor, Tensor]:
    """Both terms of linear-angular attention: the normalised sums, and the convolved values.

    Args:
        q, k: Sources of the codes, ``(b, heads, tokens, bits)``.
        v: ``(b, heads, tokens, head_dim)``.
        add_products: ``AddProducts`` or what deployment made of it.
        token_conv: Depthwise convolution along the tokens.

    Returns:
        Two of ``(b, heads, tokens, head_dim)``.
    """
    tokens, bits = q.shape[-2:]
    sums = add_products(*(part.flatten(0, 1) for part in (q, k, v))).view_as(v)
    y = v / 2 + sums / (math.pi * bits * math.sqrt(tokens))
    return F.normalize(y, dim=-1), token_conv(v)


def token_convolution(heads: int) -> nn.Conv2d:
    """Depthwise convolution of ``(b, heads, tokens, head_dim)`` along the tokens; all zeros."""
    window = (TOKEN_WINDOW, 1)
    conv = nn.Conv2d(heads, heads, window, padding=(TOKEN_WINDOW // 2, 0), groups=heads, bias=False)
    nn.init.zeros_(conv.weight)
    return conv


class LinearCore(nn.Module):
    """Linear-angular attention as the core of an attention of any class.

    Args:
        heads: Heads; 1 where they are not told apart from the batch.
        alphabet: ``pm1`` or ``01``.
        hashing: What the codes are made by; None for the signs of the features.
        drop_bias: Whether position biases and masks, which a sum over all tokens cannot keep, are
            left out.
    """

    def __init__(
        self,
        heads: int,
        alphabet: str = "pm1",
        hashing: nn.Module | None = None,
        drop_bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.drop_bias = heads, drop_bias
        self.hashing: nn.Module = hashing or SignHash(alphabet)
        self.add_products: nn.Module = AddProducts(alphabet)
        self.token_conv = token_convolution(heads)
        self.gain = nn.Parameter(torch.ones(heads, 1, 1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Stands for ``scaled_dot_product_attention``: ``(..., tokens, head_dim)``.

        Raises:
            ValueError: If there is a bias or mask that is not to be dropped.
        """
        if is_causal or (attn_mask is not None and not self.drop_bias):
            raise ValueError("attn_mask: linear attention with codes cannot be masked")
        normed, convolved = self.terms(q, k, v)
        return (self.gain * normed + convolved).reshape(v.shape)

    def terms(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As ``linear_angular``, from queries and keys of any batch."""
        q_source, k_source = self.hashing(q, k)
        q, k, v = (
            part.reshape(-1, self.heads, *part.shape[-2:]) for part in (q_source, k_source, v)
        )
        return linear_angular(q, k, v, self.add_products, self.token_conv)


class AddAttention(nn.Module):
    """Linear-angular self-attention with binary codes, one bit for each feature of a head.

    ``x = V/2 + (1/π) · q(kᵀV)``, ``x/‖x‖`` for each token and head, plus a depthwise convolution
    of V along the tokens, then the projection. Codes are scaled by 1/√bits each, as if they were
    of unit length, and the sum over the tokens by 1/√tokens: for codes that do not correlate,
    both terms then have the same magnitude at any number of tokens. A class token is a token.

    The convolution starts at zero, so that a pre-trained projection first meets attention alone.

    Args:
        dim: Features of a token.
        num_heads: Heads.
        head_dim: Features of a head, which is also the number of code bits.
        alphabet: ``pm1`` or ``01``.
        qkv_bias, proj_bias: Whether the linears have a bias.
        hashing: What the codes are made by; None for the signs of the features.

    Source:
        ShiftAddViT, arXiv 2306.06446 (released code, LinAngular); Castling-ViT, arXiv 2211.10526.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        alphabet: str = "pm1",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        hashing: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.alphabet = num_heads, head_dim, alphabet
        self.qkv: nn.Module = nn.Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.hashing: nn.Module = hashing or SignHash(alphabet)
        self.add_products: nn.Module = AddProducts(alphabet)
        self.token_conv = token_convolution(num_heads)
        self.proj: nn.Module = nn.Linear(num_heads * head_dim, dim, bias=proj_bias)
        self.proj_drop: nn.Module = nn.Dropout(0.0)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, alphabet: str = "pm1", hashing: nn.Module | None = None
    ) -> AddAttention:
        """Takes over the weights of a softmax attention; it itself stays as it is.

        Separate linears for q and kv become one. Spatial reduction is dropped: keys and values
        then come from all tokens.

        Args:
            attention: With ``num_heads``, ``proj`` and ``qkv``, or ``q`` and ``kv``.
            alphabet: ``pm1`` or ``01``.
            hashing: What the codes are made by; None for the signs of the features.

        Raises:
            ValueError: With what cannot be taken over.
        """
        if reason := refusal(attention):
            raise ValueError(reason)
        parts = _linears(attention, ("qkv", "q", "kv"))
        (proj,) = _linears(attention, ("proj",))
        heads = cast(int, attention.num_heads)
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
        made = cls(
            weight.shape[1],
            heads,
            proj.in_features // heads,
            alphabet,
            qkv_bias=bias is not None,
            proj_bias=proj.bias is not None,
            hashing=hashing,
        ).to(weight)
        made.qkv.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        made.proj.load_state_dict(proj.state_dict())
        for name in ("q_norm", "k_norm", "proj_drop"):
            if hasattr(attention, name):
                setattr(made, name, getattr(attention, name))
        return made.train(attention.training)

    def forward(
        self,
        x: Tensor,
        feat_size: object = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attends among all tokens.

        Args:
            x: ``(b, tokens, dim)``.
            feat_size: Given by pyramid models, not needed.
            attn_mask, is_causal: Given by timm's blocks; a sum over all tokens knows no mask.

        Returns:
            ``(b, tokens, dim)``.

        Raises:
            ValueError: If there is a mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask: linear attention with codes cannot be masked")
        normed, convolved = linear_angular(*self.heads(x), self.add_products, self.token_conv)
        y = (normed + convolved).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(y))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sources of the codes of queries and keys, and values, ``(b, heads, tokens, …)``."""
        b, tokens, _ = x.shape
        split = self.qkv(x).reshape(b, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return *self.hashing(self.q_norm(q), self.k_norm(k)), v


def is_softmax_attention(module: nn.Module) -> bool:
    """Whether a module is built like timm's self-attention, whatever its class."""
    has_inputs = hasattr(module, "qkv") or (hasattr(module, "q") and hasattr(module, "kv"))
    built_alike = has_inputs and hasattr(module, "proj") and hasattr(module, "num_heads")
    return built_alike and not isinstance(module, AddAttention | CodedAttention)


def refusal(attention: nn.Module) -> str | None:
    """Why ``AddAttention`` cannot take over an attention; None if it can.

    A position bias, a gate or a query of its own would be lost silently otherwise.
    """
    for name in ("qkv", "q", "kv", "proj"):
        part = getattr(attention, name, None)
        if part is not None and type(part) is not nn.Linear:
            return f"{name} is {type(part).__name__}, not nn.Linear"
    (proj,) = _linears(attention, ("proj",))
    inputs = _linears(attention, ("qkv", "q", "kv"))
    if sum(part.out_features for part in inputs) != 3 * proj.in_features:
        return "queries, keys and values differ in size"
    if len({part.bias is None for part in inputs}) > 1:
        return "only some of q and kv have a bias"
    known = _CARRIED | (_SPATIAL_REDUCTION if hasattr(attention, "sr") else set())
    own = [name for name, _ in attention.named_parameters(recurse=False)]
    lost = own + [
        name
        for name, child in attention.named_children()
        if name not in known and not isinstance(child, nn.Identity | nn.Dropout)
    ]
    return f"{', '.join(lost)} cannot be taken over" if lost else None


def dropped_parts(attention: nn.Module) -> tuple[str, ...]:
    """Names of the spatial-reduction modules that ``from_attention`` leaves behind."""
    if not hasattr(attention, "sr"):
        return ()
    return tuple(name for name, _ in attention.named_children() if name in _SPATIAL_REDUCTION)


def _linears(attention: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    return [getattr(attention, name) for name in names if hasattr(attention, name)]
