"""The paper's figures, one script each. Flags (absl) live here and nowhere else."""

import os

# One thread a run, whoever carries it out: on processors the order of sums depends on the number of threads, and two
# processes of one thread do more than one of two. TensorFlow, XLA and Torch read this when they first compute.
for _name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
