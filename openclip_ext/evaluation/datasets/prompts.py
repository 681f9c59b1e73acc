"""Class names and templates: from files, and those of CIFAR."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence

from openclip_ext import upstream
from openclip_ext.errors import UserError

#: The prompts that OpenAI published for CIFAR-10 and -100 (Radford et al., ICML 2021), in their order.
CIFAR_TEMPLATES = tuple(
    f"a {quality}photo of {subject}."
    for article in ("a", "the")
    for quality, subject in itertools.chain(
        ((quality, article + " {}") for quality in
         ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")),
        (("", f"{article} {size} {{}}") for size in ("small", "big")),
    )
)  # fmt: skip


def read_class_names(path: str, flag: str) -> list[str]:
    """One name per line, in the order of class indices. Raises UserError: no such file, or no name in it."""
    names = _lines(path, flag)
    if not names:
        raise UserError(f"{flag} {path}: holds no class name; write one per line")
    return names


def read_templates(source: str, flag: str) -> Sequence[str | Callable[[str], str]]:
    """`openai` and `simple` are OpenCLIP's lists; else a file with a template per line, in which `{}` or, as in
    clip_benchmark, `{c}` stands for the class.

    Raises:
        UserError: no such file, no template in it, or one without a place for the class.
    """
    if source in ("openai", "simple"):
        return upstream.imagenet_templates(source)
    lines = _lines(source, flag)
    if not lines:
        raise UserError(f"{flag} {source}: holds no template; write one per line, such as: a photo of a {{}}.")
    for number, line in enumerate(lines, start=1):
        if "{}" not in line and "{c}" not in line:
            raise UserError(f"{flag} {source}: template {number} has no {{}} for the class: {line[:60]}")
    return [Template(line) for line in lines]


@dataclasses.dataclass(frozen=True)
class Template:
    """A function of a class name that puts it where `text` has `{}` or `{c}`."""

    text: str

    def __call__(self, name: str) -> str:
        return self.text.replace("{c}", "{}").replace("{}", name)


def _lines(path: str, flag: str) -> list[str]:
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not a text file in UTF-8") from error
