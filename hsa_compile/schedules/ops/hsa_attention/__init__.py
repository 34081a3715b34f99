"""The schedules of `hsa_attention`, forward and backward, on each backend."""
