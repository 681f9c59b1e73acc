"""Which words of a caption are hidden, to be guessed from the rest and the image.

B   captions        L   length of their token ids
"""

import torch
from torch import Tensor

from openclip_ext.errors import UserError
from openclip_ext.losses.context import Vocabulary
from openclip_ext.losses.words import Words
from openclip_ext.ops.counter_random import uniform

#: Of hidden words: shown as a gap, and as any other word; the rest is left to be seen.
GAP, OTHER = 0.8, 0.1


class Masking(Words):
    """Hides words of captions, as BERT does (Devlin et al., NAACL 2019).

    Every word is hidden with probability `share`; of these 80 % become `mask_id`, 10 % a random id, and 10 % stay. All
    draws are a function of a caption's seed and of the place in it, so they are the same on any rank, in any batch and
    when a step is computed again.

    Args:
        vocabulary: of the captions.
        share: of words.
        mask_id: None: the vocabulary's, or where it has none the largest id that is no special one.

    Raises:
        UserError: `mask_id` is outside of the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, share: float, mask_id: int | None = None) -> None:
        super().__init__(vocabulary)
        self.share = share
        if mask_id is not None and mask_id >= vocabulary.size:
            raise UserError(f"--fusion: mask_id={mask_id} is outside of the vocabulary of {vocabulary.size} ids")
        if mask_id is None:
            mask_id = vocabulary.mask_id
        self.mask_id = int((~self.is_special).nonzero().max()) if mask_id is None else mask_id

    def mask(self, tokens: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Captions with words hidden, and which are, (B, L) each.

        Args:
            tokens: (B, L) int64.
            seeds: (B,) int64, a number of each caption's own.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hide, kind, which = (uniform(seeds[:, None], places, stream=stream) for stream in range(3))
        hidden = self.words(tokens) & (hide < self.share)
        other = (which * self.size).long().clamp_max(self.size - 1)
        other = torch.where(self.is_special[other], self.mask_id, other)
        shown = torch.where(kind < GAP, self.mask_id, torch.where(kind < GAP + OTHER, other, tokens))
        return torch.where(hidden, shown, tokens), hidden
