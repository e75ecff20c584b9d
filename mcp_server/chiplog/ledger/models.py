"""Which model a log speaks of: a name of a known family, or org/name as on the hub."""

from __future__ import annotations

import re

from chiplog.ledger.draft import Draft
from chiplog.ledger.reader import Found, Span, pattern

FAMILIES = (
    b"llama", b"qwen", b"mistral", b"mixtral", b"gemma", b"phi-", b"pythia", b"falcon", b"opt-", b"bloom", b"gpt-",
    b"gpt2", b"gpt3", b"rugpt", b"glm", b"mpt-", b"stablelm", b"granite", b"deepseek", b"yi-", b"olmo", b"smollm",
    b"vicuna", b"zephyr", b"t5-", b"flan", b"roberta", b"bert-", b"vit-", b"whisper", b"internlm", b"baichuan",
)  # fmt: skip
FAMILY = (
    rb"(?i:(?:meta-|code-?|tiny-?)?llama|qwen|mistral|mixtral|gemma|phi-?\d|pythia|falcon|opt-|bloom|gpt-?[23jn]|rugpt|mpt-|"
    rb"stablelm|granite|deepseek|yi-\d|olmo|smollm|vicuna|zephyr|t5-|flan|roberta|(?:de)?bert-|deberta|vit-|whisper|"
    rb"internlm|baichuan|(?:chat)?glm-?)"
)
_REST = rb"[\w.-]{0,80}"
VISION = (
    rb"(?i:vit_(?:tiny|small|base|large|huge)|(?:wide_)?resne[xt]t?|vgg|densenet|mobilenet|efficientnet|convnext|swin|"
    rb"deit)"
)
# Where a model is named, the surest first; then any path whose last part is a family's name with a size.
NAMED = [
    pattern(rb"(?:--)?(?:model_name_or_path|pretrained_model_name_or_path|base_model|model_id|checkpoint_dir)"
            rb"[\"']?(?:[ =:,]+)[\"']?(?P<model>[\w./~-]+)", b"model_", b"base_model", b"checkpoint_dir"),
    pattern(rb"model checkpoint at (?P<model>[\w./~-]+) (?:and are newly|were not used)", b"model checkpoint at "),
    pattern(rb"\"?_name_or_path\"?: \"(?P<model>[^\"\n]+)\"", b"_name_or_path"),
    pattern(rb"(?i:\bmodel(?:[_ ]?(?:name|path|id))?)[\"']?(?:[=:] *| +)[\"']?(?P<model>[\w./~-]{0,200}/?"
            + FAMILY + _REST + rb")", b"odel"),
    pattern(rb"(?i:\b(?:arch(?:itecture)?|network|backbone|model(?:[_ ]name)?))[\"']?(?:[=:] *| +)[\"']?(?P<model>"
            + VISION + _REST + rb")", b"net", b"vgg", b"convnext", b"swin", b"deit", b"vit_"),
    pattern(rb"/(?P<of>" + _REST + FAMILY + _REST + rb")(?![\w/])", *FAMILIES),
    pattern(rb"models--(?P<model>[\w.-]{1,80}?--[\w.-]{1,80})/", b"models--"),
    pattern(rb"(?P<model>" + FAMILY + _REST + rb"\d(?:\.\d+)?[bBmM]\b" + _REST + rb")", *FAMILIES),
    pattern(rb"(?P<model>" + FAMILY + _REST + rb"\d" + _REST + rb"-(?i:instruct|chat|base)\b)", *FAMILIES),
]  # fmt: skip
PART = re.compile(  # what is not trained
    r"(?i)(?<![a-z])(?:vision|tower|judge|teacher|embed|reward_model)|\b(?:logs? to|log_dir|output_dir)\b"
)
OWNER = re.compile(r"(?<![\w/.-])[A-Za-z][\w-]*$")
SIGHT = re.compile(r"(?i)(?:^|/)(?:clip|siglip)-")  # what a larger model sees with
TOP = 1 << 16  # bytes in which a configuration or a saved model is named
KNOWN = re.compile(f"{FAMILY.decode()}|{VISION.decode()}")
SIZED = re.compile(r"\d|-(?:tiny|small|base|medium|large|xl+)\b")
HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,80}/[A-Za-z0-9][\w.-]{0,80}")
FILE = re.compile(r"\.(?:py|sh|json|jsonl|ya?ml|pt|bin|txt|log|csv|out|err|safetensors|so|ipynb|html)$")
PLACES = {  # folders, and no owners on a hub
    "outputs", "output", "checkpoints", "checkpoint", "scripts", "models", "data", "runs", "results", "exp", "logs",
}  # fmt: skip


def take_model(draft: Draft, span: Span) -> None:
    """Notes the model, where one is named without doubt."""
    if draft.get("model") is not None:
        return
    top, bottom = span.before(span.start + TOP), span.after(span.stop - TOP)
    for wanted in NAMED:
        for found in (top.first(wanted), bottom.last(wanted)):
            if found and not PART.search(found.before[-60:]) and (name := model_name(found)):
                draft.set("model", name, found)
                return


def model_name(found: Found) -> str | None:
    """The name in a match: a family's name is the last part of a path, other names stand as org/name only."""
    path = found.get("model") or _of_owner(found)
    if not path:
        return None
    path = path.replace("--", "/").rstrip("/.-")
    if FILE.search(path) or SIGHT.search(path):
        return None
    parts = [part for part in path.split("/") if part]
    for part in reversed(parts):
        if KNOWN.search(part) and SIZED.search(part) and not FILE.search(part) and "lib/python" not in path:
            return part
    is_hub = HUB.fullmatch(path) and len(parts) == 2 and parts[0].lower() not in PLACES
    return path if is_hub else None


def _of_owner(found: Found) -> str | None:
    """`owner/name` of what stands behind a slash, if an owner alone stands before it."""
    owner = OWNER.search(found.before)
    return f"{owner.group()}/{found['of']}" if owner else None
