# The README's two commands are `make run` and `make test`; both install what they need.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
RUN    ?= runs/quick
BASE   ?= HEAD~1
RESTARTS ?= 2
MODELS ?= runs/models
TARGET ?= 5
ROUNDS ?= 4
JOBS   ?= 3

.PHONY: install run test types together bench prove refine clean

install: $(VENV)/.installed

# torch, torchvision and timm in one call: the CPU-only torch breaks torchvision, and so timm.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

run: install
	$(BIN)/python -m profiler.sweep --config quick-cpu --out $(RUN)
	$(BIN)/python -m cost_models.fit --store $(RUN)/measurements.sqlite --out $(RUN)
	$(BIN)/python -m reparam.finetune --recipe digits-quick --latency-table $(RUN)/latency_table.json --out $(RUN)
	$(BIN)/python -m reports.build --run $(RUN)

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs 2 types together
	$(BIN)/pytest -m alone

types: install
	$(BIN)/mypy

together: install
	$(BIN)/pytest -m "not alone" --numprocesses $(JOBS) --dist loadfile

bench: install
	$(BIN)/python tests/bench/gate.py --base $(BASE) --restarts $(RESTARTS)

# Long and resumable: the shapes of the paper, on one and on two threads; the targets of CONTRIBUTING.
prove: install
	$(BIN)/python -m profiler.sweep --config shiftaddvit-paper --threads 1,2 --out runs/paper
	$(BIN)/python tests/prove/kill_sweep.py --kills 100 --out runs/prove
	$(BIN)/python tests/prove/repeatability.py --out runs/prove
	$(BIN)/python tests/prove/gate_error_rates.py
	$(BIN)/python tests/prove/convert_all.py
	$(BIN)/python tests/prove/report_speed.py
	$(BIN)/python -m reparam.evaluate --model deit_tiny_patch16_224 --versus-torch --scaling --out runs/prove

# Half an hour and more, resumable: measures where the latency models are least sure, until they are
# within TARGET percent on left-out training rows or ROUNDS are over, then fits the table.
refine: install
	$(BIN)/python -m profiler.sweep --config latency-models --out $(MODELS)
	for round in $$(seq $(ROUNDS)); do \
	  $(BIN)/python -m cost_models.suggest --store $(MODELS)/measurements.sqlite \
	    --out $(MODELS)/round-$$round.toml --seed $$round --target $(TARGET) \
	    || { test $$? -eq 1 && break; exit 2; }; \
	  $(BIN)/python -m profiler.sweep --config $(MODELS)/round-$$round.toml --out $(MODELS) || exit; \
	done
	$(BIN)/python -m cost_models.fit --store $(MODELS)/measurements.sqlite --out $(MODELS)

clean:
	rm -rf $(VENV) runs
