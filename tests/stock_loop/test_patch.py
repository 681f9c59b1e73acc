"""`openclip-ext patch` on copies of the installed OpenCLIP."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import stock
from openclip_ext.cli import main
from openclip_ext.stock_loop import patching
from openclip_ext.stock_loop.patch_files import NONE, parse_patch, patches

ROOT = Path(__file__).parent.parent.parent


def contents(folder):
    """Every file's bytes by its path."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def copy(tmp_path):
    return stock.copy_installed(tmp_path / "copy")


def patch(*arguments):
    return main(["patch", *map(str, arguments)])


def test_applying_adds_one_module_and_changes_four(copy):
    before = contents(copy)
    assert patch("apply", "--target", copy) == 0
    after = {path: content for path, content in contents(copy).items() if "backup" not in str(path)}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"params.py", "data.py", "train.py", "main.py", "loss_plugins.py"}
    assert before.keys() == after.keys() - {Path("open_clip_train/loss_plugins.py")}


def test_reverting_restores_every_byte(copy):
    (copy / "open_clip_train/main.py").chmod(0o640)
    before = contents(copy)
    assert patch("apply", "--target", copy) == 0
    assert (copy / "open_clip_train/main.py").stat().st_mode & 0o777 == 0o640
    assert patch("revert", "--target", copy) == 0
    assert contents(copy) == before
    assert not (copy / patching.BACKUP).exists()


def test_the_patch_is_small_and_stands_alone(copy, capsys):
    assert patch("diff", "--target", copy) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 400
    assert not [line for line in text.splitlines() if line.startswith("+") and "openclip_ext" in line]


def test_git_applies_what_diff_prints(copy, capsys):
    assert patch("diff", "--target", copy) == 0
    subprocess.run(["git", "init", "-q", str(copy)], check=True)
    text = capsys.readouterr().out
    subprocess.run(["git", "apply"], cwd=copy, input=text, text=True, check=True)
    assert patching.find_target(str(copy)).state == "applied"


def test_status_tells_version_state_and_what_is_supported(copy, capsys):
    for change, state in ((None, "clean"), ("apply", "applied"), ("revert", "clean")):
        assert change is None or patch(change, "--target", copy) == 0
        capsys.readouterr()
        assert patch("status", "--target", copy) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"OpenCLIP 3.3.0 in {copy}: {state}, open_clip_torch-3.3.0.patch"
        assert second.startswith("supported: ") and "3.3.0 (open_clip_torch-3.3.0.patch)" in second
    (copy / "open_clip_train/train.py").write_text("# mine\n")
    assert patch("status", "--target", copy) == 0
    assert "modified (open_clip_train/train.py)" in capsys.readouterr().out


def test_the_installed_package_is_found_without_importing_it(capsys):
    code = "import sys; from openclip_ext.cli import main; code = main(['patch', 'status']); "
    code += "sys.exit(code or any(name in sys.modules for name in ('torch', 'open_clip_train')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert f"in {stock.INSTALLED.parent}:" in result.stdout


def test_a_source_checkout_is_accepted(tmp_path):
    stock.copy_installed(tmp_path / "checkout/src")
    assert patch("apply", "--target", tmp_path / "checkout") == 0
    assert (tmp_path / "checkout/src/open_clip_train/loss_plugins.py").is_file()


def modified(copy):
    with open(copy / "open_clip_train/data.py", "a") as file:
        file.write("# mine\n")


def another_version(copy):
    (copy / "open_clip").mkdir()
    (copy / "open_clip/version.py").write_text("__version__ = '3.2.0'\n")


def with_other_line_endings(copy):
    (copy / "open_clip").mkdir()
    (copy / "open_clip/version.py").write_text("__version__ = '3.3.0'\n")
    for path in copy.glob("open_clip_train/*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def unknown(copy):
    for name in ("params", "data", "train", "main"):
        (copy / f"open_clip_train/{name}.py").write_text("# another version\n")


def applied(copy):
    patching.apply(patching.find_target(str(copy)))


def applied_and_modified(copy):
    applied(copy)
    modified(copy)


def applied_without_backup(copy):
    applied(copy)
    shutil.rmtree(copy / patching.BACKUP)


def applied_with_damaged_backup(copy):
    applied(copy)
    (copy / patching.BACKUP / "open_clip_train/main.py").write_text("")


def half_applied(copy):
    applied(copy)
    shutil.copy(copy / patching.BACKUP / "open_clip_train/main.py", copy / "open_clip_train/main.py")


def gone(copy):
    shutil.rmtree(copy / "open_clip_train")


def untouched(copy):
    pass


@pytest.mark.parametrize(
    ("prepare", "action", "message"),
    [
        (applied, "apply", "it is patched already; nothing to do"),
        (untouched, "revert", "it is not patched; nothing to revert"),
        (modified, "apply", "modified (open_clip_train/data.py); supported are unchanged files of 3.3.0"),
        (applied_and_modified, "revert", "modified (open_clip_train/data.py); supported are"),
        (another_version, "apply", "OpenCLIP 3.2.0 in {copy}: no patch for it; supported: 3.3.0"),
        (another_version, "diff", "OpenCLIP 3.2.0 in {copy}: no patch for it; supported: 3.3.0"),
        (unknown, "apply", "OpenCLIP of unknown version in {copy}: no patch for it; supported: 3.3.0"),
        (with_other_line_endings, "apply", "OpenCLIP 3.3.0 in {copy}: its files differ from those of 3.3.0 (another"),
        (with_other_line_endings, "diff", "supported are unchanged files of 3.3.0, 4.2.0.dev0 at commit 89fb801"),
        (applied_without_backup, "revert", "there is no backup in {copy}/open_clip_train/.openclip_ext_backup"),
        (applied_without_backup, "revert", "patch diff --target {copy} | patch -R -p1 -d {copy}, or reinstall"),
        (applied_with_damaged_backup, "revert", "the backup of open_clip_train/main.py is not the original"),
        (half_applied, "apply", "interrupted; put the originals back with: openclip-ext patch revert --target {copy}"),
        (gone, "status", "--target {copy}: holds neither open_clip_train/ nor src/open_clip_train/"),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(copy, capsys, prepare, action, message):
    prepare(copy)
    before = contents(copy)
    assert patch(action, "--target", copy) == 2
    error = capsys.readouterr().err
    assert message.format(copy=copy) in error and len(error.splitlines()) == 1
    assert contents(copy) == before


def test_what_was_interrupted_can_be_reverted(copy):
    before = contents(copy)
    half_applied(copy)
    assert patch("revert", "--target", copy) == 0
    assert contents(copy) == before


@pytest.fixture
def run_as_stranger():
    """A function from arguments to the result of `openclip-ext patch` by a user who may not write: not by root."""
    stranger = {"user": 65534} if os.getuid() == 0 else {}

    def run(*arguments, python=sys.executable):
        command = [python, "-B", "-m", "openclip_ext", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **stranger)

    for python in (sys.executable, "/usr/bin/python3"):  # root's Python may be where nobody else can read it
        with contextlib.suppress(OSError):
            if run("--version", python=python).returncode == 0:
                return functools.partial(run, python=python)
    pytest.skip("no Python that another user than root can read")


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_without_permission_nothing_changes(run_as_stranger, action):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = stock.copy_installed(Path(folder, "copy"))
        if action == "revert":
            applied(copy)
        (copy / "open_clip_train").chmod(0o555)
        before = contents(copy)
        result = run_as_stranger("patch", action, "--target", str(copy))
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert "cannot be written to, nothing was changed ([Errno 13] Permission denied" in result.stderr
        assert contents(copy) == before
        (copy / "open_clip_train").chmod(0o755)


@pytest.mark.parametrize("blocked", ["loss_plugins", "main", "train"])
def test_a_failure_on_the_way_is_rolled_back(copy, capsys, blocked):
    """Where one of the new files cannot be put beside the old one."""
    (copy / f"open_clip_train/.{blocked}.py.openclip_ext_new").mkdir()
    before = contents(copy)
    assert patch("apply", "--target", copy) == 2
    error = capsys.readouterr().err
    assert "cannot be written to, nothing was changed" in error and len(error.splitlines()) == 1
    assert contents(copy) == before


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("good", [1, 2, 3, 4])
def test_a_disk_that_fails_between_two_files_is_rolled_back(copy, capsys, monkeypatch, action, good):
    if action == "revert":
        applied(copy)
    before, replace, calls = contents(copy), os.replace, []

    def failing(source, destination):
        if Path(source).name.endswith(".openclip_ext_new"):
            calls.append(destination)
            if len(calls) == good:
                raise OSError(5, "Input/output error", str(destination))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    assert patch(action, "--target", copy) == 2
    assert "cannot be written to, nothing was changed ([Errno 5]" in capsys.readouterr().err
    assert contents(copy) == before
    assert patch(action, "--target", copy) == 0


@pytest.mark.parametrize(("action", "good"), [("apply", 2), ("revert", 2), ("apply", 5)])
def test_a_disk_that_fails_for_good_leaves_the_backup_and_says_so(copy, capsys, monkeypatch, action, good):
    before = contents(copy)
    if action == "revert":
        applied(copy)
    replace, calls = os.replace, []

    def failing(source, destination):
        if Path(source).name.endswith(".openclip_ext_new"):
            calls.append(destination)
            if len(calls) >= good:
                raise OSError(5, "Input/output error", str(destination))
        replace(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        assert patch(action, "--target", copy) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "could be written to only in part ([Errno 5]" in error and f"{patching.BACKUP}: put them back" in error
    assert patching.find_target(str(copy)).state == "half applied"
    assert patch("revert", "--target", copy) == 0
    assert contents(copy) == before


@pytest.mark.parametrize("patch_file", patches(), ids=lambda patch_file: patch_file.name)
def test_each_patch_names_every_file_that_it_touches(patch_file):
    touched = {line[6:] for line in patch_file.text.decode().splitlines() if line.startswith("+++ b/")}
    assert touched == {file.path for file in patch_file.files}
    for file in patch_file.files:
        assert file.hunks and file.before != file.after and file.after != NONE


def test_a_damaged_patch_is_not_applied(copy):
    (whole,) = (patch_file for patch_file in patches() if patch_file.version == "3.3.0")
    for old, new in (
        (b"+    plugin_batches = []", b"+    plugin_batches = 0"),
        (b"\n     losses_m = {}", b"\n     lasses = {}"),
    ):
        assert whole.text.count(old) == 1
        damaged = parse_patch(whole.name, whole.text.replace(old, new))
        (train,) = (file for file in damaged.files if file.path == "open_clip_train/train.py")
        with pytest.raises(patching.UserError, match="reinstall openclip-ext"):
            train.applied_to((copy / train.path).read_bytes())
