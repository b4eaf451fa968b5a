"""Fine-tune large language models in a smidgen of memory. The public names; importing them is cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smidgen.errors import SmidgenError

if TYPE_CHECKING:
    from smidgen.api import (
        Generation,
        LoadedModel,
        Run,
        doctor,
        download,
        evaluate,
        export_run,
        finetune,
        inspect_data,
        load,
        merge,
        plan,
        quantize,
        resume,
        write_report,
    )

__all__ = [
    "Generation",
    "LoadedModel",
    "Run",
    "SmidgenError",
    "doctor",
    "download",
    "evaluate",
    "export_run",
    "finetune",
    "inspect_data",
    "load",
    "merge",
    "plan",
    "quantize",
    "resume",
    "write_report",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("smidgen.api"), name)
    raise AttributeError(f"module 'smidgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
