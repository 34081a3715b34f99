"""How often does a search believe noise? The default plays off against copies of itself, which cannot be faster.

python benchmarks/same_kernel.py --runs 40
"""

import click
import torch

from hsa_compile import Problem, Schedule, Target, default_schedule
from hsa_compile.autotune.bench.bench import measure, prepare
from hsa_compile.autotune.play_off import CONFIDENCE, play_off
from hsa_compile.kernels.ops import inputs_of

COPIES, ROUNDS = 8, 15  # as in a search


@click.command()
@click.option("--runs", type=click.IntRange(min=1), default=40, show_default=True, help="How many play-offs.")
@click.option("--seq-len", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of the problem.")
def main(runs: int, seq_len: int) -> None:
    """Counts the play-offs in which a copy of the default is declared faster than the default."""
    problem = Problem(seq_len=seq_len, num_heads=16, num_kv_heads=1, head_dim=64, top_k=8)
    target, device = Target.parse("cpu"), torch.device("cpu")
    torch.set_num_threads(target.num_cores)
    default = default_schedule(problem, target)
    call = prepare(problem, default, target, inputs_of(problem, device)).call
    copies = [Schedule.of("copy", number=number) for number in range(COPIES)]

    def time_all(schedules: list[Schedule], rounds: int) -> list[list[float]]:
        return measure([call] * len(schedules), device, rounds=rounds)

    fooled = 0
    for run in range(runs):
        verdict = play_off(default, copies, time_all, max_rounds=ROUNDS, deadline=float("inf"))
        fooled += verdict.winner != default
        click.echo(f"{run + 1} play-offs, {fooled} with a false winner", err=True)
    click.echo(f"{fooled} of {runs} play-offs found a false winner; {1 - CONFIDENCE:.0%} of them may")


if __name__ == "__main__":
    main()
