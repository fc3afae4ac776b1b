"""What mutants of backends showed to be untested elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blockwright as bw
from blockwright.backends import disk
from blockwright.ir.errors import ArtefactError
from blockwright.kernels.cpu_linear import Int8Linear
from blockwright.models.gpt import GPT


def half() -> Iterator[bytes]:
    yield b"new"
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(ArtefactError, match="No space left"):
        disk.replace_file(path, half())
    assert path.read_bytes() == b"old"


def test_a_file_is_synced_after_its_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    path, _, size = disk.store(tmp_path, [b"one", b"two"])
    assert sizes == [size] == [path.stat().st_size]


def test_an_engine_knows_tied_weights_by_all_their_names(gpt: GPT, tokens: Tensor) -> None:
    engine = bw.compile(gpt, None, (tokens,), backend="eager")
    assert set(engine.state_dict()) == set(gpt.state_dict())


def test_layers_have_packed_codes_of_their_own() -> None:
    codes = torch.arange(-16, 16, dtype=torch.int8).reshape(8, 4)
    one, two = (Int8Linear(c, torch.ones(4), None) for c in (codes, -codes))
    x = torch.linspace(-1, 2, 24).reshape(3, 8)
    y = one(x)
    assert y.abs().max() > 1
    torch.testing.assert_close(two(x), -y)
