"""What can be compared, and with whom. The command line reads these names before it loads a comparison."""

FORWARD, BOTH, SELECT, DECODE = "forward", "both", "select", "decode"
KINDS = {FORWARD: "hsa_forward", BOTH: "hsa_forward", SELECT: "select_chunks", DECODE: "hsa_decode"}
FAMILIES = ("sdpa", "flex", "gather", "nsa")  # the contenders that come along
