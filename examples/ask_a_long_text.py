"""A long text is read once; what the model keeps of it is saved, loaded, and asked several times.

The text is noise with needles in it, such as ` abc=1234.`; a question is ` ?abc=`, the form that the shipped `tiny`
was trained on, at rows of 2,048 bytes at most. Each question begins from the saved memory. Printed are the times and,
for each question, what the model answers and whether that is right.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from hsa_compile.model.inference.generate import generate
from hsa_compile.model.inference.inference import new_state, prefill
from hsa_compile.model.inference.reading import load_state, save_state
from hsa_compile.model.pretrained import from_pretrained
from hsa_compile.model.tasks.facts import draw_keys, lookup_facts
from hsa_compile.model.tasks.haystack import NoiseHaystack
from hsa_compile.paths import CHECKPOINT_DIR


def text_with_needles(length: int, count: int, rng: random.Random) -> tuple[bytes, dict[bytes, bytes]]:
    """Noise with a needle in each of `count` equal parts, and the value of each name."""
    text = NoiseHaystack().fill(length, rng)
    needles = lookup_facts(rng, draw_keys(rng, count, text), count).needles
    for part, needle in enumerate(needles):
        start = length * part // count + rng.randrange(length // count - len(needle))
        text[start : start + len(needle)] = needle
    return bytes(text), dict(needle.strip(b" .").split(b"=") for needle in needles)


def as_tokens(text: bytes) -> torch.Tensor:
    """Bytes are the tokens, `[1, T]`."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[None]


def main(length: int, questions: int) -> None:
    """Reads, saves, asks and prints."""
    model = from_pretrained(CHECKPOINT_DIR / "tiny")
    text, values = text_with_needles(length, questions, random.Random(0))
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        state = new_state(model)
        prefill(model, as_tokens(text), state)
        save_state(model, state, directory)
        size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
        print(f"read {length:,} bytes in {time.perf_counter() - start:.1f} s, kept {size / 2**20:.1f} MiB")
        right = 0
        for name, value in values.items():
            start = time.perf_counter()
            state = load_state(model, directory)  # the files stay as they are
            question = as_tokens(b" ?" + name + b"=")
            (written,) = generate(model, question, max_new_tokens=len(value), state=state)
            answer, right = bytes(written), right + (bytes(written) == value)
            verdict = "right" if answer == value else f"wrong, it is {value.decode()}"
            milliseconds = 1e3 * (time.perf_counter() - start)
            print(f"?{name.decode()}= {answer.decode(errors='replace')}  {verdict}  ({milliseconds:.0f} ms)")
    print(f"{right} of {questions} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**18, help="bytes of the text")
    parser.add_argument("--questions", type=int, default=5)
    main(**vars(parser.parse_args()))
