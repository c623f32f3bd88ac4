# Two commands: `make demo` and `make test`. The README gives the same lines for use without make.
SEED ?= 1
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/installed
	$(BIN)/python train_gpt.py --seed $(SEED)
	$(BIN)/python train_sft.py --seed $(SEED)
	$(BIN)/python train_rm.py --seed $(SEED)
	$(BIN)/python train_ppo.py --seed $(SEED)
	$(BIN)/python -m nanorlhf evaluate --seed $(SEED)

test: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# small changes to the code, one at a time: does a test notice each? About half an hour
mutants: .venv/test-installed
	$(BIN)/python tests/mutants.py

install: .venv/test-installed

# what the tests need (transformers, datasets) is not needed to train
.venv/installed: EXTRAS = plot
.venv/test-installed: EXTRAS = plot,hub,datasets,test

.venv/installed .venv/test-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt
	touch $@

.PHONY: demo test mutants install
