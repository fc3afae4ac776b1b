"""Everything a pass must keep to, as a pytest class or as one call.

from blockwright.testing import pass_suite
from mypackage import MyPass

TestMyPass = pass_suite(MyPass(level=2), exact=MyPass(level=0))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from . import graph_properties as graph
from . import number_properties as number
from . import process_properties as process
from . import strategies as random
from .case import AnyPass, Case, Subject, make_subject
from .corpus import read, remember
from .profiles import register_profiles

FLOATS = ("gauss", "extreme")


register_profiles()


@dataclass(frozen=True)
class Property:
    """Something every pass must keep to.

    Attributes:
        check: Raises AssertionError for a case that does not.
        domain: Cases it is asked of.
        share: Examples, relative to those of the cheapest property.
    """

    check: Callable[[Case], None]
    domain: Callable[[Subject], st.SearchStrategy[Case]]
    share: float = 1.0

    @property
    def name(self) -> str:
        """Name of the check."""
        return self.check.__name__


def any_case(subject: Subject) -> st.SearchStrategy[Case]:
    """Draw any model and any inputs."""
    return st.builds(Case, st.just(subject), random.models(), random.inputs())


def integer_case(subject: Subject) -> st.SearchStrategy[Case]:
    """Draw models that compute integers, on integers."""
    models = random.exact_models(levels=subject.levels)
    return st.builds(Case, st.just(subject), models, random.inputs(kinds=("ints",)))


def vector_case(subject: Subject) -> st.SearchStrategy[Case]:
    """Draw models of vectors, in batches of two or more."""
    models = random.models(vocab=(0,), rows=2)
    kinds = random.inputs(kinds=FLOATS[:1], layouts=("contiguous", "transposed"))
    return st.builds(Case, st.just(subject), models, kinds)


def dynamic_case(subject: Subject) -> st.SearchStrategy[Case]:
    """Draw models of which some dimension is dynamic."""
    return st.builds(Case, st.just(subject), random.models(dynamic=True), random.inputs())


PROPERTIES = (
    Property(graph.keeps_invariants, any_case),
    Property(graph.keeps_names_of_what_it_leaves, any_case),
    Property(graph.leaves_its_input_alone, any_case, 0.5),
    Property(graph.is_deterministic, any_case, 0.5),
    Property(graph.has_an_honest_receipt, any_case),
    Property(graph.is_idempotent, any_case),
    Property(graph.ignores_names, any_case, 0.5),
    Property(graph.keeps_ties, any_case),
    Property(number.keeps_its_promise, any_case),
    Property(number.is_exact_on_integers, integer_case),
    Property(number.keeps_rows_apart, integer_case),
    Property(number.keeps_nan_in_its_row, vector_case),
    Property(number.works_at_other_sizes, dynamic_case, 0.5),
    Property(process.reports_when_nothing_matches, any_case),
    Property(process.fails_without_a_trace, any_case, 0.3),
    Property(process.survives_saving, any_case, 0.5),
    Property(process.costs_what_it_says, dynamic_case, 0.5),
    Property(process.refuses_bad_options, any_case, 0.2),
    Property(process.reads_as_it_prints, any_case, 0.1),
    Property(process.goes_with_other_passes, any_case, 0.3),
)


def pass_suite(
    pass_: AnyPass,
    *,
    exact: AnyPass | None = None,
    levels: int | None = None,
    idempotent: bool = True,
    refused: tuple[Mapping[str, Any], ...] = (),
    examples: int = 25,
) -> type:
    """Return a pytest class with one test per property.

    Args:
        pass_: The pass, with the options to test.
        exact: The pass with settings under which integer weights come through bit by bit. A pass
            that promises exact results needs none.
        levels: With those settings, integers up to this one are exact if every row of a weight
            reaches it; leave it out when all integers are.
        idempotent: Running the pass again changes nothing.
        refused: Options that must be refused with an OptionError, each a mapping by name.
        examples: Random models for each property; some, which cost more, take fewer.
    """
    subject = make_subject(pass_, exact, levels, idempotent, refused)
    tests = {f"test_it_{p.name}": _test(p, subject, examples) for p in PROPERTIES}
    return type(f"Test{type(pass_).__name__}", (), tests)


def check_pass(pass_: AnyPass, *, examples: int = 25, **about: Any) -> None:
    """Check every property at once.

    Args:
        pass_: The pass, with the options to test.
        examples: As in `pass_suite`.
        about: Other arguments of `pass_suite`.

    Raises:
        AssertionError: The pass does not keep to a property; the message says which and on what.
    """
    suite = pass_suite(pass_, examples=examples, **about)
    for name, test in vars(suite).items():
        if name.startswith("test_"):
            test(suite())


def replay(data: Mapping[str, Any]) -> None:
    """Ask the property of a failure that was written down.

    Args:
        data: As `corpus.describe` gives it.

    Raises:
        AssertionError: It is still broken.
    """
    (property_,) = (p for p in PROPERTIES if p.name == data["property"])
    property_.check(read(data))


def search(
    property_: Property, subject: Subject, options: settings, seed: int | None = None
) -> None:
    """Ask a property of random cases; what breaks it is shrunk.

    Raises:
        AssertionError: A case breaks it.
    """

    @options
    @given(property_.domain(subject))
    def ask(case: Case) -> None:
        with remember(property_.name, case):
            property_.check(case)

    (ask if seed is None else with_seed(seed)(ask))()


def quick(examples: int) -> settings:
    """Return the settings of the fast tier for a number of examples."""
    return settings(settings.get_profile("ci"), max_examples=max(1, examples))


def _test(property_: Property, subject: Subject, examples: int) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        search(property_, subject, quick(round(examples * property_.share)))

    test.__doc__ = property_.check.__doc__
    return test
