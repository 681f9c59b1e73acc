"""OpenCLIP 3.3: its attention with projections that can be wrapped. Imported only where that is wanted."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class LinearAttention(nn.Module):
    """What `nn.MultiheadAttention` computes in OpenCLIP's blocks, with both projections as layers that are called.

    There the input projection is a bare parameter, and the output projection's weight is read past its `forward`, so
    that neither can be wrapped. The parameters are shared with the module that this replaces.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first, self.dropout = attention.num_heads, attention.batch_first, attention.dropout
        self.in_proj = linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Self-attention: `key` and `value` are `query`, (B, L, D), or (L, B, D) without `batch_first`.

        `attn_mask`: None, (L, L), or (B * heads, L, L); added to the scores, or, if boolean, true for what is left out.
        """
        x = query if self.batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        parts = self.in_proj(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mask = ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
        if mask is not None and mask.ndim == 3:
            mask = mask.view(batch, self.num_heads, length, length)
        dropout = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).reshape(batch, length, width))
        return out if self.batch_first else out.transpose(0, 1), None


def linear(weight: Any, bias: Any) -> nn.Linear:
    """A layer of these parameters, which torch declares as `Tensor` in some of its modules; `bias` may be None."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer
