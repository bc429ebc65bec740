"""Who gives up a netvm so that no qube waits for itself."""

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.broker.references import netvms_to_give_up


def edges(text: str) -> dict[str, str]:
    return {qube: other for qube, _, other in (part.partition(">") for part in text.split())}


@pytest.mark.parametrize(
    ("templates", "netvms", "expected"),
    [
        ("", "", ""),
        ("a>t", "a>n", ""),
        ("a>t n>t", "a>n", ""),
        ("", "a>b b>c", ""),
        # A loop of netvms: all of it, and nobody who merely leads there.
        ("", "a>a", "a"),
        ("", "a>b b>a", "a b"),
        ("x>t", "a>b b>c c>a x>a t>x", "a b c t"),
        ("", "x>y y>a a>b b>a", "a b"),
        # A template with a netvm that is based on it.
        ("net>t fw>t app>t", "t>fw fw>net app>fw", "t"),
        # A disposable template with the netvm sys-firewall, a disposable of it.
        ("dvm>t fw>dvm net>dvm", "dvm>fw fw>net", "dvm"),
        ("dvm>t fw>dvm net>dvm", "dvm>fw fw>net t>fw", "dvm t"),
        # One that is in a loop as well; one that is a template for somebody outside only.
        ("b>a", "a>b b>a", "a"),
        ("net>t box>fw", "t>fw fw>net", "t"),
        # Two circles of which one leads to the other.
        ("a>t b>u", "t>a u>b a>b", "t u"),
        # A template between two circles keeps its netvm.
        ("a>t a>t c>x b>u", "t>a u>b x>b a>c", "t u"),
    ],
)
def test_who_gives_up_a_netvm(templates: str, netvms: str, expected: str) -> None:
    assert netvms_to_give_up(edges(templates), edges(netvms)) == set(expected.split())


@pytest.mark.parametrize("closed", [False, True])
def test_thousands_in_a_row_are_no_burden(closed: bool) -> None:
    names = [f"q{number}" for number in range(20_000)]
    row = dict(zip(names, names[1:] + names[:1] if closed else names[1:], strict=False))
    assert netvms_to_give_up({}, row) == (set(names) if closed else set())


LAYERS = st.fixed_dictionaries(
    {},
    optional={
        f"{kind}{number}": st.sampled_from([f"{below}{other}" for other in range(4)])
        for kind, below in (("d", "a"), ("a", "t"))
        for number in range(4)
    },
)
NODES = [f"{kind}{number}" for kind in "dat" for number in range(4)]


@settings(max_examples=400, deadline=None)
@given(LAYERS, st.dictionaries(st.sampled_from(NODES), st.sampled_from(NODES)))
def test_what_is_left_is_free_of_circles_and_only_circles_lose(
    templates: dict[str, str], netvms: dict[str, str]
) -> None:
    given_up = netvms_to_give_up(templates, netvms)
    assert given_up <= netvms.keys()
    kept = {qube: netvm for qube, netvm in netvms.items() if qube not in given_up}
    assert not any(qube in beyond(qube, templates, kept) for qube in NODES)
    assert all(qube in beyond(qube, templates, netvms) for qube in given_up)


def beyond(start: str, *graphs: Mapping[str, str]) -> set[str]:
    """What can be reached from `start` in one step or more."""
    found: set[str] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        following = {graph[node] for graph in graphs if node in graph} - found
        found |= following
        todo.extend(following)
    return found
