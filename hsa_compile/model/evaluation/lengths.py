"""Lengths as people write them: 4K is 4,096, 1M is 1,048,576."""


def length_label(length: int) -> str:
    """`4K`, `64K`, `1M`, or plain digits where it is no multiple."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
