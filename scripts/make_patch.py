"""Write a patch of OpenCLIP to stdout, from an original and a changed tree.

Its form is what `openclip_ext.stock_loop.patch_files` reads.

    python scripts/make_patch.py 3.3.0 ORIGINAL CHANGED > patches/open_clip_torch-3.3.0.patch

Each tree is a folder that holds `open_clip_train/`; a version that many commits share is "VERSION at commit HASH". See
patches/README.md.
"""

import argparse
import difflib
import sys
from pathlib import Path

from openclip_ext.stock_loop.patch_files import NONE, digest
from openclip_ext.stock_loop.patching import BACKUP

HEADER = """\
OpenCLIP's training loop with losses of other packages: --loss, --loss-arg and --loss-term.
The reason of each hunk is in openclip_ext's patches/README.md. Apply with `openclip-ext patch apply` or `patch -p1`.

Version: {version}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("original", type=Path)
    parser.add_argument("changed", type=Path)
    args = parser.parse_args()
    digests: list[str] = []
    diffs: list[str] = []
    for path in sorted(args.changed.rglob("*.py")):
        name = path.relative_to(args.changed).as_posix()
        if path.is_relative_to(args.changed / BACKUP):  # the tree was made by `openclip-ext patch apply`
            continue
        original = args.original / name
        old, new = original.read_bytes() if original.exists() else b"", path.read_bytes()
        if old == new:
            continue
        digests.append(f"sha256: {digest(old) if original.exists() else NONE} -> {digest(new)} {name}\n")
        before, after = (content.decode().splitlines(keepends=True) for content in (old, new))
        from_name = f"a/{name}" if original.exists() else "/dev/null"
        diffs += difflib.unified_diff(before, after, from_name, f"b/{name}")
    sys.stdout.write("".join([HEADER.format(version=args.version), *digests, "\n", *diffs]))


if __name__ == "__main__":
    main()
