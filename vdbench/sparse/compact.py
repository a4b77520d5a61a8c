"""Exact removal of dead structure."""

from vdbench.sparse.graph import Graph


def compact(graph: Graph) -> Graph:
    return graph
