"""The long tests: vllmd with real vLLM. `make e2e` runs them."""
