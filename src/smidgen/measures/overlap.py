"""How much of a reference's wording an answer has: ROUGE and BLEU.

ROUGE (Lin 2004): F1 over shared n-grams, or over the longest common subsequence, mean over rows. Words are runs of
letters and digits, lower-cased, not stemmed: for ASCII text the figures are those of rouge-score; letters of other
scripts count too, which that package drops.

BLEU (Papineni et al. 2002): over the whole file, up to 4-grams, words as mteval-v13a splits them, case kept, empty
precisions smoothed by halving (mteval's way): the figures of sacrebleu's defaults.
"""

import html
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["BLEU_COUNTS", "bleu_counts", "bleu_of", "rouge_l", "rouge_n"]

_WORD = re.compile(r"[^\W_]+")
_ORDERS = 4
BLEU_COUNTS = 2 * _ORDERS + 2  # matches and n-grams of each order, length of the answer, length of the reference

_SYMBOL = re.compile(r"([!-&(-+/:-@\[-`{-~])")  # of ASCII, all but ' , - .
_POINT_AFTER = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE = re.compile(r"([.,])([^0-9])")
_DASH = re.compile(r"([0-9])(-)")
_ENTITIES = ("&quot;", "&amp;", "&lt;", "&gt;")


def rouge_n(expected: str, answer: str, n: int) -> float:
    """F1 of shared n-grams; 0 where a side has none."""
    wanted, given = _ngrams(_words(expected), n), _ngrams(_words(answer), n)
    return _f1((wanted & given).total(), wanted.total(), given.total())


def rouge_l(expected: str, answer: str) -> float:
    """F1 of the longest common subsequence of words."""
    wanted, given = _words(expected), _words(answer)
    return _f1(_common_subsequence(wanted, given), len(wanted), len(given))


def bleu_counts(expected: str, answer: str) -> list[int]:
    """What one row adds: see BLEU_COUNTS."""
    wanted, given = _tokens(expected), _tokens(answer)
    matches, totals = [], []
    for n in range(1, _ORDERS + 1):
        ngrams = _ngrams(given, n)
        matches.append((ngrams & _ngrams(wanted, n)).total())
        totals.append(ngrams.total())
    return [*matches, *totals, len(given), len(wanted)]


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """Sums of bleu_counts over rows, [..., BLEU_COUNTS] -> BLEU from 0 to 1, [...]."""
    matches, totals = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
    given, wanted = sums[..., -2], sums[..., -1]
    # the first order without a match counts as half a match, the next as a quarter, and so on
    smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=-1))
    precisions = smoothed / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(given, 1)))
    scored = (matches[..., 0] > 0) & (totals[..., -1] > 0)  # without any match, or any 4-gram: 0
    return np.where(scored, brevity * np.exp(np.log(precisions).mean(axis=-1)), 0.0)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _tokens(text: str) -> list[str]:
    """Symbols stand alone; full stops and commas too, except between digits; dashes only behind a digit."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity in _ENTITIES:
        text = text.replace(entity, html.unescape(entity))
    text = _SYMBOL.sub(r" \1 ", f" {text} ")
    text = _POINT_BEFORE.sub(r" \1 \2", _POINT_AFTER.sub(r"\1 \2 ", text))
    return _DASH.sub(r"\1 \2 ", text).split()


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _f1(shared: int, wanted: int, given: int) -> float:
    return 2 * shared / (wanted + given) if shared else 0.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at once as the bits of a number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(one)) - 1
    row = every  # bit i is 0 where the best length grows at word i
    for word in other:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & every
    return len(one) - row.bit_count()
