# SPDX-License-Identifier: Apache-2.0
"""Adapter files that are cut, bent or hostile: an error that says so, and never gigabytes of memory."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from smn_peft import MaskConfig
from smn_peft.functional.packing import pack_bits
from smn_peft.storage.adapter_file import (
    WEIGHTS_NAME,
    AdapterSizes,
    adapter_sizes,
    check_adapter_file,
    check_packed,
    narrowed,
    read_adapter_file,
    widened,
)
from smn_peft.storage.files import AdapterFileError

TENSORS = {
    "base_model.model.a.smn_mask": torch.arange(9, dtype=torch.uint8),
    "base_model.model.b.smn_mask": torch.arange(5, dtype=torch.uint8),
    "base_model.model.head.weight": torch.randn(3, 4),
}


@pytest.fixture
def path(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    return tmp_path / WEIGHTS_NAME


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def assert_refused(path: Path, message: str = "cannot be read|promises") -> None:
    for function in (check_adapter_file, read_adapter_file, adapter_sizes):
        with pytest.raises(AdapterFileError, match=message):
            function(path)


def entry(first: object, last: object, dtype: str = "U8", shape: object = (4,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_a_whole_file_is_read(path):
    for place in (path, path.parent, str(path), str(path.parent)):
        check_adapter_file(place)
        read = read_adapter_file(place)
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(tensor, TENSORS[key]) for key, tensor in read.items())


def test_a_file_cut_anywhere_is_refused(path):
    data = path.read_bytes()
    for size in [*range(0, 24), *range(24, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        assert_refused(path, "truncated|promises|cannot be read.*fetch it again")
    path.write_bytes(data)
    check_adapter_file(path)


def test_a_file_with_more_bytes_than_it_says_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    assert_refused(path, "cannot be read.*fetch it again")


def test_a_header_that_promises_gigabytes_costs_no_memory(path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (2**63, 2**64 - 1, 2**40, 25_000_001, 10**6):
        write(path, b"{}", b"\0" * 64, length)
        assert_refused(path, f"promises a header of {length} bytes but has 74 bytes.*fetch it again")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_large_header_that_is_really_there_is_refused(path):
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 30_000_000))
        file.truncate(30_000_008)  # sparse
    assert_refused(path, "promises a header of 30000000 bytes")


def test_tensors_that_promise_gigabytes_are_refused(path):
    for size in (1 << 33, 1 << 62):
        write(path, {"a.smn_mask": entry(0, size, shape=(size,))}, b"\0" * 16)
        assert_refused(path, "cannot be read")


def test_a_header_that_is_no_object(path):
    for header in (b"", b"{", b"not json", b"\xff\xfe", b"[" * 5000, b"nul", b"[]", b"3", b'"x"', b"null"):
        write(path, header, b"\0" * 4)
        assert_refused(path, "cannot be read.*fetch it again")


def test_an_entry_that_makes_no_sense(path):
    for bad in (
        3,
        None,
        [],
        {},
        {"data_offsets": 3},
        {"data_offsets": [0]},
        {"data_offsets": [0, 1, 2]},
        {"data_offsets": ["0", "4"]},
        {"data_offsets": [None, None]},
        {"data_offsets": [-1, 4]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [0.0, 4.0]},
        {"data_offsets": [0, True]},
        {"data_offsets": {}},
        {"data_offsets": [[0], [4]]},
    ):
        write(path, {"a.smn_mask": bad}, b"\0" * 4)
        assert_refused(path)


def test_tensors_that_contradict_themselves_are_not_read(path):
    for header in (
        {"a": entry(0, 4), "b": entry(2, 6)},  # they overlap
        {"a": entry(0, 4), "b": entry(6, 10)},  # a hole
        {"a": entry(2, 6)},  # a hole in front
        {"a": entry(0, 4, "F32")},  # bytes and shape disagree
        {"a": entry(0, 4, shape=(5,))},
        {"a": entry(0, 4, shape=(-4,))},
        {"a": entry(0, 4, shape=(1 << 40, 1 << 40))},
        {"a": entry(0, 4, "U9")},
        {"a": {"data_offsets": [0, 4]}},
        {"a": entry(0, 4, shape="4")},
        {"a": entry(0, 4), "__metadata__": {"x": 1}},
        {"a": entry(0, 8, "C64", shape=(1,))},  # neither are complex numbers, nor what torch has no dtype for
        {"a": entry(0, 8, "F4", shape=(16,))},
        {"a": entry(0, 4, shape=(1,) * 20 + (4,))},
    ):
        size = max(value["data_offsets"][1] for key, value in header.items() if key != "__metadata__")
        write(path, header, b"\0" * size)
        assert_refused(path, "cannot be read")


def test_bits_flipped_anywhere_never_crash(path):
    data = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(100):
        where = int(torch.randint(0, len(data), (), generator=generator))
        bent = bytearray(data)
        bent[where] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(bent)
        try:
            read_adapter_file(path)
        except AdapterFileError:
            refused += 1
    assert refused > 12


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    for place in (tmp_path, tmp_path / "none", tmp_path / WEIGHTS_NAME):
        with pytest.raises(FileNotFoundError):
            check_adapter_file(place)


def test_an_error_is_a_value_error_and_names_the_file(path):
    assert issubclass(AdapterFileError, ValueError)
    path.write_bytes(b"")
    assert_refused(path, str(path))


@pytest.mark.parametrize("save_scores", [False, True])
def test_sizes_are_split_by_purpose(tmp_path, save_scores):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))
    config = MaskConfig(
        target_modules=["0"], modules_to_save=["3"], batch_norm="adapt", mask_bias=True, save_scores=save_scores
    )
    get_peft_model(base, config).save_pretrained(tmp_path)
    sizes = adapter_sizes(tmp_path)
    assert sizes.mask == (135 + 7) // 8 + 1
    assert sizes.scores == (4 * (135 + 5) if save_scores else 0)
    assert sizes.statistics == 2 * 4 * 5 + 8
    assert sizes.head == 4 * (80 + 4)
    assert sizes.total == (tmp_path / WEIGHTS_NAME).stat().st_size
    assert sizes == adapter_sizes(str(tmp_path / WEIGHTS_NAME))
    assert isinstance(sizes, AdapterSizes)
    parts = sizes.mask + sizes.scores + sizes.statistics + sizes.head
    assert parts < sizes.total < parts + 4000


def test_tensors_that_lie_over_each_other_cost_no_memory(path):
    size = 1 << 20
    header = {f"t{index}": entry(0, size, shape=[size]) for index in range(500)}
    write(path, header, bytes(size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(path, "cannot be read")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_was_read_stays_whatever_becomes_of_the_file(path):
    read = read_adapter_file(path)
    data = path.read_bytes()
    with path.open("r+b") as file:  # overwritten in place, then cut: a map of the file would follow, or crash
        file.write(bytes(len(data)))
        file.truncate(0)
    assert all(torch.equal(tensor, TENSORS[key]) for key, tensor in read.items())


def test_a_packed_mask_of_the_base_is_accepted():
    for numel in (1, 7, 8, 9, 64, 1001):
        for share in (0.0, 0.5, 1.0):
            mask = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < share
            check_packed("a.smn_mask", pack_bits(mask), numel)
    check_packed("a.smn_mask", torch.zeros(2, dtype=torch.uint8, device="meta"), 9)


def test_every_padding_bit_must_be_zero():
    for numel in (1, 7, 9, 15, 1001):
        for bit in range(-numel % 8):
            packed = pack_bits(torch.zeros(numel, dtype=torch.bool))
            packed[-1] |= 1 << bit
            with pytest.raises(ValueError, match=f"a.smn_mask has non-zero padding bits after its {numel} bits"):
                check_packed("a.smn_mask", packed, numel)
        packed = pack_bits(torch.zeros(numel, dtype=torch.bool))
        packed[-1] |= 1 << (-numel % 8)  # the last bit that counts
        check_packed("a.smn_mask", packed, numel)


def test_a_mask_of_another_dtype_or_size_is_refused():
    for dtype in (torch.int8, torch.bool, torch.float32, torch.int64):
        with pytest.raises(TypeError, match=f"a.smn_mask is {dtype}, a packed mask is uint8.*save_pretrained"):
            check_packed("a.smn_mask", torch.zeros(2, dtype=dtype), 16)
    message = r"but the base weight has 16 entries and takes \(2,\) bytes.*another architecture"
    for shape in ((1,), (3,), (2, 1), (1, 2), (), (0,)):
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=message):
                check_packed("a.smn_mask", torch.zeros(shape, dtype=torch.uint8, device=device), 16)


def test_rounding_stops_at_what_overflows():
    tensor = torch.tensor([1.0, 1 / 3, 60000.0, float("inf")])
    assert narrowed("x", tensor, "float32") is tensor
    assert narrowed("x", torch.arange(3), "float16").dtype == torch.int64
    assert torch.equal(narrowed("x", tensor, "float16"), tensor.half())
    with pytest.raises(ValueError, match=r"x holds values beyond what float16 can hold \(7e\+04\)"):
        narrowed("x", torch.tensor([70000.0]), "float16")


def test_int8_is_within_half_a_step_of_each_row_and_comes_back_the_same():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1], [1e-3], [1e3], [0], [7.0]]
    )
    stored = {"h.weight": narrowed("h.weight", weight, "int8"), "h.bias": narrowed("h.bias", weight[0], "int8")}
    stored["h.feature_mean"] = narrowed("h.feature_mean", torch.zeros(40), "int8")
    stored["h.feature_std"] = narrowed("h.feature_std", torch.arange(40.0), "int8")
    assert {key: (value.dtype, tuple(value.shape)) for key, value in stored.items()} == {
        "h.weight": (torch.int8, (5, 42)),
        "h.bias": (torch.bfloat16, (40,)),
        "h.feature_mean": (torch.bfloat16, (1,)),
        "h.feature_std": (torch.bfloat16, (40,)),
    }
    wide = widened(stored)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((wide["h.weight"] - weight).abs() <= step * (0.5 + 127 / 512)).all()  # the step itself is rounded to 2⁻⁹
    assert ((wide["h.weight"] - weight).abs().mean(1) <= 0.3 * step.flatten()).all()
    assert wide["h.feature_mean"].shape == (40,)
    assert torch.equal(narrowed("h.weight", wide["h.weight"], "int8"), stored["h.weight"])
    with pytest.raises(ValueError, match=r"h\.weight holds NaN or infinity, which int8 cannot"):
        narrowed("h.weight", weight / 0, "int8")
