"""Programs that run as root inside a throw-away systemd, against a vllmd installed from its package. Each plays one story,
asserts on the way, and prints what it measured as lines of JSON. tests/e2e/test_systemd.py starts them.
"""
