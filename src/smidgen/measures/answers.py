"""What answers are measured by: exact match always; JSON fields or wording, by what the data expects."""

from collections.abc import Sequence

import numpy as np

from smidgen.events import Answer
from smidgen.measures.fields import field_counts, is_json
from smidgen.measures.measure import Measure, mean, ratio, share
from smidgen.measures.overlap import BLEU_COUNTS, bleu_counts, bleu_of, rouge_l, rouge_n

__all__ = ["ANSWER_MEASURES", "measure_answers"]

ANSWER_MEASURES = ("exact_match", "valid_json", "json_f1", "rouge_1", "rouge_2", "rouge_l", "bleu")


def measure_answers(rows: Sequence[Answer]) -> dict[str, Measure]:
    """exact_match; valid_json and json_f1 where every expected answer is JSON, else rouge_1, rouge_2, rouge_l, bleu."""
    measures = {"exact_match": share([row.answer == row.expected for row in rows])}
    if rows and all(is_json(row.expected) for row in rows):
        counts = np.array([field_counts(row.expected, row.answer) for row in rows], dtype=float)
        return measures | {
            "valid_json": share([is_json(row.answer) for row in rows]),
            "json_f1": Measure(counts, ratio),
        }
    counts = np.array([bleu_counts(row.expected, row.answer) for row in rows], dtype=float).reshape(-1, BLEU_COUNTS)
    return measures | {
        "rouge_1": mean([rouge_n(row.expected, row.answer, 1) for row in rows]),
        "rouge_2": mean([rouge_n(row.expected, row.answer, 2) for row in rows]),
        "rouge_l": mean([rouge_l(row.expected, row.answer) for row in rows]),
        "bleu": Measure(counts, bleu_of),
    }
