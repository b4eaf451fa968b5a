"""Values from the command line and from --config files: read alike, and everything wrong said at once."""

from pathlib import Path

import pytest

from smidgen.cli.options import Flag, settings_flags
from smidgen.cli.values import Given, collect
from smidgen.errors import SettingsError

FLAGS = settings_flags()


def read(tmp_path: Path, yaml: str = "", **typed: str | bool | tuple[str, ...]) -> Given:
    config = None
    if yaml:
        config = tmp_path / "run.yaml"
        config.write_text(yaml, encoding="utf-8")
    return collect(FLAGS, ("model",), (), typed, config)


def problems(tmp_path: Path, yaml: str = "", **typed: str | bool | tuple[str, ...]) -> list[str]:
    with pytest.raises(SettingsError) as error:
        read(tmp_path, yaml, **typed)
    return error.value.problems


def test_words_become_numbers_of_their_kind(tmp_path: Path) -> None:
    given = read(tmp_path, rank="8", learning_rate="2e-4", train_on_prompt=True)
    assert (given["rank"], given["learning_rate"], given["train_on_prompt"]) == (8, 2e-4, True)
    assert given["alpha"] == 32.0
    assert given.named == {"rank", "learning_rate", "train_on_prompt"}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    given = read(tmp_path, "rank: 4\nalpha: 8\nmodel: here\n", rank="64")
    assert (given["rank"], given["alpha"], given["model"]) == (64, 8.0, "here")


def test_a_flag_turned_off_wins_over_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, "train-on-prompt: true", train_on_prompt=False)["train_on_prompt"] is False


def test_keys_may_have_hyphens_underscores_or_be_the_flag_itself(tmp_path: Path) -> None:
    given = read(tmp_path, "learning-rate: 1.0e-3\nmicro_batch: 2\n--seq-len: 99\n")
    assert (given["learning_rate"], given["micro_batch"], given["seq_len"]) == (1e-3, 2, 99)


def test_5e_4_in_yaml_is_a_number_though_yaml_reads_text(tmp_path: Path) -> None:
    assert read(tmp_path, "learning-rate: 5e-4")["learning_rate"] == 5e-4


def test_a_list_of_targets_may_be_a_yaml_list(tmp_path: Path) -> None:
    assert read(tmp_path, "targets: [q, v]")["targets"] == "q,v"


def test_a_mapping_is_a_flag_said_once_for_each_key_or_a_mapping_of_the_file(tmp_path: Path) -> None:
    words = ("q_proj=8", r"layers\.(0|1)=x=4")  # the last = divides: a pattern may hold one
    assert read(tmp_path, rank_pattern=words)["rank_pattern"] == {"q_proj": 8, r"layers\.(0|1)=x": 4}
    given = read(tmp_path, "alpha-pattern: {q_proj: 8, v_proj: 5e-1}", rank_pattern=())
    assert given["alpha_pattern"] == {"q_proj": 8.0, "v_proj": 0.5} and given["rank_pattern"] is None
    assert read(tmp_path, "rank-pattern: {q_proj: 8}", rank_pattern=("v_proj=1",))["rank_pattern"] == {"v_proj": 1}
    assert problems(tmp_path, "alpha-pattern: q_proj", rank_pattern=("q_proj",)) == [
        "--rank-pattern: expected KEY=VALUE, found ('q_proj',)",
        f"{tmp_path / 'run.yaml'}: alpha-pattern: expected 'key: value' lines, found 'q_proj'",
    ]
    assert read(tmp_path, fill=("sum=1 + 1 = 2", "name="))["fill"] == {"sum": "1 + 1 = 2", "name": ""}
    assert problems(tmp_path, fill=("sum",)) == ["--fill: expected KEY=VALUE, found ('sum',)"]
    assert problems(tmp_path, rank_pattern=("q=1", "q=2"))[0].startswith("--rank-pattern: expected each key once")
    assert problems(tmp_path, rank_pattern=("q=x",))[0].startswith("--rank-pattern: expected a whole number")


def test_null_in_yaml_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, "max-steps: null\nrank: null")["rank"] == 16


def test_everything_wrong_on_the_command_line_is_said_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, rank="lots", learning_rate="inf", schedule="zigzag")
    assert found == [
        "--rank: expected a whole number, found 'lots'",
        "--learning-rate: expected a finite number, found 'inf'",
        "--schedule: expected one of cosine, linear, constant, found 'zigzag'",
    ]


def test_everything_wrong_in_a_file_is_said_at_once_with_the_files_name(tmp_path: Path) -> None:
    found = problems(tmp_path, "rnak: 3\nepochs: [1]\ntrain-on-prompt: perhaps\nmicro-batch: 1.5\nseed: true\n")
    file = tmp_path / "run.yaml"
    assert sorted(found) == [
        f"{file}: epochs: expected a number, found [1]",
        f"{file}: micro-batch: expected a whole number, found 1.5",
        f"{file}: seed: expected a whole number, found True",
        f"{file}: train-on-prompt: expected true or false, found 'perhaps'",
        f"{file}: unknown key 'rnak' (did you mean rank?)",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rank: [1\n", "not YAML"),
        (b"- rank\n", "expected one 'flag: value' a line"),
        (b"rank: \xff\n", "expected UTF-8 text"),
        (b"rank: !!python/object/apply:os.getcwd []\n", "not YAML"),
        (b"micro-batch: 1\nmicro_batch: 2\n", "is there twice"),
    ],
)
def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        collect(FLAGS, (), (), {}, config)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        collect(FLAGS, (), (), {}, tmp_path / "nowhere.yaml")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n").named == frozenset()


def test_litgpts_spellings_are_understood_and_said(tmp_path: Path) -> None:
    given = read(tmp_path, "compute-dtype: bf16-true", quantize="bnb.nf4-dq")
    assert (given["quantize"], given["compute_dtype"]) == ("nf4-dq", "bfloat16")
    assert given.notes == [
        "--quantize bnb.nf4-dq: understood as nf4-dq.",
        "--compute-dtype bf16-true: understood as bfloat16.",
    ]


def test_a_check_may_name_a_value_as_the_user_did(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("rank: 3")
    flags = (Flag("rank", int, 1, ""), Flag("top_k", int, 0, ""))
    with pytest.raises(SettingsError) as error:
        collect(flags, (), (), {}, config, lambda given: ["rank: odd", "top_k: too few"])
    assert error.value.problems == [f"{config}: rank: odd", "--top-k: too few"]


def test_a_missing_argument_is_one_of_the_problems(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        collect(FLAGS, ("model_run",), ("model_run",), {"rank": "x"}, None)
    assert error.value.problems == ["MODEL|RUN: missing", "--rank: expected a whole number, found 'x'"]
