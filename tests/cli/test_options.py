"""How tables are printed."""

import pytest

from hsa_compile.cli.options import counted, print_rows

ROWS = [{"number": "1", "problem": "one two three four five " * 4, "note": "six seven eight nine ten " * 3}]


@pytest.mark.parametrize(("terminal", "columns", "lines"), [(True, 80, 5), (True, 400, 3), (False, 80, 3)])
def test_a_table_fits_the_terminal_and_is_whole_elsewhere(
    terminal: bool, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    print_rows(ROWS, as_json=False)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= lines if terminal and columns == 80 else len(printed) == lines
    if terminal:
        assert max(map(len, printed)) <= columns
    words = " ".join(printed).split()
    assert words.count("three") == 4
    assert words.count("eight") == 3


def test_a_table_of_long_words_ends_even_if_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_rows([dict.fromkeys("abcd", "x" * 50)], as_json=False)
    assert capsys.readouterr().out.count("x") == 200


def test_one_is_not_many() -> None:
    assert (counted(1, "core"), counted(2, "core")) == ("1 core", "2 cores")
