"""Hugging Face's models and tokenizers without the code that their repositories may bring."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

from openclip_ext.errors import UserError


@contextlib.contextmanager
def without_remote_code() -> Iterator[None]:
    """In the block, nothing that comes with a config, a tokenizer or a model of a hub or a folder is run.

    OpenCLIP hands what a model's config says to a tokenizer on to Hugging Face's, `trust_remote_code` too, and without
    that a terminal is asked.

    Raises:
        UserError: a config asks for it.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError:  # then there is nothing that could run it
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind in (AutoConfig, AutoModel, AutoTokenizer):
            guarded = functools.partial(_without, kind.from_pretrained)
            stack.enter_context(mock.patch.object(kind, "from_pretrained", guarded))
        yield


def _without(from_pretrained, name, *args, trust_remote_code=None, **kwargs):
    if trust_remote_code:
        raise UserError(f"the config asks to run code that comes with {name} (trust_remote_code), which is never done")
    return from_pretrained(name, *args, trust_remote_code=False, **kwargs)
