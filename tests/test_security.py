"""Nothing that comes from elsewhere is run, and no secret is written down."""

import ast
import json
import pathlib

import open_clip
import pytest
import torch

import openclip_ext
from openclip_ext.cli import main
from openclip_ext.redact import redacted

PACKAGE = pathlib.Path(openclip_ext.__file__).parent
SECRET = "s3cr3t-VALUE-of-a-variable"


def calls(tree):
    """(dotted name, call) of all calls in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call, name):
    return next((ast.unparse(each.value) for each in call.keywords if each.arg == name), None)


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.parent / "scripts"], ids=["package", "scripts"])
def test_no_code_reads_pickles_or_runs_text(folder):
    faults = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {"pickle", "shelve", "marshal", "dill", "joblib", "yaml"} & set(names):
                faults.append(f"{path.name}:{node.lineno} imports {names}")
        for name, call in calls(tree):
            wrong = (
                (name == "torch.load" and keyword(call, "weights_only") != "True")
                or (name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, "False"))
                or name
                in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.jit.load", "torch.hub.load")
                or keyword(call, "trust_remote_code") not in (None, "False", "trust_remote_code")
                or keyword(call, "shell") == "True"
            )
            if wrong:
                faults.append(f"{path.name}:{call.lineno} {ast.unparse(call)}")
    assert faults == []


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "flags",
    [("--resume",), ("--pretrained",), ("--distill-model", "tiny-test", "--distill-pretrained"),
     ("eval", "--pretrained"), ("export", "--to", "hf", "--model", "tiny-test")],
)  # fmt: skip
@pytest.mark.parametrize("new", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_a_checkpoint_that_holds_code_is_refused(
    train_flags, tmp_path, model_config, digit_folders, capsys, flags, new
):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    content = {"epoch": 1, "name": "a", "state_dict": {"a": torch.ones(1)}, "optimizer": Evil(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    if flags[0] in ("eval", "export"):
        data = ["--zero-shot", str(digit_folders)] if flags[0] == "eval" else []
        command = [*flags, str(path), "--model-config", model_config, *data]
    else:
        command = train_flags(*flags, path)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "not a checkpoint of tensors and plain values: it asks for " in line and not trace.exists()


@pytest.mark.parametrize("asked", [{"trust_remote_code": True}, {}])
def test_code_beside_a_tokenizer_is_never_run(tmp_path, model_config, digit_folders, capsys, asked):
    """A folder in OpenCLIP's format whose tokenizer is a Python file."""
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    config = json.loads(pathlib.Path(model_config).read_text())
    config["text_cfg"] |= {"hf_tokenizer_name": "any", "tokenizer_kwargs": asked}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine",
    }))  # fmt: skip
    (folder / "mine.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import BertTokenizer\nclass Mine(BertTokenizer): pass\n"
    )
    open_clip.add_model_config(model_config)
    torch.save(open_clip.create_model("tiny-test").state_dict(), folder / "open_clip_pytorch_model.bin")
    assert main(["eval", "--pretrained", f"local-dir:{folder}", "--zero-shot", str(digit_folders)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ("trust_remote_code" in line or not asked) and not trace.exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa55word@host/a.tar", "https://***@host/a.tar"),
        ("https://host/a.tar?X-Amz-Signature=0123abcd&part=2", "https://host/a.tar?X-Amz-Signature=***&part=2"),
        ("pipe:curl -H 'Authorization: Bearer abcdefgh12' https://h", "pipe:curl -H 'Authorization: Bearer ***' https://h"),
        ("api_key=0123456789, more", "api_key=***, more"),
        ("of hf_abcdefghijklmnopqrst.", "of ***."),
        (f"before {SECRET} after", "before *** after"),
        ("hf-hub:org/name, tokens: 77, shards/{000..331}.tar, key=a", None),
        (f"sha256 {'0a' * 32}, wandb_notes: none, s3://bucket/keys/a.tar", None),
    ],
)  # fmt: skip
def test_secrets_are_hidden_and_nothing_else_is(monkeypatch, text, shown):
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redacted(text) == (text if shown is None else shown)


def test_no_file_of_a_run_shows_a_secret(train_flags, tmp_path, shards, digit_folders, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    broken = tmp_path / SECRET
    broken.symlink_to(shards)
    flags = ("--train-data", f"{shards}::{broken}", "--wandb-notes", f"my key is {SECRET}", "--epochs", 1)
    assert main(train_flags(*flags, "--report-to", "tensorboard")) == 0
    assert main(train_flags(*flags, "--report-to", "tensorboard", "--resume", "latest", "--lr", 1e-4)) == 0
    assert "wandb_notes was" not in capsys.readouterr().err
    assert main(["export", str(tmp_path / "logs" / "run"), "--to", "hf"]) == 0
    missing = ["eval", "--pretrained", str(broken / "none.pt"), "--zero-shot", str(digit_folders)]
    assert main(missing) == 2
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "***" in shown.err
    files = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert all("***" in path.read_text() for path in files if path.name in ("params.json", "params.txt", "README.md"))


def test_no_file_of_a_run_shows_the_environment(train_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_VARIABLE_OF_MINE", "its-value-is-nobodys-business")
    assert main(train_flags("--debug", "--copy-codebase")) == 0
    for path in (tmp_path / "logs").rglob("*"):
        assert path.is_dir() or b"nobodys-business" not in path.read_bytes(), path
