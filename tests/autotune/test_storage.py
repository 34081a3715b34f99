"""Where studies are kept, and which study a search belongs to."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.trial import TrialState

from hsa_compile.autotune.study.storage import (
    default_storage,
    finish_study,
    open_storage,
    open_study,
    open_to_read,
    question,
)
from hsa_compile.autotune.study.trials import is_gone, this_process
from hsa_compile.errors import InvalidArgument, MissingDependency, StorageError
from hsa_compile.problem import Problem
from hsa_compile.schedules import ops as ops_module
from hsa_compile.target import Target

PROBLEM = Problem(seq_len=131, num_heads=4, num_kv_heads=1, head_dim=16, chunk_size=16, top_k=2)


def asked(problem: Problem = PROBLEM, inputs: str = "random", seed: int = 0) -> dict[str, Any]:
    return question(problem, Target.parse("cpu"), inputs=inputs, seed=seed)


def test_each_kind_of_address_opens_optunas_own_storage(tmp_path: Path) -> None:
    assert isinstance(open_storage(None), InMemoryStorage)
    assert isinstance(open_storage(str(tmp_path / "new" / "study.journal")), JournalStorage)
    assert isinstance(open_storage(f"sqlite:///{tmp_path / 'study.db'}"), RDBStorage)


def test_the_default_is_a_journal_beside_the_schedules(cpu: Target, tmp_path: Path) -> None:
    assert default_storage(cpu) == str(tmp_path / "cache" / "schedules" / "studies" / "cpu-test-cpu-avx2.journal")


@pytest.mark.parametrize("address", ["banana", "redis://host", "study.json", "http://host/x.journal", ""])
def test_an_unknown_address_is_refused_with_those_that_are_known(address: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is not known; allowed are postgresql"):
        open_storage(address)


def test_a_missing_driver_is_named_with_the_command_that_installs_it() -> None:
    pymysql = pytest.importorskip("sqlalchemy").engine.make_url("mysql+pymysql://host/db")
    try:
        pymysql.get_dialect().import_dbapi()
    except ModuleNotFoundError:
        with pytest.raises(MissingDependency, match="pip install pymysql"):
            open_storage("mysql+pymysql://user:secret@host/db")
    else:
        pytest.skip("pymysql is installed")


def test_a_database_that_is_not_there_is_one_line_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match="does not answer") as raised:
        open_storage("postgresql+psycopg://user:secret@127.0.0.1:1/db")
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(StorageError, match="does not answer"):
        open_storage(f"sqlite:///{tmp_path}/no/such/folder/study.db")


def test_a_journal_that_was_torn_by_a_crash_loses_its_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    study.add_trial(optuna.create_trial(value=1.0))
    study.add_trial(optuna.create_trial(value=2.0))
    path.write_bytes(path.read_bytes()[:-7])
    study = optuna.load_study(storage=open_storage(str(path)), study_name="s")
    assert [trial.value for trial in study.trials] == [1.0]
    study.add_trial(optuna.create_trial(value=3.0))
    study = optuna.load_study(storage=open_storage(str(path)), study_name="s")
    assert [(trial.value, trial.state) for trial in study.trials] == [
        (1.0, TrialState.COMPLETE), (3.0, TrialState.COMPLETE)
    ]  # fmt: skip


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_text("banana\nbanana\nbanana\n")
    with pytest.raises(StorageError, match="is damaged"):
        open_storage(str(path))


def test_a_search_that_did_not_end_goes_on_and_one_that_did_begins_anew() -> None:
    storage = InMemoryStorage()
    first = open_study(storage, asked(), anew=False)
    assert open_study(storage, asked(), anew=False).study_name == first.study_name
    finish_study(first, {})
    second = open_study(storage, asked(), anew=False)
    assert second.study_name != first.study_name
    assert open_study(storage, asked(), anew=False).study_name == second.study_name
    third = open_study(storage, asked(), anew=True)
    assert third.study_name not in {first.study_name, second.study_name}


def test_another_question_has_another_study(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = InMemoryStorage()
    questions = [asked(), asked(replace(PROBLEM, top_k=3)), asked(inputs="local"), asked(seed=1)]
    kind = ("hsa_forward", "torch")
    own = ops_module.OP_BACKENDS[kind]
    fewer = {**own.choices, "token": {"block_tokens": (1, 4)}}
    monkeypatch.setitem(ops_module.OP_BACKENDS, kind, replace(own, choices=fewer))
    questions.append(asked())
    names = {open_study(storage, one, anew=False).study_name for one in questions}
    assert len(names) == len(questions)


def test_a_storage_that_is_opened_to_read_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    study.add_trial(optuna.create_trial(value=1.0))
    study.add_trial(optuna.create_trial(value=2.0))
    torn = path.read_bytes()[:-7]
    path.write_bytes(torn)
    (found,) = open_to_read(str(path)).get_all_studies()
    assert [trial.value for trial in open_to_read(str(path)).get_all_trials(found._study_id)] == [1.0]
    assert path.read_bytes() == torn


@pytest.mark.parametrize("address", ["sqlite:///{folder}/nothing.db", "{folder}/nothing.journal"])
def test_to_read_what_is_not_there_names_what_is_and_makes_nothing(address: str, tmp_path: Path) -> None:
    there = Path(default_storage(Target.parse("cpu")))
    optuna.create_study(storage=open_storage(str(there)), study_name="s")
    with pytest.raises(InvalidArgument, match=rf"nothing\.\w+ does not exist; .* there are: {re.escape(str(there))}"):
        open_to_read(address.format(folder=tmp_path))
    assert not list(tmp_path.glob("nothing*"))


def test_an_empty_database_that_is_read_gets_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(StorageError, match=r"holds no studies: .*no such table"):
        open_to_read(f"sqlite:///{path}")
    assert path.read_bytes() == b""


def test_a_study_says_what_it_is_of() -> None:
    study = open_study(InMemoryStorage(), asked(), anew=False)
    assert study.metric_names == ["time / default"]
    assert study.user_attrs["problem"] == PROBLEM.to_dict()
    assert study.user_attrs["target"] == Target.parse("cpu").to_dict()
    assert study.study_name.startswith("hsa_forward-")


def test_a_process_is_gone_when_it_ended_or_its_number_has_another() -> None:
    me = this_process()
    assert not is_gone(me, None)
    assert is_gone({}, None)
    assert is_gone({**me, "pid": 2**22 + 1}, None)
    assert is_gone({**me, "started": "1"}, None)
    assert not is_gone({**me, "host": "another"}, None)
