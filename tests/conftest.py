import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

torch.set_num_threads(1)
