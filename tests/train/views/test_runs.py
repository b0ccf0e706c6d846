import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.errors import TrainingError
from surgery.train.views import groups, read_run
from tests.train.views.folders import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", {"layers 0..3": 4}, name="ancre", seed=3)


def append(run: Path, text: str) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write(text)


def test_a_whole_run(run: Path) -> None:
    record = read_run(run)

    assert (record.name, record.seed, record.total, record.last_step) == ("ancre", 3, 500, 500)
    assert record.notes == ()
    assert len(record.train) == 50
    assert record.evaluation.steps.tolist() == list(range(0, 501, 50))
    assert set(record.evaluations) == {"loss", "perplexity"}
    assert record.frames[0].values.shape == (11, 4, 4)
    assert record.frames[0].steps.tolist() == list(range(0, 501, 50))


def test_a_torn_last_line_is_left_out_and_said(run: Path) -> None:
    append(run, '{"kind": "step", "step": 510, "lo')

    record = read_run(run)

    assert record.last_step == 500
    (note,) = record.notes
    assert "last line of log.jsonl is torn" in note
    assert "killed" in note


def test_a_whole_last_line_without_its_end_counts(run: Path) -> None:
    append(run, json.dumps({"kind": "step", "step": 510, "loss": 1.0}))

    assert read_run(run).last_step == 510
    assert read_run(run).notes == ()


def test_broken_lines_are_named_by_number(run: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines()
    lines[4:4] = ["{]", "[1]", '{"kind": "step"}', '"text"', "\x00"]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")

    (note,) = read_run(run).notes

    assert note.endswith("left out: 5, 6, 7 and 2 more")


def test_a_step_that_was_written_twice_counts_as_it_was_last(run: Path) -> None:
    # Killed at 500, gone on from a checkpoint at 300 and killed again at 320.
    append(run, '{"kind": "step", "step": 310, "loss": 7.0}\n')
    append(run, '{"kind": "step", "step": 320, "loss": 8.0}\n')

    record = read_run(run)

    assert record.train.steps[-3:].tolist() == [300, 310, 320]
    assert record.train.values[-2:].tolist() == [7.0, 8.0]


@pytest.mark.parametrize("value", ['"nan"', '"inf"', "NaN", "null", '"-inf"'])
def test_losses_that_are_not_finite_are_kept_and_counted(run: Path, value: str) -> None:
    append(run, f'{{"kind": "step", "step": 510, "loss": {value}}}\n')

    record = read_run(run)

    assert not math.isfinite(record.train.values[-1])
    (note,) = record.notes
    assert "not finite at 1 of 51 logged steps, first at step 510" in note


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"layers 0..3": 4})
    lines = (run / "log.jsonl").read_text().splitlines()[:20]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")

    record = read_run(run)

    assert record.unfinished
    assert any("unfinished: the log ends at step" in note for note in record.notes)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (None, "the run has no rules"),
        ("ancre", "the model has no shortcuts"),
        ("lora", "the run's rules rewire nothing"),
    ],
)
def test_a_run_without_matrices_says_why(tmp_path: Path, rules: str | None, said: str) -> None:
    record = read_run(make_run(tmp_path / "run", {}, rules=rules))

    assert record.frames == ()
    assert said in record.notes[0]


def test_a_run_without_configuration_is_called_after_its_folder(run: Path) -> None:
    (run / "config.yaml").unlink()

    record = read_run(run)

    assert (record.name, record.seed, record.total) == ("run", None, None)
    assert "no config.yaml" in record.notes[0]


def test_a_configuration_that_is_no_yaml_is_said(run: Path) -> None:
    (run / "config.yaml").write_text("a: [1")

    record = read_run(run)

    assert record.name == "run"
    assert "config.yaml cannot be read" in record.notes[0]


def test_matrices_of_two_models_are_refused(run: Path) -> None:
    save_file({"layers 0..3": torch.zeros(5, 5)}, run / "matrices" / "000100.safetensors")

    with pytest.raises(TrainingError, match="different models") as caught:
        read_run(run)

    assert "layers 0..3 4x4 at step 0, layers 0..3 5x5 at step 100" in str(caught.value)


def test_other_stacks_at_a_later_step_are_refused(run: Path) -> None:
    save_file({"h 0..3": torch.zeros(4, 4)}, run / "matrices" / "000100.safetensors")

    with pytest.raises(TrainingError, match="different models"):
        read_run(run)


def test_what_is_not_square_is_refused(run: Path) -> None:
    save_file({"layers 0..3": torch.zeros(4, 5)}, run / "matrices" / "000100.safetensors")

    with pytest.raises(TrainingError, match=r"shape \(4, 5\), expected \(K, K\)"):
        read_run(run)


def test_a_torn_file_of_matrices_is_left_out_and_said(run: Path) -> None:
    path = run / "matrices" / "000500.safetensors"
    path.write_bytes(path.read_bytes()[:60])

    record = read_run(run)

    assert record.frames[0].steps[-1] == 450
    assert "matrices/000500.safetensors cannot be read" in record.notes[0]


def test_entries_that_no_state_can_give_are_said(run: Path) -> None:
    save_file({"layers 0..3": torch.ones(4, 4)}, run / "matrices" / "000500.safetensors")

    assert "above the diagonal" in read_run(run).notes[0]


def test_stacks_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {"layer2": 2, "layer10": 3})
    assert [frames.stack for frames in read_run(run).frames] == ["layer2", "layer10"]

    for path in (run / "matrices").iterdir():
        found = {"encoder": torch.eye(2), "decoder": torch.eye(2)}
        save_file(found, path, {"stacks": json.dumps(list(found))})
    assert [frames.stack for frames in read_run(run).frames] == ["encoder", "decoder"]


def test_a_missing_run_names_those_that_are_there(run: Path) -> None:
    with pytest.raises(TrainingError, match="there is no run") as caught:
        read_run(run.parent / "rnu")

    assert str(run) in str(caught.value)


def test_a_folder_of_runs_is_no_run(run: Path) -> None:
    with pytest.raises(TrainingError, match=r"no log\.jsonl") as caught:
        read_run(run.parent)

    assert str(run) in str(caught.value)


def test_a_file_is_no_run(run: Path) -> None:
    with pytest.raises(TrainingError, match="is a file"):
        read_run(run / "log.jsonl")


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / f"{n}-{s}", {}, name=n, seed=s) for n in "ab" for s in (1, 0)]

    found = groups([read_run(path) for path in paths])

    assert [group.name for group in found] == ["a", "b"]
    assert [[run.seed for run in group.runs] for group in found] == [[0, 1], [0, 1]]


def test_groups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / str(steps), {}, name="a", steps=steps) for steps in (100, 200)]

    found = groups([read_run(path) for path in paths])

    assert [group.name for group in found] == [f"a ({path})" for path in paths]


def test_the_same_run_twice_is_refused(run: Path) -> None:
    with pytest.raises(TrainingError, match="given twice"):
        groups([read_run(run), read_run(run)])


def test_one_seed_twice_is_no_second_sample(tmp_path: Path) -> None:
    records = [read_run(make_run(tmp_path / name, {})) for name in ("a", "b")]

    with pytest.raises(TrainingError, match="same seed 0"):
        groups(records)


def test_a_line_and_a_header_that_are_hostile_are_left_out_and_said(run: Path) -> None:
    with (run / "log.jsonl").open("a") as log:
        log.write("[" * 100_000 + '\n{"kind": "step", "kind": "x", "step": 1}\n')
    path = run / "matrices" / "000500.safetensors"
    save_file({"layers 0..3": torch.eye(4)}, path, {"stacks": "[" * 100_000})

    record = read_run(run)

    assert any("lines that cannot be read" in note for note in record.notes)
    assert any("000500.safetensors cannot be read" in note for note in record.notes)
