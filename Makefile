# Every target does its own set-up; the second time that costs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINE := .engine
WHEEL   = dist/vllmd_supervisor-$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' vllmd/__init__.py)-py3-none-any.whl

.PHONY: help run test e2e bench lint format docs wheel deb setup engine clean

help:
	@echo "make run    set up, then two real vLLM models under one memory budget (Ctrl-C ends them)"
	@echo "make test   set up, linters and the fast tests (no vLLM needed)"
	@echo "make e2e    the long tests: real vLLM"
	@echo "make bench  measure; prints ratios"
	@echo "make lint   ruff and mypy alone"
	@echo "make deb    dist/vllmd_*.deb, a Debian package with its Python packages inside"
	@echo "make wheel  dist/*.whl"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml packaging/setup.sh
	@sh packaging/setup.sh "$(PYTHON)" "$(VENV)"

engine:
	@bash packaging/demo/engine.sh "$(ENGINE)"

run: setup engine
	@$(BIN)/python packaging/demo/demo.py "$(ENGINE)"

test: setup
	$(BIN)/pytest -m "not e2e"

e2e: setup engine
	$(BIN)/pytest -m e2e

bench: setup engine
	$(BIN)/python -m tests.bench

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python -m vllmd.core.states > docs/states.md
	$(BIN)/python -m vllmd.config.options > docs/config.md
	$(BIN)/python -m vllmd.edge.openapi api > docs/api.md
	$(BIN)/python -m vllmd.edge.openapi status > docs/status.md

wheel: setup
	@rm -rf build
	$(BIN)/python -m pip wheel -qq --no-deps --wheel-dir dist .
	@rm -rf build

deb: wheel
	$(BIN)/python packaging/deb/build.py $(WHEEL)

clean:
	rm -rf $(VENV) $(ENGINE) .run build dist *.egg-info
