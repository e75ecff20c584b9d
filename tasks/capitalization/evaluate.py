"""How an answer of the capitalization study is marked."""


def score(output: str, target: str) -> dict[str, bool]:
    """Whether the output is the target, and whether it contains it; upper and lower case differ."""
    output, target = output.strip(), target.strip()
    return {"exact_match": output == target, "includes": target in output}
