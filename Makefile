# `make demo` runs the main job, `make test` the tests; both make .venv if it is not there.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/.installed
	$(BIN)/python tasks/capitalization/demo.py

test: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -m "not slow" -n 3

# uv where it is installed, else venv and pip. uv ignores pip's setting for local wheels, so it is handed on.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("chiplog needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@echo "Making .venv (once; 1 to 3 minutes)"
	@if command -v uv >/dev/null; then \
	  export UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" && \
	  uv venv --quiet --allow-existing --python "$(PYTHON)" .venv && \
	  uv pip install --quiet --python $(BIN)/python -e '.[run,dev]'; \
	else \
	  $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[run,dev]'; \
	fi
	@touch $@

.PHONY: demo test
