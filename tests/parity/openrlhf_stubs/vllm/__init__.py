"""In the place of vLLM, which every process of OpenRLHF imports; and the device is the CPU."""

import torch

SamplingParams = None
torch.cuda.current_device = lambda: torch.device("cpu")
