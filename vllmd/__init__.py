"""vllmd: a supervisor for vLLM. Kept free of imports, so that the client starts fast."""

__version__ = "0.1.0"
