"""Flags that generate and chat share."""

from smidgen.cli.options import Flag

__all__ = ["sampling_flags"]


def sampling_flags(*, temperature: float, max_new_tokens: int) -> tuple[Flag, ...]:
    """How the next token is chosen. Defaults differ: one answer should be the same again, a chat should not loop."""
    group = "Sampling"
    return (
        Flag(
            "temperature",
            float,
            temperature,
            "0: always the likeliest token.",
            group,
            check=lambda value: value >= 0,
            expected="0 or more",
        ),
        Flag(
            "top_p",
            float,
            1.0,
            "Only the likeliest tokens that together have this probability.",
            group,
            check=lambda value: 0 < value <= 1,
            expected="more than 0 and at most 1",
        ),
        Flag(
            "top_k",
            int,
            0,
            "Only the K likeliest tokens; 0: all.",
            group,
            metavar="K",
            check=lambda value: value >= 0,
            expected="0 or more",
        ),
        Flag(
            "seed",
            int,
            0,
            "Seed of the choice.",
            group,
            check=lambda value: 0 <= value < 2**63,
            expected="a number from 0 to 2**63 - 1",
        ),
        Flag(
            "max_new_tokens",
            int,
            max_new_tokens,
            "Longest answer in tokens.",
            group,
            check=lambda value: value >= 1,
            expected="1 or more",
        ),
        Flag("system", str, None, "A system message before the conversation.", group),
    )
