"""What the READMEs say of files and of code holds. Of the plugin in it: testing/test_plugin.py."""

import pathlib
import re

import open_clip
import pytest
import torch

from batches import config
from openclip_ext.data.pipeline import train_loader

ROOT = pathlib.Path(__file__).parent.parent
READMES = ["README.md", "openclip_ext/README.md", "openclip_ext/evaluation/README.md",
           "openclip_ext/commands/diagnose/README.md", "scripts/README.md", "tests/README.md",
           "patches/README.md"]  # fmt: skip
README = (ROOT / "README.md").read_text()


def code_blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    folder = (ROOT / readme).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / readme).read_text()) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("readme", READMES[1:-1])
def test_files_that_a_map_names_exist(readme):
    """By the end of their path, as `losses/base.py` or `base.py`. Those in patches/ are OpenCLIP's."""
    named = set(re.findall(r"`([\w/]+(?:\.py|\.sh|/))`", (ROOT / readme).read_text()))
    folders = [ROOT / name for name in ("openclip_ext", "scripts", "tests", "patches")]
    paths = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (folder, *folder.rglob("*"))]
    missing = [name for name in named if not any(path.endswith(f"/{name.rstrip('/')}") for path in paths)]
    assert sorted(missing) == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_the_loop_in_the_readme_trains(shards, model_config):
    (loop,) = [block for block in code_blocks(README, "python") if "begin_step" in block]
    open_clip.add_model_config(model_config)
    towers = open_clip.create_model("tiny-test", output_dict=True)
    transform = open_clip.image_transform(32, is_train=False)
    stream = config(shards, image_transform=transform, tokenizer=open_clip.get_tokenizer("tiny-test"), batch_size=64)

    class Loader:
        """Batches as tuples, and a length, as a `DataLoader` of a data set that counts has."""

        dataset = range(256)

        def __len__(self):
            return 4

        def __iter__(self):
            for batch in train_loader(stream, num_samples=256, workers=0).batches:
                yield batch["image"], batch["text"], batch["sample_ids"]

    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-3)
    names = {"model": towers, "optimizer": optimizer, "loader": Loader(), "epochs": 2}
    before = towers.logit_scale.item()
    exec(loop, names)
    assert towers.logit_scale.item() != before
    assert names["outputs"]["first_visits"] == 0 and names["loss"].state_dict()
    assert names["loss"].base.recent.errors  # freshness was measured
