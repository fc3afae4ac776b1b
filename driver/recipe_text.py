"""The one-line form of a recipe.

    recipe  := pass ("," pass)*
    pass    := name [ "{" [ option "=" value ("," option "=" value)* ] "}" ]
    value   := true | false | none | number | string | word | "[" [ value ("," value)* ] "]"

Numbers and quoted strings are those of TOML. A word is a string that needs no quotes. Spaces, line
breaks, comments after `#` and a comma at the end of a list are free.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.errors import OptionError

_TOKEN = re.compile(
    r"""(?P<space> (?: \s | \#[^\n]* )+ )
      | (?P<string> "(?: [^"\\\n] | \\. )*" | '[^'\n]*' )
      | (?P<mark> [{}\[\],=] )
      | (?P<word> [^\s{}\[\],="'\#] [^\s{}\[\],="']* )""",
    re.VERBOSE,
)
_WORDS = {"true": True, "false": False, "none": None}
_END = "the end"


@dataclass(frozen=True)
class Call:
    """A pass as written: name, plain options, and where each stands.

    Attributes:
        name: Name of the pass.
        options: Plain values by option.
        places: Place of each option, and of the pass under None.
    """

    name: str
    options: Mapping[str, Any]
    places: Mapping[str | None, str]


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int

    def __str__(self) -> str:
        return self.text if self.kind == "end" else repr(self.text)


def read_calls(text: str) -> list[Call]:
    """Return the passes a text asks for.

    Raises:
        OptionError: The text is malformed; says where, what was found and what may stand there.
    """
    reader = _Reader(text)
    calls: list[Call] = []
    while reader.peek.kind != "end":
        calls.append(reader.call())
        if reader.peek.kind != "end":
            reader.take(",", f"',' or {_END}")
    return calls


def write(value: Any) -> str:
    """Return a plain value as text that both `read_calls` and TOML read (TOML has no `none`)."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(write, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


class _Reader:
    """Recursive descent over tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._scan()
        self._next = 0

    @property
    def peek(self) -> _Token:
        return self._tokens[self._next]

    def take(self, mark: str, expected: str) -> None:
        if (self.peek.kind, self.peek.text) != ("mark", mark):
            raise self._unexpected(expected)
        self._next += 1

    def call(self) -> Call:
        token = self._name("the name of a pass")
        options: dict[str, Any] = {}
        places: dict[str | None, str] = {None: self._place(token.at)}
        if self._skip("{"):
            while not self._skip("}"):
                option = self._name("the name of an option or '}'")
                if option.text in options:
                    raise OptionError(
                        f"{token.text}: {option.text} is given twice.", where=self._place(option.at)
                    )
                places[option.text] = self._place(option.at)
                self.take("=", f"'=' and a value of {option.text}")
                options[option.text] = self._value()
                self._separator("}")
        return Call(token.text, options, places)

    def _value(self) -> Any:
        if self._skip("["):
            items: list[Any] = []
            while not self._skip("]"):
                items.append(self._value())
                self._separator("]")
            return items
        token = self.peek
        if token.kind not in ("string", "word"):
            raise self._unexpected("a value")
        self._next += 1
        if token.kind == "word":
            return _WORDS[token.text] if token.text in _WORDS else _number_or_word(token.text)
        try:
            return tomllib.loads(f"value = {token.text}")["value"]
        except tomllib.TOMLDecodeError:
            raise OptionError(
                f"{token.text} is not a valid string.",
                where=self._place(token.at),
                remedy="double a backslash, or use single quotes.",
            ) from None

    def _name(self, expected: str) -> _Token:
        if self.peek.kind != "word":
            raise self._unexpected(expected)
        self._next += 1
        return self._tokens[self._next - 1]

    def _skip(self, mark: str) -> bool:
        found = (self.peek.kind, self.peek.text) == ("mark", mark)
        self._next += found
        return found

    def _separator(self, closing: str) -> None:
        if (self.peek.kind, self.peek.text) != ("mark", closing):
            self.take(",", f"',' or {closing!r}")

    def _scan(self) -> list[_Token]:
        tokens: list[_Token] = []
        at = 0
        while at < len(self._text):
            match = _TOKEN.match(self._text, at)
            if match is None:  # only a quote that nothing closes
                raise OptionError("a string has no closing quote.", where=self._place(at))
            if match.lastgroup != "space":
                tokens.append(_Token(str(match.lastgroup), match[0], at))
            at = match.end()
        return [*tokens, _Token("end", _END, at)]

    def _unexpected(self, expected: str) -> OptionError:
        token = self.peek
        return OptionError(
            f"the recipe has {token} where {expected} should be.", where=self._place(token.at)
        )

    def _place(self, at: int) -> str:
        """Name a position as column, after line where there are several."""
        line, column = self._text.count("\n", 0, at) + 1, at - self._text.rfind("\n", 0, at)
        lines = f"line {line}, " if "\n" in self._text.strip() else ""
        rest = re.split(r"[\n,}]", self._text[at:])[0][:24]
        return f"{lines}column {column} of the recipe" + (f", at {rest!r}" if rest else "")


def _number_or_word(text: str) -> int | float | str:
    if not re.match(r"[+-]?(\d|inf$|nan$)", text):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, int | float) else text
