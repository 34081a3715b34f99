"""The shipped `tiny` as a model of Hugging Face transformers: saved, opened by Auto classes, asked about a long text.

The text is noise with needles in it, such as ` abc=1234.`; a question is ` ?abc=`. The text is read once, into a cache
whose copies answer every question. Printed are the answers, what a batch with padding changes in the logits, and how
many tokens a second `generate` writes with the cache and without.
"""

import argparse
import copy
import random
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hsa_compile.model.hf import HSACompileForCausalLM
from hsa_compile.model.tasks.facts import draw_keys, lookup_facts
from hsa_compile.model.tasks.haystack import NoiseHaystack
from hsa_compile.paths import CHECKPOINT_DIR


def text_with_needles(length: int, count: int) -> tuple[str, dict[str, str]]:
    """Noise with a needle in each of `count` equal parts, and the value of each name."""
    rng = random.Random(0)
    text = NoiseHaystack().fill(length, rng)
    needles = lookup_facts(rng, draw_keys(rng, count, text), count).needles
    for part, needle in enumerate(needles):
        start = length * part // count + rng.randrange(length // count - len(needle))
        text[start : start + len(needle)] = needle
    values = dict(needle.decode().strip(" .").split("=") for needle in needles)
    return text.decode(), values


def seconds(model: PreTrainedModel, tokens: torch.Tensor, count: int, *, use_cache: bool) -> float:
    """How long `generate` takes for `count` new tokens."""
    start = time.perf_counter()
    model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=use_cache)
    return time.perf_counter() - start


def main(length: int, questions: int, tokens: int) -> None:
    """Saves, opens, asks and prints."""
    text, values = text_with_needles(length, questions)
    with tempfile.TemporaryDirectory() as directory:
        HSACompileForCausalLM.from_pretrained(CHECKPOINT_DIR / "tiny").save_pretrained(directory)
        # Elsewhere, where `hsa_compile.model.hf` is not imported, these two take trust_remote_code=True.
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    read = tokenizer(text, return_tensors="pt")["input_ids"]
    cache = model(read, use_cache=True, logits_to_keep=1).past_key_values
    right = 0
    for name, value in values.items():
        whole = tokenizer(f"{text} ?{name}=", return_tensors="pt")
        written = model.generate(**whole, past_key_values=copy.deepcopy(cache), max_new_tokens=4, do_sample=False)
        answer = tokenizer.decode(written[0, whole["input_ids"].shape[1] :])
        right += answer == value
        print(f"?{name}= {answer}  {'right' if answer == value else f'wrong, it is {value}'}")
    print(f"{right} of {questions} right")

    batch = tokenizer([text[-300:], text[-97:]], padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = model(**tokenizer(text[-97:], return_tensors="pt")).logits[0]
        difference = (model(**batch).logits[1, -97:] - alone).abs().max().item()
    print(f"padding before a text changes its logits by {difference:.1e} at most")

    first, last = (seconds(model, read, count, use_cache=True) for count in (1, 1 + tokens))
    print(f"{length:,} bytes are read in {first:.1f} s; then {tokens / (last - first):.3g} tokens a second")
    print(f"without the cache {1 / seconds(model, read, 1, use_cache=False):.3g} tokens a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**15, help="bytes of the text")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=20, help="how many tokens are timed")
    main(**vars(parser.parse_args()))
