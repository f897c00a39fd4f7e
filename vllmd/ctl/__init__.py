"""vllmctl: the client. It imports nothing of the daemon, and each command only what it needs, so that it starts fast.

`dataclasses` and `typing` are absent on purpose: together they cost a third of the whole run of `vllmctl status`.
"""
