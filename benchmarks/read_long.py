"""Reads one very long text with the shipped model, then asks it for a needle: the rate of each million tokens, and RAM.

python benchmarks/read_long.py [--tokens 67108864] [--memory disk|host|device] [--json OUT]
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import torch
from tqdm import tqdm

from hsa_compile.cli.models.argument import keep_freed_memory
from hsa_compile.model.config import GREEDY, TEACHER_FORCED
from hsa_compile.model.evaluation.retrieval import answered
from hsa_compile.model.inference.inference import PIECE, new_state, prefill
from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.tasks.haystack import NoiseHaystack
from hsa_compile.model.tasks.retrieval import make_sample
from hsa_compile.paths import CHECKPOINT_DIR

MILLION = 2**20
MARKS = (1, 16, 32, 64)  # the millions whose rates are printed: the mean of up to four before each


@click.command()
@click.option("--tokens", default=64 * MILLION, show_default=True, help="The length of the text.")
@click.option("--depth", default=0.5, show_default=True, help="Where the needle lies, from 0 to 1.")
@click.option("--memory", type=click.Choice(["device", "host", "disk"]), default="disk", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Dtype of the weights.")
@click.option("--memory-dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures there, after each million.")
def main(tokens: int, depth: float, memory: str, dtype: str, memory_dtype: str, out: Path | None) -> None:
    """The text is RULER's noise around one needle; rates are by the clock and, for a shared machine, by CPU time."""
    model = from_pretrained(CHECKPOINT_DIR / "tiny").to(getattr(torch, dtype))
    keep_freed_memory(model.device)  # as `generate` and `eval` do
    sample = make_sample("s-niah", length=tokens, seed=0, index=0, haystack=NoiseHaystack(), depth=depth)
    end = sample.answer_spans[0][0] - 1  # `answered` reads the rest
    rates, by_cpu, anonymous = [], [], []
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": "tiny",
        "dtype": dtype,
        "memory": memory,
        "memory_dtype": memory_dtype,
        "depth": depth,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "tokens_per_second": rates,
        "tokens_per_cpu_second": by_cpu,
        "anonymous_rss_gib": anonymous,
    }
    with tempfile.TemporaryDirectory(dir=out.parent if out else None) as directory:
        state = new_state(model, memory=memory, directory=Path(directory), memory_dtype=getattr(torch, memory_dtype))
        begin = time.perf_counter()
        for first in tqdm(range(0, end, MILLION), unit="M"):
            text = torch.from_numpy(sample.tokens[None, first : min(first + MILLION, end)].copy())
            wall, cpu = time.perf_counter(), time.process_time()
            prefill(model, text, state)
            rates.append(text.shape[1] / (time.perf_counter() - wall))
            by_cpu.append(text.shape[1] / (time.process_time() - cpu))
            anonymous.append(_status("RssAnon"))
            result |= {"tokens": state.positions[0], "peak_rss_gib": _status("VmHWM")}
            if state.memory is not None:
                result["memory_gib"] = {place: size / 2**30 for place, size in state.memory.nbytes.items()}
            if out:
                out.write_text(json.dumps(result, indent=2) + "\n")
        result["seconds"] = time.perf_counter() - begin
        found = answered(model, state, [sample], end, (TEACHER_FORCED, GREEDY), PIECE)
    result |= {"answered": {name: right for name, (right,) in found.items()}, "peak_rss_gib": _status("VmHWM")}
    for mark in (mark for mark in MARKS if mark <= len(rates)):
        part = slice(max(0, mark - 4), mark)
        print(f"at {mark}M: {median(rates[part]):,.0f} tokens/s, {median(by_cpu[part]):,.0f} a CPU second")
    print(
        f"{tokens:,} tokens in {result['seconds']:.0f} s; peak RSS {result['peak_rss_gib']:.2f} GiB, "
        f"{max(anonymous):.2f} GiB of it the process's own; needle found: {result['answered']}"
    )
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def _status(field: str) -> float:
    """Returns a size of this process in GiB, from Linux's `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
