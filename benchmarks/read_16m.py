"""Reads 16,777,216 tokens with one model: tokens a second for each million, and the peak of resident memory.

python benchmarks/read_16m.py [--tokens 16777216] [--memory device|disk] [--json OUT]
"""

import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from tqdm import tqdm

from hsa_compile.model.inference.inference import new_state, prefill
from hsa_compile.model.presets import PRESETS, preset
from hsa_compile.model.transformer import HSATransformer

MILLION = 2**20


@click.command()
@click.option("--preset", "name", type=click.Choice(list(PRESETS)), default="tiny", show_default=True)
@click.option("--tokens", default=16 * MILLION, show_default=True, help="To read.")
@click.option("--memory", type=click.Choice(["device", "host", "disk"]), default="device", show_default=True)
@click.option("--memory-dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16")
@click.option("--piece", default=4096, show_default=True, help="Tokens read at once.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures there.")
def main(name: str, tokens: int, memory: str, memory_dtype: str, piece: int, out: Path | None) -> None:
    """Random weights and random bytes: time and memory do not depend on what is read."""
    torch.manual_seed(0)
    model = HSATransformer(preset(name)).eval()
    generator = torch.Generator().manual_seed(1)
    times = []
    with tempfile.TemporaryDirectory() as directory:
        state = new_state(
            model, memory=memory, directory=Path(directory) / "memory", memory_dtype=getattr(torch, memory_dtype)
        )
        prefill(
            model, torch.randint(256, (1, piece), generator=generator), state, piece=piece
        )  # kernels are built here
        for _ in tqdm(range(tokens // MILLION), unit="M"):
            text = torch.randint(256, (1, MILLION), dtype=torch.uint8, generator=generator)
            start = time.perf_counter()
            prefill(model, text, state, piece=piece)
            times.append(time.perf_counter() - start)
    rates = [MILLION / seconds for seconds in times]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "command": " ".join(["python", *sys.argv]),
        "preset": name,
        "tokens": state.positions[0],
        "memory": memory,
        "memory_dtype": memory_dtype,
        "seconds": sum(times),
        "tokens_per_second": rates,
        "last_over_first": rates[-1] / rates[0],
        "peak_rss_gib": peak,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(
        f"{state.positions[0]:,} tokens in {sum(times):.0f} s; tokens/s of the first million {rates[0]:,.0f}, "
        f"of the last {rates[-1]:,.0f} ({rates[-1] / rates[0]:.2f}); peak RSS {peak:.2f} GiB"
    )
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
