"""How sure a share of right answers is."""

import math

_Z = 1.959963984540054  # of 95 %


def wilson_interval(num_correct: int, num_samples: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share, which is right for few samples and for shares of 0 and 1 too.

    Args:
        num_correct: from 0 to the number of samples.
        num_samples: 1 or more.
    """
    assert 0 <= num_correct <= num_samples > 0, (num_correct, num_samples)
    share, z2 = num_correct / num_samples, _Z**2
    middle = share + z2 / (2 * num_samples)
    half = _Z * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    scale = 1 + z2 / num_samples
    low = 0.0 if num_correct == 0 else (middle - half) / scale
    high = 1.0 if num_correct == num_samples else (middle + half) / scale
    return low, high
