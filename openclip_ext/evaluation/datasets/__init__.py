"""Pictures with classes or captions, on disk, as batches."""
