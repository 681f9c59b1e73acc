"""Models of every kind of tower, small enough to train in a test."""

import json

import open_clip
import torch

TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

DEEP_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}

COCA = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16,
                   "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "embed_cls": True,
                 "output_tokens": True},
    "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
}  # fmt: skip

TEXT = {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
ATTENTION = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 64}
TOWERS = {
    "vit": (VIT, TEXT, {}),
    "vit-average-pool": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, TEXT, {}),
    "vit-attention-pool": (VIT | ATTENTION, TEXT, {}),
    "resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, TEXT, {}),
    "timm-linear": (TIMM | {"timm_proj": "linear"}, TEXT, {}),
    "timm-mlp": (TIMM | {"timm_proj": "mlp"}, TEXT, {}),
    "timm-own-classifier": (TIMM | {"timm_proj": None}, TEXT, {}),
    "timm-vit": ({"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": None, "image_size": 160}, TEXT, {}),
    "text-linear": (VIT, TEXT | {"proj_bias": True}, {}),
    "text-last-token": (VIT, TEXT | {"pool_type": "last"}, {"custom_text": True}),
    "text-class-token": (VIT, TEXT | {"embed_cls": True, "pad_id": 0}, {"custom_text": True}),
}  # fmt: skip


def tower_model(name):
    vision, text, extra = TOWERS[name]
    kind = open_clip.model.CustomTextCLIP if extra else open_clip.model.CLIP
    return kind(8, vision, text, output_dict=True).eval()


def inputs(model):
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    text = torch.randint(1, 60, (3, 12))
    text[:, 7] = 63  # the largest id ends a caption
    return torch.randn(3, 3, height, width), text


def coca_flags(tmp_path):
    """Flags of a small CoCa model."""
    config = tmp_path / "coca-test.json"
    config.write_text(json.dumps(COCA))
    open_clip.add_model_config(config)
    weights = open_clip.create_model("coca-test").state_dict()
    # OpenCLIP leaves this one as it finds the memory, so two models of one seed differ.
    torch.nn.init.normal_(weights["text_decoder.text_projection"], std=0.1)
    torch.save(weights, tmp_path / "coca.pt")
    # A large epsilon, else Adam's first steps amplify the rounding of gradients that are nearly zero.
    return ["--model", "coca-test", "--model-config", config, "--pretrained", tmp_path / "coca.pt",
            "--coca-caption-loss-weight", 1.5, "--coca-contrastive-loss-weight", 0.5, "--eps", 1e-3]  # fmt: skip
