"""What all tests share: one thread, no network, the same random numbers every time."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from a second one, and tests share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes compiles its plain operators anew for every shape


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama's folder."""
    from tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small chats as .jsonl."""
    from tiny import write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
