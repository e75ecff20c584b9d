"""LoRA fine-tuning on several devices, which divide the frozen weights and every batch; validates if asked to.

    python lora_finetune_distributed.py --config config.yaml [--out .]

Started once for each device, by srun or torchrun; MASTER_ADDR and MASTER_PORT say where the processes meet.
lora_finetune_distributed.yaml explains the settings, finetuning.py what is written and has the whole loop.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

if __name__ == "__main__":
    stop = job.Stop()
    from finetuning import main

    job.run(lambda: main(Path(__file__), stop, distributed=True))
