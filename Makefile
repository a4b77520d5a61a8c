# make demo      the smoke suite: every method, both nets, a few minutes on two cores
# make test      the tests
# make check     formatting, lints, types, workflow
# make report    the smoke suite's report as one HTML file
# make faults    kill -9 and damaged files at length; docs/faults.md says what comes of it
# make benchmark cost of a training step and of sparse inference, measured
# Everything happens in .venv, which is made on first use.
PYTHON ?= python3
SUITE ?= configs/smoke.yaml
CORES ?= 2
KILLS ?= 100
EXAMPLES ?= 20000

export PATH := $(CURDIR)/.venv/bin:$(PATH)
SNAKEMAKE = snakemake --cores $(CORES) --configfile $(SUITE) --workflow-profile workflow/profiles/local

.PHONY: demo test check report benchmark faults
.DELETE_ON_ERROR:

demo: .venv/run
	$(SNAKEMAKE) --quiet rules
	$(SNAKEMAKE) --quiet all --report results/smoke/report.html
	@vdbench table $(SUITE) --results results/smoke
	@echo
	@echo "tables:  results/smoke/tables/"
	@echo "figures: results/smoke/figures/"
	@echo "report:  results/smoke/report.html"

test: .venv/dev
	pytest -q

check: .venv/dev
	ruff check
	ruff format --check
	pyright
	snakefmt --check Snakefile workflow
	snakemake --lint

report: demo

# kills and fuzzing at length: an hour or two
faults: .venv/dev
	python tests/faults/killing.py --suite configs/smoke.yaml --kills $(KILLS) --output results/recorded/faults/kills.json
	FUZZ_EXAMPLES=$(EXAMPLES) pytest -q tests/faults/test_fuzz.py

benchmark: .venv/dev
	mkdir -p results
	pytest -q tests/benchmarks --benchmark-only --benchmark-json results/benchmarks.json
	python tests/benchmarks/table.py results/benchmarks.json


.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vdbench needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip

.venv/run: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable .
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable '.[dev,peers]'
	@touch $@ .venv/run
