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

# rounds of feedback: you judge the newest policy on a page, and the next one follows
loop: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[human]' -c constraints.txt
	bash examples/loop.sh

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the project's own files: a fork beside them keeps whatever style it likes
OWN = nanorlhf tests examples $(wildcard experiments) $(SCRIPTS)
SCRIPTS = train_gpt.py train_sft.py train_rm.py train_ppo.py
lint: .venv/test-installed
	$(BIN)/ruff check $(OWN)
	$(BIN)/ruff format --check $(OWN)

# what takes longer and must not rot: the demo, the documents' commands, one short sweep of each
# kind, and the GPU's script at toy size. About ten minutes
slow: .venv/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 0 tests/slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 0 -m slow tests

# kills, signals, full disks: runs that go on must end as undisturbed ones do
accidents: .venv/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sweeps.accidents 100 10

# bad input of every kind: over 10,000 damaged files, folders and flags, from a new seed
fuzz: .venv/test-installed
	FUZZ=400 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/sweeps/test_fuzz.py

# small changes to the code, one at a time: does a test notice each? About half an hour
mutants: .venv/test-installed
	$(BIN)/python -m tests.sweeps.mutants

install: .venv/test-installed

# what the tests need (transformers, datasets) is not needed to train
.venv/installed: EXTRAS = plot
.venv/test-installed: EXTRAS = plot,hub,datasets,human,test

.venv/installed .venv/test-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt
	touch $@

.PHONY: demo loop test lint slow accidents fuzz mutants install
