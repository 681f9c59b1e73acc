"""The words of captions: values against a slow loop, every tokenizer family, and training."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from safetensors.torch import load_file

import oracles
from openclip_ext import UserError, create_loss, upstream
from openclip_ext.cli import main
from openclip_ext.testing.checks import check_ranks
from openclip_ext.training.pair_model import feature_widths, pair_model
from towers import TOWERS, coca_flags, inputs, tower_model

B, D, WIDTH, V = 5, 3, 4, 12
SPECIAL, END = {0, 10, 11}, 11
TERM: dict[str, dict[str, float]] = {"caption_words": {}}
SHAPES = {"image_trunk_dim": WIDTH, "vocab_size": V, "special_token_ids": SPECIAL}


def loss_with(**options):
    torch.manual_seed(1)
    return create_loss("clip", terms={"caption_words": options}, **SHAPES, end_token_id=END).double()


def batch(seed=0):
    """Leaves and captions such as `10 3 3 7 11 0 0`; two of them have no word."""
    generator = torch.Generator().manual_seed(seed)
    image, text = oracles.unit(2, B, D, seed=seed)
    tokens = torch.randint(1, 10, (B, 7), generator=generator)
    tokens[:, 0] = 10
    for row, end in enumerate((6, 4, 3, 2, 1)):
        tokens[row, end], tokens[row, end + 1 :] = 11, 0
    tokens[1, 2] = tokens[1, 1]
    tokens[2, 1:3] = 10
    trunk = torch.randn(B, WIDTH, generator=generator, dtype=torch.float64)
    given = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(7.0, dtype=torch.float64),
             "image_trunk_features": trunk}  # fmt: skip
    return {name: value.requires_grad_() for name, value in given.items()}, tokens


def call(loss, given, tokens):
    return loss(**given, text_trunk_features=given["text_features"], text_tokens=tokens)["caption_words_loss"]


def test_value_and_gradients_equal_a_slow_loop_over_three_steps():
    loss, seen = loss_with(weight=0.5), []
    for step in range(3):
        given, tokens = batch(step)
        value = call(loss, given, tokens)
        head, captions = loss.terms["caption_words"].head.weight, tokens.tolist()
        reference = 0.5 * oracles.caption_words(given["image_trunk_features"], captions, head, seen, SPECIAL, END)
        torch.testing.assert_close(value, reference)
        leaves = [given["image_trunk_features"], head]
        ours, theirs = (torch.autograd.grad(x, leaves) for x in (value, reference))
        torch.testing.assert_close(ours, theirs)
        seen += captions
        loss.commit()
    state = loss.state_dict()
    assert state["terms.caption_words.captions"] == 3 * B
    assert not state["terms.caption_words.captions_with"][list(SPECIAL)].any()


def test_gradcheck():
    loss, (given, tokens) = loss_with(), batch()
    head = loss.terms["caption_words"].head.weight
    names = list(given)

    def value(weight, *values):
        replaced = {"terms.caption_words.head.weight": weight}
        kept = dict(zip(names, values, strict=True))
        kept |= {"text_trunk_features": kept["text_features"], "text_tokens": tokens}
        return torch.func.functional_call(loss, replaced, kwargs=kept)["caption_words_loss"]

    assert torch.autograd.gradcheck(value, (head, *given.values()))


def test_the_first_caption_of_all_and_an_empty_one_add_nothing():
    loss, (given, tokens) = loss_with(), batch()
    one = {name: value[:1] if value.ndim else value for name, value in given.items()}
    value = call(loss, one, tokens[:1])
    assert value == 0 and all(x.isfinite().all() for x in torch.autograd.grad(value, one["image_trunk_features"]))
    loss.commit()
    assert call(loss, given, torch.full((B, 7), 11)) == 0


def test_a_word_that_every_caption_holds_has_no_weight():
    loss, (given, _) = loss_with(), batch()
    tokens = torch.tensor([[1, 2], [1, 3], [1, 4], [1, 5], [1, 6]])
    gradient = torch.autograd.grad(call(loss, given, tokens), loss.terms["caption_words"].head.weight)[0]
    without = torch.autograd.grad(call(loss, given, tokens[:, 1:]), loss.terms["caption_words"].head.weight)[0]
    torch.testing.assert_close(gradient, without)


def test_a_pass_before_training_counts_captions():
    loss, (given, tokens) = loss_with(), batch()
    trained = loss_with()
    call(trained, given, tokens)
    trained.commit()
    loss.warm_start(**given, text_trunk_features=given["text_features"], text_tokens=tokens)
    torch.testing.assert_close(loss.state_dict(), trained.state_dict())


def test_ranks_with_batches_of_different_size_equal_one(ranks):
    check_ranks(ranks, "dcl", {"terms": TERM}, [4, 1, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_trunk_dim": None}, "caption_words needs the widths .*: give create_loss.…, image_trunk_dim=…"),
        ({"vocab_size": None}, "caption_words needs the vocabulary .*: give create_loss.…, vocab_size=…"),
        ({"special_token_ids": None}, "caption_words needs .*: give .*, vocab_size=…, special_token_ids=…"),
        ({"special_token_ids": [12]}, "vocab_size=12: holds no special id 12; give how many ids"),
        ({"vocab_size": 12.0}, "vocab_size=12.0: must be a whole number of at least 1"),
        ({"end_token_id": 13}, "vocab_size=12: holds no special id 13"),
    ],
)  # fmt: skip
def test_what_is_missing_to_build_it_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        create_loss("clip", terms=TERM, **(SHAPES | changes))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.ones(B, 7), r"text_tokens: is float32 \(5, 7\); must be one row of token ids per pair, \(5, L\)"),
        (torch.ones(B + 1, 7, dtype=torch.int64), r"text_tokens: is int64 \(6, 7\); must be one row"),
        (torch.ones(B, dtype=torch.int64), r"text_tokens: is int64 \(5,\); must be one row"),
        (torch.full((B, 7), V), "text_tokens: holds the id 12, and vocab_size=12; give that of the tokenizer"),
        (torch.full((B, 7), -1), "text_tokens: holds the id -1, and vocab_size=12"),
        (None, "loss term caption_words needs text_tokens=…, the captions' token ids"),
    ],
)
def test_a_wrong_caption_is_named(tokens, message):
    given, _ = batch()
    with pytest.raises(UserError, match=message):
        call(loss_with(), given, tokens)


# Tokenizers.


def counted(tokenizer, captions):
    """The ids that the term takes for words, by how many of the captions hold them."""
    size, special_ids, end_id = upstream.read_vocabulary(tokenizer)
    known = {"vocab_size": size, "special_token_ids": special_ids, "end_token_id": end_id}
    loss = create_loss("clip", terms=TERM, image_trunk_dim=2, **known)
    features = torch.nn.functional.normalize(torch.ones(len(captions), 2), dim=1)
    given = {"image_trunk_features": features, "text_trunk_features": features, "text_tokens": tokenizer(captions)}
    loss(features, features, torch.tensor(1.0), **given)
    loss.commit()
    found = loss.state_dict()["terms.caption_words.captions_with"]
    return {index: int(found[index]) for index in found.nonzero().flatten().tolist()}


def test_of_clips_own_tokenizer_words_are_what_stands_between_start_and_end():
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=6)
    assert upstream.read_vocabulary(tokenizer) == (49408, {49406, 49407}, 49407)
    cat, dog, a = (tokenizer.encode(word)[0] for word in ("cat", "dog", "a"))
    assert counted(tokenizer, ["a cat", "A dog, a dog", ""]) == {a: 2, cat: 1, dog: 1, tokenizer.encode(",")[0]: 1}
    cut = counted(tokenizer, ["cat " * 20 + "dog"])  # cut off after four words
    assert cut == {cat: 1}


def test_an_exclamation_mark_is_a_word_although_padding_has_its_id():
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert tokenizer(["!(a"])[0, 1] == 0
    assert counted(tokenizer, ["!(a", "a"])[0] == 1
    assert 0 not in counted(tokenizer, ["a"])


@pytest.fixture
def words(tmp_path):
    """A function that saves a small tokenizer of Hugging Face's with the given special tokens; returns its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def save(vocabulary, template, **special):
        ids = {word: index for index, word in enumerate(vocabulary.split())}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        used = [(token, ids[token]) for token in template.split() if token in ids]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "words")
        return str(tmp_path / "words")

    return save


BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@pytest.mark.parametrize("strip", [False, True])
def test_of_hugging_faces_tokenizers_special_tokens_are_no_words(words, strip):
    folder = words("[UNK] [CLS] cat dog a [SEP] [PAD]", "[CLS] $A [SEP]", **BERT)
    tokenizer = HFTokenizer(folder, context_length=8, strip_sep_token=strip)
    assert set(tokenizer(["a cat"])[0].tolist()) == {1, 4, 2, 6, 0 if strip else 5}
    assert counted(tokenizer, ["a cat", "a dog and a dog", ""]) == {2: 1, 3: 1, 4: 2}
    assert upstream.read_vocabulary(tokenizer)[0] == 7


def test_what_stands_for_a_stripped_separator_is_no_word(words):
    folder = words("[MASK] [CLS] cat [SEP] [PAD] [UNK]", "[CLS] $A [SEP]", **BERT)
    assert counted(HFTokenizer(folder, context_length=6, strip_sep_token=True), ["cat"]) == {2: 1}


def test_an_added_token_belongs_to_the_vocabulary(words):
    tokenizer = HFTokenizer(words("[UNK] [CLS] cat [SEP] [PAD]", "[CLS] $A [SEP]", **BERT), context_length=6)
    tokenizer.tokenizer.add_tokens(["zebra"])
    assert counted(tokenizer, ["zebra cat"]) == {2: 1, 5: 1}


@pytest.mark.parametrize("pad", ["</s>", "<pad>"])  # SigLIP pads with the end, SigLIP 2 with an id of its own
def test_of_siglips_tokenizers_the_end_and_padding_are_no_words(words, pad):
    folder = words("<pad> </s> <unk> cat a", "$A </s>", pad_token=pad, eos_token="</s>", unk_token="<unk>")
    hub = HFTokenizer(folder, context_length=6, clean="canonicalize")
    siglip = SigLipTokenizer.__new__(SigLipTokenizer)  # as it is once it has downloaded its vocabulary
    siglip.tokenizer, siglip.context_length = hub.tokenizer, 6
    for tokenizer in (hub, siglip):
        assert tokenizer(["A cat!"]).tolist() == [[4, 3, 1] + [1 if pad == "</s>" else 0] * 3]
        assert counted(tokenizer, ["A cat!", "cat", ""]) == {3: 2, 4: 1}


# Towers.


@pytest.mark.parametrize("name", TOWERS)
def test_it_goes_with_every_image_tower(name):
    paired = pair_model(tower_model(name), frozenset({"trunk_features"}))
    width = feature_widths(paired, None).image_trunk
    loss = create_loss("clip", terms=TERM, image_trunk_dim=width, vocab_size=64, special_token_ids={63})
    image, text = inputs(paired.model)
    loss(**paired(image, text), text_tokens=text)["caption_words_loss"].backward()
    tower = paired.model.visual
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())


# Training.


def rows(tmp_path, name="run"):
    return [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def checkpoint(tmp_path, name, epoch):
    return torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_{epoch}.pt")


WORDS = ("--loss-term", "caption_words=1")


def test_it_trains_resumes_bit_for_bit_and_is_dropped_on_export(train_flags, tmp_path):
    flags = (*WORDS, "--lr-scheduler", "const", "--lr", "3e-3")
    assert main(train_flags(*flags, "--epochs", 3, "--name", "whole")) == 0
    assert main(train_flags(*flags, "--epochs", 1, "--name", "parts")) == 0
    assert main(train_flags(*flags, "--epochs", 3, "--name", "parts", "--resume", "latest")) == 0
    curves = [[row["caption_words_loss"] for row in rows(tmp_path, name)] for name in ("whole", "parts")]
    assert curves[0] == curves[1] and len(curves[0]) == 24
    assert sum(curves[0][-8:]) < sum(curves[0][:8])
    whole, parts = (checkpoint(tmp_path, name, 3) for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer", "loss", "loss_optimizer"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert whole["loss"]["terms.caption_words.head.weight"].shape == (49408, 32)
    assert whole["loss"]["terms.caption_words.captions"] == 3 * 256
    out = tmp_path / "exported"
    assert main(["export", str(tmp_path / "logs/whole"), "--to", "open_clip", "--out", str(out)]) == 0
    assert (
        load_file(out / "open_clip_model.safetensors").keys() == open_clip.create_model("tiny-test").state_dict().keys()
    )


def test_accumulated_batches_equal_one_large_batch_with_second_views_too(train_flags, tmp_path):
    """Second views change what the model is given, not which words are counted."""
    flags = (*WORDS, "--loss-term", "brownian_bridge=0.1", "--caption-separator", " ", "--loss-term",
             "geometric_consistency=0.001", "--epochs", 2, "--opt", "timm/sgd", "--lr", "0.02")  # fmt: skip
    assert main(train_flags(*flags, "--batch-size", 256, "--name", "large")) == 0
    assert main(train_flags(*flags, "--batch-size", 64, "--accum-freq", 4, "--name", "parts")) == 0
    for large, parts in zip(rows(tmp_path, "large"), rows(tmp_path, "parts"), strict=True):
        assert parts["caption_words_loss"] == pytest.approx(large["caption_words_loss"], rel=1e-5)
    large, parts = (checkpoint(tmp_path, name, 2)["loss"] for name in ("large", "parts"))
    torch.testing.assert_close(parts, large, rtol=1e-4, atol=1e-6)
    assert large["terms.caption_words.captions"] == 512


@pytest.mark.parametrize("flags", [("--precision", "pure_bf16"), ("--warm-start-pass", "--loss", "gamma_decomp")])
def test_it_goes_with_other_flags(train_flags, tmp_path, flags):
    assert main(train_flags(*WORDS, *flags)) == 0
    found = [row["caption_words_loss"] for row in rows(tmp_path)]
    assert all(0 < value < 20 for value in found)
    seen = 512 if "--warm-start-pass" in flags else 256
    assert checkpoint(tmp_path, "run", 1)["loss"]["terms.caption_words.captions"] == seen


def test_it_goes_with_coca_models(train_flags, tmp_path):
    assert main(train_flags(*coca_flags(tmp_path), *WORDS, "--accum-freq", 2)) == 0
    assert {"caption_loss", "caption_words_loss"} <= rows(tmp_path)[-1].keys()


def test_it_goes_with_a_tokenizer_of_the_hub(train_flags, tmp_path, words, model_config):
    folder = words("[PAD] [UNK] [CLS] [SEP] the digit number a seven", "[CLS] $A [SEP]", **BERT)
    config = json.loads(Path(model_config).read_text())
    config["text_cfg"] |= {"hf_tokenizer_name": folder}
    (tmp_path / "worded.json").write_text(json.dumps(config))
    assert main(train_flags("--model", "worded", "--model-config", tmp_path / "worded.json", *WORDS)) == 0
    state = checkpoint(tmp_path, "run", 1)["loss"]
    assert state["terms.caption_words.head.weight"].shape == (9, 32)
    assert state["terms.caption_words.captions_with"][4:].any()
    assert not state["terms.caption_words.captions_with"][:4].any()


def test_it_is_refused_where_there_are_no_captions(train_flags, capsys):
    assert main(train_flags("--pairs", "views", *WORDS)) == 2
    assert "--loss-term caption_words: needs text_tokens, trunk_features, vocabulary, and with --pairs views" in (
        capsys.readouterr().err
    )
