"""llama.cpp itself opens what we export: the adapter over the very base file, and the merged model.

llama.cpp rounds activations to 8 bits where we compute in float32, so the two differ on the bare base already. An
export is right if the adapter adds nothing to that difference.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from smidgen.data.records import read_data
from smidgen.export.compare import without_adapters

PROMPTS, NEW_TOKENS, TOP = 20, 16, 20
SCRIPT = Path(__file__).parents[1] / "llamacpp_answers.py"


def _llamacpp(model: str, lora: Path | None, prompts: list[list[int]]) -> Any:
    asked = {
        "model": model, "lora": lora and str(lora), "prompts": prompts, "new_tokens": NEW_TOKENS, "top": TOP,
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


def _distance_and_unlike(
    loaded: Any, prompts: list[list[int]], answers: Any, allowed: float
) -> tuple[float, float, list[str]]:
    """(mean |difference| of log-probabilities at the first new token, weighted by probability; twice the largest one of
    the two best tokens anywhere; wrong greedy tokens).

    A greedy token may differ where our own two best are nearer to one another than `allowed`: two log-probabilities
    that are each off by the largest difference, one up and one down, change places there.
    """
    differences: list[float] = []
    largest = 0.0
    wrong: list[str] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = [token for token, _ in answer]
        ours = _log_probabilities(loaded, prompt + tokens[:-1])[len(prompt) - 1 :]
        for place, (token, tops) in enumerate(answer):
            row = ours[place]
            gaps = [abs(float(row[other]) - theirs) for other, theirs in tops]
            if place == 0:
                weights = [float(row[other].exp()) for other, _ in tops]
                differences.append(sum(w * gap for w, gap in zip(weights, gaps, strict=True)) / sum(weights))
            largest = max(largest, *gaps[:2])
            best, second = row.topk(2).values.tolist()
            if int(row.argmax()) != token and best - second > allowed:
                wrong.append(f"prompt {number}, token {place}: {token} for {int(row.argmax())}")
    return sum(differences) / len(differences), 2 * largest, wrong


@pytest.mark.slow
def test_adapter_and_merged_model(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    run = smidgen.finetune(
        "smollm2-135m", "toolcalls", tmp_path / "run", max_steps=16, compute_dtype="float32", compare=0
    )
    loaded = smidgen.load(run.path, compute_dtype="float32")
    rows = read_data("toolcalls").validation[:PROMPTS]
    prompts = [loaded.renderer.prompt_ids(row.messages[:-1]) for row in rows if row.messages]
    assert len(prompts) == PROMPTS
    base_file = str(loaded.base.checkpoint.path)
    smidgen.export_run(run.path, tmp_path / "lora.gguf", to="gguf-lora")
    smidgen.export_run(run.path, tmp_path / "merged.gguf", to="gguf", type="F16")
    with without_adapters(loaded.base):
        answers = _llamacpp(base_file, None, prompts)
        bare, allowed, _ = _distance_and_unlike(loaded, prompts, answers, 0.0)
        assert not _distance_and_unlike(loaded, prompts, answers, allowed)[2]
    for model, lora in ((base_file, tmp_path / "lora.gguf"), (str(tmp_path / "merged.gguf"), None)):
        distance, _, wrong = _distance_and_unlike(loaded, prompts, _llamacpp(model, lora, prompts), allowed)
        print(f"bare {bare:.4f} (at most {allowed:.3f}), with the adapter {distance:.4f}, {wrong}")
        assert distance <= 1.1 * bare
        assert not wrong
