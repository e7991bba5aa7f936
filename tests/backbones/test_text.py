# SPDX-License-Identifier: Apache-2.0
"""Class embeddings against CLIPModel's own logits, on a tiny CLIP with a tokenizer made here."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from smn_peft.backbones import load_backbone, text_embeddings
from smn_peft.backbones.clip import _load

CLASSES = ["cat", "big_dog", "frog"]


@pytest.fixture(scope="module")
def clip_with_text(clip_folder) -> Path:
    """A CLIP with a byte-level tokenizer without merges: every letter is a token."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list(".,")
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {name: index for index, name in enumerate(names)}
    folder = clip_folder.parent / "clip_with_text"
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(names), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 40}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


def test_logits_are_clips(clip_with_text):
    embeddings, scale = text_embeddings(clip_with_text, CLASSES, ["a photo of a {}."])
    assert embeddings.shape == (3, 16)
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad
    pixel_values = torch.randn(4, 3, 32, 32)
    whole = transformers.CLIPModel.from_pretrained(clip_with_text).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip_with_text)(
        [f"a photo of a {name}." for name in ("cat", "big dog", "frog")], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = whole(pixel_values=pixel_values, **tokens).logits_per_image
        images = F.normalize(load_backbone(clip_with_text, projection=True).features(pixel_values), dim=1)
    torch.testing.assert_close(scale * images @ embeddings.T, expected)
    assert expected.std() > 0.01  # the classes differ


def test_templates_are_averaged_after_normalising(clip_with_text):
    templates = ["a photo of a {}.", "the {}.", "{}"]
    embeddings, _ = text_embeddings(clip_with_text, CLASSES, templates)
    single = [text_embeddings(clip_with_text, CLASSES, [template])[0] for template in templates]
    torch.testing.assert_close(embeddings, F.normalize(sum(single) / 3, dim=1))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_the_batch_size_changes_nothing(clip_with_text, monkeypatch):
    templates = ["a photo of a {}.", "the {}."]
    whole, _ = text_embeddings(clip_with_text, CLASSES, templates)
    for batch in (1, 4):
        monkeypatch.setattr("smn_peft.backbones.clip.BATCH", batch)
        torch.testing.assert_close(text_embeddings(clip_with_text, CLASSES, templates)[0], whole)


def test_the_tower_is_freed(clip_with_text, monkeypatch):
    alive = []

    def watched(name, revision):
        model, tokenizer = _load(name, revision)
        alive.extend(weakref.ref(thing) for thing in (model, model.text_model, *model.parameters()))
        return model, tokenizer

    monkeypatch.setattr("smn_peft.backbones.clip._load", watched)
    embeddings, _ = text_embeddings(clip_with_text, CLASSES)
    gc.collect()
    assert len(alive) > 10
    assert [reference() for reference in alive] == [None] * len(alive)
    assert embeddings.untyped_storage().nbytes() == embeddings.numel() * 4


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([], {}, "class_names is empty"),
        (["cat", "dog", "cat"], {}, "class_names repeats 'cat': two classes would be one"),
        (["cat"], {"templates": ["a photo."]}, r"exactly one \{\}"),
        (["cat", "x" * 60], {}, r"takes 40 tokens at most, too few for 'a photo of a x{60}\.': shorten it"),
    ],
)
def test_bad_input(clip_with_text, classes, options, message):
    with pytest.raises(ValueError, match=message):
        text_embeddings(clip_with_text, classes, **options)


def test_only_clip_has_a_text_tower_here(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(vit\) is not a CLIP with a text tower"):
        text_embeddings(tmp_path, ["cat"])


def test_not_in_the_cache():
    with pytest.raises(OSError, match="is not in the local cache and cannot be downloaded"):
        text_embeddings("nobody/no-such-clip", ["cat"])
