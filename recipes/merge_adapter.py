"""Writes a model with its adapter merged into the weights, in Hugging Face format.

    python merge_adapter.py --model DIR [--adapter adapter] [--out merged] [--dtype bf16]

The weights are those with which evaluate.py answers in that dtype. The tokenizer and chat template come along; no
adapter_config.json does, since transformers with peft would apply the adapter a second time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
from adapters import DTYPES, load_model, merge_adapter

from trainer.job import UserError

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def main() -> int:
    """Exit code 0, when the merged model is there."""
    parser = argparse.ArgumentParser(description="Merges a LoRA or DoRA adapter into its model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model in Hugging Face format")
    parser.add_argument("--adapter", type=Path, default=Path("adapter"), help="LoRA adapter as PEFT stores it")
    parser.add_argument("--out", type=Path, default=Path("merged"), help="folder to write to; must not be there")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the merged weights")
    arguments = parser.parse_args()
    merge(arguments.model, arguments.adapter, arguments.out, arguments.dtype)
    print(f"merged {arguments.adapter} into {arguments.model}: {arguments.out}")
    return 0


def merge(model_dir: Path, adapter: Path, out: Path, dtype: str) -> None:
    """Writes the folder `out`, whole or not at all. Raises UserError if it is there, or as `merge_adapter` does."""
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or give another --out")
    model = load_model(model_dir, DTYPES[dtype])
    merge_adapter(model, adapter)
    with job.whole_folder(out) as folder:
        model.save_pretrained(folder)
        for file in model_dir.iterdir():
            written = (folder / file.name).exists() or file.name.endswith(".index.json")
            if file.is_file() and not written and file.suffix not in WEIGHTS and file.name != "adapter_config.json":
                shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    job.run(main)
