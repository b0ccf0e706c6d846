"""Texts from tables: what is read, what is refused, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import DataError
from surgery.train.data import open_data
from surgery.train.data.base import Place
from surgery.train.data.configs import DocstringsData, HubData, RecordsData
from surgery.train.data.docstrings import by_module, parts
from surgery.train.data.tokenizer import load_tokenizer
from tests.train.finetune import tiny


def opened(path: Path, **options: Any) -> Any:
    given = {"tokenizer": "bytes", "label": "kind", "held_out": 0.25, **options}
    return open_data(RecordsData(path=str(path), **given), seed=0)


def csv_of(folder: Path, rows: list[dict[str, Any]], name: str = "table.csv") -> Path:
    path = folder / name
    comma = "\t" if name.endswith("tsv") else ","
    lines = [comma.join(rows[0]), *(comma.join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["table.jsonl", "table.csv", "table.tsv"])
def test_tables_of_all_formats_are_the_same(name: str, tmp_path: Path):
    path = tiny.table(tmp_path) if name == "table.jsonl" else csv_of(tmp_path, tiny.rows(), name)
    data = opened(path)
    assert data.facts.names == ("age", "colour", "shape")
    # One-word texts repeat; a training row that is held out too is left out of training.
    assert len(data.held_out) == 12
    row = data.held_out.sample(0, 0)
    assert bytes(row["input_ids"][:-1].tolist()).decode().split()[0] in tiny.WORDS
    assert row["input_ids"][-1] == 257


def test_batches_are_padded_to_their_longest(tmp_path: Path):
    data = opened(tiny.table(tmp_path), label=None)
    batch = data.train.batch([Place(index, 10 + index) for index in range(6)])
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == lengths.max()
    assert lengths.min() < lengths.max()
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert torch.equal(ids[:length], labels[:length])
        assert (labels[length:] == -100).all()
        assert (ids[length:] == 258).all()
    assert batch["position"].tolist() == list(range(10, 16))


def test_a_tokenizer_of_transformers_frames_texts_and_pairs(tmp_path: Path):
    tokenizer = load_tokenizer(str(tiny.bert(tmp_path / "bert")))
    (one,) = tokenizer.frame(["red green"], None, 8)
    assert one.ids.tolist() == [2, 5, 6, 3]
    (two,) = tokenizer.frame(["red green"], ["blue"], 8)
    assert two.ids.tolist() == [2, 5, 6, 3, 7, 3]
    assert two.types is not None
    assert two.types.tolist() == [0, 0, 0, 0, 1, 1]
    (short,) = tokenizer.frame(["red green blue small"], None, 4)
    assert short.ids.tolist() == [2, 5, 6, 3]
    assert (one.cut, two.cut, short.cut) == (False, False, True)


def test_a_pair_is_two_columns(tmp_path: Path):
    rows = [{**row, "second": "old"} for row in tiny.rows()]
    data = opened(
        tiny.table(tmp_path, rows), pair="second", tokenizer=str(tiny.bert(tmp_path / "bert"))
    )
    batch = data.train.batch([Place(0, 0), Place(1, 1)])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["token_type_ids"].max() == 1


def test_what_is_cut_and_uneven_is_said(tmp_path: Path):
    rows = [row for row in tiny.rows(90) if row["kind"] == "colour" or row["number"] % 30 == 1]
    data = opened(tiny.table(tmp_path, rows), length=12)
    told = "\n".join(data.notes)
    assert "training texts" in told
    assert "are cut to 12 tokens" in told
    assert "classes are uneven" in told


def test_held_out_texts_are_not_trained_on(tmp_path: Path):
    rows = [{"text": f"text {number // 2}", "kind": number % 2} for number in range(40)]
    data = opened(tiny.table(tmp_path, rows))
    texts = [{each.ids.tobytes() for each in part.framed} for part in (data.train, data.held_out)]
    assert not texts[0] & texts[1]
    assert any("also held out" in note for note in data.notes)


def test_what_is_held_out_may_be_a_file(tmp_path: Path):
    train, other = tmp_path / "a", tmp_path / "b"
    train.mkdir()
    other.mkdir()
    held = tiny.table(other, [{"text": "pale thing", "kind": "age"}])
    data = opened(tiny.table(train), held_out=str(held))
    assert len(data.held_out) == 1


def test_classes_come_in_the_order_that_is_given(tmp_path: Path):
    data = opened(tiny.table(tmp_path), labels=("shape", "age", "colour"))
    assert data.facts.names == ("shape", "age", "colour")


def test_numbers_are_classes_in_the_order_of_numbers(tmp_path: Path):
    rows = [{"text": f"text {number}", "kind": number % 11} for number in range(60)]
    assert opened(tiny.table(tmp_path, rows)).facts.names == tuple(map(str, range(11)))


GOOD = {"text": "red", "kind": "colour"}
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "column": (
        [GOOD],
        {"label": "class"},
        "no column 'class'\n.*columns: text, kind",
    ),
    "empty text": ([GOOD, {"text": "", "kind": "a"}], {}, r"jsonl:2: column 'text' holds nothing"),
    "blank text": ([{"text": "  ", "kind": "a"}], {}, "holds blanks, expected text"),
    "number": ([{"text": 3, "kind": "a"}], {}, "holds int, expected text"),
    "no class": ([GOOD, {"text": "red", "kind": None}], {}, "2: column 'kind' holds nothing"),
    "float": ([{"text": "red", "kind": 0.5}], {}, r"0.5 \(float\).*\n.*regression"),
    "one class": ([GOOD] * 3, {}, "every row is of class 'colour'"),
    "other class": ([GOOD], {"labels": ("a", "b")}, "'colour' is not among data.labels: a, b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_row(case: str, tmp_path: Path):
    rows, options, message = WRONG[case]
    with pytest.raises(DataError) as caught:
        opened(tiny.table(tmp_path, rows), **options)
    import re

    assert re.search(message, f"{caught.value.message}\n  hint: {caught.value.hint}")


BROKEN = {
    "a.jsonl": ('{"text": "a"\n', "a.jsonl:1: no JSON"),
    "deep.jsonl": ("[" * 100_000 + "\n", "deep.jsonl:1: no JSON"),
    "b.jsonl": ("[1]\n", "b.jsonl:1: expected an object"),
    "c.csv": ("text,kind\na,b,c\n", "c.csv:2: 3 fields, and the header has 2"),
    "d.csv": ("text,text\na,b\n", "a column is named twice"),
    "e.csv": ("text,kind\n", "holds no rows"),
    "f.xlsx": ("", "known endings: .jsonl"),
    "g.csv": ("", "is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_its_line(name: str, tmp_path: Path):
    content, message = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


def test_a_class_that_only_the_evaluation_has_is_refused(tmp_path: Path):
    (tmp_path / "b").mkdir()
    held = tiny.table(tmp_path / "b", [{"text": "pale thing", "kind": "weight"}])
    with pytest.raises(DataError, match="class 'weight' occurs in what is evaluated on"):
        opened(tiny.table(tmp_path), held_out=str(held))


def test_a_dataset_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in tiny.rows()]
    (folder / "train.jsonl").write_text("".join(lines[:36]))
    (folder / "validation.jsonl").write_text("".join(lines[36:]))
    section = HubData(path=str(folder), label="kind", tokenizer="bytes")
    data = open_data(section, seed=0)
    assert len(data.held_out) == 12
    assert data.facts.names == ("age", "colour", "shape")


def test_docstrings_of_one_module_are_in_one_part(tmp_path: Path):
    for package in ("alpha", "beta"):
        for module in range(12):
            path = tmp_path / package / f"module{module}.py"
            path.parent.mkdir(exist_ok=True)
            told = f"what {package} of {module} does number"
            path.write_text("\n".join(f"def f{n}():\n    '{told} {n}'\n" for n in range(20)))
        (tmp_path / package / "__init__.py").write_text("")
    found = parts(by_module(tmp_path), most=50)
    modules = [{text.split(" of ")[1].split()[0] for text in part.texts} for part in found]
    assert all(modules)
    for package in ("alpha", "beta"):
        of = [
            {
                text
                for text, label in zip(part.texts, part.labels or (), strict=True)
                if label == package
            }
            for part in found
        ]
        inside = [{text.split(" of ")[1].split()[0] for text in texts} for texts in of]
        assert not inside[0] & inside[1]
        assert not inside[1] & inside[2]
        assert not inside[0] & inside[2]
    assert not any("alpha" in text or "beta" in text for part in found for text in part.texts)
    assert max(len(part) for part in found) <= 100


def test_the_standard_library_has_enough_docstrings():
    data = open_data(DocstringsData(tokenizer="bytes", most=20), seed=0)
    assert data.facts.classes is not None
    assert data.facts.classes >= 5
    assert len(data.train) <= 20 * data.facts.classes


def test_digits_are_turned_and_inverted_and_halved():
    from surgery.train.data.configs import DigitsData, ShiftedDigitsData

    plain = open_data(DigitsData(held_out=0.6), seed=0)
    validation, test = (
        open_data(ShiftedDigitsData(part=part), seed=0) for part in ("validation", "test")
    )
    image, turned = (each.train.sample(3, 3)["images"] for each in (plain, test))
    assert torch.equal(turned, -torch.rot90(image, 1, (-2, -1)))
    assert torch.equal(validation.train.images, test.train.images)
    together = len(validation.held_out) + len(test.held_out)
    assert together == len(plain.held_out)
    pairs = torch.cat([validation.held_out.images, test.held_out.images]).flatten(1)
    assert len(pairs.unique(dim=0)) == len(plain.held_out.images.flatten(1).unique(dim=0))
