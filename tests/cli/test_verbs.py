"""What each verb passes to the library and prints of its answer. The library is a stand-in here."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smidgen.events import Answer, Answers, Evaluated, Note, Progress, Saved, Step

SUMMARY = {
    "run": "runs/x",
    "base_format": "gguf",
    "loss_before": 2.5,
    "loss_after": 0.25,
    "exact_match_before": 0.0,
    "exact_match_after": 0.93,
    "valid_json_before": None,
    "valid_json_after": float("nan"),
    "steps": 3,
    "tokens": 300,
    "tokens_per_s": 100.0,
    "wall_s": 65.0,
    "peak_rss_bytes": 1_200_000_000,
    "trainable_parameters": 4_884_480,
}


@dataclass
class Generation:
    text: str
    prompt_tokens: int = 4
    new_tokens: int = 2
    tokens_per_s: float = 10.0


class Model:
    def __init__(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def generate(self, prompt: Any, **sampling: Any) -> Generation:
        self.asked.append((prompt, sampling))
        return Generation("said")

    def stream(self, prompt: Any, **sampling: Any) -> Iterator[str]:
        # A copy: the caller goes on adding to its list of messages.
        self.asked.append((list(prompt) if isinstance(prompt, list) else prompt, sampling))
        yield from ("Hel", "lo ", "there")


@pytest.fixture
def model(api: Any) -> Model:
    model = Model()
    api.load = lambda spec, **settings: model
    return model


def a_run(report: Callable[[Any], None]) -> SimpleNamespace:
    report(Note("a reason"))
    report(Progress("quantising", 1, 1))
    report(Answers("before", (Answer("ring me", "{}", "no"),), {"exact_match": 0.0}))
    for step in (1, 2, 3):
        report(Step(step, 3, 1.0, 1e-3, 1.0, 100, 100.0, 3.0, 10**9))
    report(Evaluated(3, 0.25, 10, 100))
    report(Answers("after", (Answer("ring me", "{}", "{}"),), {"exact_match": 1.0}))
    report(Saved(Path("runs/x/adapter_model.safetensors"), 1_000_000))
    return SimpleNamespace(path=Path("runs/x"), summary=SUMMARY)


def test_finetune_passes_every_setting_and_prints_its_summary_last(smidgen: Callable[..., Any], api: Any) -> None:
    seen: dict[str, Any] = {}

    def finetune(model: str, data: str, out: Path, *, report: Any, **settings: Any) -> SimpleNamespace:
        seen.update(settings, model=model, data=data, out=out)
        return a_run(report)

    api.finetune = finetune
    outcome = smidgen("finetune", "m", "d", "--out", "runs/x", "--rank", "4", "--quantize", "bnb.nf4", "--json")
    assert outcome.code == 0
    last = json.loads(outcome.out.splitlines()[-1])
    assert last == {**SUMMARY, "valid_json_after": None}
    assert len(outcome.out.splitlines()) == 1, "with --json only the object goes to standard output"
    assert "bnb.nf4: understood as nf4" in outcome.err
    assert "a reason" in outcome.err
    assert (seen["model"], seen["data"], seen["out"]) == ("m", ["d"], Path("runs/x"))
    assert (seen["rank"], seen["quantize"], seen["alpha"]) == (4, "nf4", 32.0)


def test_finetune_shows_before_and_after_files_and_how_to_go_on(smidgen: Callable[..., Any], api: Any) -> None:
    api.finetune = lambda model, data, out, *, report, **_: a_run(report)
    outcome = smidgen("finetune", "m", "d", "--out", "runs/x")
    for said in ("2.500", "0.250", "93 %", "adapter_model.safetensors", "1.0 MB", "1.2 GB", "3 steps, 300 tokens"):
        assert said in outcome.out
    assert "smidgen generate runs/x 'ring me'" in outcome.out
    assert "smidgen merge runs/x --out runs/x-merged" in outcome.out
    assert "3/3 loss 1.000" in outcome.err


def test_finetune_resume_takes_everything_from_the_run(smidgen: Callable[..., Any], api: Any) -> None:
    seen: list[Path] = []

    def resume(run: Path, *, report: Any) -> SimpleNamespace:
        seen.append(run)
        return a_run(report)

    api.resume = resume
    assert smidgen("finetune", "--resume", "runs/x").code == 0
    assert seen == [Path("runs/x")]


def test_ctrl_c_in_training_says_how_to_go_on(smidgen: Callable[..., Any], api: Any, tmp_path: Path) -> None:
    def finetune(model: str, data: str, out: Path, **_: Any) -> None:
        (out / "checkpoints" / "step-2").mkdir(parents=True)
        raise KeyboardInterrupt

    api.finetune = finetune
    outcome = smidgen("finetune", "m", "d", "--out", str(tmp_path / "my run"))
    assert outcome.code == 130
    assert f"smidgen finetune --resume '{tmp_path}/my run'" in outcome.err


def test_demo_takes_the_next_free_folder(
    smidgen: Callable[..., Any], api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    seen: list[Any] = []

    def finetune(model: str, data: str, out: Path, *, report: Any, **settings: Any) -> SimpleNamespace:
        seen.append((model, data, out))
        return a_run(report)

    api.finetune = finetune
    outcome = smidgen("demo")
    assert seen == [("smollm2-135m", "toolcalls", Path("runs/demo-2"))]
    assert outcome.err.startswith("smidgen demo: ")


def test_generate_streams_to_standard_output(smidgen: Callable[..., Any], model: Model) -> None:
    outcome = smidgen("generate", "m", "hi", "--temperature", "0.5", "--top-k", "7")
    assert outcome.out == "Hello there\n"
    prompt, sampling = model.asked[0]
    assert prompt == "hi"
    assert (sampling["temperature"], sampling["top_k"], sampling["raw"]) == (0.5, 7, False)


def test_generate_json_has_the_figures(smidgen: Callable[..., Any], model: Model) -> None:
    outcome = smidgen("generate", "m", "hi", "--system", "Be brief.", "--json")
    assert json.loads(outcome.out) == {"text": "said", "prompt_tokens": 4, "new_tokens": 2, "tokens_per_s": 10.0}
    assert model.asked[0][0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize("words", [("generate", "m"), ("generate", "m", "-")])
def test_generate_reads_its_prompt_from_standard_input(
    smidgen: Callable[..., Any], model: Model, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("wie spät?\n".encode())))
    smidgen(*words)
    assert model.asked[0][0] == "wie spät?"


@pytest.mark.parametrize(("given", "said"), [(b"\xff", "expected UTF-8 text"), (b" \n", "the prompt is empty")])
def test_generate_refuses_what_is_no_prompt(
    smidgen: Callable[..., Any], model: Model, monkeypatch: pytest.MonkeyPatch, given: bytes, said: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    outcome = smidgen("generate", "m")
    assert outcome.code == 2
    assert said in outcome.err


def test_chat_keeps_the_conversation_until_reset(
    smidgen: Callable[..., Any], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n/what\nand?\n/reset\nnew\n")))
    outcome = smidgen("chat", "m", "--json")
    asked = [[message["content"] for message in messages] for messages, _ in model.asked]
    assert asked == [["hi"], ["hi", "Hello there", "and?"], ["new"]]
    assert [sampling["seed"] for _, sampling in model.asked] == [0, 1, 2]
    assert len(outcome.out.splitlines()) == 1, "with --json the conversation goes to standard error"
    assert json.loads(outcome.out)["messages"][-1] == {"role": "assistant", "content": "Hello there"}


def figure(value: float, against: float | None = None, worse: bool = False, spread: float = 0.1) -> dict[str, Any]:
    """As measures.measure.compare gives them."""

    def within(middle: float) -> dict[str, Any]:
        return {"value": middle, "low": middle - spread, "high": middle + spread}

    if against is None:
        return within(value)
    return within(value) | {"against": within(against), "difference": within(value - against), "worse": worse}


def test_evaluate_prints_what_it_measured(smidgen: Callable[..., Any], api: Any) -> None:
    seen: dict[str, Any] = {}

    def evaluate(model_run: str, *data: str, **settings: Any) -> dict[str, Any]:
        seen.update(settings, data=data)
        part = {"data": "wiki.txt", "kind": "text", "protocol": "gptq", "rows": 3, "tokens": 6141}
        figures = {"loss": figure(0.5), "perplexity": {"value": 1.6487, "low": None, "high": None}}
        return {"model": "m", "against": None, "data": [part | {"figures": figures}]}

    api.evaluate = evaluate
    outcome = smidgen("evaluate", "m", "wiki.txt", "b.jsonl", "--protocol", "gptq", "--no-answers", "--limit", "3")
    assert (seen["protocol"], seen["answers"], seen["limit"]) == ("gptq", False, 3)
    assert seen["data"] == ("wiki.txt", "b.jsonl")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines() if line]
    assert lines == [
        "wiki.txt: 3 windows, 6,141 tokens, protocol gptq; 95 % intervals in brackets",
        "m",
        "loss 0.5 (0.4 to 0.6)",
        "perplexity 1.649",
    ]


def test_evaluate_shows_two_models_side_by_side_and_what_became_worse(smidgen: Callable[..., Any], api: Any) -> None:
    part = {"data": "arc.jsonl", "kind": "choices", "rows": 50, "figures": {"accuracy": figure(0.3, 0.6, worse=True)}}
    rows = {
        "data": "rows.jsonl",
        "kind": "rows",
        "rows": 9,
        "tokens": 10,
        "figures": {"loss": figure(2, 1, worse=True)},
    }
    worse = [{"data": p["data"], "kind": p["kind"], "figure": name} for p, name in ((part, "accuracy"), (rows, "loss"))]
    result = {"model": "run", "against": "base", "data": [part, rows], "worse": worse}
    api.evaluate = lambda *_, **__: result
    outcome = smidgen("evaluate", "run", "arc.jsonl", "rows.jsonl", "--against", "base")
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines() if line]
    assert lines[1:3] == [
        "base run difference",
        "accuracy 60.0 % (50.0 to 70.0) 30.0 % (20.0 to 40.0) -30.0 % (-40.0 to -20.0)",
    ]
    beyond = "worse beyond the 95 % interval of the difference"
    assert lines[-2:] == [
        f"Forgotten: arc.jsonl: accuracy 60.0 % → 30.0 %, {beyond}, -40.0 to -20.0.",
        f"Worse: rows.jsonl: loss 1 → 2, {beyond}, +0.9 to +1.1.",
    ]
    result["worse"] = []
    assert "Nowhere worse than base beyond" in smidgen("evaluate", "run", "arc.jsonl", "--against", "base").out
    assert json.loads(smidgen("evaluate", "run", "a", "--against", "base", "--json").out) == result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "DATA: missing."),
        (("--questions", "q.jsonl"), "--questions: needs --out FILE beside it."),
        (("d.jsonl", "--out", "a.jsonl"), "--out: needs --questions FILE beside it."),
    ],
)
def test_evaluate_says_what_is_missing(words: tuple[str, ...], said: str, smidgen: Callable[..., Any]) -> None:
    outcome = smidgen("evaluate", "m", *words)
    assert outcome.code == 2
    assert said in outcome.err


def test_evaluate_takes_its_data_from_a_file_of_flags(smidgen: Callable[..., Any], api: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []
    api.evaluate = lambda model, *data, **_: seen.append(data) or {"model": model, "against": None, "data": []}
    for text in ("model_run: m\ndata: [a.jsonl, b.txt]\n", "model_run: m\ndata: a.jsonl\n"):
        (tmp_path / "flags.yaml").write_text(text)
        assert smidgen("evaluate", "--config", str(tmp_path / "flags.yaml")).code == 0
    assert smidgen("evaluate", "m", "c.jsonl", "--config", str(tmp_path / "flags.yaml")).code == 0
    assert seen == [("a.jsonl", "b.txt"), ("a.jsonl",), ("c.jsonl",)]


def test_merge_lists_its_files(smidgen: Callable[..., Any], api: Any) -> None:
    def merge(run: str, out: Path, *, dtype: str, report: Any, **others: Any) -> dict[str, Any]:
        assert others == {"base": None, "memory": None, "trust_remote_code": False}
        report(Saved(out / "model.safetensors", 270_000_000))
        return {"out": str(out), "dtype": dtype, "max_difference": 0.001}

    api.merge = merge
    outcome = smidgen("merge", "runs/x", "--out", "models/x", "--dtype", "bfloat16")
    for said in ("models/x/model.safetensors", "270.0 MB", "bfloat16", "smidgen generate models/x"):
        assert said in outcome.out


def test_download_prints_the_folder(smidgen: Callable[..., Any], api: Any) -> None:
    api.download = lambda spec, *, report: Path("/cache") / spec
    assert smidgen("download", "owner/name").out.splitlines()[0] == "/cache/owner/name"
    assert json.loads(smidgen("download", "owner/name", "--json").out) == {"path": "/cache/owner/name"}


def test_doctor_prints_nested_facts(smidgen: Callable[..., Any], api: Any) -> None:
    api.doctor = lambda *, report: {"python": "3.11", "cpu": {"threads": 2, "memory_bytes": 8 * 10**9}}
    out = smidgen("doctor").out
    assert "8.0 GB" in out
    assert "threads" in out


def test_a_doctor_that_finds_something_wrong_ends_with_1(smidgen: Callable[..., Any], api: Any) -> None:
    api.doctor = lambda *, report: {"kernels": {"swiglu": "wrong: relative error 1.0e+00"}, "failed": ["swiglu"]}
    assert smidgen("doctor").code == 1
    found = smidgen("doctor", "--json")
    assert found.code == 1 and json.loads(found.out)["failed"] == ["swiglu"]
    api.doctor = lambda *, report: {"kernels": {"swiglu": "ok"}, "failed": [], "disk": {"read_bytes_per_s": 12 * 10**8}}
    found = smidgen("doctor")
    assert found.code == 0 and "1.2 GB/s" in found.out


def test_data_shows_a_row_and_lengths(smidgen: Callable[..., Any], api: Any) -> None:
    from smidgen.data.report import DataReport, Sharing
    from smidgen.events import RowShown

    report = DataReport(
        layout="messages",
        rows=3,
        tokens=100,
        trained_tokens=25,
        longest_tokens=50,
        lengths=((32, 2), (50, 1)),
        truncated=0,
        suspicious=(("a.jsonl:2", "the same as a.jsonl:1"),),
        suspicious_rows=1,
        shown=RowShown((("ask", False), ("answer", True))),
        sharing=Sharing(micro_batch=4, accumulation=2, pack=None, tokens=1000, computed_tokens=500),
    )
    given: dict[str, Any] = {}
    api.inspect_data = lambda model, data, *, report, _=report, **more: given.update(more) or _
    out = smidgen("data", "m", "a.jsonl", "--micro-batch", "8", "--accumulation", "2", "--pack", "600").out
    said = {key: value for key, value in given.items() if value is not None}
    assert said == {
        **{"seq_len": 1024, "too_long": "right", "token_cache": True, "train_on_prompt": False},
        **{"dropout": 0.0, "neftune_alpha": 0.0, "share_prefix": "auto", "group_by_length": False},
        **{"micro_batch": 8, "accumulation": 2, "pack": 600},
    }
    assert "50 % of the tokens saved (2.00 times fewer), at 4 rows at once, 8 rows a step" in " ".join(out.split())
    for said in ("ask[[answer]]", "25 of 100 tokens (25 %)", "33-50", "a.jsonl:2: the same as a.jsonl:1"):
        assert said in out
    said = json.loads(smidgen("data", "m", "a.jsonl", "--json").out)
    assert (said["share"], said["sharing"]["saved"]) == (0.25, 0.5)
