"""llama.cpp itself opens what we export: the adapter over the very base file, and the merged model.

llama.cpp rounds activations to 8 bits where we compute in float32, so the two differ on the bare base already. An
export is right if the adapter adds nothing to that difference.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from gguf_models import ROTARY, UNSAID, write_gguf
from smidgen.checkpoint.architectures import ARCHITECTURES
from smidgen.data.records import read_data
from smidgen.export.compare import without_adapters
from smidgen.export.gguf_model import save_gguf
from tiny import VOCAB_SIZE, tiny_folder, write_rows

PROMPTS, NEW_TOKENS, TOP = 20, 16, 20
TINY_PROMPTS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(1)).tolist()
SCRIPT = Path(__file__).parents[1] / "llamacpp_answers.py"


def _llamacpp(
    model: str, lora: Path | None, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, top: int = TOP
) -> Any:
    asked = {
        "model": model, "lora": lora and str(lora), "prompts": prompts, "new_tokens": new_tokens, "top": top,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@torch.no_grad()
def _log_probabilities(loaded: Any, ids: list[int]) -> torch.Tensor:
    """Of the next token after every one of `ids`, [len(ids), vocab_size]."""
    return loaded.base.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def _gaps(ours: torch.Tensor, tops: list[tuple[int, float]]) -> torch.Tensor:
    """|our log-probability - llama.cpp's| of its most likely tokens, best first. ours: [vocab_size]"""
    tokens, theirs = zip(*tops, strict=True)
    return (ours[list(tokens)] - torch.tensor(theirs)).abs()


def _distance(loaded: Any, texts: list[tuple[list[int], list[int]]], lora: Path | None, model: str) -> float:
    """Mean difference of the log-probabilities, weighted by probability, after every beginning of every answer.

    texts: (prompt, answer). Both programs read the same text, so that neither's own choices change what is compared.
    """
    beginnings = [prompt + answer[:count] for prompt, answer in texts for count in range(len(answer))]
    read = iter(_llamacpp(model, lora, beginnings, 1))
    differences = []
    for prompt, answer in texts:
        ours = _log_probabilities(loaded, prompt + answer)[len(prompt) - 1 :]
        for row, tokens in zip(ours[: len(answer)], read, strict=False):
            if tokens:  # else it would end the answer here, and says no more
                gaps, (_, tops) = _gaps(row, tokens[0][1]), tokens[0]
                weights = row[[token for token, _ in tops]].exp()
                differences.append(float((weights * gaps).sum() / weights.sum()))
    assert len(differences) >= 0.9 * len(beginnings)
    return sum(differences) / len(differences)


def _greedy(loaded: Any, prompts: list[list[int]], answers: Any) -> tuple[float, list[float]]:
    """(the largest difference of the two best tokens' log-probabilities anywhere; for each greedy token that is not
    ours, how much better ours is by our own).
    """
    largest, others = 0.0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [token for token, _ in answer]
        ours = _log_probabilities(loaded, prompt + tokens[:-1])[len(prompt) - 1 :]
        for row, (token, tops) in zip(ours, answer, strict=True):
            largest = max(largest, float(_gaps(row, tops[:2]).max()))
            if int(row.argmax()) != token:
                others.append(float(row.max() - row[token]))
    return largest, others


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a fine-tune, and 320 texts for each of three files
def test_adapter_and_merged_model(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    run = smidgen.finetune(
        "smollm2-135m", "toolcalls", tmp_path / "run", max_steps=16, compute_dtype="float32", compare=0
    )
    loaded = smidgen.load(run.path, compute_dtype="float32")
    rows = [row.messages for row in read_data("toolcalls").validation[:PROMPTS] if row.messages]
    prompts = [loaded.renderer.prompt_ids(messages[:-1]) for messages in rows]
    answers = [loaded.tokenizer(messages[-1]["content"]).input_ids[:NEW_TOKENS] for messages in rows]
    texts = list(zip(prompts, answers, strict=True))
    assert len(texts) == PROMPTS
    base_file = str(loaded.base.checkpoint.path)
    smidgen.export_run(run.path, tmp_path / "lora.gguf", to="gguf-lora")
    smidgen.export_run(run.path, tmp_path / "merged.gguf", to="gguf", type="F16")
    with without_adapters(loaded.base):
        bare = _distance(loaded, texts, None, base_file)
        largest, others = _greedy(loaded, prompts, _llamacpp(base_file, None, prompts))
    allowed = 1.1 * largest
    print(f"bare {bare:.4f}, at most {largest:.3f}; other tokens where the gap is {others}")
    assert all(gap < allowed for gap in others)
    for model, lora in ((base_file, tmp_path / "lora.gguf"), (str(tmp_path / "merged.gguf"), None)):
        distance = _distance(loaded, texts, lora, model)
        largest, others = _greedy(loaded, prompts, _llamacpp(model, lora, prompts))
        print(f"with the adapter {distance:.4f}, at most {largest:.3f}; other tokens where the gap is {others}")
        assert distance <= 1.1 * bare
        assert all(gap < allowed for gap in others)


def _relative_difference(path: Path, run: Path | None = None, lora: Path | None = None) -> float:
    """Of the log-probabilities that llama.cpp and smidgen read out of a tiny file, to their spread over the tokens.

    run: what smidgen opens instead; lora: what llama.cpp puts on the file.
    """
    loaded = smidgen.load(run or path, quantize="keep", compute_dtype="float32")
    different, spread, compared = 0.0, 0.0, 0
    for prompt, answer in zip(TINY_PROMPTS, _llamacpp(str(path), lora, TINY_PROMPTS, 1, VOCAB_SIZE), strict=True):
        if not answer:  # it would end at once
            continue
        compared += 1
        theirs = dict(answer[0][1])
        tokens = sorted(theirs)
        assert len(tokens) > VOCAB_SIZE // 2
        ours = _log_probabilities(loaded, prompt)[-1][tokens]
        different += float((ours - torch.tensor([theirs[token] for token in tokens])).square().sum())
        spread += float((ours - ours.mean()).square().sum())
    assert compared >= 2
    return (different / spread) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256_mean_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes. llama.cpp rounds activations to 8 bits with one scale for 256: 0.7 % at each product."""
    pytest.importorskip("xllamacpp")
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    write_gguf(tiny_folder(tmp_path / "tiny", **wide), tmp_path / "tiny.gguf", {}, default=kind)
    difference = _relative_difference(tmp_path / "tiny.gguf")
    print(f"{kind}: {difference:.4f}")
    assert difference < 0.03


@pytest.mark.slow
def test_adapters_of_unlike_scaling(tmp_path: Path) -> None:
    """rsLoRA with ranks and alphas of some layers' own; llama.cpp knows one alpha and divides by each layer's rank."""
    pytest.importorskip("xllamacpp")
    write_gguf(tiny_folder(tmp_path / "tiny"), tmp_path / "tiny.gguf", {}, default="F16")
    how: dict[str, Any] = {
        "rank": 8, "alpha": 8.0, "use_rslora": True, "rank_pattern": {"down_proj|v_proj": 2},
        "alpha_pattern": {"q_proj|up_proj": 20.0}, "learning_rate": 5e-3, "compute_dtype": "float32", "epochs": 3.0,
    }  # fmt: skip
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(str(tmp_path / "tiny.gguf"), str(rows), tmp_path / "run", **how).path
    smidgen.export_run(run, tmp_path / "lora.gguf", to="gguf-lora")
    difference = _relative_difference(tmp_path / "tiny.gguf", run, tmp_path / "lora.gguf")
    bare = _relative_difference(tmp_path / "tiny.gguf", run)
    print(f"{difference:.5f}, without the adapter {bare:.5f}")
    assert difference < 0.01 < 10 * 0.01 < bare  # as for whole exports below; the adapter is far more than that


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral"])
def test_exports_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = tiny_folder(tmp_path / "tiny", architecture, **UNSAID.get(architecture, {}))
    how: dict[str, Any] = {"learning_rate": 5e-3, "compute_dtype": "float32", "compare": 0, "max_time": "3s"}
    run = smidgen.finetune(str(folder), str(write_rows(tmp_path / "rows.jsonl")), tmp_path / "run", **how)
    smidgen.export_run(run.path, tmp_path / "merged.gguf", to="gguf", type="F16")
    difference = _relative_difference(tmp_path / "merged.gguf")
    print(f"{architecture}: {difference:.5f}")
    assert difference < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [name for name in ROTARY if "betas" not in name])  # which llama.cpp does not read
def test_rotary_scalings(scaling: str, tmp_path: Path) -> None:
    """Of longrope's two sets of factors llama.cpp takes one by its room for text: with 1,024 tokens here, the short."""
    pytest.importorskip("xllamacpp")
    architecture, changes = copy.deepcopy(ROTARY[scaling])
    if architecture == "phi3":
        changes |= {"original_max_position_embeddings": 2048, "max_position_embeddings": 8192}
    folder = tiny_folder(tmp_path / "tiny", architecture, **changes)
    loaded = smidgen.load(folder, quantize="none", compute_dtype="float32")
    save_gguf(loaded.base, loaded.tokenizer, tmp_path / "out.gguf", "F16")
    difference = _relative_difference(tmp_path / "out.gguf")
    print(f"{scaling}: {difference:.5f}")
    assert difference < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_exports_in_blocks(kind: str, tmp_path: Path) -> None:
    """The same file read by both: llama.cpp rounds activations to 8 bits with one scale for 32."""
    pytest.importorskip("xllamacpp")
    how: dict[str, Any] = {"learning_rate": 5e-3, "compute_dtype": "float32", "compare": 0, "max_time": "3s"}
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(str(tiny_folder(tmp_path / "tiny")), str(rows), tmp_path / "run", **how)
    smidgen.export_run(run.path, tmp_path / "merged.gguf", to="gguf", type=kind)
    difference = _relative_difference(tmp_path / "merged.gguf")
    print(f"{kind}: {difference:.5f}")
    assert difference < 0.03
