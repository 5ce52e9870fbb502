"""Lets test modules find a GPU while pytest collects them: -p tests.helpers.pretended_gpu."""

import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
