"""Shared set-up of the test suite.

Test folders have no `__init__.py`; what tests share are fixtures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from blockwright.ir.capture import capture
from blockwright.ir.program import Program
from blockwright.models.gpt import GPT, GPTConfig

if TYPE_CHECKING:
    from blockwright.testing.acceptance import Acceptance
    from blockwright.testing.toys import Toy

ROOT = Path(__file__).resolve().parent.parent


class RootIsAPlainFolder:
    """Keeps pytest from importing the repository under the name of its folder.

    The root has an `__init__.py`, because it is the package `blockwright`. pytest takes any such
    folder above a test for a test package and imports it: as `main` if the checkout is called so.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(
        self, path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    # Hooks of a conftest only see what lies beside it; a registered plugin also sees the root.
    config.pluginmanager.register(RootIsAPlainFolder())


@pytest.fixture(scope="session")
def gpt() -> GPT:
    """Three blocks, width 8, tied head; weights from seed 0."""
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=3, ffn_dim=12)).eval()


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def program(gpt: GPT, tokens: Tensor) -> Program:
    """The captured GPT, batch dynamic. Programs do not change, so all tests share it."""
    return capture(gpt, (tokens,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))


@pytest.fixture(scope="session")
def toy_gpt() -> Toy:
    """Trained on the spot, as are the other toys; only slow tests have the minutes."""
    from blockwright.testing import toys

    return toys.gpt()


@pytest.fixture(scope="session")
def toy_deep_gpt() -> Toy:
    from blockwright.testing import toys

    return toys.deep_gpt()


@pytest.fixture(scope="session")
def toy_llama() -> Toy:
    from blockwright.testing import toys

    return toys.llama()


@pytest.fixture(scope="session")
def toy_bert() -> Toy:
    from blockwright.testing import toys

    return toys.bert()


@pytest.fixture(scope="session")
def toy_vit() -> Toy:
    from blockwright.testing import toys

    return toys.vit()


@pytest.fixture(scope="session")
def toy_dit() -> Toy:
    from blockwright.testing import toys

    return toys.dit()


@pytest.fixture(scope="session")
def toy_flux() -> Toy:
    from blockwright.testing import toys

    return toys.flux()


@pytest.fixture
def acceptance(request: pytest.FixtureRequest) -> Iterator[Acceptance]:
    """Records rows of docs/acceptance.md; `make acceptance` writes them."""
    from blockwright.testing.acceptance import Acceptance, publish

    recorder = Acceptance(request.node.nodeid)
    yield recorder
    if os.environ.get("BLOCKWRIGHT_ACCEPTANCE") == "rewrite":
        publish(ROOT, recorder.test, recorder.rows)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file beside the test; `make golden` rewrites the file."""

    def check(name: str, text: str) -> None:
        path = request.path.parent / "golden" / f"{name}.txt"
        if os.environ.get("BLOCKWRIGHT_GOLDEN") == "rewrite":
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.read_text() == text, f"{path.name} is stale; run `make golden`"

    return check
