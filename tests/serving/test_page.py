# SPDX-License-Identifier: Apache-2.0
"""The page: whole in one file under a strict policy; in a real browser it finds tasks and shows their predictions."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

import pytest

from smn_peft.bank.bank import MaskBank
from smn_peft.serving.app import content_policy
from smn_peft.serving.bank import add_folder
from smn_peft.serving.limits import Limits
from smn_peft.serving.service import Service
from tests.serving.chromium import Browser, find_chromium
from tests.serving.running import running
from tests.serving.tiny import IMAGES, NAMES, backbone

PAGE = (files("smn_peft.serving") / "index.html").read_text("utf-8")


def test_nothing_comes_from_elsewhere_and_nothing_else_runs():
    assert re.findall(r"""\s(?:src|href|action)=["']?([^"'\s>]+)""", PAGE) == ["data:,"]
    assert not re.search(r"https?:|url\(|@import", PAGE)
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|eval\(", PAGE)  # the policy would block these, or should
    policy = content_policy(PAGE)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert content_policy(PAGE.replace('"use strict"', '"use strict" ')) != policy


def test_every_input_has_a_label():
    labelled = set(re.findall(r'<label[^>]*\sfor="(\w+)"', PAGE))
    assert set(re.findall(r'<input[^>]*\sid="(\w+)"', PAGE)) == labelled


@pytest.fixture
def browser(tmp_path):
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium: install one, or name it in SMN_CHROMIUM")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


def test_the_page_predicts_in_a_browser(saved, browser, tmp_path):
    served = backbone()
    bank = MaskBank.open([], served.model, exclusive=True)
    add_folder(bank, "birds", saved[0] / "birds")
    for index in range(150):
        add_folder(bank, f"<b>task</b> {index:03}", saved[0] / "weather")
    picture = tmp_path / "picture.png"
    picture.write_bytes(IMAGES[0])
    shots = Path(os.environ.get("SMN_SCREENSHOTS", tmp_path))
    expected = saved[1]["birds"][0].softmax(0)
    with running(Service(bank, served, limits=Limits(samples=3))) as port:
        browser.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.wait("document.querySelectorAll('#list li').length === 100")
        assert browser.run("document.querySelector('#about').textContent") == "151 tasks over tiny ViT, 32 px"
        assert browser.run("document.querySelector('#list b')") is None  # a name is text, whatever it holds
        search = "(text) => { const s = document.querySelector('#search'); s.value = text; "
        search += "s.dispatchEvent(new Event('input')); }"
        tick = "document.querySelectorAll('#list input')[0].click()"
        for text, count in (("bird", 1), ("task</b> 14", 10)):
            browser.run(f"({search})({text!r})")
            browser.wait(f"document.querySelectorAll('#list li').length === {count}")
            browser.run(tick)
        browser.choose_file("#file", picture)
        browser.wait("document.querySelectorAll('article').length === 2 && !document.querySelector('.waiting')")
        rows = "[...document.querySelectorAll('article:first-child .row')].map((row) => row.innerText.split('\\n'))"
        found = browser.run(rows)
        best = expected.sort(descending=True)
        assert [name for name, _ in found] == [NAMES["birds"][i] for i in best.indices]
        for (_, share), value in zip(found, best.values.tolist(), strict=True):
            assert float(share.removesuffix(" %")) == pytest.approx(100 * value, abs=0.1)
        width = "document.querySelector('article .track div').getBoundingClientRect().width"
        track = "document.querySelector('article .track').getBoundingClientRect().width"
        assert browser.run(width) == pytest.approx(best.values[0].item() * browser.run(track), abs=2)
        assert re.match(r"round trip [\d.]+ ms · server", browser.run("document.querySelector('#timing').textContent"))
        colours = []
        for theme in ("light", "dark"):
            browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
            colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
            browser.screenshot(shots / f"page-{theme}.png")
            assert (shots / f"page-{theme}.png").stat().st_size > 10_000
        assert colours[0] != colours[1]
        narrow = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.send("Emulation.setDeviceMetricsOverride", **narrow)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.screenshot(shots / "page-narrow.png")
        for index in (1, 2):
            browser.run(tick.replace("[0]", f"[{index}]"))
        browser.wait("document.querySelector('[role=alert]')")
        assert "There are 4 tasks" in browser.run("document.querySelector('[role=alert]').textContent")
        complaints = browser.complaints()
        assert all("422" in text for text in complaints), complaints
