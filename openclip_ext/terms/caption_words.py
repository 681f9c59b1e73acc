"""Caption words: a linear head names the words of the caption from the image alone, whatever the batch holds."""

import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext, require_vocabulary, require_widths
from openclip_ext.losses.words import Words
from openclip_ext.ops.gather import global_mean, sum_over_ranks
from openclip_ext.ops.precision import promoted
from openclip_ext.options import NoOptions
from openclip_ext.registry import LossSpec

OWNER = "loss term caption_words"


class CaptionWordsTerm(Loss):
    """`mean_i -sum_c y_ic log softmax(W x_i)_c` over the pairs i of the global batch and the V ids c of the vocabulary.

    x_i is the image tower's pooled output before the shared projection, and y_i the share that each word of caption i
    has, however often it stands there: in proportion to `max(0, log(D / (1 + df_c)))`, with df_c the number of the D
    captions seen so far, this batch's included, that hold word c. A caption without a word of positive weight adds 0.
    Special ids and padding are no words. Second views do not count.

    The head W, (V, width), is a parameter of this term: trained with the model, kept in the loss's state, absent from
    the model's. Counts are kept in the state too, and are the same on all ranks. No sum over pairs: time and memory
    are O(B V). In one's own loop, with CLIP's tokenizer and a tower of width 768:

        create_loss("clip", terms={"caption_words": {}}, image_trunk_dim=768,
                    vocab_size=49408, special_token_ids={49406, 49407}, end_token_id=49407)

    Source: SuperCLIP (Zhao et al., NeurIPS 2025, arXiv 2512.14480), read in a note on the paper only: that weights are
    cut at 0, and that a batch counts before it is weighed, are of this package.
    """

    captions: Tensor
    captions_with: Tensor

    def __init__(self, options: NoOptions, context: LossContext) -> None:
        super().__init__(options, context)
        width = require_widths(context, OWNER, "image_trunk").image_trunk
        vocabulary = require_vocabulary(context, OWNER)
        self.words = Words(vocabulary)
        self.head = nn.Linear(width or 0, vocabulary.size, bias=False)
        self.register_buffer("captions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("captions_with", torch.zeros(vocabulary.size, dtype=torch.int64))
        self._staged: tuple[Tensor, Tensor] | None = None

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_trunk_features: Tensor,
        text_tokens: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Pooled outputs of the image tower (B, width) and token ids of the captions (B, L).

        Returns:
            caption_words_loss: the global mean.

        Raises:
            UserError: `text_tokens` is no such tensor, or holds an id that the vocabulary does not.
        """
        self._require_tokens(text_tokens, len(image_features))
        words, is_word = self._words(text_tokens)
        self._staged = captions, captions_with = self._counted(words, is_word)
        (trunk,) = promoted(image_trunk_features)
        rarity = (captions.to(trunk.dtype) / (1 + captions_with)).log().clamp_min(0)
        weight = rarity[words] * is_word
        share = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        log_probability = self.head(trunk).log_softmax(1).gather(1, words)
        total = -(share * log_probability).sum()
        return {"caption_words_loss": global_mean(total, len(words), self.context.world_size)}

    def commit(self) -> None:
        """Keep the counts with this step's captions."""
        if self._staged is not None:
            captions, captions_with = self._staged
            self.captions.copy_(captions)
            self.captions_with.copy_(captions_with)
            self._staged = None

    def warm_start(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, text_tokens: Tensor,
        **extra: Tensor,
    ) -> None:  # fmt: skip
        """Count captions before training, so that the first words are weighed as the last."""
        self._require_tokens(text_tokens, len(image_features))
        self._staged = self._counted(*self._words(text_tokens))
        self.commit()

    def _words(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of each caption in ascending order, (B, L), and which of them are words that did not come before."""
        ids = tokens.masked_fill(~self.words.words(tokens), -1).sort(1).values
        is_new = ids.diff(dim=1, prepend=ids.new_full((len(ids), 1), -1)) > 0
        return ids.clamp_min(0), is_new

    def _counted(self, words: Tensor, is_word: Tensor) -> tuple[Tensor, Tensor]:
        """How many captions of all ranks there are up to now, and how many hold each word. A collective call."""
        new = torch.zeros_like(self.captions_with).scatter_add(0, words.flatten(), is_word.flatten().long())
        added = sum_over_ranks(torch.cat([new, new.new_tensor([len(words)])]), self.context.world_size)
        return self.captions + added[-1], self.captions_with + added[:-1]

    def _require_tokens(self, tokens: Tensor, pairs: int) -> None:
        if tokens.is_floating_point() or tokens.ndim != 2 or len(tokens) != pairs:
            kind = f"{str(tokens.dtype).removeprefix('torch.')} {tuple(tokens.shape)}"
            raise UserError(f"text_tokens: is {kind}; must be one row of token ids per pair, ({pairs}, L)")
        low, high = tokens.aminmax()
        size = self.words.size
        fix = f"and vocab_size={size}; give that of the tokenizer"
        if tokens.is_cuda:  # the device stops, so that the host need not wait for it
            torch._assert_async(
                (low >= 0) & (high < size), f"text_tokens: holds an id outside of the vocabulary, {fix}"
            )
        elif low < 0 or high >= size:
            raise UserError(f"text_tokens: holds the id {int(low if low < 0 else high)}, {fix}")


SPEC = LossSpec(
    name="caption_words",
    summary="names the caption's words from the image by a linear head, rare ones first",
    paper="Zhao et al., NeurIPS 2025",
    needs=frozenset({"text_tokens", "vocabulary", "trunk_features", "widths"}),
    build=CaptionWordsTerm,
)
