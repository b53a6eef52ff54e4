"""Settings of the whole suite."""

import os
import signal

# Before torch is imported. Waiting threads sleep instead of spinning: on a busy machine spinning takes the core from the
# thread that is waited for. Weights and tokenizers come from installed packages; nothing may ask a hub.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# An online tracker must not be found by chance in the environment of the person who runs the tests.
for name in ("COMET_API_KEY", "COMET_WORKSPACE", "COMET_PROJECT_NAME"):
    os.environ.pop(name, None)

# A shell starts what runs in its background with SIGINT ignored, and so would be every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import torch

# One thread: bit-equal results do not depend on the number of cores, and parallel test processes do not fight for them.
torch.set_num_threads(1)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=5000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
