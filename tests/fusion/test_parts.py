"""Masking, hard negatives, the encoder, momentum copies and tokens of towers, each against a slow reference."""

import contextlib
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fusion_models import CONFIG, VOCABULARY, outputs, pretraining
from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.fusion.answers import AnswerDecoder
from openclip_ext.fusion.config import make_config, read_config, require_same
from openclip_ext.fusion.encoder import FusionEncoder
from openclip_ext.fusion.masking import Masking
from openclip_ext.fusion.matching import draw_negatives
from openclip_ext.fusion.tasks import TaskObjective, assigned
from openclip_ext.losses import LossContext, Vocabulary
from openclip_ext.losses.base import total_loss
from openclip_ext.state.momentum import MomentumCopy
from towers import TOWERS, inputs, tower_model


def captions(count, length=12, seed=0):
    """Token ids: 62 begins, words, 63 ends, and 0 pads."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 60, (count, length), generator=generator)
    tokens[:, 0] = 62
    ends = torch.randint(3, length, (count,), generator=generator)
    for row, end in zip(tokens, ends, strict=True):
        row[end], row[end + 1 :] = 63, 0
    return tokens


# Masking.


def test_words_are_hidden_as_in_bert():
    masking, tokens = Masking(VOCABULARY, 0.15), captions(4000)
    shown, hidden = masking.mask(tokens, torch.arange(4000))
    for row, (ids, seen) in enumerate(zip(tokens.tolist(), shown.tolist(), strict=True)):
        end = ids.index(63)
        assert not hidden[row, 0] and not hidden[row, end:].any()  # begin, end and padding are no words
        assert [s for s, h in zip(seen, hidden[row], strict=True) if not h] == [
            t for t, h in zip(ids, hidden[row], strict=True) if not h
        ]
    words = masking.words(tokens)
    assert hidden.sum() / words.sum() == pytest.approx(0.15, abs=0.01)
    became, was = shown[hidden], tokens[hidden]
    gaps, same = became == masking.mask_id, became == was
    assert masking.mask_id == 61  # the largest that is not special
    assert gaps.float().mean() == pytest.approx(0.8 + 0.1 / 64 * 4, abs=0.02)  # special ones drawn become gaps
    assert (same & ~gaps).float().mean() == pytest.approx(0.1 + 0.1 / 64, abs=0.02)
    assert not torch.isin(became, torch.tensor([0, 62, 63])).any()


def test_what_is_hidden_is_a_function_of_the_captions_seed():
    masking, tokens, seeds = Masking(VOCABULARY, 0.5), captions(64), torch.arange(64)
    order = torch.randperm(64)
    alone = masking.mask(tokens, seeds)
    for one, other in zip(masking.mask(tokens[order], seeds[order]), alone, strict=True):
        assert torch.equal(one, other[order])
    assert not torch.equal(masking.mask(tokens, seeds + 1000)[1], alone[1])


def test_captions_without_an_end_id_are_told_by_special_ids():
    masking = Masking(Vocabulary(64, frozenset({0, 1, 2})), 0.5, mask_id=3)
    tokens = torch.tensor([[1, 7, 8, 2, 0, 0]])
    assert masking.words(tokens).tolist() == [[False, True, True, False, False, False]]
    assert masking.attended(tokens).tolist() == [[True, True, True, False, False, False]]
    assert Masking(Vocabulary(64, frozenset({0, 4}), mask_id=4), 0.5).mask_id == 4
    with pytest.raises(UserError, match="mask_id=64 is outside of the vocabulary of 64"):
        Masking(VOCABULARY, 0.5, mask_id=64)


# Negatives.


def test_negatives_follow_the_softmax_over_wrong_pairs_with_other_captions():
    image, text = (normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    tokens, scale = captions(6), torch.tensor(3.0)
    tokens[4] = tokens[1]
    counts = torch.zeros(2, 6, 6)
    draws = 3000
    for draw in range(draws):
        found = draw_negatives(image, text, scale, tokens, torch.arange(6) + 1000 * draw, rank=0, world_size=1)
        assert found.exist.all()
        for way, chosen in enumerate((found.text_of_image, found.image_of_text)):
            counts[way, torch.arange(6), chosen] += 1
    for way, scores in enumerate((scale * image @ text.T, scale * text @ image.T)):
        for row in range(6):
            weights = [0.0 if torch.equal(tokens[row], tokens[j]) else math.exp(scores[row, j]) for j in range(6)]
            expected = [weight / sum(weights) for weight in weights]
            assert (counts[way, row] / draws).tolist() == pytest.approx(expected, abs=0.04)
            assert counts[way, row, row] == 0


def test_negatives_do_not_depend_on_the_order_of_pairs():
    image, text = (normalize(torch.randn(9, 4), dim=1) for _ in range(2))
    tokens, seeds, order = captions(9), torch.arange(9) + 7, torch.randperm(9)
    ranks = {"rank": 0, "world_size": 1}
    found = draw_negatives(image, text, torch.tensor(9.0), tokens, seeds, **ranks)
    other = draw_negatives(image[order], text[order], torch.tensor(9.0), tokens[order], seeds[order], **ranks)
    assert torch.equal(order[other.text_of_image], found.text_of_image[order])
    assert torch.equal(order[other.image_of_text], found.image_of_text[order])


def test_where_all_captions_are_one_there_is_no_negative():
    image, text = (normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    tokens = captions(1).expand(3, -1)
    found = draw_negatives(image, text, torch.tensor(9.0), tokens, torch.arange(3), rank=0, world_size=1)
    assert not found.exist.any()


# The objective.


def test_the_pre_training_loss_is_that_of_a_loop_over_pairs():
    model, objective, batch = pretraining(pairs=5, distill="0.3", dropout=0.0)
    found = outputs(model, objective, batch)
    expected = slow_pre_training(model, objective, batch, share=0.3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


def slow_pre_training(model, objective, batch, share):
    """One pair at a time, through OpenCLIP's own functions where it has them."""
    clip, image, text, seeds = model.model, batch["image"], batch["text"], batch["row_seeds"]
    copy = model.momentum_encoder.average
    scale = clip.logit_scale.exp()
    v, t = clip.encode_image(image, normalize=True), clip.encode_text(text, normalize=True)
    v_m, t_m = copy.encode_image(image, normalize=True), copy.encode_text(text, normalize=True)
    labels = torch.arange(len(v))
    contrast = sum(
        cross_entropy(scale * a @ b.T, labels) + cross_entropy(scale * b @ a.T, labels)
        for a, b in ((v, t_m.detach()), (v_m.detach(), t))
    )
    end = [row.tolist().index(63) for row in text]

    def fused(encoder, towers, row, ids, place):
        pictures = tokens_of(towers.visual.transformer, towers.encode_image, image[row : row + 1])
        words = tokens_of(towers.transformer, towers.encode_text, ids[None])
        return encoder(words[:, : place + 1], torch.ones(1, place + 1, dtype=torch.bool), pictures)[0]

    wrong = draw_negatives(v, t, scale, text, seeds, rank=0, world_size=1)
    total = 0
    for row in range(len(v)):
        j, k = wrong.text_of_image[row], wrong.image_of_text[row]
        for picture, caption, match in ((row, row, 1), (row, j, 0), (k, row, 0)):
            pooled = fused(objective.encoder, clip, picture, text[caption], end[caption])[0]
            total = total + cross_entropy(objective.matching(pooled)[None], torch.tensor([match]))
    shown, hidden = objective.masking.mask(text, seeds)
    losses = []
    encoder_m, head_m = objective.momentum.average
    for row in range(len(v)):
        scores = objective.words(fused(objective.encoder, clip, row, shown[row], end[row]))
        targets = head_m(fused(encoder_m, copy, row, shown[row], end[row])).softmax(-1).detach()
        for place in hidden[row].nonzero()[:, 0].tolist():
            log = scores[place].log_softmax(-1)
            losses.append(-(1 - share) * log[text[row, place]] - share * (targets[place] * log).sum())
    return {
        "contrastive_loss": contrast / 4,
        "matching_loss": total / (3 * len(v)),
        "words_loss": sum(losses) / len(losses),
    }


def tokens_of(module, encode, x):
    """What a module of a tower puts out while the tower encodes."""
    seen = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encode(x)
    handle.remove()
    return seen[0]


def test_every_parameter_learns_and_no_gradient_reaches_the_momentum_copies():
    model, objective, batch = pretraining(pairs=5)
    total_loss(outputs(model, objective, batch)).backward()
    copies = {id(p) for part in (model.momentum_encoder, objective.momentum) for p in part.parameters()}
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        assert (parameter.grad is None) == (id(parameter) in copies), name


def test_the_copy_of_the_encoder_follows_with_each_commit():
    _, objective, _ = pretraining(pairs=3)
    parameter = objective.encoder.norm.weight
    copy = objective.momentum.average[0].norm.weight
    expected = copy.clone()
    for step in range(3):
        with torch.no_grad():
            parameter.add_(0.1 * (step + 1))
        objective.commit()
        expected = 0.9 * expected + 0.1 * parameter.detach()
        torch.testing.assert_close(copy, expected)
    objective.momentum.restart()
    assert torch.equal(copy, parameter)


def test_a_momentum_copy_takes_buffers_over():
    norm = torch.nn.BatchNorm1d(2).train()
    copy = MomentumCopy(norm, 0.5)
    norm(torch.randn(8, 2))
    copy.update()
    assert torch.equal(copy.average.running_mean, norm.running_mean) and not copy.average.weight.requires_grad


# Tasks.


def test_two_images_pass_one_after_the_other_through_twins():
    torch.manual_seed(0)
    encoder = FusionEncoder(make_config(CONFIG, ""), 6, 5, images=2).double().eval()
    text, first, second = torch.randn(1, 4, 5).double(), torch.randn(1, 3, 6).double(), torch.randn(1, 3, 6).double()
    attended = torch.ones(1, 4, dtype=torch.bool)
    found = encoder(text, attended, first, second)
    x, (one, two) = encoder.text_in(text), (encoder.image_in(image) for image in (first, second))
    for layer, twin in zip(encoder.layers, encoder.twins, strict=True):
        x = twin(layer(x, one), two)
    torch.testing.assert_close(found, encoder.norm(x))
    single = FusionEncoder(make_config(CONFIG, ""), 6, 5)
    single.load(encoder.state_dict())  # without the twins
    assert torch.equal(single.norm.weight, encoder.norm.weight.float())
    encoder.load(single.state_dict())
    for layer, twin, own in zip(encoder.layers, encoder.twins, single.layers, strict=True):
        assert torch.equal(layer.linear1.weight, own.linear1.weight.double())
        assert torch.equal(twin.linear1.weight, own.linear1.weight.double())


def test_an_answers_likelihood_is_the_product_over_its_words():
    torch.manual_seed(0)
    decoder = AnswerDecoder(make_config(CONFIG | {"dropout": 0.0}, ""), 64, 6).double().eval()
    masking, answers = Masking(VOCABULARY, 0.5), captions(4, 6)
    fused, attended = torch.randn(4, 5, 16).double(), torch.arange(5)[None] < torch.tensor([[5], [3], [4], [2]])
    found = decoder.log_likelihood(fused, attended, answers, masking.attended(answers))
    for row, answer in enumerate(answers.tolist()):
        seen, expected = fused[row : row + 1, : int(attended[row].sum())], 0.0
        for place in range(1, answer.index(63) + 1):
            begin = torch.tensor([answer[:place]])
            scores = decoder(seen, torch.ones(1, seen.shape[1], dtype=torch.bool), begin)[0, -1]
            expected += scores.log_softmax(0)[answer[place]]
        torch.testing.assert_close(found[row], expected)
    likelihoods = torch.stack([
        decoder.log_likelihood(fused, attended, answers[[one] * 4], masking.attended(answers[[one] * 4]))
        for one in range(4)
    ], 1)  # fmt: skip
    assert torch.equal(decoder.rank(fused, attended, answers, masking.attended(answers)), likelihoods.argmax(1))


def test_answers_weigh_as_many_annotators_as_gave_them():
    torch.manual_seed(0)
    answers = captions(3, 6)
    context = LossContext(vocabulary=VOCABULARY)
    config = make_config(CONFIG | {"dropout": 0.0}, "")
    objective = TaskObjective(context, config, "vqa", 6, 5, contextlib.nullcontext, answers).double()
    text, states, images = captions(2), torch.randn(2, 12, 5).double(), torch.randn(2, 4, 6).double()
    targets = torch.tensor([[0, 0, 2, -1], [1, -1, -1, -1]])
    found = objective(None, None, None, text_tokens=text, image_states=images, text_states=states, targets=targets)
    fused, attended = objective.fused(text, images, states)
    expected = 0
    for row, votes in enumerate(targets.tolist()):
        for answer in filter(lambda number: number >= 0, votes):
            one = answers[answer : answer + 1]
            said = objective.masking.attended(one)
            likelihood = objective.decoder.log_likelihood(fused[[row]], attended[[row]], one, said)
            expected -= likelihood[0] / len(votes) / 2
    torch.testing.assert_close(found["vqa_loss"], expected)


def test_a_text_is_assigned_to_its_image_or_to_neither():
    states, seeds = torch.arange(300).double()[:, None, None], torch.arange(300)
    pairs, classes = assigned(states, seeds)
    assert (classes.bincount(minlength=3) > 70).all()
    for row, ((first, second), kind) in enumerate(
        zip(pairs.flatten(2)[..., 0].tolist(), classes.tolist(), strict=True)
    ):
        assert (first == row, second == row) == ((kind == 0), (kind == 1)) and first != second


# Towers and configs.


@pytest.mark.parametrize("name", [name for name in TOWERS if name not in ("text-class-token",)])
def test_tokens_of_towers_come_before_pooling(name):
    model = tower_model(name)
    image, text = inputs(model)
    if name.startswith("timm") and name != "timm-vit":
        with pytest.raises(UserError, match="the image tower, a TimmModel, has no token outputs; use a --model whose"):
            upstream.find_states(model)
        return
    places, widths = upstream.find_states(model)
    out, states = upstream.states_of(model, places, image, text)
    assert states["text"].shape == (3, 12, widths[1]) and states["image"].shape[::2] == (3, widths[0])
    assert states["image"].shape[1] > 1 or name == "resnet"  # of 32 pixels, one place is left
    if name == "vit":  # the pooled output is of these tokens
        tower = model.visual
        torch.testing.assert_close(
            normalize(tower.ln_post(states["image"])[:, 0] @ tower.proj, dim=1), out["image_features"]
        )


def test_a_text_tower_that_pools_by_a_token_of_its_own_is_refused():
    with pytest.raises(UserError, match="the text tower, a TextTransformer, has no token outputs"):
        upstream.find_states(tower_model("text-class-token"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "must hold an object"),
        ('{"layer": 2}', "layer=2: a fusion model has no option 'layer'"),
        ('{"layers": 0}', "layers=0: layers of a fusion model must be int >= 1"),
        ('{"width": 10, "heads": 3}', "heads=3: must divide width=10"),
        ('{"distill": "2"}', "distill=2: must be in"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, content, message):
    path = tmp_path / "fusion.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_config(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_config_than_the_checkpoints_is_refused(tmp_path):
    config = make_config(CONFIG, "")
    path = tmp_path / "fusion.json"
    path.write_text(json.dumps(CONFIG))
    assert read_config(str(path)) == config
    with pytest.raises(UserError, match="its fusion model has layers=3, and --fusion says layers=2"):
        require_same(config, CONFIG | {"layers": 3}, "x.pt")
    with pytest.raises(UserError, match="was trained without --fusion"):
        require_same(config, None, "x.pt")
