"""OpenCLIP 3.3: class names, templates and the classifier of its zero-shot evaluation."""

#: How many classes its evaluation encodes at once.
CLASSES_PER_BATCH = 10


def imagenet_names() -> tuple[list[str], list]:
    """ImageNet's 1,000 class names and OpenAI's 80 templates, as OpenCLIP evaluates with."""
    from open_clip import IMAGENET_CLASSNAMES

    return IMAGENET_CLASSNAMES, imagenet_templates("openai")


def imagenet_templates(name: str) -> list:
    """OpenCLIP's templates: `openai`, 80, or `simple`, 7."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    return {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}[name]


def zero_shot_weights(model, tokenizer, class_names, templates, device, *, progress: bool):
    """OpenCLIP's zero-shot classifier: (D, classes), unit columns, mean over templates."""
    from open_clip import build_zero_shot_classifier

    return build_zero_shot_classifier(
        model,
        tokenizer,
        class_names,
        templates,
        num_classes_per_batch=CLASSES_PER_BATCH,
        device=device,
        use_tqdm=progress,
    )
