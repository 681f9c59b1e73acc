"""The answer decoder of visual question answering: it writes answers, and says how likely each one of a list is.

B   questions      L   tokens of a question      A   answers      M   tokens of an answer      C   width
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from openclip_ext.fusion.config import FusionConfig
from openclip_ext.fusion.encoder import make_layer
from openclip_ext.ops.precision import promoted


class AnswerDecoder(nn.Module):
    """Tokens of an answer that see those before them, and the question fused with its image.

    Layers are those of the encoder with a causal mask. The first token of an answer, where every one begins, is given.
    Scores of ids are products with the embedding of ids.

    Args:
        config: of the layers.
        vocabulary: V, ids run from 0 to V - 1.
        length: M, of the longest answer.
    """

    def __init__(self, config: FusionConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.ids = nn.Embedding(vocabulary, config.width)
        self.places = nn.Embedding(length, config.width)
        for table in (self.ids, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList([make_layer(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(config.width)

    def forward(self, fused: Tensor, attended: Tensor, answers: Tensor) -> Tensor:
        """Scores of the next id, (B, M, V), after each of the tokens of one answer per question, (B, M).

        Args:
            fused: (B, L, C).
            attended: (B, L), which places of the question there are.
            answers: (B, M).
        """
        length = answers.shape[1]
        x = self.ids(answers) + self.places.weight[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, fused, tgt_mask=later, memory_key_padding_mask=~attended)
        return self.norm(x) @ self.ids.weight.T

    def log_likelihood(self, fused: Tensor, attended: Tensor, answers: Tensor, said: Tensor) -> Tensor:
        """(B,): log probability of one answer (B, M) per question, of its tokens after the first that are `said`."""
        (scores,) = promoted(self(fused, attended, answers[:, :-1]))
        losses = cross_entropy(scores.flatten(0, 1), answers[:, 1:].flatten(), reduction="none")
        return -(losses.view(len(answers), -1) * said[:, 1:]).sum(1)

    @torch.no_grad()
    def rank(self, fused: Tensor, attended: Tensor, answers: Tensor, said: Tensor, candidates: int = 128) -> Tensor:
        """(B,): the most likely of A answers (A, M), among the `candidates` whose first words are likeliest."""
        begin = answers[:1, :1].expand(len(fused), 1)
        first = self(fused, attended, begin)[:, 0].float().log_softmax(1)[:, answers[:, 1]]
        chosen = first.topk(min(candidates, len(answers)), dim=1).indices
        scores = torch.stack(
            [self.log_likelihood(fused, attended, answers[one], said[one]) for one in chosen.unbind(1)], dim=1
        )
        return chosen.gather(1, scores.argmax(1, keepdim=True))[:, 0]
