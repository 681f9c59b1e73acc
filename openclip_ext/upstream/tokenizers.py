"""OpenCLIP's tokenizers: which ids of what they return stand for no word."""

import argparse

from openclip_ext.upstream.remote_code import without_remote_code


@without_remote_code()
def create_tokenizer(args: argparse.Namespace):
    """The tokenizer of `--model`. Raises what OpenCLIP does where there is none."""
    from open_clip import get_tokenizer

    return get_tokenizer(args.model, cache_dir=args.cache_dir, context_length=args.force_context_length)


def read_vocabulary(tokenizer) -> tuple[int, frozenset[int], int | None]:
    """What a tokenizer's ids mean.

    Args:
        tokenizer: OpenCLIP's, of any family: CLIP's BPE, SigLIP's, Hugging Face's, or tiktoken's.

    Returns:
        How many ids there are; those that are no words wherever they stand, padding included where it has an id of its
        own; and the id after which a caption holds nothing but padding. CLIP's BPE pads with 0, which is `!` too, so
        that only the place tells; None: padding has an id of its own.
    """
    from open_clip import SimpleTokenizer

    hub = getattr(tokenizer, "tokenizer", None)  # Hugging Face's, of which SigLIP's are some
    special_ids = frozenset((hub or tokenizer).all_special_ids)
    if hub is not None:
        if getattr(tokenizer, "strip_sep_token", False):
            special_ids |= {0}  # what OpenCLIP puts in the separator's place
        return max(hub.get_vocab().values()) + 1, special_ids, None
    end_id = tokenizer.eot_token_id if isinstance(tokenizer, SimpleTokenizer) else None
    return tokenizer.vocab_size, special_ids, end_id


def find_mask_id(tokenizer) -> int | None:
    """The id by which a tokenizer's own model was trained to fill gaps; None: it has none, as CLIP's BPE."""
    return getattr(getattr(tokenizer, "tokenizer", None), "mask_token_id", None)
