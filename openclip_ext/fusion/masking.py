"""Which tokens of a caption are words, and which of them are hidden, to be guessed from the rest and the image.

B   captions        L   length of their token ids
"""

import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.losses.context import Vocabulary
from openclip_ext.ops.counter_random import uniform

#: Of hidden words: shown as a gap, and as any other word; the rest is left to be seen.
GAP, OTHER = 0.8, 0.1


class Masking(nn.Module):
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

    is_special: Tensor

    def __init__(self, vocabulary: Vocabulary, share: float, mask_id: int | None = None) -> None:
        super().__init__()
        is_special = torch.zeros(vocabulary.size, dtype=torch.bool)
        is_special[list(vocabulary.special_ids)] = True
        self.register_buffer("is_special", is_special, persistent=False)
        self.end_id, self.share = vocabulary.end_id, share
        if mask_id is not None and mask_id >= vocabulary.size:
            raise UserError(f"--fusion: mask_id={mask_id} is outside of the vocabulary of {vocabulary.size} ids")
        if mask_id is None:
            mask_id = vocabulary.mask_id
        self.mask_id = int((~is_special).nonzero().max()) if mask_id is None else mask_id

    def words(self, tokens: Tensor) -> Tensor:
        """(B, L): which ids are words, and neither special nor behind the caption's end."""
        return ~self.is_special[tokens] & ~self._behind_end(tokens)

    def attended(self, tokens: Tensor) -> Tensor:
        """(B, L): what there is to be attended to: words, the caption's end, and the first place, which pools."""
        seen = self.words(tokens)
        if self.end_id is not None:
            seen |= (tokens == self.end_id) & ~self._behind_end(tokens)
        seen[:, 0] = True
        return seen

    def mask(self, tokens: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Captions with words hidden, and which are, (B, L) each.

        Args:
            tokens: (B, L) int64.
            seeds: (B,) int64, a number of each caption's own.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hide, kind, which = (uniform(seeds[:, None], places, stream=stream) for stream in range(3))
        hidden = self.words(tokens) & (hide < self.share)
        other = (which * len(self.is_special)).long().clamp_max(len(self.is_special) - 1)
        other = torch.where(self.is_special[other], self.mask_id, other)
        shown = torch.where(kind < GAP, self.mask_id, torch.where(kind < GAP + OTHER, other, tokens))
        return torch.where(hidden, shown, tokens), hidden

    def _behind_end(self, tokens: Tensor) -> Tensor:
        if self.end_id is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        is_end = tokens == self.end_id
        return (is_end.cumsum(1) - is_end.long()) > 0
