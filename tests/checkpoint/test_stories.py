"""stories260K through every reader: the same tensors, the same text as the program that it was trained for."""

from pathlib import Path

import pytest
import torch

from smidgen.checkpoint.open import open_checkpoint
from smidgen.model.tokenizer import load_tokenizer
from stories import stories_folder, stories_gguf, stories_golden_text

_TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces\nand a new line\t",
    "é 日本 🙂 “quoted” 1234 x_y",
    " leading",
    "<s>One day</s>",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_folder(tmp_path_factory.mktemp("hf"))


def test_greedy_text_of_the_folder_is_the_golden_text(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    golden = stories_golden_text()
    with torch.inference_mode():
        ids = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=256, pad_token_id=0)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == golden
    # Words to tokens and back, on text that the model really writes.
    assert tokenizer(golden)["input_ids"] == ids[0].tolist()


def test_folder_tensors_are_views_equal_to_what_transformers_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(folder)
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(weights) - set(checkpoint.tensors) == {"lm_head.weight"}
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        assert torch.equal(tensor, weights[name]), name
        assert tensor.data_ptr() == checkpoint.read(name).data_ptr(), "a copy was made"


def test_writing_into_a_view_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(folder)
    checkpoint.read("model.norm.weight").zero_()
    del checkpoint
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_gguf_tensors_equal_those_of_the_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    checkpoint, reference = open_checkpoint(stories_gguf(tmp_path, kind)), open_checkpoint(folder)
    assert set(checkpoint.tensors) == set(reference.tensors)
    for name, info in checkpoint.tensors.items():
        expected = reference.read(name)
        if info.dtype == "F16":
            expected = expected.half()
        tensor = checkpoint.read(name)
        assert tensor.shape == info.shape == expected.shape
        if info.dtype == "Q8_0":  # 127 steps to the largest of 32 numbers: half a step, and the 16-bit scale's rounding
            step = expected.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            error = (tensor - expected).reshape(-1, 32).abs()
            assert (error <= step * (0.5 + 127 / 2048)).all(), name
        else:
            assert torch.equal(tensor, expected), name
    kinds = {info.dtype for info in checkpoint.tensors.values()}
    assert kinds == {"F32": {"F32"}, "F16": {"F32", "F16"}, "Q8_0": {"F32", "F16", "Q8_0"}}[kind]


def test_gguf_config_gives_the_config_of_the_folder(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    ours = LlamaConfig(**open_checkpoint(stories_gguf(tmp_path)).config).to_dict()
    reference = LlamaConfig.from_pretrained(folder).to_dict()
    different = {key for key in reference if ours.get(key) != reference[key]}
    assert different <= {"dtype", "torch_dtype", "_name_or_path", "transformers_version"}
    assert ours["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_sentencepiece_tokenizer_equals_transformers_own_conversion(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = stories_gguf(tmp_path)
    ours, reference = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (*_TEXTS, stories_golden_text()):
        assert ours(text)["input_ids"] == reference(text)["input_ids"], text
    assert ours("One")["input_ids"][0] == ours.bos_token_id == 1
    assert (ours.eos_token_id, ours.unk_token_id) == (2, 0)


def test_sentencepiece_text_comes_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(stories_gguf(tmp_path))
    for text in ("Once upon a time", "two  spaces\nand more\t", "é 日本 🙂 1234"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
