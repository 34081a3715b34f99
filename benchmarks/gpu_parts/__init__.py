"""The parts of `benchmarks/gpu.py`: correctness, tuning, race and smoke, and the pool of processes that they share."""
