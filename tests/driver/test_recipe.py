"""Recipes: text, TOML and Python say the same, and mistakes are explained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwright.driver import register
from blockwright.driver.options import attribute_help, options_of
from blockwright.driver.recipe import (
    parse_text,
    parse_toml,
    recipe_schema,
    resolve,
    to_text,
    to_toml,
)
from blockwright.driver.register import find_pass, pass_names
from blockwright.ir.errors import OptionError
from blockwright.passes import PASSES, FuseProjections, Pass, Promise, QuantizeWeights


class Norm(StrEnum):
    L1 = "l1"
    L2 = "l2"


@dataclass(frozen=True, kw_only=True)
class Everything(Pass):  # type: ignore[type-arg]
    """Hold an option of every type.

    Attributes:
        depth: Must be given,
            over two lines.
        note: A text.
    """

    name: ClassVar[str] = "hold-everything"
    promise: ClassVar[Promise] = Promise.EXACT
    depth: int
    keep_ratio: float = 0.5
    fast: bool = True
    note: str = ""
    seed: int | None = 0
    mode: Literal["a", "b"] | None = None
    norm: Norm = Norm.L1
    shape: tuple[int, float] = (1, 2.0)
    names: tuple[str, ...] = ("*",)
    table: tuple[tuple[int | None, ...], ...] = ()

    def decide(self, region: object) -> None: ...

    def replace(self, region: object, decision: object) -> None: ...  # type: ignore[override]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("hold-everything", f"{__name__}:Everything", register.GROUP),
        EntryPoint("broken-pass", "no_such_module:Pass", register.GROUP),
    ]
    monkeypatch.setattr(EntryPoint, "load", _load)
    monkeypatch.setattr(register, "entry_points", lambda group: points)


def _load(point: EntryPoint) -> object:
    if point.name == "hold-everything":
        return Everything
    raise ModuleNotFoundError("No module named 'no_such_module'")


everything = st.builds(
    Everything,
    allow_no_match=st.booleans(),
    depth=st.integers(),
    keep_ratio=st.floats(allow_nan=False),
    fast=st.booleans(),
    note=st.text(),
    seed=st.none() | st.integers(),
    mode=st.sampled_from([None, "a", "b"]),
    norm=st.sampled_from(Norm),
    shape=st.tuples(st.integers(), st.floats(allow_nan=False)),
    names=st.lists(st.text(), max_size=3).map(tuple),
    table=st.lists(st.lists(st.none() | st.integers(), max_size=2).map(tuple), max_size=2).map(
        tuple
    ),
)
quantize = st.builds(
    QuantizeWeights,
    bits=st.sampled_from([4, 8]),
    group_size=st.none() | st.integers(1, 512),
    exclude=st.lists(st.text(), max_size=3).map(tuple),
)
recipes = st.lists(everything | quantize | st.just(FuseProjections()), max_size=4)


@given(recipes)
def test_text_round_trips(passes: list[Pass]) -> None:  # type: ignore[type-arg]
    assert parse_text(to_text(passes)) == passes


@given(recipes)
def test_toml_round_trips(passes: list[Pass]) -> None:  # type: ignore[type-arg]
    assert parse_toml(to_toml(passes)) == passes


TOKENS = (
    *("fuse-projections", "quantize-weights", "hold-everything", "bits", "depth", "names"),
    *("{", "}", "[", "]", "=", ",", " ", "\n", "#", "4", "-1", "0.5", "true", "none", "inf"),
    *("'a'", '"b"', '"\\', "*head*"),
)


@given(st.lists(st.sampled_from(TOKENS)).map("".join) | st.text())
def test_any_text_gives_passes_or_an_option_error(text: str) -> None:
    with contextlib.suppress(OptionError):
        passes = parse_text(text)
        assert parse_text(to_text(passes)) == passes


def test_one_recipe_in_three_forms() -> None:
    text = 'fuse-projections, quantize-weights{bits=4, group_size=32, exclude=["*head*"]}'
    toml = (
        '[[pass]]\nname = "fuse-projections"\n\n'
        '[[pass]]\nname = "quantize-weights"\nbits = 4\ngroup_size = 32\nexclude = ["*head*"]\n'
    )
    passes = [FuseProjections(), QuantizeWeights(bits=4, group_size=32, exclude=("*head*",))]
    assert parse_text(text) == parse_toml(toml) == passes
    assert (to_text(passes), to_toml(passes)) == (text, toml)


def test_free_layout_bare_words_and_none() -> None:
    found = parse_text(
        """
        hold-everything{depth=1_000, seed=none, note='a\\b', norm=l2,  # the second norm
                        names=[*head*, layer.0],},
        """
    )
    want = Everything(depth=1000, seed=None, note="a\\b", norm=Norm.L2, names=("*head*", "layer.0"))
    assert found == [want]


def test_resolve_mixes_forms(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text('[[pass]]\nname = "quantize-weights"\n')
    mixed = resolve([FuseProjections(), "fold-constants", str(file), file])
    assert [step.name for step in mixed] == [
        "fuse-projections",
        "fold-constants",
        "quantize-weights",
        "quantize-weights",
    ]
    assert resolve(None) == resolve("") == resolve(()) == []
    assert resolve(FuseProjections()) == [FuseProjections()]


def test_toml_keeps_the_string_none_where_none_is_no_choice() -> None:
    assert parse_toml(to_toml([Everything(depth=1, note="none")])) == [
        Everything(depth=1, note="none")
    ]


def test_toml_refuses_what_it_cannot_tell() -> None:
    step = replace(QuantizeWeights())
    object.__setattr__(step, "activations", "none")
    with pytest.raises(OptionError, match="cannot tell the string 'none' from no value"):
        to_toml([step])


REGISTERED = {kind.name for kind in PASSES}
MISTAKES = {
    "fuse-projection": "there is no pass 'fuse-projection'. [column 1 of the recipe, at"
    " 'fuse-projection'] Try: did you mean fuse-projections?",
    "zzz": f"Try: use one of {', '.join(sorted({*REGISTERED, 'broken-pass', 'hold-everything'}))}.",
    "broken-pass": "pass 'broken-pass' of no_such_module:Pass does not load: ModuleNotFoundError:"
    " No module named 'no_such_module' [column 1",
    "quantize-weights{bit=4}": "quantize-weights has no option 'bit'. [column 18 of the recipe,"
    " at 'bit=4'] Try: did you mean bits?",
    "quantize-weights{bits=4.0}": "bits is a whole number, not 4.0. [column 18",
    "quantize-weights{bits=true}": "bits is a whole number, not true.",
    "quantize-weights{bits=none}": "bits is a whole number, not none.",
    "quantize-weights{symmetric=1}": "symmetric is true or false, not 1.",
    "quantize-weights{group_size=big}": "group_size is a whole number or none, not the string"
    " 'big'.",
    "quantize-weights{exclude=head}": "exclude is a list, each a string, not the string 'head'.",
    "hold-everything{depth=1, mode=c}": "mode is one of a, b or none, not the string 'c'.",
    "hold-everything{depth=1, shape=[1]}": "shape is a list [a whole number, a number], not [1].",
    "hold-everything": "hold-everything needs the option 'depth'. [column 1 of the recipe, at"
    " 'hold-everything'] Try: give hold-everything{depth=...}, a whole number.",
    "fold-constants,\nquantize-weights{bits=5}": "bits=5 is not supported; use one of 4, 8."
    " [line 2, column 1 of the recipe",
    "quantize-weights{bits=4,bits=4}": "quantize-weights: bits is given twice. [column 25",
    "quantize-weights{bits 4}": "the recipe has '4' where '=' and a value of bits should be."
    " [column 23",
    "quantize-weights{bits=4": "the recipe has the end where ',' or '}' should be.",
    "quantize-weights{bits=}": "the recipe has '}' where a value should be.",
    "quantize-weights{=4}": "the recipe has '=' where the name of an option or '}' should be.",
    "fuse-projections quantize-weights": "the recipe has 'quantize-weights' where ',' or the end"
    " should be. [column 18",
    ",": "the recipe has ',' where the name of a pass should be.",
    'quantize-weights{exclude=["a}': "a string has no closing quote. [column 27",
    'quantize-weights{exclude=["\\q"]}': '"\\q" is not a valid string. [column 27',
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_text(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_text(text)
    assert MISTAKES[text] in caught.value.one_line()


TOML_MISTAKES = {
    "[[pass]]\nbits = 4": "a [[pass]] has no name. [pass 1 of the recipe]",
    "[pass]\nname = 'a'": "pass is no list of tables. [the recipe] Try: write [[pass]].",
    "passes = []": "a recipe has no key 'passes'.",
    "[[pass]": "not valid TOML",
    "[[pass]]\nname = 'quantize-weights'\nbts = 4": "quantize-weights has no option 'bts'. [bts in"
    " pass 1 of the recipe] Try: did you mean bits?",
    "[[pass]]\nname = 'quantize-weights'\nbits = 'none'": "bits is a whole number, not the string"
    " 'none'.",
}


@pytest.mark.parametrize("text", TOML_MISTAKES)
def test_mistakes_in_toml(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_toml(text)
    assert TOML_MISTAKES[text] in caught.value.one_line()


def test_a_missing_file_and_a_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read the recipe .*gone\.toml"):
        resolve(tmp_path / "gone.toml")
    with pytest.raises(OptionError, match="the class FuseProjections is not a pass"):
        resolve(FuseProjections)  # type: ignore[arg-type]


def test_plugins_are_found_by_name() -> None:
    assert "hold-everything" in pass_names()
    assert find_pass("hold-everything") is Everything


def test_option_help_comes_from_docstrings() -> None:
    helps = attribute_help(Everything)
    assert helps["depth"] == "Must be given, over two lines."
    assert helps["allow_no_match"].startswith("Accept that nothing")
    assert list(options_of(Everything))[-1] == "allow_no_match"


def test_schema_describes_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "entry_points", lambda group: [])
    schema = recipe_schema()
    tables = {t["title"]: t for t in schema["properties"]["pass"]["items"]["oneOf"]}
    assert list(tables) == pass_names()
    bits = tables["quantize-weights"]["properties"]["bits"]
    assert bits == {
        "description": "8 or 4 bits per weight. Embedding tables always take 8.",
        "type": "integer",
        "default": 8,
    }
    assert tables["quantize-weights"]["properties"]["group_size"]["default"] == "none"
    assert json.loads(json.dumps(schema)) == schema
    assert all(_described(tables))


def _described(tables: dict[str, dict[str, dict[str, dict[str, object]]]]) -> Iterator[object]:
    for table in tables.values():
        options = {k: v for k, v in table["properties"].items() if k != "name"}
        yield from (option["description"] for option in options.values())
