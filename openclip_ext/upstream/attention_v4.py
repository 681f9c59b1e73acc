"""OpenCLIP 4: its attention with an input projection that can be wrapped. Imported only where that is wanted."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from openclip_ext.upstream.attention_v3 import linear


def is_replaceable(attention: Any) -> bool:
    """Whether this is OpenCLIP 4's `Attention` as its models have it: neither cosine nor scaled heads."""
    return (
        getattr(attention, "use_sdpa", False)
        and getattr(attention, "in_proj_weight", None) is not None
        and attention.logit_scale is None
        and attention.head_scale is None
    )


class LinearSelfAttention(nn.Module):
    """What `Attention` computes of one sequence, with its input projection, a bare parameter there, as a layer.

    All parts are shared with the module that this replaces, under their names.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.in_proj = linear(attention.in_proj_weight, attention.in_proj_bias)
        self.ln_q, self.ln_k, self.ln_inner = attention.ln_q, attention.ln_k, attention.ln_inner
        self.attn_drop, self.out_proj, self.out_drop = attention.attn_drop, attention.out_proj, attention.out_drop

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Self-attention, (B, L, D): `k_x` and `v_x` are `x`.

        `attn_mask` as of `scaled_dot_product_attention`, (L, L), or (B * heads, L, L).
        """
        batch, length, width = x.shape
        q, k, v = self.in_proj(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.reshape(batch, self.num_heads, length, length)
        dropout = self.attn_drop.p if self.training else 0.0
        out = scaled_dot_product_attention(
            self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask, dropout_p=dropout, scale=self.scale
        )
        out = self.ln_inner(out.transpose(1, 2).reshape(batch, length, width))
        return self.out_drop(self.out_proj(out))
