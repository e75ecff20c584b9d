"""Whether a model folder in Hugging Face format can be loaded and trained, from its files alone and without torch.

Failed: a file that is missing, cut off, no JSON or a git-lfs pointer; weights that are not safetensors; tensors that
the index names and no shard holds; an embedding of another shape than config.json says; a tokenizer with ids beyond it;
a chat template that does not work, where one is needed.
Warning: what is odd and loads all the same.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import Field

from chiplog.checks import Check, Report, Words, all_ok, failed, passed, warning
from chiplog.checks.lookup import missing_model
from chiplog.checks.model_files import BadFile, Config, fetch_again, read_config, refuse_pointer
from chiplog.checks.weights import check_embedding, check_weights
from chiplog.trainer_files import load_trainer_file

OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
CONVERT = "python -c \"import transformers as t; t.AutoTokenizer.from_pretrained('.').save_pretrained('.')\""


class ModelReport(Report):
    """What `check_model` found."""

    path: Path = Field(description="Folder of the model.")
    model_type: Words | None = Field(description="Family, such as llama; null: not said.")
    architecture: Words | None = Field(description="Class, such as LlamaForCausalLM; null: not said.")
    vocab_size: int | None = Field(description="Rows of the embedding, as config.json says; null: not said.")
    context_length: int | None = Field(description="Positions that it can attend to; null: not said.")
    depth: int | None = Field(description="Layers; null: not said.")
    width: int | None = Field(description="Size of the hidden state; null: not said.")
    n_params: int | None = Field(
        description="Elements of all tensors in its files, where tied weights lie once; null: the files are not whole."
    )
    dtypes: list[str] = Field(description="Dtypes of the tensors, such as BF16, that of most elements first.")
    weight_bytes: int = Field(description="Bytes of the weight files that are there.")
    shards: int = Field(description="Weight files that a loader opens.")
    tokenizer: str | None = Field(description="Kind of the tokenizer, such as BPE; null: it cannot be read.")
    chat_template: bool | None = Field(description="Whether its chat template works; null: could not be tried.")


def check_model(path: Path, *, needs_chat: bool = True) -> ModelReport:
    """Looks at every file that a loader would open; of the weights, at their headers only.

    What is wrong stands in the report. Raises NotFoundError where there is no folder `path`.
    """
    if not path.is_dir():
        raise missing_model(str(path), [path.parent])
    config, checks = _config(path)
    config_ok = all_ok(checks)
    weights = check_weights(path)
    checks += weights.checks
    if weights.tensors and config.vocab_size and config.embedding_width:
        checks += check_embedding(weights.tensors, config.vocab_size, config.embedding_width)
    tokenizer, tokenizer_checks = _tokenizer(path, config.vocab_size)
    checks += tokenizer_checks
    chat = _chat_template(path, needs_chat) if tokenizer and config_ok else None
    checks += [chat] if chat else []
    checks += _leftovers(path)
    elements: Counter[str] = Counter()
    for tensor in (weights.tensors or {}).values():
        elements[tensor.dtype] += tensor.n_elements
    return ModelReport(
        ok=all_ok(checks),
        checks=checks,
        path=path,
        model_type=config.model_type,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        depth=config.depth,
        width=config.width,
        n_params=None if weights.tensors is None else elements.total(),
        dtypes=[dtype for dtype, _ in elements.most_common()],
        weight_bytes=sum(file.stat().st_size for file in weights.files if file.is_file()),
        shards=len(weights.files),
        tokenizer=tokenizer,
        chat_template=chat and chat.level == "ok",
    )


def _config(folder: Path) -> tuple[Config, list[Check]]:
    try:
        config = read_config(folder)
    except BadFile as error:
        return Config(), [failed("config", error.found, error.mend)]
    if config.model_type is None:
        return config, [failed("config", "config.json names no model_type", fetch_again(folder / "config.json"))]
    return config, [
        passed("config", f"{config.model_type}, {config.depth or '?'} layers of width {config.width or '?'}")
    ]


def _tokenizer(folder: Path, vocab_size: int | None) -> tuple[str | None, list[Check]]:
    """The tokenizer's kind, None where it cannot be read, and what was found."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.exists() and (others := [name for name in OTHER_TOKENIZERS if (folder / name).is_file()]):
        found = f"there is {others[0]} and no tokenizer.json"
        return None, [failed("tokenizer", found, f"in {folder}, convert it: {CONVERT}")]
    try:
        refuse_pointer(file)
        tokenizer = Tokenizer.from_file(str(file))
    except BadFile as error:
        return None, [failed("tokenizer", error.found, error.mend)]
    except Exception as error:  # tokenizers raises plain Exception
        return None, [failed("tokenizer", f"tokenizer.json cannot be read ({error})", fetch_again(file))]
    kind = type(tokenizer.model).__name__
    last_id = max(tokenizer.get_vocab().values(), default=-1)
    checks = [passed("tokenizer", f"{kind} with {tokenizer.get_vocab_size():,} tokens")]
    if vocab_size and last_id >= vocab_size:
        found = f"the tokenizer's ids go up to {last_id:,}, the embedding has {vocab_size:,} rows"
        checks.append(failed("vocabulary", found, "take tokenizer and weights from the same model"))
    return kind, checks


def _chat_template(folder: Path, needed: bool) -> Check:
    """Whether one question and answer go through it, as the trainer will send them."""
    messages = [{"role": "user", "content": "sines"}, {"role": "assistant", "content": "Sines"}]
    try:
        load_trainer_file("chat").ChatTokenizer(folder).example(messages)
    except Exception as error:  # a template is a program, and may raise anything
        mend = "take the model's instruct variant or its template" if needed else "train it on plain text only"
        return (failed if needed else warning)("chat template", str(error) or type(error).__name__, mend)
    return passed("chat template", "writes a question and its answer")


def _leftovers(folder: Path) -> list[Check]:
    """Downloads that were not finished, beside a local folder and in the hub's cache."""
    places = [
        folder / ".cache" / "huggingface",
        folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None,
    ]
    left = sorted(file.name for place in places if place and place.is_dir() for file in place.rglob("*.incomplete"))
    if not left:
        return []
    found = f"{len(left):,} unfinished downloads: {', '.join(left[:3])}"
    return [warning("downloads", found, "finish them with `hf download`, or delete them")]
