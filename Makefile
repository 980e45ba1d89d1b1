.DEFAULT_GOAL := help
.PHONY: help install train test slow mesh collectives lint types goldens lock clean

BIN := .venv/bin
STAMP := .venv/installed
LIBTPU := .venv/libtpu
LIBTPU_VERSION := libtpu==0.0.42.1
CHECK_COLLECTIVES := PYTHONPATH=$(LIBTPU) $(BIN)/python -m tests.sharding.collectives --check tests/sharding/collectives.txt
MESH_TESTS := tests/sharding tests/launch/test_processes.py tests/trainer/test_any_mesh.py

help:  ## show this text
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 16

install: $(STAMP)  ## make .venv with everything pinned, and .venv/bin/drover

# Debian's python3 comes without ensurepip, and a pyenv shim may stand for a version that is not active: try them.
define find_python
python=; for candidate in python3.11 python3.12 python3.13 python3; do \
    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
        python=$$candidate; break; \
    fi; \
done; \
if [ -z "$$python" ]; then \
    echo "Drover needs Python 3.11, 3.12 or 3.13 with its venv module; tried python3.11, python3.12, python3.13, python3." >&2; \
    echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
fi
endef

$(STAMP): requirements.lock setup.py pyproject.toml
	@$(find_python); \
	echo "Installing the packages of requirements.lock into .venv with $$($$python --version) ..."; \
	$$python -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "Done: $(BIN)/drover"

train: install  ## install, then the default run: minutes on a laptop
	$(BIN)/drover train --config configs/tiny.py

test: install  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10 -m "not slow"

slow: install  ## the slow tests, but for those of make mesh
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -m slow $(MESH_TESTS:%=--ignore=%)

mesh: $(LIBTPU)  ## all that holds the mesh to one device: the same numbers, real processes, collectives
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist worksteal -v $(MARKED) $(MESH_TESTS) || status=$$?; \
	$(CHECK_COLLECTIVES) || status=$$?; \
	exit $$status

collectives: $(LIBTPU)  ## what the TPU compiler makes of a step on a mesh, against the table kept; no TPU needed
	$(CHECK_COLLECTIVES)

# Beside the other packages: where jax finds libtpu, it looks for TPUs.
$(LIBTPU): install
	@[ -d $@ ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(LIBTPU_VERSION)

lint: install  ## style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## static types
	$(BIN)/pyright

goldens: install  ## write the rendered configs in tests/golden/configs again
	$(BIN)/python -m tests.configs.regenerate

lock:  ## write requirements.lock again, with the newest versions that setup.py allows
	@$(find_python); rm -rf .venv-lock && $$python -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@{ echo "# Every package of .venv, for Python 3.11 to 3.13 on Linux. Written by: make lock"; \
	   .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip; } > requirements.lock
	rm -rf .venv-lock

clean:  ## remove .venv, caches and build output; runs/ stays
	rm -rf .venv .venv-lock build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
