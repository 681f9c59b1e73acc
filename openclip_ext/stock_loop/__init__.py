"""OpenCLIP's own training loop: patching it, and what it calls of this package once it is patched."""
