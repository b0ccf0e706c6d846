import numpy as np

from surgery.train.views import canvas, read_run, sources
from surgery.train.views.sources import effective_sources
from tests.train.views.folders import make_run, signed_matrix, softmax_matrix


def test_uniform_rows_have_as_many_sources_as_states() -> None:
    found = effective_sources(softmax_matrix(6, 0.0).double().numpy()[None])

    # Coefficients of float32.
    np.testing.assert_allclose(found, [[1, 2, 3, 4, 5, 6]], rtol=1e-6)


def test_one_source_counts_one_and_scale_and_sign_do_not_count() -> None:
    matrix = np.array([[-3.0, 7.0, 7.0], [0.5, -0.5, 7.0], [0.0, 0.2, 0.0]])

    np.testing.assert_allclose(effective_sources(matrix[None]), [[1.0, 2.0, 1.0]], rtol=1e-12)


def test_against_the_definition() -> None:
    shares = np.array([0.7, 0.2, 0.1])
    matrix = np.zeros((3, 3))
    matrix[2] = shares

    found = effective_sources(matrix[None])[0, 2]

    assert np.isclose(found, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-12)


def test_rows_of_zeros_and_of_nan_have_no_number() -> None:
    matrix = np.array([[0.0, 0.0], [np.nan, 1.0]])

    assert np.isnan(effective_sources(matrix[None])).all()


def test_identity_starts_and_single_records_are_drawn(tmp_path) -> None:
    run = make_run(tmp_path / "run", {"layers 0..5": 6, "b": 1}, matrix=signed_matrix, every=500)
    picture = canvas.as_array(sources.over_time(read_run(run).frames))

    assert (picture[:, -3:] == 255).all()
