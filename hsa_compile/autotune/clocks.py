"""At which clocks a GPU ran while it was timed: times at other clocks do not compare."""

import shutil
import subprocess

import torch

_TIMEOUT_S = 10


def clocks_mhz(device: str) -> dict[str, int] | None:
    """Present clocks of a GPU's multiprocessors and memory; None on a CPU and where nvidia-smi does not tell."""
    place, tool = torch.device(device), shutil.which("nvidia-smi")
    if place.type != "cuda" or tool is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(place), "uuid", None)
    command = [tool, "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    command += [f"--id=GPU-{uuid}"] if uuid is not None else [f"--id={place.index or 0}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    words = done.stdout.split(",")
    if done.returncode or len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        return None
    return {"sm": int(words[0]), "memory": int(words[1])}
