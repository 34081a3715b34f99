"""Studies behind Optuna's gRPC proxy, in a server process of its own."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from hsa_compile.autotune.study import storage as storage_module
from hsa_compile.autotune.study.storage import close_storage, open_storage
from hsa_compile.autotune.study.trials import OUTCOME
from hsa_compile.autotune.tune import Progress, tune
from hsa_compile.errors import InvalidArgument, StorageError
from hsa_compile.problem import Problem
from hsa_compile.schedules.record import TuningRecord

pytest.importorskip("grpc", reason="no driver: pip install grpcio protobuf")

PROBLEM = Problem(seq_len=4096, num_heads=4, num_kv_heads=1, head_dim=64, top_k=8)
SERVER = """
import sys, warnings
warnings.simplefilter("ignore")
from optuna.storages import get_storage, run_grpc_proxy_server
run_grpc_proxy_server(get_storage(sys.argv[1]), host="localhost", port=int(sys.argv[2]))
"""

Server = tuple[subprocess.Popen[bytes], str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, f"sqlite:///{tmp_path / 'study.db'}", str(port)], stderr=subprocess.DEVNULL
    )
    yield process, f"grpc://localhost:{port}"
    process.kill()
    process.wait()


def search(address: str, *, stop_after: int = 1000, trials: int = 8) -> TuningRecord:
    tried = 0

    def count(progress: Progress) -> None:
        nonlocal tried
        tried = progress.tried

    return tune(
        PROBLEM, device="cpu", trials=trials, timeout=600.0, sampler="random", isolate=False, storage=address,
        bench="fake_benches:open_fake", on_progress=count, should_stop=lambda: tried >= stop_after,
    )  # fmt: skip


@pytest.mark.exhaustive
def test_a_stopped_search_goes_on_and_tries_nothing_twice(server: Server) -> None:
    _, address = server
    assert not search(address, stop_after=3).complete
    assert search(address).complete
    storage = open_storage(address)
    (study,) = optuna.get_all_study_names(storage)
    trials = [trial for trial in optuna.load_study(study_name=study, storage=storage).trials if trial.params]
    close_storage(storage)
    tried = [str(sorted(trial.params.items())) for trial in trials if OUTCOME in trial.user_attrs]
    assert len(tried) == len(set(tried)) == 8


@pytest.mark.exhaustive
def test_a_server_that_dies_in_the_middle_is_one_line(server: Server) -> None:
    process, address = server

    def kill(progress: Progress) -> None:
        if progress.tried == 2:
            process.kill()
            process.wait()

    with pytest.raises(StorageError, match=r"stopped answering: .*the same command goes on") as raised:
        tune(
            PROBLEM, device="cpu", trials=8, timeout=600.0, isolate=False, storage=address,
            bench="fake_benches:open_fake", on_progress=kill,
        )  # fmt: skip
    assert "\n" not in str(raised.value)
    assert "RpcError" not in str(raised.value)


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_PROXY_TIMEOUT_S", 0.2)
    with pytest.raises(StorageError, match=r"grpc://127.0.0.1:1 does not answer within 0.2 s"):
        open_storage("grpc://127.0.0.1:1")


@pytest.mark.parametrize("address", ["grpc://host", "grpc://:1", "grpc://host:port", "grpc://host:1/study"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="grpc://HOST:PORT"):
        open_storage(address)
