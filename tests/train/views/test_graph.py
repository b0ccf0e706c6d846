import numpy as np
import pytest

from surgery.train.views import canvas, graph, read_run
from surgery.train.views.graph import Edge, strong_edges
from tests.train.views.folders import make_run, signed_matrix

MATRIX = np.array([[1.0, 9.0, 9.0], [0.3, -0.7, 9.0], [0.05, np.nan, 0.0]])


@pytest.mark.parametrize(
    ("threshold", "edges"),
    [
        (0.1, [Edge(0, 2, 0.3), Edge(1, 2, -0.7), Edge(0, 1, 1.0)]),
        (0.3, [Edge(0, 2, 0.3), Edge(1, 2, -0.7), Edge(0, 1, 1.0)]),
        (0.5, [Edge(1, 2, -0.7), Edge(0, 1, 1.0)]),
        (0.0, [Edge(0, 3, 0.05), Edge(0, 2, 0.3), Edge(1, 2, -0.7), Edge(0, 1, 1.0)]),
        (2.0, []),
    ],
)
def test_edges_are_those_of_the_triangle_the_weakest_first(
    threshold: float, edges: list[Edge]
) -> None:
    assert strong_edges(MATRIX, threshold) == edges


@pytest.mark.parametrize(
    "stacks",
    [
        {"model.layers 0..7": 8},
        {"model.layers 0..47": 48},
        {"encoder.block 0..5": 6, "decoder.block 0..5": 6},
        {"a": 2, "b": 30, "c": 1},
    ],
    ids=["k8", "k48", "t5", "uneven"],
)
def test_labels_stay_inside_the_picture(stacks: dict[str, int], tmp_path) -> None:
    frames = read_run(make_run(tmp_path / "run", stacks, every=250)).frames

    picture = canvas.as_array(graph.at_the_end(frames, 0.1))

    assert (picture[:3] == 255).all()
    assert (picture[-3:] == 255).all()
    assert (picture[:, :3] == 255).all()
    assert (picture[:, -3:] == 255).all()


def test_the_threshold_and_what_it_leaves_out_are_stated(tmp_path) -> None:
    run = make_run(tmp_path / "run", {"layers 0..3": 4}, every=250, matrix=signed_matrix)
    frames = read_run(run).frames
    figure = graph.at_the_end(frames, 0.2)
    edges = strong_edges(frames[0].values[-1], 0.2)

    assert "magnitude 0.2 or more" in figure.get_suptitle()
    assert f"{len(edges)} of 10 edges drawn" in figure.axes[0].get_title()
    assert 0 < len(edges) < 10
    arcs = [patch for patch in figure.axes[0].patches if patch.get_zorder() == 2]
    blocks = [patch for patch in figure.axes[0].patches if patch.get_zorder() == 1]
    assert (len(arcs), len(blocks)) == (len(edges), 4)


def test_without_a_strong_edge_the_chain_is_left(tmp_path) -> None:
    frames = read_run(make_run(tmp_path / "run", {"layers 0..3": 4}, every=250)).frames
    figure = graph.at_the_end(frames, 5.0)

    assert "0 of 10 edges drawn, 0% of the weight" in figure.axes[0].get_title()
