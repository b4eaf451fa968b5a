"""The tables of the pages are those of the results."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from smidgen.bench.peers import STEP_PEERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_performance_docs", ROOT / "tools" / "make_performance_docs.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


WHERE: dict[str, Any] = {
    "machine": {"processor": "A processor", "threads": 2, "isa": "avx2"},
    "versions": {"torch": "2.13"},
    "measured": "today",
    "commit": "0123456789abcdef",
}
RUN: dict[str, Any] = {
    "shape": "smollm2-135m", "recompute": "none", "against": "peft-bnb", "step_s": 3.0, "step_s_min": 2.9,
    "step_s_max": 3.25, "peer_step_s": 4.5, "peer_step_s_min": 4.4, "peer_step_s_max": 4.6, "speedup": 1.5,
    "roofline_fraction": 0.8, "peer_roofline_fraction": 0.5, "peak_rss_bytes": 1.5e9, "peer_peak_rss_bytes": 2.25e9,
    "four_bit_tax": 1.031, "skipped": {}, "notes": ["what to know"], **WHERE,
}  # fmt: skip


def test_pages_are_up_to_date(tool: ModuleType) -> None:
    for page, text in tool.make().items():
        assert page.read_text(encoding="utf-8") == text, "run `python tools/make_performance_docs.py`"


def test_only_marked_sections_change_and_twice_is_as_once(tool: ModuleType) -> None:
    page = "before\n<!-- step -->\nold\n<!-- /step -->\nafter <!-- load --> x\n"
    filled = tool.fill(page, {"step": "new \\1", "load": "y"})
    assert filled == "before\n<!-- step -->\n\nnew \\1\n\n<!-- /step -->\nafter <!-- load --> x\n"
    assert tool.fill(filled, {"step": "new \\1"}) == filled


def test_the_table_of_steps(tool: ModuleType) -> None:
    alone = {**RUN, "against": None, "speedup": None, "skipped": {"peft-bnb": "no network"}, "four_bit_tax": None}
    for key in [key for key in alone if key.startswith("peer_")]:
        alone[key] = None
    text = tool.step_table({"runs": [RUN, alone]})
    lines = text.splitlines()
    assert lines[2] == (
        "| smollm2-135m | none | peft-bnb | 3 s [2.9-3.25] | 4.5 s [4.4-4.6] | 1.50 x | 0.80 | 0.50 | 1.50 GB | 2.25 GB"
        " | 1.03 |"
    )
    assert "| peft-bnb | 3 s [2.9-3.25] | - | - | 0.80 | - | 1.50 GB | - | - |" in lines[3]
    assert lines[-1] == ("A processor, 2 threads, kept to AVX2; today, 0123456789ab; torch 2.13. Note: what to know.")


def test_the_readme_has_a_line_for_each_claim(tool: ModuleType) -> None:
    load = {"against": "peft-bnb", "time_ratio": 0.1, "load_peak_rss_bytes": 1e9, "peer_load_peak_rss_bytes": 4e9}
    peers = [{"name": "llama.cpp", "peak_rss_bytes": 2e8, "prefill_speedup": 2.5, "decode_speedup": 0.8}]
    results = {"step": {"runs": [RUN]}, "load": load, "decode": {"peak_rss_bytes": 1e8, "peers": peers}}
    lines = tool.readme_table(results).splitlines()[2:]
    assert lines == [
        "| step, smollm2-135m, 512 tokens, recompute none | peft-bnb | 1.50 x | 1.50 GB / 2.25 GB |",
        "| load + quantise 1.1B | peft-bnb | 10.00 x | 1.00 GB / 4.00 GB |",
        "| prefill, SmolLM2-135M | llama.cpp | 2.50 x | 0.10 GB / 0.20 GB |",
        "| decode, SmolLM2-135M | llama.cpp | 0.80 x | 0.10 GB / 0.20 GB |",
    ]


def test_without_results_the_page_says_what_to_run(tool: ModuleType) -> None:
    made = tool.sections({})
    assert made["performance"] == "Not measured yet: `make proof`."
    for name, (script, _) in tool.SECTIONS.items():
        assert (ROOT / "benchmarks" / script).is_file()
        assert f"python benchmarks/{script}" in made[name]


def test_the_page_names_every_peer(tool: ModuleType) -> None:
    text = tool.PAGES[0].read_text(encoding="utf-8")
    for name in STEP_PEERS:
        assert f"`{name}`" in text


def test_the_tables_of_quality(tool: ModuleType) -> None:
    forms = {"float32": {"perplexity": 20.0, "loss": 3.0, "tokens": 1024}, "nf4": {"perplexity": 25.0, "loss": 3.25}}
    lines = tool.perplexity_table({"forms": forms, **WHERE}).splitlines()
    assert lines[0].startswith("| stored as | perplexity over 1,024 tokens |")
    assert lines[3] == "| nf4 | 25.00 | 3.2500 | +0.2500 |"
    means = {"float32": {"mean": 0.5, "spread": 0.1, "seeds": 2}, "nf4": {"mean": 0.408, "spread": 0.0, "seeds": 1}}
    runs = [
        {"data": "snips", "form": form, "seed": seed, "loss_before": 2.5, "loss_after": after}
        for form, seed, after in (("float32", 0, 0.4), ("float32", 1, 0.6), ("nf4", 0, 0.408))
    ]
    lines = tool.quality_table({"table": {"snips": means}, "runs": runs, **WHERE}).splitlines()
    assert lines[2] == "| snips | float32 | 2.500 | 0.5000 ± 0.1000 | 2 | - |"
    assert lines[3] == "| snips | nf4 | 2.500 | 0.4080 ± 0.0000 | 1 | +2.0% |", "against the same seeds"


def test_the_tables_of_results(tool: ModuleType) -> None:
    def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high}

    loss = figure(0.5, 0.25, 0.75) | {"against": figure(2.5, 2.0, 3.0), "difference": figure(-2.0, -2.5, -1.5)}
    exact = figure(0.5) | {"against": figure(0.0), "difference": figure(0.5)}
    summary = {"steps": 100, "tokens": 31000, "tokens_per_s": 123.4, "wall_s": 90.0, "peak_rss_bytes": 1.25e9}
    run = {"command": "smidgen finetune", "evaluated": "smidgen evaluate", "test_rows": 50, "summary": summary}
    text = tool.results_table({"runs": {"snips": {**run, "figures": {"exact_match": exact, "loss": loss}}}, **WHERE})
    lines = text.splitlines()
    assert lines[2] == (
        "| snips | loss | 50 | 2.500 (2.000 to 3.000) | 0.500 (0.250 to 0.750) | -2.000 (-2.500 to -1.500) |"
    )
    assert lines[3] == "| snips | exact match | 50 | 0% | 50% | +50% |"
    assert "| snips | 100 | 31,000 | 123 | 1.5 min | 1.25 GB |" in lines
    assert lines[-6:-2] == ["```sh", "smidgen finetune", "smidgen evaluate", "```"]


def test_the_line_of_kills_hides_no_difference(tool: ModuleType) -> None:
    found = {"kills": 100, "same_bytes": True, "same_log": True, "remains": [], **WHERE}
    assert "Killed 100 times, the run ended with the bytes and the log" in tool.kills_line(found)
    for wrong in ({"same_bytes": False}, {"same_log": False}, {"remains": [".tmp-1"]}):
        assert "ANOTHER" in tool.kills_line(found | wrong)


def test_rows_of_many_commits_are_not_said_to_be_of_one(tool: ModuleType) -> None:
    assert tool._with_place("", WHERE, [{"commit": None}, {}]).startswith(
        "\n\nA processor, 2 threads, kept to AVX2; today, 0123456789ab;"
    )
    assert "today, 0123456789ab+;" in tool._with_place("", {**WHERE, "commit": "0123456789abcdef+"})
    text = tool._with_place("", WHERE, [{"commit": "fedcba"}, {}])
    assert "today, rows measured at their own commits, in the JSON; torch 2.13" in text and "0123" not in text
