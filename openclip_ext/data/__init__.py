"""Shards of image-text pairs: listing, streaming with sample ids, packing, checking."""
