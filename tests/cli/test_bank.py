# SPDX-License-Identifier: Apache-2.0
"""`smn bank`: a bank from adapters to adapters, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing

import pytest
import timm
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model

from smn_peft import MaskConfig
from smn_peft.cli import app
from smn_peft.storage.adapter_file import WEIGHTS_NAME

runner = CliRunner()


def run(*args: object, code: int = 0) -> str:
    result = runner.invoke(app, ["bank", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def build_model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["birds", "cars", "odd=name"]):
        torch.manual_seed(seed)
        model = get_peft_model(
            build_model(), MaskConfig(modules_to_save=["head"], codec=["bits", "entropy"][seed % 2])
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "smn_" in key:
                    parameter.uniform_(-0.01, 0.99)
        model.save_pretrained(folder / name)
    return folder


def test_a_bank_from_adapters_to_adapters(adapters, tmp_path):
    bank = tmp_path / "bank"
    assert "bank.sqlite: 2 tasks, " in run("build", bank, adapters / "birds", f"vehicles={adapters / 'cars'}")
    assert "is a bank with 2 tasks" in run("build", bank, adapters / "birds", code=1)
    assert "has a task 'birds' already" in run("add", bank, adapters / "birds", code=1)
    run("add", bank, adapters / "birds", adapters / "odd=name", "--replace")
    run("rename", bank, "vehicles", "cars")
    listed = json.loads(run("ls", bank, "--json"))
    assert [task["name"] for task in listed] == ["birds", "cars", "odd=name"]
    assert all(0.98 < task["density"] < 0.995 for task in listed)
    assert listed[1]["codec"] == "entropy"
    assert listed[0]["sizes"]["head"] == 4 * (3 * 192 + 3)
    table = run("ls", bank)
    assert "| cars" in table
    assert f"{listed[1]['sizes']['mask']:,}" in table
    assert json.loads(run("info", bank, "--json"))["tasks"] == 3
    assert "config peft_type" in run("info", bank, "cars")
    assert "3 tasks, all whole" in run("verify", bank)
    run("rm", bank, "odd=name")
    before, after = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", run("compact", bank).rpartition(":")[2]))
    assert 0 < after < before
    assert [path.name for path in bank.iterdir()] == ["bank.sqlite"]
    assert "2 tasks, all whole" in run("verify", bank / "bank.sqlite")
    for name in ("birds", "cars"):
        run("export", bank, name, tmp_path / name)
        assert (tmp_path / name / WEIGHTS_NAME).read_bytes() == (adapters / name / WEIGHTS_NAME).read_bytes()
    images = torch.randn(2, 3, 32, 32)
    given, back = (PeftModel.from_pretrained(build_model(), f / "cars").eval()(images) for f in (adapters, tmp_path))
    assert torch.equal(given, back)


def test_what_it_says_when_something_is_wrong(adapters, tmp_path):
    bank = tmp_path / "bank"
    for command in ("ls", "add", "rm", "verify", "compact"):
        rest = [adapters / "birds"] if command in ("add", "rm") else []
        assert "holds no bank" in run(command, bank, *rest, code=1)
        assert not bank.exists()
    assert "'same'" in run("build", bank, f"same={adapters / 'birds'}", f"same={adapters / 'cars'}", code=1)
    assert "no tasks" in run("ls", bank)
    assert "no/such/adapter does not exist" in run("add", bank, "no/such/adapter", code=1)
    assert "'x=' lacks one of its halves: NAME=FOLDER" in run("add", bank, "x=", code=1)
    assert "'=x' lacks one of its halves" in run("add", bank, "=x", code=1)
    run("build", bank, adapters / "birds", adapters / "cars")
    for command, *rest in (["rm", "cars", "boats"], ["info", "boats"], ["export", "boats", tmp_path / "out"]):
        assert f"no task 'boats'; it has 2: see smn bank ls {bank}" in run(command, bank, *rest, code=1)
    with closing(sqlite3.connect(bank / "bank.sqlite")) as connection, connection:
        connection.execute("UPDATE task SET config = x'7b7d' WHERE name = 'birds'")
    output = run("verify", bank, code=1)
    assert "1 of 2 tasks are damaged" in output
    assert "'birds': its checksum is" in output
    content = bytearray((bank / "bank.sqlite").read_bytes())
    content[28:32] = (7).to_bytes(4, "big")  # pages of the file, as its header counts them
    (bank / "bank.sqlite").write_bytes(content)
    assert "bank.sqlite is damaged" in run("verify", bank, code=1)
