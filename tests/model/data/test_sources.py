"""Which files a corpus is made of."""

import os
from pathlib import Path

import pytest

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.documents import HUB, JSONL, PARQUET, TEXT, Source, find_sources, kind_of, stdlib_sources


def names(sources: list[Source]) -> list[str]:
    return [Path(source.path).name for source in sources]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", ".hidden", ".git/d.txt", "out/e.txt"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "folder"


def test_a_folder_is_opened_in_a_fixed_order_without_hidden_files(folder: Path) -> None:
    assert names(find_sources([folder])) == ["a.jsonl", "b.txt", "e.txt", "c.parquet"]


def test_the_folder_of_the_corpus_is_left_out(folder: Path) -> None:
    assert names(find_sources([folder], without=folder / "out")) == ["a.jsonl", "b.txt", "c.parquet"]


def test_a_file_that_is_named_twice_is_read_once(folder: Path) -> None:
    assert names(find_sources([folder / "b.txt", folder, folder / "sub" / ".." / "b.txt"])).count("b.txt") == 1


def test_what_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere\.txt does not exist"):
        find_sources([tmp_path / "nowhere.txt"])


def test_a_pipe_is_refused_when_named_and_left_out_of_a_folder(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(InvalidArgument, match="neither a file nor a folder"):
        find_sources([folder / "pipe"])
    assert "pipe" not in names(find_sources([folder]))


def test_a_dangling_link_is_listed_so_that_it_can_be_named(folder: Path) -> None:
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    assert "dangling.txt" in names(find_sources([folder]))


def test_linked_folders_are_read_once_and_links_in_a_circle_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.txt").write_text("f")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "again").symlink_to(tmp_path / "elsewhere")
    assert names(find_sources([folder])) == ["a.jsonl", "b.txt", "f.txt", "e.txt", "c.parquet"]


def test_kinds_go_by_the_name() -> None:
    kinds = [kind_of(Path(name)) for name in ("a.jsonl", "a.ndjson.zst", "a.parquet", "a.txt.gz", "a.py", "a")]
    assert kinds == [JSONL, JSONL, PARQUET, TEXT, TEXT, TEXT]


def test_a_data_set_is_named_by_a_prefix() -> None:
    assert find_sources(["hf:user/name@test"]) == [Source(path="user/name@test", kind=HUB)]


def test_a_written_file_is_another_source(folder: Path) -> None:
    before = find_sources([folder / "b.txt"])
    (folder / "b.txt").write_text("longer than before")
    assert find_sources([folder / "b.txt"]) != before


@pytest.mark.slow
def test_the_standard_library_is_there_without_its_tests() -> None:
    paths = [Path(source.path) for source in stdlib_sources()]
    assert {"os.py", "argparse.py"} <= {path.name for path in paths}
    assert all(path.suffix == ".py" and not {"test", "site-packages"} & set(path.parts) for path in paths)
    assert len(set(paths)) == len(paths) > 300
