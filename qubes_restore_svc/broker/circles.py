"""Circles in which qubes would wait for one another: which netvms have to be given up.

Strategy: a qube is finished after its template and its netvm, so these two kinds of reference together must
lead nowhere back. Template references alone cannot (see `references`); every circle goes through a netvm. Of
circles there are two kinds. One through a template is a state that a Qubes system can be in: a template with
the netvm sys-firewall, which is based on it; a disposable template with that netvm, sys-firewall being a
disposable of it. There the template gives its netvm up, and nobody else has to. One of netvms alone is a
loop, which qubesd does not allow: all of its members give theirs up.

The graph comes from a backup, with up to thousands of qubes in a row: time is linear, and nothing recurses.
"""

from collections.abc import Iterable, Iterator, Mapping


def netvms_to_give_up(templates: Mapping[str, str], netvms: Mapping[str, str]) -> frozenset[str]:
    """The qubes that must not wait for their netvm; without those, nothing leads back to itself.

    `templates` and `netvms` give a qube's template and netvm, for those that have one; `templates` alone
    must be free of circles.
    """
    qubes = templates.keys() | netvms.keys() | set(templates.values()) | set(netvms.values())
    group = _groups(
        {qube: [found[qube] for found in (templates, netvms) if qube in found] for qube in sorted(qubes)}
    )
    in_a_circle = {qube for qube, netvm in netvms.items() if group[netvm] == group[qube]}
    used_in_a_circle = {template for qube, template in templates.items() if group[template] == group[qube]}
    through_templates = in_a_circle & used_in_a_circle
    kept = {qube: netvms[qube] for qube in sorted(in_a_circle - through_templates)}
    group = _groups({qube: [netvm] for qube, netvm in kept.items()})
    return frozenset(
        through_templates | {qube for qube, netvm in kept.items() if group[netvm] == group[qube]}
    )


def _groups(edges: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """For each node, one that stands for all nodes from which it can be reached and that it can reach.

    A path-based search for strongly connected components (Gabow, 2000), its stack kept by hand.
    """
    group: dict[str, str] = {}
    order: dict[str, int] = {}
    path: list[str] = []  # nodes without a group yet, as they were met
    firsts: list[str] = []  # of these, each that may be the first of its group

    def enter(node: str) -> tuple[str, Iterator[str]]:
        order[node] = len(order)
        path.append(node)
        firsts.append(node)
        return node, iter(edges.get(node, ()))

    for start in edges:
        todo = [enter(start)] if start not in order else []
        while todo:
            node, rest = todo[-1]
            following = next(rest, None)
            if following is None:
                todo.pop()
                if firsts[-1] == node:
                    firsts.pop()
                    while node not in group:
                        group[path.pop()] = node
            elif following not in order:
                todo.append(enter(following))
            elif following not in group:
                while order[firsts[-1]] > order[following]:
                    firsts.pop()
    return group
