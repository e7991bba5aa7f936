# SPDX-License-Identifier: Apache-2.0
"""`smn push`: what it shows, what it sends, and how it fails."""

from __future__ import annotations

import json

from click.testing import CliRunner

from smn_peft.cli import app
from smn_peft.evaluation import EvalReport
from smn_peft.storage.adapter_config import CONFIG_NAME
from tests.hub.conftest import hub, waits  # noqa: F401  (fixtures)
from tests.hub.folders import write_run

runner = CliRunner()


def smn_push(*words: object, code: int = 0):
    result = runner.invoke(app, ["push", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_it_pushes_and_names_the_commit(hub, tmp_path):  # noqa: F811
    write_run(tmp_path / "0", 0, 0.7)
    write_run(tmp_path / "1", 1, 0.8)
    options = ["--private", "--license", "mit", "--seed-run", tmp_path / "1", "--message", "Two seeds"]
    result = smn_push(tmp_path / "0", "user/seeds", *options)
    repository = hub.repositories["user/seeds"]
    sha = repository.refs["main"]
    assert result.stdout == f"{hub.endpoint}/user/seeds/commit/{sha}\n"
    assert repository.private
    assert repository.messages[sha] == "Two seeds"
    card = hub.tree("user/seeds")["README.md"].decode()
    assert "75.0 ± 7.1" in card
    assert "license: mit" in card
    result = smn_push(tmp_path / "1", "user/seeds", "--create-pr")
    assert result.stdout == f"{hub.endpoint}/user/seeds/discussions/1\n"
    smn_push(tmp_path / "1", "user/seeds", "--revision", "dev", "--subfolder", "one")
    assert "one/adapter_model.safetensors" in hub.tree("user/seeds", "dev")


def test_reports_of_smn_eval_take_the_place_of_the_run_s(hub, tmp_path):  # noqa: F811
    write_run(tmp_path)
    report = EvalReport("out", "pets", "test", "linear_probe@0.1", (0.5, 0.6), (0, 1))
    (tmp_path / "reports.json").write_text(f"[{report.to_json()}]")
    smn_push(tmp_path, "user/x", "--reports", tmp_path / "reports.json")
    card = hub.tree("user/x")["README.md"].decode()
    assert "linear probe accuracy, 10 % of the labels" in card
    assert "55.0 ± 7.1" in card


def test_a_dry_run_sends_nothing(hub, tmp_path):  # noqa: F811
    write_run(tmp_path)
    result = smn_push(tmp_path, "user/x", "--dry-run", "--subfolder", "cifar10")
    assert hub.requests == []
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert f"{size:>12,}  cifar10/adapter_model.safetensors" in result.stdout
    assert "README.md" in result.stdout
    assert "note: no licence is named" in result.stdout
    assert 'PeftModel.from_pretrained(base, "user/x", subfolder="cifar10")' in result.stdout


def test_mistakes_are_one_line_with_the_fix(hub, tmp_path, monkeypatch):  # noqa: F811
    def error(*words: object) -> str:
        found = smn_push(*words, code=1).stderr
        assert found.count("\n") == 1
        assert "Traceback" not in found
        return found

    assert "name the output folder of smn train" in error(tmp_path, "user/x")
    write_run(tmp_path)
    assert "Write it as user/smn-cifar100" in error(tmp_path, "a/b/c")
    hub.fail("POST", "^/api/repos/create", status=429, headers={"Retry-After": "600"})
    assert "push again in 600 seconds" in error(tmp_path, "user/x")
    assert "Your token may not write to other/x" in error(tmp_path, "other/x")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    for field, value in (("auto_mapping", 5), ("base_model_name_or_path", ["x"])):
        (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, field: value}))
        assert f"adapter_config.json is damaged: {field} is {value!r}" in error(tmp_path, "user/x", "--dry-run")
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    (tmp_path / "reports.json").write_text(json.dumps([{"format": 1}]))
    assert "lacks" in error(tmp_path, "user/x", "--reports", tmp_path / "reports.json")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "log in by `hf auth login`" in error(tmp_path, "user/x")
    assert smn_push(tmp_path, code=2)
