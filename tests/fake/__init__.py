"""A stand-in for vLLM 0.32: real processes, real signals, real words, no model. See fakevllm.py."""
