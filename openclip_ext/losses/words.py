"""Which token ids of a caption are words.

B   captions        L   length of their token ids
"""

import torch
from torch import Tensor, nn

from openclip_ext.losses.context import Vocabulary


class Words(nn.Module):
    """Tells words from special ids, and from padding behind a caption's end.

    Args:
        vocabulary: of the captions.
    """

    is_special: Tensor

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        is_special = torch.zeros(vocabulary.size, dtype=torch.bool)
        is_special[list(vocabulary.special_ids)] = True
        self.register_buffer("is_special", is_special, persistent=False)
        self.end_id = vocabulary.end_id

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return len(self.is_special)

    def words(self, tokens: Tensor) -> Tensor:
        """(B, L): which ids are words: neither special, nor a caption's end or behind it."""
        return ~self.is_special[tokens] & (self._ends(tokens).cumsum(1) == 0)

    def attended(self, tokens: Tensor) -> Tensor:
        """(B, L): what there is to be attended to: words, the caption's end, and the first place, which pools."""
        ends = self._ends(tokens)
        seen = self.words(tokens) | (ends & (ends.cumsum(1) == 1))
        seen[:, 0] = True
        return seen

    def _ends(self, tokens: Tensor) -> Tensor:
        """Where the id is that ends captions; nowhere if there is none."""
        return torch.zeros_like(tokens, dtype=torch.bool) if self.end_id is None else tokens == self.end_id
