"""The cross-attention encoder, and the heads on it.

B   texts        L   tokens of a text        T   tokens of an image        C   width of the layers
"""

import copy

from torch import Tensor, nn

from openclip_ext.fusion.config import FusionConfig


class FusionEncoder(nn.Module):
    """Text tokens that attend to each other and to an image's tokens.

    A layer is `torch.nn.TransformerDecoderLayer` without a causal mask: self-attention over the text, cross-attention
    to the image, MLP; LayerNorms come first. Tokens of either tower pass a LayerNorm and a linear map to the layers'
    width. The first place of the result stands for the pair.

    Args:
        config: of the layers.
        image_width, text_width: of the towers' tokens.
        images: per text. With two, each layer is followed by a twin that looks at the second image.
    """

    def __init__(self, config: FusionConfig, image_width: int, text_width: int, images: int = 1) -> None:
        super().__init__()
        self.image_in, self.text_in = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.width)) for width in (image_width, text_width)
        )
        self.layers = nn.ModuleList([make_layer(config) for _ in range(config.layers)])
        self.twins = nn.ModuleList([copy.deepcopy(layer) for layer in self.layers]) if images == 2 else None
        self.norm = nn.LayerNorm(config.width)

    def forward(self, text: Tensor, attended: Tensor, *images: Tensor) -> Tensor:
        """(B, L, C).

        Args:
            text: (B, L, text_width).
            attended: (B, L), which places of the text there are.
            *images: (B, T, image_width) each, one, or two where there are twins.
        """
        x, absent = self.text_in(text), ~attended
        memories = [self.image_in(image) for image in images]
        for number, layer in enumerate(self.layers):
            x = layer(x, memories[0], tgt_key_padding_mask=absent)
            if self.twins is not None:
                x = self.twins[number](x, memories[1], tgt_key_padding_mask=absent)
        return self.norm(x)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of an encoder; twins that these lack start as the layers they follow."""
        if self.twins is None:
            weights = {name: value for name, value in weights.items() if not name.startswith("twins.")}
        if self.twins is not None and not any(name.startswith("twins.") for name in weights):
            own = {name: value for name, value in weights.items() if name.startswith("layers.")}
            weights = weights | {f"twins.{name.removeprefix('layers.')}": value for name, value in own.items()}
        self.load_state_dict(weights)


def make_layer(config: FusionConfig) -> nn.TransformerDecoderLayer:
    """One layer, newly initialised."""
    return nn.TransformerDecoderLayer(
        config.width, config.heads, round(config.mlp_ratio * config.width), config.dropout, activation="gelu",
        batch_first=True, norm_first=True,
    )  # fmt: skip


class WordHead(nn.Sequential):
    """(…, C) to scores of the vocabulary's ids (…, V), as BERT's: a linear map, GELU, LayerNorm, a linear map."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocabulary))


class ClassHead(nn.Sequential):
    """(B, C) to scores of classes by an MLP of one hidden layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
