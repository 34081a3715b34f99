"""What a model can be asked for: names, defaults and bounds. The command line reads them before it loads a model."""

PLACEMENTS = ("device", "host", "disk")  # where a memory keeps its keys and values
MAX_SEED = 2**63 - 1  # the largest seed of a text that is continued

TEACHER_FORCED, GREEDY = "teacher-forced", "greedy"
PROTOCOLS = {
    TEACHER_FORCED: "the authors' protocol: arg-max at each byte of an answer given the true bytes before it; "
    "every byte of every answer must be right",
    GREEDY: "greedy generation, byte by byte, from each question, with the true answers to earlier questions; "
    "the text up to the first full stop must be the answer",
}
PERPLEXITY = "ppl"  # a task of the evaluation beside the retrieval tasks

TRAIN, PREFILL, DECODE = "train", "prefill", "decode"
STEPS = (TRAIN, PREFILL, DECODE)  # that can be profiled

DEFAULT_MFU = 0.4  # share of the peak that training and serving are assumed to reach on paper
