"""The other two benchmarks, small: every case is measured, failures of a peer are no failure of ours."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from smidgen.bench import decode, kernels
from smidgen.bench.decode import DecodeSettings, bench_decode
from smidgen.bench.kernels import KernelSettings, bench_kernels
from stories import stories_gguf


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_STORAGES", ("nf4-dq",))
    result = bench_kernels(KernelSettings(repeats=2, size=256, rows=(1, 8)))
    cases = {case["case"]: case for case in result["cases"]}
    assert {case["threads"] for case in result["cases"]} == {1}
    assert "dequantise nf4-dq float32" in cases
    assert cases["quantise nf4-dq bfloat16"]["smidgen"]["gweights_per_s_per_thread"] > 0
    assert len(cases["product M=8"]["smidgen"]["repeats"]) == 2
    assert cases["product M=8"]["smidgen"]["gflops"] > 0
    assert cases["gradient M=8"]["speedup_over_dense"] > 0
    ours_alone = {f"{what} {form}" for what in ("dequantise", "product") for form in ("gptq-4 g128", "Q4_K", "Q8_0")}
    assert all(any(name.startswith(start) for name in cases) for start in ours_alone)
    if find_spec("bitsandbytes"):
        for name in ("dequantise nf4-dq float32", "quantise int8 float32", "product M=8", "gradient M=8"):
            assert "speedup_over_bitsandbytes" in cases[name], cases[name]
    assert result["quantise_memory"][0]["smidgen"]["tensor_bytes"] == 2 * 256 * 256 * 4
    json.dumps(result)


def test_decode_gives_rates_of_all_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_PEERS", {"transformers": ("decode_transformers", "transformers")})
    model = stories_gguf(tmp_path)
    result = bench_decode(DecodeSettings(str(model), prompt_tokens=8, new_tokens=4, repeats=2))
    assert result["skipped"] == {}
    assert len(result["prefill"]) == len(result["decode"]) == 2
    assert result["decode_tokens_per_s_min"] <= result["decode_tokens_per_s"] <= result["decode_tokens_per_s_max"]
    assert [peer["name"] for peer in result["peers"]] == ["transformers"]
    assert result["peers"][0]["decode_speedup"] > 0
    json.dumps(result)
