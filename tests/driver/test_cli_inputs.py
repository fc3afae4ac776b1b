"""Inputs as written on a command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blockwright.driver.cli_inputs import (
    dynamic_shapes,
    make_inputs,
    parse_dynamic,
    parse_input,
    parse_sizes,
    vocabulary,
)
from blockwright.driver.cli_view import depth_for, grouped
from blockwright.ir.errors import OptionError


def test_input_names_type_sizes_and_dynamic_axes() -> None:
    spec = parse_input("input_ids = i64[batch=2, 16]")
    assert (spec.name, spec.dtype, spec.shape) == ("input_ids", torch.int64, (2, 16))
    assert spec.names == ("batch", None)
    assert parse_input("scale=float32[]").shape == ()


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "ids": "cannot read the input 'ids'.",
        "ids=int64[2": "cannot read the input 'ids=int64[2'.",
        "ids=int64[-1]": "cannot read the input 'ids=int64[-1]'.",
        "ids=long[2]": "input ids: there is no type 'long'. Try: use one of bfloat16, bool,",
    }.items(),
)
def test_malformed_inputs(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_input(text)
    assert message in caught.value.one_line()


def test_dynamic_names_axes_and_ranges() -> None:
    found = parse_dynamic(["ids:0=batch,1=seq", "*mask:1=seq", "batch=1..64, seq=2.."])
    assert found.axes == {("ids", 0): "batch", ("ids", 1): "seq", ("*mask", 1): "seq"}
    assert found.ranges == {"batch": (1, 64), "seq": (2, None)}
    with pytest.raises(OptionError, match="cannot read '0=batch' in --dynamic '0=batch'"):
        parse_dynamic(["0=batch"])
    with pytest.raises(OptionError, match="cannot read 'batch=1'"):
        parse_dynamic(["batch=1"])


def test_sizes() -> None:
    assert parse_sizes("batch=8, seq=128") == {"batch": 8, "seq": 128}
    assert parse_sizes(None) == {}
    with pytest.raises(OptionError, match="cannot read the size '8'"):
        parse_sizes("8")


def test_shapes_for_export_share_one_dim_per_name() -> None:
    specs = [parse_input("ids=i64[batch=2,16]")]
    inputs = {**make_inputs(specs, 10), "mask": torch.ones(2, 16), "flag": True}
    shapes = dynamic_shapes(parse_dynamic(["m*:0=batch", "batch=1..8"]), specs, inputs)
    assert shapes is not None
    assert shapes["ids"][0] is shapes["mask"][0]
    assert (shapes["ids"][0].__name__, shapes["ids"][0].max) == ("batch", 8)
    assert shapes["flag"] is None
    assert dynamic_shapes(parse_dynamic([]), [], inputs) is None


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "idz:0=batch": "there is no tensor input 'idz'. Try: use one of ids.",
        "ids:2=batch": "ids has 2 axes, so there is no axis 2.",
        "seq=1..4": "a range for 'seq', but no axis is called that.",
        "ids:0=batch,batch=3..4": "ids has batch=2, outside 3..4.",
    }.items(),
)
def test_shapes_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        dynamic_shapes(parse_dynamic([text]), [], {"ids": torch.ones(2, 5)})
    assert message in caught.value.one_line()


def test_random_values_are_valid_for_their_name() -> None:
    texts = ("input_ids=i64[4,9]", "attention_mask=i64[4,9]", "token_type_ids=i64[4,9]",
             "position_ids=i32[4,9]", "x=bf16[3]", "flags=bool[64]", "image=u8[100]")  # fmt: skip
    specs = [parse_input(text) for text in texts]
    made = make_inputs(specs, 7, seed=3)
    assert made["input_ids"].max() < 7
    assert made["attention_mask"].all()
    assert not made["token_type_ids"].any()
    assert made["position_ids"][2].tolist() == list(range(9))
    assert made["x"].dtype == torch.bfloat16
    assert 0 < made["flags"].sum() < 64
    assert torch.equal(made["x"], make_inputs(specs, 7, seed=3)["x"])


def test_vocabulary_comes_from_the_smallest_table() -> None:
    assert vocabulary(nn.Sequential(nn.Embedding(9, 2), nn.Embedding(5, 2))) == 5
    assert vocabulary(nn.Linear(2, 2)) == 2


def test_paths_are_grouped_until_they_fit() -> None:
    counts = {f"layers.{i}.{part}": 1 for i in range(30) for part in ("a", "b")}
    assert grouped(counts, 3) == {"layers.*.a": 30, "layers.*.b": 30}
    assert depth_for(counts, rows=2) == 3
    assert depth_for(counts, rows=1) == 2
