"""What a search can be asked for: names, defaults and bounds. The command line reads them before it loads a search."""

SAMPLERS = ("ours", "tpe", "random", "grid", "gp", "cmaes")
DEFAULT_TRIALS = 40
DEFAULT_TIMEOUT_S = 55.0
DEFAULT_SAMPLER = SAMPLERS[0]
MAX_SEED = 2**32 - 1  # the largest seed that Optuna's samplers take
