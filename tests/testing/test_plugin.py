"""The README's plugin, built, installed and trained with as a stranger would."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parent.parent.parent / "README.md"


def readme_files():
    """File name to text, of the README's code blocks that begin with a file's name."""
    blocks = re.findall(r"```(?:toml|python)\n# (\S+)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return dict(blocks)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder to put on the path, with the package in it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name, text in readme_files().items():
        (source / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    return target


def test_the_plugin_is_complete_and_short():
    files = readme_files()
    assert files.keys() == {"pyproject.toml", "polynomial_loss.py"}
    assert sum(len(text.strip().splitlines()) for text in files.values()) < 30


def test_the_plugin_trains_by_name_from_the_command_line(installed, train_flags, tmp_path):
    command = [sys.executable, "-m", "openclip_ext", *train_flags("--loss", "poly", "--loss-arg", "epsilon=0.5")]
    environment = {"PYTHONPATH": f"{installed}:{README.parent}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["contrastive_loss"] for row in rows]
    assert len(losses) == 8 and losses[-1] < losses[0]


@pytest.mark.slow
def test_the_plugin_passes_the_checks(installed):
    code = "from openclip_ext.testing import check_loss\n"
    code += "if __name__ == '__main__':\n    check_loss('poly', num_ranks=(2,))\n"
    script = installed / "check.py"
    script.write_text(code)
    environment = {"PYTHONPATH": f"{installed}:{README.parent}", "PATH": "/usr/bin:/bin", "HOME": str(installed)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
