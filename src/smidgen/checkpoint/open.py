"""Opens a model on disk, whatever its format."""

from pathlib import Path

from smidgen.errors import ModelError
from smidgen.events import Report, silent

from .base import PICKLES, Checkpoint
from .gguf_header import is_gguf

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path, report: Report = silent) -> Checkpoint:
    """A Hugging Face folder or a GGUF file. Reads headers only; raises ModelError for anything that is not right."""
    if path.is_dir():
        from .safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, report)
    if not path.exists():
        raise ModelError(f"{path} does not exist", expected="a model folder or a .gguf file")
    if path.suffix != ".gguf" and not (path.is_file() and is_gguf(path)):
        if path.suffix in PICKLES:
            raise ModelError(
                f"{path} is a pickle, which can run any program when it is opened: it is never opened",
                cure="take the .safetensors files of the model, or convert it where you trust it",
            )
        cure = f"give the folder that it lies in: {path.parent}" if path.suffix == ".safetensors" else ""
        raise ModelError(f"{path} is no model", expected="a folder or a GGUF file", cure=cure)
    from .gguf import GgufCheckpoint

    return GgufCheckpoint(path)
