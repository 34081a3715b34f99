"""What has made figures of long texts wrong: places in chunks, chance, text that was trained on, repeated samples."""

import random
import re
from pathlib import Path

import pytest

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.documents import stdlib_sources
from hsa_compile.model.data.manifest import VALIDATION
from hsa_compile.model.tasks.facts import draw_fresh
from hsa_compile.model.tasks.family import TASKS, haystack_of, sizes
from hsa_compile.model.tasks.haystack import MADE, TextHaystack, load_haystack
from hsa_compile.model.tasks.retrieval import Asked, make_edits, make_sample
from hsa_compile.model.tasks.unseen import packages_haystack, unseen_text

NUMBERS = TextHaystack("numbers", b"".join(b"x = f(%04d, 'Tavok')\n" % number for number in range(0, 9000)))


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needles_of_a_cell_begin_at_all_offsets_of_their_chunk(chunk_size: int, depth: float) -> None:
    asked = [Asked(depth=depth, index=index) for index in range(chunk_size)]
    _, plans = make_edits("s-niah", length=4096, seed=0, haystack=MADE["noise"], asked=asked)
    assert {plan.needles[0].start % chunk_size for plan in plans} == set(range(chunk_size))


@pytest.mark.parametrize("task", ["mk-niah-needles", "mk-niah-similar"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0, None])
def test_a_needle_among_needles_cuts_none_in_pieces(task: str, depth: float | None) -> None:
    asked = [Asked(depth=depth, index=index) for index in range(32)]
    base, plans = make_edits(task, length=4096, seed=0, haystack=MADE["needles"], asked=asked)
    for plan in plans:
        text = plan.apply(base).tokens.tobytes()[: plan.question.start]
        assert re.fullmatch(rb"[^ ]{0,9}( [a-z]{3}=[0-9]{4}\.)+.{0,9}", text)
        assert depth is None or plan.depth == pytest.approx(depth, abs=0.1)
    if depth is not None:  # every tenth place, so that an even chunk has half of its offsets
        assert len({plan.needles[0].start % 32 for plan in plans}) == 16


def test_offsets_are_spread_by_few_samples_too() -> None:
    asked = [Asked(depth=0.5, index=index) for index in range(4)]
    _, plans = make_edits("s-niah", length=4096, seed=0, haystack=MADE["noise"], asked=asked)
    assert len({plan.needles[0].start % 32 // 8 for plan in plans}) >= 3


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.chance < 0.1 and task.has_depth])
def test_no_answer_stands_in_the_haystack_by_chance(task: str) -> None:
    for index in range(4):
        base, (plan,) = make_edits(
            task, length=60_000, seed=3, number=index, haystack=haystack_of(task, NUMBERS), asked=[Asked(index=index)]
        )
        text = base.tobytes()[: plan.question.start]
        for number in re.findall(rb"\d{4}", bytes(plan.question.tokens)):
            assert re.search(rb"(?<![0-9a-zA-Z])%b(?![0-9a-zA-Z])" % number, text) is None


def test_words_that_stand_in_the_text_are_drawn_anew() -> None:
    drawn = iter([b"one", b"two", b"two", b"six", b"ten"])
    assert draw_fresh(random.Random(0), 2, lambda rng: next(drawn), b"one, 1two2; (six)") == [b"two", b"ten"]
    with pytest.raises(InvalidArgument, match="too many words like one to hide 1"):
        draw_fresh(random.Random(0), 1, lambda rng: b"one", b"one")


@pytest.mark.parametrize("task", TASKS)
def test_samples_do_not_repeat_over_seeds_numbers_and_depths(task: str) -> None:
    length = max(700, sizes(task).least)
    text = TextHaystack("text", b"a text that is shorter than a sample; ")
    seen = [
        make_sample(task, length=length, seed=seed, index=index, haystack=haystack_of(task, text), depth=depth)
        for seed in range(3)
        for index in range(8)
        for depth in ((0.0, 0.5, 1.0) if TASKS[task].has_depth else (None,))
    ]
    assert len({sample.tokens.tobytes() for sample in seen}) == len(seen)
    assert len({(sample.plan.question, sample.plan.needles) for sample in seen}) == len(seen)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def lines(first: int, count: int = 40) -> str:
    return "".join(f"def function_number_{first + number}(argument): pass\n" for number in range(count))


def test_text_that_was_trained_on_is_left_out(tmp_path: Path) -> None:
    changed = lines(100).replace("number_100(", "number_one_hundred(")
    package = write(tmp_path / "ours", same=lines(0), changed=changed, new=lines(200), new_again=lines(200))
    (package / "picture.bin").write_bytes(b"\0\1")
    (package / "guide.md").write_text(lines(300) + lines(0, 2))
    haystack = unseen_text({"ours": package}, [lines(0).encode(), lines(100).encode()])
    text = bytes(haystack.fill(len(haystack), random.Random(0)))
    assert text == (lines(300) + lines(0, 2) + "\0" + lines(200) + "\0").encode()
    assert haystack.origin["files"] == 2
    assert haystack.origin["files_left_out"] == 3
    assert haystack.origin["known_lines"] == 2 / 82
    assert haystack.origin["packages"] == {"ours": "unknown"}
    with pytest.raises(InvalidArgument, match="no text of ours"):
        unseen_text({"ours": write(tmp_path / "theirs", same=lines(0))}, [lines(0).encode()])


def test_the_text_of_the_packages_is_named_hashed_and_cut_to_its_limit(tmp_path: Path) -> None:
    package = write(tmp_path / "ours", a=lines(0), b=lines(100))
    first, again = (unseen_text({"ours": package}, [], max_bytes=2500) for _ in range(2))
    assert len(first) == first.origin["bytes"] == 2500
    assert first.origin == again.origin
    assert first.origin["sha256"] != unseen_text({"ours": package}, [], max_bytes=2499).origin["sha256"]


@pytest.mark.slow
def test_installed_packages_hold_tens_of_millions_of_bytes_that_the_standard_library_does_not() -> None:
    haystack = packages_haystack()
    assert len(haystack) > 4e7
    assert haystack.origin["known_lines"] < 0.01
    assert {"numpy", "torch"} <= set(haystack.origin["packages"])
    text = bytes(haystack.fill(len(haystack), random.Random(0)))
    sources = [Path(source.path).read_bytes() for source in stdlib_sources()]
    assert not [source for source in sources if len(source) > 200 and source in text]


@pytest.mark.slow
def test_the_standard_library_is_asked_in_its_validation_split() -> None:
    haystack = load_haystack("stdlib", split=VALIDATION)
    assert haystack.name == "stdlib"
    assert 1e5 < len(haystack) < 0.1 * sum(source.size for source in stdlib_sources())
