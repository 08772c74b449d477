# make demo: install and run the main job.  make test: install and run the tests.  make lint: format, lint, types.
PYTHON ?= python3
BIN = .venv/bin
HALF = $(addprefix tests/,attribution lab sae sae_kernels steering studies)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/sae-persona demo --force

test: export OMP_NUM_THREADS = 1
test: .venv/tested
	# two halves side by side, a core each
	$(BIN)/python -m pytest $(HALF) > .venv/half.log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest $(addprefix --ignore ,$(HALF)); rest=$$?; \
	wait $$half; half=$$?; cat .venv/half.log; test $$rest -eq 0 -a $$half -eq 0

lint: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch  # first and pinned: a range would bring the newest build with its CUDA packages
	$(INSTALL) --editable .
	touch $@

.venv/tested: .venv/installed
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
