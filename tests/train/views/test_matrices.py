import numpy as np
import pytest
import torch

from surgery.errors import TrainingError
from surgery.train.views import canvas, matrices, matrix_image, read_run
from surgery.train.views.matrices import Scale, start_of
from tests.train.views.folders import make_run, signed_matrix, softmax_matrix

STACKS = {
    "k8": {"model.layers 0..7": 8},
    "k48": {"model.layers 0..47": 48},
    "resnet": {"layer1 0..2": 3, "layer2 1..3": 3, "layer3 1..5": 5, "layer4 1..2": 2},
    "one site": {"block 0..0": 1},
}


def test_matrix_image_is_a_picture() -> None:
    image = matrix_image(softmax_matrix(8, 0.5), "model.layers 0..7")

    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 30


def test_matrix_image_shows_values_and_not_their_range() -> None:
    small = matrix_image(0.1 * torch.eye(4), "x")
    large = matrix_image(torch.eye(4), "x")

    assert small.shape == large.shape
    assert not np.array_equal(small, large)


@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0), (2, 3, 3)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match=r"shape \(K, K\), got"):
        matrix_image(torch.zeros(shape), "x")


def test_matrix_image_of_nan_and_of_zeros() -> None:
    broken = torch.full((3, 3), torch.nan)

    assert matrix_image(broken, "x").shape == matrix_image(torch.zeros(3, 3), "x").shape


def test_above_the_diagonal_nothing_is_drawn() -> None:
    lower = torch.ones(6, 6).tril()
    filled = lower + 0.7 * torch.ones(6, 6).triu(1)

    assert np.array_equal(matrix_image(lower, "x"), matrix_image(filled, "x"))


@pytest.mark.parametrize(
    ("matrix", "name"),
    [
        (softmax_matrix(5, 0.0), "uniform start, 1/(k+1) in row k"),
        (
            torch.ones(4, 4).tril() / torch.tensor([4.0, 3.0, 2.0, 1.0]),
            "uniform start, 1/(K-j) in column j",
        ),
        (torch.zeros(4, 4), "identity start, all zero"),
        (torch.eye(4), "identity start, the unit matrix"),
        (softmax_matrix(5, 0.5), None),
    ],
)
def test_starts_are_known_by_name(matrix: torch.Tensor, name: str | None) -> None:
    assert start_of(matrix.double().numpy()) == name


def test_a_scale_has_two_sides_only_where_coefficients_do() -> None:
    assert not Scale.over([softmax_matrix(4, 1.0).numpy()]).signed
    assert Scale.over([signed_matrix(4, 1.0).numpy()]).signed
    # Rounding errors of a difference of two softmaxes.
    assert not Scale.over([np.array([[1.0, 0.0], [-1e-9, 0.5]])]).signed


def test_a_scale_ignores_what_is_not_drawn() -> None:
    matrix = np.array([[0.5, 9.0], [np.nan, 0.25]])

    assert Scale.over([matrix]) == Scale(0.5, signed=False)


@pytest.mark.parametrize("stacks", STACKS.values(), ids=STACKS.keys())
def test_labels_stay_inside_the_picture(stacks: dict[str, int], tmp_path) -> None:
    frames = read_run(make_run(tmp_path / "run", stacks, every=250)).frames

    for figure in (matrices.at_the_end(frames), matrices.over_time(frames)):
        picture = canvas.as_array(figure)
        border = np.concatenate([picture[:3].ravel(), picture[-3:].ravel()])
        sides = np.concatenate([picture[:, :3].ravel(), picture[:, -3:].ravel()])
        assert (border == 255).all()
        assert (sides == 255).all()


def test_frames_of_an_animation_share_layout_and_scale(tmp_path) -> None:
    frames = read_run(make_run(tmp_path / "run", {"layers 0..4": 5}, every=125)).frames

    pictures = list(matrices.animated(frames, 500))

    assert len(pictures) == 5
    assert len({picture.shape for picture in pictures}) == 1
    right = [picture[60:, -90:] for picture in pictures]  # the colour bar
    assert all(np.array_equal(right[0], other) for other in right[1:])
    assert not np.array_equal(pictures[0], pictures[-1])


def test_evenly_keeps_both_ends() -> None:
    assert matrices.evenly(3, 6) == [0, 1, 2]
    assert matrices.evenly(1000, 6) == [0, 200, 400, 599, 799, 999]
    assert matrices.evenly(100, 100) == list(range(100))
