"""How `smidgen bench` shows its figures: pure functions from results to tables. Nothing here prints."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from smidgen.bench.figures import format_rate
from smidgen.units import format_bytes, format_duration

__all__ = ["decode", "kernels", "memory", "step", "where"]

Parts = list[tuple[str, Table]]


def step(result: Mapping[str, Any]) -> Parts:
    """Times, memory and shares of the peak of all sides, ours first."""
    table = _table("", "step", "min - max", "of the peak", "peak memory", "load", "its peak", "smidgen is", "loss")
    sides = [("smidgen", result, "")]
    if result["dense"]:
        sides.append(("dense float32", result["dense"], f"4-bit tax {result['four_bit_tax']:.2f}"))
    sides += [(peer["name"], peer, f"{peer['speedup']:.2f} x as fast") for peer in result["peers"]]
    for name, side, ratio in sides:
        table.add_row(
            name,
            _seconds(side["step_s"]),
            f"{_seconds(side['step_s_min'])} - {_seconds(side['step_s_max'])}",
            f"{side['roofline_fraction']:.2f}",
            format_bytes(side["peak_rss_bytes"]),
            format_duration(side["load_s"]),
            format_bytes(side["load_peak_rss_bytes"]),
            ratio,
            f"{side['loss'][0]:.4f} … {side['loss'][-1]:.4f}",
        )
    title = f"One step of {result['shape']}, {result['seq_len']} tokens, recompute {result['recompute']}"
    return [(title, table)]


def kernels(result: Mapping[str, Any]) -> Parts:
    """One line for each case and number of threads; then the memory of quantising."""
    table = _table("case", "threads", "smidgen", "min - max", "rate", "against dense", "against bitsandbytes")
    for case in result["cases"]:
        ours = case["smidgen"]
        table.add_row(
            case["case"],
            str(case["threads"]),
            _seconds(ours["seconds"]),
            f"{_seconds(ours['seconds_min'])} - {_seconds(ours['seconds_max'])}",
            format_rate(ours),
            _ratio(case.get("speedup_over_dense")),
            _ratio(case.get("speedup_over_bitsandbytes")),
        )
    memory = _table("stored as", "smidgen", "bitsandbytes")
    for row in result["quantise_memory"]:
        memory.add_row(row["storage"], _share(row.get("smidgen")), _share(row.get("bitsandbytes")))
    size = result["size"]
    return [
        (f"Kernels on a matrix of {size} x {size}", table),
        ("Extra memory of quantising, result included, as a share of the float32 tensor", memory),
    ]


def decode(result: Mapping[str, Any]) -> Parts:
    """Tokens a second of all sides, ours first."""
    table = _table("", "as", "prefill tokens/s", "min - max", "decode tokens/s", "min - max", "smidgen is", "memory")
    for name, side in [("smidgen", result), *((peer["name"], peer) for peer in result["peers"])]:
        ratio = f"{side['prefill_speedup']:.2f} x / {side['decode_speedup']:.2f} x" if "decode_speedup" in side else ""
        table.add_row(
            name,
            side["settings"],
            *(
                text
                for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
                for text in (f"{side[key]:.1f}", f"{side[f'{key}_min']:.1f} - {side[f'{key}_max']:.1f}")
            ),
            ratio,
            format_bytes(side["peak_rss_bytes"]),
        )
    title = f"{result['model']}: a prompt of {result['prompt_tokens']} tokens, {result['new_tokens']} after it"
    return [(title, table)]


def memory(result: Mapping[str, Any]) -> Parts:
    """Forecast and measured peaks, the step, and what was read for it."""
    table = _table("", "forecast", "measured")
    table.add_row("anonymous", format_bytes(result["forecast_peak_bytes"]), format_bytes(result["measured_peak_bytes"]))
    table.add_row("resident", format_bytes(result["forecast_rss_bytes"]), format_bytes(result["peak_rss_bytes"]))
    if result["cgroup_peak_bytes"] is not None:
        table.add_row("cgroup", format_bytes(result["limit_bytes"]), format_bytes(result["cgroup_peak_bytes"]))
    if result["swapped_bytes"]:
        table.add_row("swapped", "", format_bytes(result["swapped_bytes"]))
    step = _table("", "")
    step.add_row("step" if result["mode"] == "train" else "token", _seconds(result["step_s"]))
    if result["resident_step_s"]:
        peak = format_bytes(result["resident_peak_rss_bytes"])
        step.add_row("all layers in memory", f"{_seconds(result['resident_step_s'])}, peak {peak}")
    step.add_row("read from disk", format_bytes(result["read_bytes_per_step"]))
    step.add_row("waited for it", _seconds(result["wait_s_per_step"]))
    step.add_row("layers streamed", f"{result['streamed_layers']} of {result['layers']}")
    step.add_row("recompute", result["recompute"])
    what = f"{result['shape']}, {result['quantize']}, {result['micro_batch']} x {result['seq_len']} tokens"
    return [(f"Memory of {what}", table), ("Time", step)]


def where(result: Mapping[str, Any]) -> str:
    """'Intel ..., 2 threads, AVX2; medians of 7 rounds. Skipped: ...'"""
    machine, rounds = result["machine"], result["repeats_wanted"]
    parts = [
        f"{machine['processor']}, {machine['threads']} threads, instructions: {machine['isa']};"
        f" {f'medians of {rounds} rounds' if rounds > 1 else 'one round'}."
    ]
    parts += [f"{name} is skipped: {why}" for name, why in result["skipped"].items()]
    parts += [f"Note: {note}." for note in result.get("notes", [])]
    return " ".join(parts)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    return table


def _seconds(seconds: float) -> str:
    """0.00213 -> '2.13 ms', 4.2 -> '4.20 s'."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _share(side: Mapping[str, Any] | None) -> str:
    return f"{side['ratio']:.2f}" if side and "ratio" in side else "-"
