"""`model info --devices` as a person meets it."""

import pytest
from shell import Shell


def test_each_line_has_its_formula_and_says_what_is_assumed(run: Shell) -> None:
    shown = run("model", "info", "tiny", "--devices", "8xh100", "--mfu", "0.3")
    assert (shown.code, shown.err) == (0, "")
    tables = shown.out[shown.out.index("8 x NVIDIA H100") :]
    assert "MFU 0.3" in tables
    assert "an ASSUMPTION (--mfu). Nothing here was measured." in tables
    for name, formula in (
        ("compute: dense products", "3 x forward FLOPs"),
        ("memory: weights, gradients, AdamW", "16 B x parameters / devices"),
        ("tokens a day", "86,400 s"),
        ("prefill, one device", "/ peak"),
        ("decode a token of 1 text", "/ bandwidth"),
    ):
        (line,) = (line for line in tables.splitlines() if line.startswith(f"{name}  "))
        assert formula in line


def test_without_devices_there_is_no_paper(run: Shell) -> None:
    assert "bound" not in run("model", "info", "tiny").out


def test_as_json(run: Shell) -> None:
    scale = run("model", "info", "tiny", "--devices", "h200", "--batch-tokens", "64k", "--json").json["scale"]
    assert (scale["devices"], scale["mfu_assumed"]) == (1, 0.4)
    assert scale["training"]["tokens a step"]["value"] == 65536
    assert scale["serving"]["texts a device"]["unit"] == "texts"


def test_two_numbers_of_devices_show_how_a_step_scales(run: Shell) -> None:
    asked = ("model", "info", "tiny", "--context", "1k", "--batch-tokens", "64k", "--devices", "8-32xh100")
    tables = run(*asked, "--json").json["scaling"]
    assert {name: [(row["devices"], row["tokens"]) for row in rows] for name, rows in tables.items()} == {
        "strong": [(8, 65536), (16, 65536), (32, 65536)],
        "weak": [(8, 16384), (16, 32768), (32, 65536)],
    }
    assert tables["strong"][-1] == {**tables["weak"][-1], "efficiency": tables["strong"][-1]["efficiency"]}
    for rows in tables.values():
        for row in rows:
            assert row["tokens_a_day"] == pytest.approx(row["tokens"] / row["seconds"] * 86400)
            gain = row["tokens_a_day"] / rows[0]["tokens_a_day"] * rows[0]["devices"] / row["devices"]
            assert row["efficiency"] == pytest.approx(gain)
    alone = run(*asked[:-1], "16xh100", "--json").json["scale"]["training"]
    assert tables["strong"][1]["seconds"] == alone["time a step"]["assumed"]
    shown = run(*asked).out
    assert "too much" not in shown
    assert "strong scaling, on paper; nothing here was measured" in shown
    assert "weak scaling" in shown


def test_a_step_that_does_not_fit_is_told(run: Shell) -> None:
    assert run("model", "info", "8b-a1b", "--context", "16m", "--devices", "8-16xh100").out.count("GB (too much)") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "64xrtx"], "devices '64xrtx' are not known; allowed is a count and a name, as in 64xh100"),
        (["--devices", "12xh100"], "count = 12 must be at most 8 or a multiple of it"),
        (["--devices", "8-24xh100"], "devices '8-24xh100': the second number must be 2, 4, 8, … times the first"),
        (["--devices", "h100", "--mfu", "1.2"], "mfu = 1.2 must be more than 0 and at most 1"),
        (["--devices", "h100", "--batch-tokens", "1k,2k"], "--batch-tokens names 2 numbers; one is needed"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments: list[str], message: str, run: Shell) -> None:
    refused = run("model", "info", "tiny", *arguments)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert message in refused.err
