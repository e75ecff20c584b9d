"""LoRA fine-tuning on one device.

    python lora_finetune_single_device.py --config config.yaml [--out .]

lora_finetune_single_device.yaml explains the settings, finetuning.py what is written and has the whole loop.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

if __name__ == "__main__":
    stop = job.Stop()
    from finetuning import main

    job.run(lambda: main(Path(__file__), stop))
