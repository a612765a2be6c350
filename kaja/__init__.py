"""kaja: judge-driven safety tuning for Japanese LLMs, in readable pure PyTorch."""

__version__ = "0.1.0"
