import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surgery.errors import TrainingError
from surgery.train.views import draw
from surgery.train.views import movie as movies
from tests.train.views.folders import make_run

ALL = {"losses", "matrices", "graph", "matrices-over-time", "sources"}


def test_a_run_with_shortcuts_gets_every_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"layers 0..3": 4}, every=250)

    found = draw([run])

    names = {file.name for file in found.files}
    assert names == {f"{name}.png" for name in ALL} | {"matrices.gif"}
    assert all(file.parent == run / "plots" for file in found.files)
    assert not list((run / "plots").glob(".*"))
    with Image.open(run / "plots" / "matrices.gif") as movie:
        assert movie.n_frames == 3


def test_svg_and_webp(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"layers 0..3": 4}, every=250)

    found = draw([run], out=tmp_path / "out", form="svg", animation="webp")

    assert {file.suffix for file in found.files} == {".svg", ".webp"}
    assert {file.parent for file in found.files} == {tmp_path / "out"}
    assert "<svg" in (tmp_path / "out" / "graph.svg").read_text()
    with Image.open(tmp_path / "out" / "matrices.webp") as movie:
        assert movie.n_frames == 3


def test_drawing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"layers 0..3": 4}, every=500)

    first = {file: file.read_bytes() for file in draw([run]).files}
    second = {file: file.read_bytes() for file in draw([run]).files}

    assert first == second


def test_a_run_without_shortcuts_gets_its_losses_and_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", {}, rules=None)

    with caplog.at_level(logging.WARNING):
        found = draw([run])

    assert [file.name for file in found.files] == ["losses.png"]
    assert "no rules" in found.notes[0]
    assert "no rules" in caplog.text


def test_rules_that_rewire_nothing_are_no_reason_to_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", {}, rules="lora")

    with caplog.at_level(logging.WARNING):
        found = draw([run])

    assert "rewire nothing" in found.notes[0]
    assert not caplog.records


def test_several_runs_get_a_comparison_beside_them(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "out" / name / "seed-0", {}, name=name, floor=floor)
        for name, floor in (("a", 1.5), ("b", 1.2))
    ]

    found = draw(runs)

    assert found.files[-1] == tmp_path / "out" / "plots" / "losses.png"
    (saving,) = found.savings
    assert (saving.baseline, saving.name) == ("a", "b")
    assert found.to_dict()["savings"][0]["saved"] > 0


def test_several_runs_in_one_folder_of_pictures_stay_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "seed-0", {}, name=name) for name in "ab"]

    found = draw(runs, out=tmp_path / "out")

    assert len(set(found.files)) == len(found.files) == 3


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    (run / "log.jsonl").write_text("")

    with pytest.raises(TrainingError, match="nothing to draw"):
        draw([run])


@pytest.mark.parametrize(("paths", "threshold"), [([], 0.1), (["x"], -1.0)])
def test_wrong_arguments(paths: list[str], threshold: float) -> None:
    with pytest.raises(TrainingError):
        draw(paths, threshold=threshold)


def test_an_animation_keeps_its_colours(tmp_path: Path) -> None:
    draw_ = np.random.default_rng(0)
    bar = draw_.integers(0, 255, (20, 8, 3), dtype=np.uint8)
    pictures = [np.full((20, 20, 3), 255, np.uint8) for _ in range(4)]
    for at, picture in enumerate(pictures):
        picture[:, 12:] = bar
        picture[at, at] = 0

    path = movies.write(pictures, tmp_path / "x.gif")

    with Image.open(path) as movie:
        frames = []
        for at in range(4):
            movie.seek(at)
            frames.append(np.asarray(movie.convert("RGB")))
    assert all(np.array_equal(frames[0][:, 12:], frame[:, 12:]) for frame in frames)
    assert (frames[3][10, 5] == 255).all()
