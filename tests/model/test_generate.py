"""Decoding against transformers' own, and batches against single prompts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import smidgen.model.fused as fused
from smidgen.errors import SettingsError
from smidgen.model.decoder import FusedDecoder
from smidgen.model.generate import Sampling, generate_batch, stream_text, stream_tokens
from tiny import VOCAB_SIZE, build, tiny_folder

PROMPTS = [[5, 9, 80, 33], [7], [100, 101, 102, 103, 104, 105, 106]]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma3", "gpt2", "gpt-neox", "qwen3"])
def test_greedy_tokens_equal_transformers(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, architecture)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = build(folder)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        stop = [257]
        ours = list(stream_tokens(base, prompt, stop, Sampling(max_new_tokens=12), VOCAB_SIZE))
        theirs = expected[0, len(prompt) :].tolist()
        assert ours == (theirs[: theirs.index(257)] if 257 in theirs else theirs)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3", "gpt2", "gpt-neox"])
def test_a_batch_answers_as_each_prompt_alone(architecture: str, tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path, architecture), "nf4-dq")
    alone = [list(stream_tokens(base, p, [], Sampling(max_new_tokens=10), VOCAB_SIZE)) for p in PROMPTS]
    stop = alone[0][4]  # rows end at different times and leave the batch
    expected = [row[: row.index(stop)] if stop in row else row for row in alone]
    assert generate_batch(base, PROMPTS, [stop], Sampling(max_new_tokens=10), VOCAB_SIZE) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_long_prompt_takes_no_room_from_the_others_of_its_batch(architecture: str, tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path, architecture), "nf4-dq")
    lengths = [base.max_positions - left for left in (1, 3, 100)]
    prompts = [[7 * i % VOCAB_SIZE for i in range(length)] for length in lengths]
    alone = [list(stream_tokens(base, p, [], Sampling(max_new_tokens=10), VOCAB_SIZE)) for p in prompts]
    assert [len(answer) for answer in alone] == [2, 4, 10]
    for stop in ([], [alone[0][0]]):  # a row that has ended is not computed beyond its positions either
        expected = [row[: row.index(stop[0])] if stop and stop[0] in row else row for row in alone]
        assert generate_batch(base, prompts, stop, Sampling(max_new_tokens=10), VOCAB_SIZE) == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_prompt_in_tiles_is_the_same_prompt(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(tiny_folder(tmp_path, architecture), "nf4-dq", torch.float32)
    sampling, prompt = Sampling(max_new_tokens=10), [7 * i % VOCAB_SIZE for i in range(70)]
    expected = list(stream_tokens(base, prompt, [], sampling, VOCAB_SIZE))
    monkeypatch.setattr(fused, "PROMPT_TOKENS", 16)
    assert list(stream_tokens(base, prompt, [], sampling, VOCAB_SIZE)) == expected


def test_a_rounded_key_cache_says_nearly_the_same(tmp_path: Path) -> None:
    """Distance of the logits after 60 tokens: bfloat16's rounding (2**-9) of keys and values, averaged over many."""
    base = build(tiny_folder(tmp_path), "nf4-dq", torch.float32)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        base.cache_dtype = dtype
        decoder = FusedDecoder(base)
        with torch.inference_mode():
            decoder.start([[7 * i % VOCAB_SIZE for i in range(40)]], 21)
            hidden = [decoder.step(torch.tensor([token])) for token in range(20)][-1]
            logits.append(base.logits_of(hidden))
        assert {part.dtype for part in [*decoder._keys, *decoder._values]} == {dtype}
    exact, rounded = logits
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 4e-3


def test_prompts_that_fill_up_a_product_are_answered_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build(tiny_folder(tmp_path, "mistral"))
    sampling = Sampling(max_new_tokens=10)
    expected = generate_batch(base, PROMPTS, [], sampling, VOCAB_SIZE)
    monkeypatch.setattr(type(base), "padded", lambda self, rows: rows + 5)
    assert generate_batch(base, PROMPTS, [], sampling, VOCAB_SIZE) == expected


def test_sampling_is_repeatable_and_follows_its_seed(tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path))

    def sample(**changes: float) -> list[int]:
        sampling = Sampling(**{"temperature": 1.5, "seed": 1, "max_new_tokens": 20} | changes)  # type: ignore[arg-type]
        return list(stream_tokens(base, [3, 4], [], sampling, VOCAB_SIZE))

    assert sample() == sample()
    assert sample() != sample(seed=2)
    greedy = sample(temperature=0)
    assert sample(top_k=1) == greedy and sample(top_p=1e-6) == greedy
    assert len(sample(max_new_tokens=3)) == 3


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = {int(Sampling(temperature=1, top_p=0.75, seed=s).chooser()(logits)) for s in range(200)}
    assert kept == {0, 1}


def test_a_character_in_several_tokens_comes_whole() -> None:
    text = "é€🙂 a"
    pieces = list(stream_text(iter(text.encode()), lambda ids: bytes(ids).decode("utf-8", errors="replace")))
    assert pieces == ["é", "€", "🙂", " ", "a"]


def test_wrong_sampling_settings_are_all_named() -> None:
    with pytest.raises(SettingsError) as refused:
        Sampling(temperature=-1, top_p=0, top_k=-2, max_new_tokens=0)
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        "temperature", "top_p", "top_k", "max_new_tokens",
    ]  # fmt: skip
