"""A model that brings its own code is trained on, merged and exported where that is asked for, and only there."""

import json
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM

import smidgen
from smidgen.cli.main import main
from tiny import VOCAB_SIZE, tiny_folder, write_rows

IDS = torch.randint(0, VOCAB_SIZE, (1, 11), generator=torch.Generator().manual_seed(0))
CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
AUTO = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tiny_folder(tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO}
    (folder / "config.json").write_text(json.dumps(config))
    for name, code in CODE.items():
        (folder / name).write_text(code)
    return folder


def exit_code(command: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(command)
    return int(str(ended.value.code))


def test_a_run_on_a_model_with_its_own_code(
    own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither `merge` nor `export` had the flag that their error asked for."""
    rows = write_rows(tmp_path / "rows.jsonl")
    run = smidgen.finetune(
        str(own_model), rows, tmp_path / "run", trust_remote_code=True, learning_rate=5e-3, compute_dtype="float32"
    )
    trained = smidgen.load(run.path, trust_remote_code=True).base.model
    assert type(trained).__name__ == "OwnForCausalLM"
    for verb in (["merge", "--dtype", "float32"], ["export", "--to", "hf", "--type", "float32"]):
        out = tmp_path / verb[0]
        command = [verb[0], str(run.path), "--out", str(out), *verb[1:]]
        assert exit_code(command) == 2 and "--trust-remote-code" in capsys.readouterr().err
        assert exit_code([*command, "--trust-remote-code"]) == 0
        assert f"generate {out} --trust-remote-code" in capsys.readouterr().out, "the next command needs it too"
        assert {path.name for path in out.glob("*.py")} == set(CODE)
        written = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        with torch.no_grad():
            # another order of the sums
            torch.testing.assert_close(written(IDS).logits, trained(IDS).logits, rtol=1e-4, atol=1e-4)
