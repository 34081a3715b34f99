"""How the exact fast prefill grows: seconds for 64K and 256K tokens of `tiny`, and their ratio.

python benchmarks/prefill_growth.py
"""

import time
from statistics import median

import torch

from hsa_compile.model.inference.inference import new_state, prefill
from hsa_compile.model.presets import preset
from hsa_compile.model.transformer import HSATransformer

LENGTHS, ROUNDS = (2**16, 2**18), 3


def main() -> None:
    """Random weights and bytes, in turns, after one short text that builds the kernels."""
    torch.manual_seed(0)
    model = HSATransformer(preset("tiny")).eval()
    prefill(model, torch.randint(256, (1, 8192)), new_state(model))
    seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(ROUNDS):
        for length, times in seconds.items():
            text = torch.randint(256, (1, length))
            start = time.perf_counter()
            prefill(model, text, new_state(model))
            times.append(time.perf_counter() - start)
    short, long = (median(seconds[length]) for length in LENGTHS)
    print(f"{LENGTHS[0]:,} tokens {short:.2f} s, {LENGTHS[1]:,} tokens {long:.2f} s: {long / short:.2f} times")


if __name__ == "__main__":
    main()
