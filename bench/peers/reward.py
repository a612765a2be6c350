"""The reward of the GRPO contests: the share of even words, read from the text. Standard library only."""


def even_share(text: str) -> float:
    words = text.split()
    return sum(word[-1] in "02468" for word in words) / len(words) if words else 0.0
