import pytest

from surgery.errors import DataError
from surgery.train.data import text
from surgery.train.data.text import STDLIB, find, open_corpus, read


def folder(root, count=40, ending=".txt"):
    for number in range(count):
        path = root / f"part{number % 3}" / f"{number:02d}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number}\n" * (number + 1), encoding="utf-8")
    return root


def names(pieces):
    return [piece.file.name for piece in pieces]


def test_files_come_in_the_order_of_their_names(tmp_path):
    found = find(str(folder(tmp_path)))
    assert len(found) == 40
    assert [file.name for file in found] == sorted(file.name for file in found)
    assert found[0].name == "part0/00.txt"


def test_whole_files_are_held_out_by_their_names(tmp_path):
    corpus = open_corpus(str(folder(tmp_path / "a")), held_out=0.3)
    train, held_out = names(corpus.train), names(corpus.held_out)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 40
    assert 5 <= len(held_out) <= 20
    # A file keeps its side wherever it lies and whatever else there is.
    other = folder(tmp_path / "b", count=60)
    more = open_corpus(str(other), held_out=0.3)
    assert set(held_out) == set(names(more.held_out)) & set(train + held_out)
    fewer = open_corpus(str(other), held_out=0.1)
    assert set(names(fewer.held_out)) < set(names(more.held_out))


def test_the_content_of_a_held_out_file_is_not_trained_on(tmp_path):
    folder(tmp_path)
    held = open_corpus(str(tmp_path), held_out=0.3).held_out[0].file
    copies = [tmp_path / f"copy{number}.txt" for number in range(8)]
    for copy in copies:
        copy.write_bytes(held.path.read_bytes())
    corpus = open_corpus(str(tmp_path), held_out=0.3)
    contents = {read(piece) for piece in corpus.held_out}
    assert read(corpus.held_out[0])
    assert not contents & {read(piece) for piece in corpus.train}
    assert len(corpus.train) + len(corpus.held_out) < 48


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_of_several_files_both_sides_have_one(tmp_path, share):
    corpus = open_corpus(str(folder(tmp_path, count=3)), held_out=share)
    assert corpus.train
    assert corpus.held_out


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    corpus = open_corpus(str(path), held_out=0.2)
    train, held_out = ("".join(map(read, side)) for side in (corpus.train, corpus.held_out))
    assert train + held_out == path.read_text()
    assert train.endswith("\n")
    assert held_out.startswith("line 8")


def test_a_long_file_comes_in_pieces_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 64)
    monkeypatch.setattr(text, "_LINE", 16)
    long = tmp_path / "long.txt"
    # Lines, then one without end, of characters of three bytes: a piece ends with a character.
    long.write_text("short line\n" * 30 + "数" * 200, encoding="utf-8")
    (tmp_path / "other.txt").write_text("x")
    (tmp_path / "third.txt").write_text("y")
    corpus = open_corpus(str(tmp_path), held_out=0.0001)
    (held,) = {piece.file.name for piece in corpus.held_out}
    pieces = [p for p in corpus.train + corpus.held_out if p.file.name == "long.txt"]
    assert held
    assert len(pieces) > 8
    assert "".join(map(read, pieces)) == long.read_text(encoding="utf-8")
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert read(pieces[0]).endswith("\n")


def test_a_digest_tells_contents_names_and_sides_apart(tmp_path):
    folder(tmp_path)
    first = open_corpus(str(tmp_path)).digest
    assert open_corpus(str(tmp_path)).digest == first
    assert open_corpus(str(tmp_path), held_out=0.5).digest != first
    (tmp_path / "part0" / "00.txt").write_text("changed")
    changed = open_corpus(str(tmp_path)).digest
    assert changed != first
    (tmp_path / "part0" / "00.txt").rename(tmp_path / "part0" / "000.txt")
    assert open_corpus(str(tmp_path)).digest != changed


@pytest.mark.parametrize("source", ["{}/part1/*.txt", "{}/**/[0-9]*.txt", "{}"])
def test_patterns_and_folders(tmp_path, source):
    folder(tmp_path)
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("x")
    found = find(source.format(tmp_path))
    assert len(found) == (13 if "part1" in source else 40)


def test_a_relative_pattern_begins_at_the_working_folder(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(find("part?/0*.txt")) == 10
    assert len(find("part2/*")) == 13


def test_the_standard_library_is_there_and_reads_as_text():
    corpus = open_corpus(STDLIB)
    found = names(corpus.train) + names(corpus.held_out)
    assert "dataclasses.py" in found
    assert "asyncio/tasks.py" in found
    assert not [name for name in found if "site-packages" in name or "/test/" in name]
    assert sum(piece.size for piece in corpus.train) > 5_000_000
    share = len(corpus.held_out) / len(found)
    assert 0.02 < share < 0.1
    for piece in corpus.train[::20] + corpus.held_out:
        assert read(piece)


@pytest.mark.parametrize("start", [0, 7_000_000])
def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path, start):
    (tmp_path / "good.txt").write_text("fine\n")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"line of text\n" * (start // 13) + b"caf\xe9 ol\xe9\n")
    offset = start // 13 * 13 + 3
    corpus = open_corpus(str(tmp_path), held_out=0.5)
    with pytest.raises(DataError, match=f"bad.txt is not UTF-8: byte 0xe9 at offset {offset} "):
        [read(piece) for piece in corpus.train + corpus.held_out]


@pytest.mark.parametrize(
    ("make", "options", "message", "hint"),
    [
        (lambda root: None, {}, "is empty", "put text files"),
        (lambda root: folder(root, 3, ".md"), {}, r"none of the 3 files", r"\*\*/\*\.md"),
        (lambda root: (root / "a.txt").touch(), {}, "all its files are empty", None),
        (folder, {"pattern": "*.py"}, r"matches '\*\.py'", "txt"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path, make, options, message, hint):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_corpus(str(tmp_path), **options)
    if hint is not None:
        assert caught.match(hint)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "no file or folder nowhere"),
        ("nowhere/*.txt", {}, "no file matches"),
        (STDLIB, {"pattern": "*.py"}, "is for a folder"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, options, message):
    with pytest.raises(DataError, match=message):
        open_corpus(source, **options)


def test_a_file_too_small_to_split_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(DataError, match="too few to hold"):
        open_corpus(str(tmp_path / "a.txt"))


def test_files_of_one_content_leave_nothing_to_train_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("same")
    with pytest.raises(DataError, match="same content"):
        open_corpus(str(tmp_path))


def test_a_file_cut_short_meanwhile_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 100)
    corpus = open_corpus(str(path))
    path.write_text("line\n")
    with pytest.raises(DataError, match="shorter while it was read"):
        read(corpus.train[0])
