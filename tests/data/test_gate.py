"""Data that the gate refuses, batches, the order of an epoch, and the report."""

import pytest
import torch

from small_tokenizers import CHATML, word_tokenizer
from smidgen.data.batch import epoch_order, make_batch
from smidgen.data.gate import check_examples
from smidgen.data.layouts import Row
from smidgen.data.render import Example, Renderer
from smidgen.data.report import build_report, find_odd
from smidgen.data.rows import content_hash, scan
from smidgen.data.tokens import tokenise
from smidgen.errors import DataError

TOKENIZER = word_tokenizer(CHATML)
BOS, EOS, START, END = 1, 2, 3, 4


def example(ids: list[int], labels: list[int], cut: int = 0) -> Example:
    return Example(ids, labels, cut > 0, "rows.jsonl:7", cut)


GOOD = example([START, 9, 9, END], [-100, -100, 9, END])


def check(*examples: Example, vocab_size: int = 50, layout: str = "messages") -> None:
    check_examples(examples, TOKENIZER, vocab_size, (END, EOS), layout=layout)


def test_good_rows_pass() -> None:
    check(GOOD)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no rows to train on"),
        ([example([START, 9], [-100, -100])], "no token of the data would be trained"),
        ([example([START, 9, 9], [-100, 9, 9])], r"no row trains the token .*<|im_end|>"),
        ([GOOD, example([BOS, BOS, 9, END], [-100, -100, 9, END])], r"rows\.jsonl:7 begins with two <s> tokens"),
        ([GOOD, example([START, 9], [-100, 9], 3), example([START, 9], [-100, 9], 5)], "2 of 3 rows .*found up to 7"),
        ([example([START, 50, END], [-100, 50, END])], "does not fit the model, expected token ids below 50, found 50"),
    ],
)
def test_rows_that_would_teach_the_wrong_thing_are_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(*examples)


def test_plain_text_may_be_cut_and_have_no_end() -> None:
    check(example([9, 9, 9], [-100, 9, 9], 5), layout="text")


def test_a_batch_is_padded_on_the_right_and_padding_has_no_label() -> None:
    batch = make_batch([GOOD, example([START, 9], [-100, 9])])
    assert batch.input_ids.tolist() == [[START, 9, 9, END], [START, 9, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 9, END], [-100, 9, -100, -100]]
    assert batch.lengths.tolist() == [4, 2]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    assert list(epoch_order(8, 0, 0)) == list(epoch_order(8, 0, 0)) == [0, 6, 4, 3, 1, 7, 2, 5]
    assert sorted(epoch_order(100, 1, 2)) == list(range(100))
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_report_counts_tokens_and_names_suspicious_rows() -> None:
    def row(question: str, answer: str, where: str, more: tuple[str, ...] = ()) -> Row:
        turns = [("user", question), ("assistant", answer), *(("user", text) for text in more)]
        return Row(tuple({"role": role, "content": text} for role, text in turns), None, None, where)

    rows = [
        row("hi", "bye", "a:1"),
        row("hi", "bye", "a:2"),
        row("hi <|im_end|>", "yes", "a:3"),
        row("one", "two", "a:4", more=("three",)),
        row("one " * 8, "two", "a:5"),
        row("one", "two" + " two" * 8, "a:6"),
    ]
    hashed = [(content_hash(one), one) for one in rows]
    examples = tokenise(scan(lambda: iter(hashed)), Renderer(TOKENIZER, seq_len=16), odd=find_odd(TOKENIZER))
    report = build_report([examples], TOKENIZER, layout="messages")
    assert dict(report.suspicious) == {
        "a:2": "the same as a:1",
        "a:3": "holds the special token <|im_end|> in its text",
        "a:4": "turns after the last answer are left out",
        "a:5": "no token is trained: the prompt alone fills the row",
        "a:6": "cut off: 12 tokens too long",
    }
    assert (report.rows, report.truncated, report.lost_tokens, report.suspicious_rows) == (6, 2, 12 + 11, 5)
    assert report.tokens == sum(len(one.input_ids) for one in examples)
    assert report.trained_tokens == 2 + 2 + 2 + 2 + 0 + 7
    assert report.lengths == ((28, 6),) and report.longest_tokens == 28
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert report.shown.pieces == ((prompt, False), ("bye<|im_end|>", True), ("\n", False))
    assert report.as_dict()["share"] == report.share == report.trained_tokens / report.tokens
