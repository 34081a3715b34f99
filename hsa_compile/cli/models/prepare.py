"""`hsa-compile prepare`: how text becomes a corpus that training reads."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from hsa_compile.cli.options import FiniteFloat, json_option
from hsa_compile.log import progress_bar
from hsa_compile.model.data.manifest import SPLITS, Manifest

_MAX_NAMED = 10


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder that the corpus goes to."
)
@click.option("--tokenizer", default="bytes", show_default=True, help="The tokenizer: 'bytes', or a TOKENIZER.json.")
@click.option(
    "--corpus", type=click.Choice(["stdlib"]), help="Use sources that this machine has: Python's own library."
)
@click.option(
    "--validation",
    type=FiniteFloat(0, 1, max_open=True),
    default=0.01,
    show_default=True,
    help="Share of documents held out, chosen by their hash.",
)
@click.option(
    "--field", default="text", show_default=True, help="The field of JSONL, Parquet and Arrow that holds the text."
)
@click.option("--overwrite", is_flag=True, help="Start anew, whatever corpus the folder holds.")
@json_option
def prepare(sources: tuple[str, ...], out: Path, tokenizer: str, corpus: str | None, validation: float,
            field: str, overwrite: bool, as_json: bool) -> None:  # fmt: skip
    """Turn text into a corpus that training reads.

    A SOURCE is a file, a folder, or hf:NAME[@SPLIT], a data set of Hugging Face. The name of a file tells what it is:
    JSONL (.jsonl, .ndjson), Parquet (.parquet), Arrow (.arrow, which save_to_disk of Hugging Face's datasets writes),
    token ids of Megatron (.idx with .bin, made with the same --tokenizer) or text, one document a file; .gz and .zst
    are unpacked. Equal documents are kept once. After an interruption or a kill the same command goes on after the last
    finished source.

    \b
    What is skipped is named in the summary and in manifest.json:
      the whole source   empty, vanished, unreadable or damaged;
                         text that is binary or not UTF-8;
                         ids that the tokenizer does not have
      the line or row    longer than 64 MiB, no JSON, no such field,
                         not UTF-8, empty
    Refused (exit 2):    a SOURCE that does not exist;
                         a folder that holds another corpus
    Failed (exit 1):     a full disk, no document at all;
                         what was finished is kept

    \b
    Examples:
      hsa-compile prepare --corpus stdlib --out corpus
      hsa-compile prepare books/ pages.jsonl.zst --out corpus
      hsa-compile prepare books/ --out tokens --tokenizer tokenizer.json
      hsa-compile prepare a.idx --out tokens --tokenizer tokenizer.json
    """
    from hsa_compile.model.data.documents import find_sources, stdlib_sources
    from hsa_compile.model.data.prepare import prepare as prepare_corpus

    found = find_sources(sources, without=out) + (stdlib_sources() if corpus else [])
    total = sum(source.size for source in found)
    with progress_bar(total, "prepare", hidden=as_json, unit="B", unit_scale=True, leave=True) as bar:
        manifest = prepare_corpus(
            found,
            out,
            tokenizer=tokenizer,
            validation=validation,
            field=field,
            overwrite=overwrite,
            on_progress=bar.update,
        )
    if as_json:
        click.echo(json.dumps(asdict(manifest), indent=2))
    else:
        _show(out, manifest)


def _show(out: Path, manifest: Manifest) -> None:
    parts = [f"{manifest.splits[split].documents:,} {split}" for split in SPLITS]
    click.echo(
        f"{out}: {manifest.documents:,} documents ({', '.join(parts)}), {manifest.tokens:,} tokens "
        f"({manifest.settings.tokenizer}, {manifest.dtype}), {manifest.duplicates:,} duplicates left out"
    )
    skipped = sum(manifest.skipped.values())
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.skipped.items()))
        click.echo(f"skipped {skipped:,}: {reasons}")
    named = [
        f"  {source['path']}{f', {where}' if where else ''}: {reason}"
        for source in manifest.sources
        for where, reason in source["examples"]
    ]
    for line in named[:_MAX_NAMED]:
        click.echo(line)
    if skipped > _MAX_NAMED:
        click.echo(f"  … all of them, up to 20 a source, are in {out / 'manifest.json'}")
