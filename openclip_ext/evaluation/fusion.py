"""What a fusion model answers, and how it ranks pairs again."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_ext.data.questions import Question
from openclip_ext.errors import RankError, UserError
from openclip_ext.evaluation.datasets.captioned import CaptionedFiles, CaptionedShards, loader_of
from openclip_ext.evaluation.datasets.rows import opened
from openclip_ext.evaluation.loading import LoadedModel
from openclip_ext.evaluation.metrics.retrieval import score_metrics
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.fusion.loading import Matcher, load_head
from openclip_ext.fusion.model import FusionModel
from openclip_ext.fusion.tasks import TaskObjective


@torch.no_grad()
def predictions(
    model: LoadedModel, content: dict, rows: Sequence[Question], names: Sequence[str], batch_size: int, ranks: Ranks
) -> list[str]:
    """What the task's head of a checkpoint says to each question, one of `names`.

    Of several ranks each takes every so many batches, and the first has all.

    Raises:
        UserError: a picture that cannot be opened.
    """
    fusion, head = _fusion(model, content)
    assert isinstance(head, TaskObjective)
    own = []
    starts = range(ranks.rank * batch_size, len(rows), ranks.world_size * batch_size)
    for start in tqdm(starts, desc=head.task, unit="batch", disable=not ranks.first, leave=False):
        part = rows[start : start + batch_size]
        tokens = model.tokenizer([row.text for row in part]).to(model.device)
        images = torch.stack([_pictures(model, row.pictures) for row in part]).to(model.device, model.dtype)
        with model.autocast():
            out = fusion(images, tokens)
        own.append(head.predict(tokens, out["image_states"], out["text_states"]).cpu())
    return [names[number] for batch in ranks.in_turn(own) for number in batch.tolist()]


def _pictures(model: LoadedModel, paths: Sequence[str]) -> Tensor:
    pictures = []
    for path in paths:
        picture = opened(path)
        if isinstance(picture, RankError):
            raise picture
        pictures.append(model.transform(picture))
    return pictures[0] if len(pictures) == 1 else torch.stack(pictures)


def _fusion(model: LoadedModel, content: dict) -> tuple[FusionModel, TaskObjective | Matcher]:
    fusion = FusionModel(model.model).eval()
    return fusion, load_head(content, model.tokenizer, fusion.state_widths, model.device, model.autocast)


@torch.no_grad()
def reranked_metrics(
    model: LoadedModel, content: dict, pairs: CaptionedFiles | CaptionedShards, candidates: int, batch_size: int,
    workers: int, ranks: Ranks,
) -> tuple[dict[str, float], int, int]:  # fmt: skip
    """`score_metrics` where the first candidates of each query are ranked before others, by the odds of a match.

    Tokens of all pictures and captions are kept in the memory of the CPU. Only the first rank works.

    Returns:
        The metrics, and the numbers of pictures and of texts.

    Raises:
        UserError: a picture or caption that cannot be read.
    """
    if not ranks.first:
        return {}, 0, 0
    fusion, matcher = _fusion(model, content)
    assert isinstance(matcher, Matcher)
    parts = list(_encoded(model, fusion, pairs, batch_size, workers))
    if not parts:
        raise UserError(f"{pairs.files[0]}: holds no sample")
    image, text, states, text_states, tokens, owner = (torch.cat(column) for column in zip(*parts, strict=True))
    scores = image @ text.T
    found = []
    for way in range(2):
        table = (scores if way == 0 else scores.T).clone()
        chosen = table.topk(min(candidates, table.shape[1]), dim=1).indices
        for query in tqdm(range(len(table)), desc="ranked again", unit="query", leave=False, disable=None):
            for part in chosen[query].split(batch_size):
                of_query = torch.full_like(part, query)
                images, texts = (of_query, part) if way == 0 else (part, of_query)
                placed = (x.to(model.device) for x in (tokens[texts], text_states[texts], states[images]))
                with model.autocast():
                    odds = matcher(*placed)
                table[query, part] = 2 + odds.double().sigmoid().cpu().to(table.dtype)  # before all cosines
        found.append(table)
    return score_metrics(found[0], found[1], owner), len(image), len(text)


def _encoded(
    model: LoadedModel, fusion: FusionModel, pairs: Any, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, ...]]:
    """By batch, on the CPU: features of pictures and of captions, their tokens, ids, and each caption's picture."""
    done = 0
    for batch in loader_of(model, pairs, batch_size, workers):
        if isinstance(batch, UserError):
            raise batch
        pictures, tokens, owner, _ = batch
        images = pictures.to(model.device, model.dtype)
        # A tower is run on its own input; the other one gets as few of its kind as it takes.
        with model.autocast():
            of_images = fusion(images, tokens[:1].to(model.device))
            of_texts = [fusion(images[:1], part.to(model.device)) for part in tokens.split(batch_size)]
        columns = (
            of_images["image_features"].double(),
            torch.cat([out["text_features"].double() for out in of_texts]),
            of_images["image_states"],
            torch.cat([out["text_states"] for out in of_texts]),
        )
        yield (*(x.cpu() for x in columns), tokens, owner + done)
        done += len(pictures)
