"""`hsa-compile eval --harness` with tasks and data that lie on this disk."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from shell import Shell

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.evaluation.subject import Subject

pytest.importorskip("lm_eval", reason="the extra harness is not installed")
from hsa_compile.model.evaluation import harness_tasks

pytestmark = pytest.mark.filterwarnings("ignore::hsa_compile.errors.UntunedWarning")

TEXTS = ["one two three", "a much longer text, é and all, " * 20, "x", "last words"]
TASKS = {
    "our_choice": """
output_type: multiple_choice
doc_to_text: "{{text}} and then"
doc_to_choice: ["yes", "no, never", "perhaps"]
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "our_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "our_words": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
GROUP = """
group: our_group
task: [our_choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks, one of each kind, and a group."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": n % 3}) + "\n" for n, text in enumerate(TEXTS)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "datasets"}}}
test_split: test
metadata: {{version: 1.0}}
"""
    for name, words in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{words}")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the network, and the harness does not list all that pip installed, which takes seconds."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


def command(directory: Path, tasks: Path, out: Path, *more: str) -> list[str]:
    return ["eval", "--model", str(directory), "--harness-path", str(tasks), "--out", str(out), *more]


def test_tasks_of_every_kind_give_tables_and_a_file(run: Shell, directory: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run(*command(directory, tasks, out, "--harness", ",".join(TASKS)))
    assert shown.code == 0, shown.err
    for text in ("|our_choice|", "|acc ", "|acc_norm", "|our_text", "|byte_perplexity|", "|our_words", "|exact_match"):
        assert text in shown.out
    assert shown.out.splitlines()[-1] == f"in {out}: harness.json"
    assert not (out / "results.json").exists()
    values = json.loads((out / "harness.json").read_text())
    assert values["model"] == directory.parent.name
    assert values["settings"]["tasks"] == list(TASKS)
    assert len(values["settings"]["model"]) == 64
    assert values["versions"].keys() >= {"hsa-compile", "torch", "lm-eval"}
    found = values["found"]["results"]
    assert found["our_choice"]["acc,none"] in [0, 0.25, 0.5, 0.75, 1]
    bits, perplexity = found["our_text"]["bits_per_byte,none"], found["our_text"]["byte_perplexity,none"]
    assert bits == pytest.approx(math.log2(perplexity))
    assert bits == pytest.approx(8, abs=0.5)  # of a model that knows nothing
    assert "hostname" not in (out / "harness.json").read_text().lower()


@pytest.mark.slow
def test_the_shipped_model_finds_a_choice_that_its_context_names_far_back(
    run: Shell, tasks: Path, tmp_path: Path
) -> None:
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 30
    values = ["1234", "8071", "5560", "9342"]
    rows = [
        {"text": f"{filler[: 300 * n]} abc={value}.{filler[300 * n :]} ?abc=", "values": values, "label": n}
        for n, value in enumerate(values)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = (tasks / "our_choice.yaml").read_text().replace(" and then", "")
    task = re.sub("doc_to_choice: .*", 'doc_to_choice: "{{values}}"\ntarget_delimiter: ""', task)
    (tasks / "our_choice.yaml").write_text(task)
    shown = run(*command(Path("tiny"), tasks, tmp_path / "out", "--harness", "our_choice", "--json"))
    assert shown.code == 0, shown.err
    assert shown.json["found"]["results"]["our_choice"]["acc,none"] == 1


def test_json_is_what_is_kept_and_nothing_is_computed_twice(
    run: Shell, directory: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = command(directory, tasks, out, "--harness", "our_choice,our_words", "--harness-limit", "2", "--json")
    shown = run(*arguments)
    assert shown.code == 0, shown.err
    assert shown.json == json.loads((out / "harness.json").read_text())
    assert shown.json["found"]["n-samples"]["our_choice"] == {"original": 4, "effective": 2}
    lines = (out / "samples.jsonl").read_text()
    assert len(lines.splitlines()) == 2 * 3 + 2

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Subject, "new_state", never)
    again = run(*arguments)
    assert again.code == 0, again.err
    assert again.json["found"]["results"] == shown.json["found"]["results"]
    assert (out / "samples.jsonl").read_text() == lines


def test_where_the_memory_lies_changes_nothing(run: Shell, directory: Path, tasks: Path, tmp_path: Path) -> None:
    words = ["--harness", "our_text", "--memory-dtype", "bf16", "--top-k", "3", "--json"]
    shown = [run(*command(directory, tasks, tmp_path / place, *words, "--memory", place)) for place in ("host", "disk")]
    assert [each.code for each in shown] == [0, 0], shown[0].err
    assert shown[0].json["found"]["results"] == shown[1].json["found"]["results"]
    assert shown[0].json["settings"]["memory_dtype"] == "bfloat16"
    assert shown[0].json["settings"]["top_k"] == 3


def test_a_task_of_our_own_may_run_beside_it(run: Shell, directory: Path, tasks: Path, tmp_path: Path) -> None:
    words = ["--harness", "our_choice", "--task", "s-niah", "--lengths", "128", "--depths", "0", "--samples", "1"]
    shown = run(*command(directory, tasks, tmp_path / "out", *words, "--json"))
    assert shown.code == 0, shown.err
    assert len(shown.json["retrieval"]) == 2
    assert shown.json["harness"] == json.loads((tmp_path / "out" / "harness.json").read_text())
    assert (tmp_path / "out" / "results.json").exists()


def test_the_seed_is_the_harness_s_own_unless_given(run: Shell, directory: Path, tasks: Path, tmp_path: Path) -> None:
    seeds = []
    for number, more in enumerate(([], ["--seed", "5"])):
        out = tmp_path / str(number)
        shown = run(*command(directory, tasks, out, "--harness", "our_choice", "--harness-limit", "1", "--json", *more))
        assert shown.code == 0, shown.err
        seeds.append(shown.json["found"]["config"]["fewshot_seed"])
    assert seeds == [1234, 5]


@pytest.mark.exhaustive
def test_groups_and_patterns_are_found_among_all_tasks(
    run: Shell, directory: Path, tasks: Path, tmp_path: Path
) -> None:
    (tasks / "our_group.yaml").write_text(GROUP)
    shown = run(*command(directory, tasks, tmp_path / "out", "--harness", "our_group,our_t*"))
    assert shown.code == 0, shown.err
    assert "|our_group" in shown.out
    assert "|our_text" in shown.out
    assert "Groups" in shown.out


def test_a_group_a_pattern_and_what_is_near_a_name_that_stands_for_nothing(tasks: Path) -> None:
    (tasks / "our_group.yaml").write_text(GROUP)
    few = harness_tasks.Tasks(tasks, with_own=False)
    assert few.named(["our_group", "our_t*"]) == ["our_group", "our_text"]
    with pytest.raises(InvalidArgument, match="--harness our_txt: no such task; near it are our_text"):
        few.named(["our_txt"])


def assert_refused(run: Shell, message: str, out: Path, *words: str) -> None:
    refused = run(*words)
    assert refused.code == 2, refused.err
    *others, line = refused.err.splitlines()
    assert all("examples/s" in other or not other for other in others)  # a bar of the library that reads data
    assert line.startswith("error: ")
    assert message in line
    assert not (out / "harness.json").exists()


@pytest.mark.exhaustive
def test_an_unknown_task_is_one_line_with_those_near_it(
    run: Shell, directory: Path, tasks: Path, tmp_path: Path
) -> None:
    message = "--harness helaswag: no such task; near it are hellaswag"
    assert_refused(
        run, message, tmp_path / "out", *command(directory, tasks, tmp_path / "out", "--harness", "helaswag")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness", ","], "--harness names no task"),
        (["--harness", "our_text", "--harness-limit", "0"], "0 is not in the range"),
        (["--harness-limit", "5"], "needs --harness: it"),
        (["--harness", "our_text", "--harness-path", "/nowhere"], "/nowhere"),
        (["--harness", "broken"], "--harness broken cannot be loaded: "),
        (["--harness", "unsafe"], "--harness unsafe runs code that a model wrote"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, run: Shell, directory: Path, tasks: Path, tmp_path: Path
) -> None:
    text = (tasks / "our_text.yaml").read_text()
    (tasks / "broken.yaml").write_text(text.replace("our_text", "broken").replace("data.jsonl", "no.jsonl"))
    (tasks / "unsafe.yaml").write_text(text.replace("our_text", "unsafe") + "unsafe_code: true\n")
    assert_refused(run, message, tmp_path / "out", *command(directory, tasks, tmp_path / "out", *words))


def test_without_the_harness_one_line_says_what_to_install(
    run: Shell, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in (harness_tasks.__name__, harness_tasks.HarnessModel.__module__):
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    message = "error: --harness needs lm_eval: pip install 'hsa-compile[harness]'"
    words = ["eval", "--model", str(directory), "--harness", "hellaswag", "--out", str(tmp_path / "out")]
    assert_refused(run, message, tmp_path / "out", *words)
