# The pipeline as a graph: each stage's checkpoint is a target that depends on what it is made from, so
# `make out/demo/dpo.pt` builds what is missing, and a second `make demo` rebuilds nothing. `make help` lists all.

SIZE = small#   tiny (seconds), small (minutes on a CPU), large (minutes on a GPU)
OUT = out/$(if $(filter small,$(SIZE)),demo,$(SIZE))$(if $(filter 0,$(SEED)),,-seed$(SEED))
DEVICE = auto
SEED = 0
SEEDS = 0 1 2#  of `make results`
PYTHON ?= python3

PY := .venv/bin/python
FLAGS = --seed $(SEED) --device $(DEVICE)
export PYTHONUNBUFFERED := 1
.DELETE_ON_ERROR:
.SUFFIXES:

.PHONY: help
help:  ## list the targets
	@echo "targets (variables: SIZE=$(SIZE) OUT=$(OUT) DEVICE=$(DEVICE) SEED=$(SEED))"
	@awk -F ':.*## *' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  make FILE       any file of the pipeline, such as $(OUT)/dpo.pt"

# ------------------------------------------------------------------------------------------------ set-up

.PHONY: setup
setup: .venv/installed  ## create .venv and install what is needed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than 3.10; name another with PYTHON=python3.12."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

.venv/parity: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[parity]'
	@touch $@

# ------------------------------------------------------------------------------------------------ pipeline

.PHONY: demo
demo: $(OUT)/scorecard.txt  ## world → pretrain → SFT → preferences → DPO → scorecard
	@cat $<
	@echo && echo "Talk to it:  $(PY) chat.py --checkpoint $(OUT)/dpo.pt"

WORLD = $(OUT)/world
PRETRAIN_FLAGS_tiny = --epochs 2 --batch-size 8 --log-every 10
SFT_FLAGS_tiny = --epochs 3
DPO_FLAGS_small = --epochs 0.2#  six pairs a prompt: a whole epoch would go too far
RM_FLAGS_small = --epochs 2#  a trunk this small starts with little to build on
PPO_FLAGS_tiny = --steps 3

$(WORLD)/pretrain.jsonl: $(addprefix nanoalign/world/,facts.py text.py __main__.py) | .venv/installed
	$(PY) -m nanoalign.world --out $(WORLD) --size $(SIZE) --seed $(SEED)

$(WORLD)/sft.jsonl $(WORLD)/prompts.jsonl $(WORLD)/prompts_held_out.jsonl: $(WORLD)/pretrain.jsonl
	@test -f $@ || { rm -f $<; $(MAKE) --no-print-directory $<; }
	@touch -c $@

$(OUT)/base.pt: $(WORLD)/pretrain.jsonl train_pretrain.py
	@rm -f $@
	$(PY) train_pretrain.py --data $< --model world-$(SIZE) --out $@ --resume $(FLAGS) $(PRETRAIN_FLAGS_$(SIZE))

$(OUT)/sft.pt: $(WORLD)/sft.jsonl $(OUT)/base.pt train_sft.py
	@rm -f $@
	$(PY) train_sft.py --data $< --init $(OUT)/base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE))

$(OUT)/pairs.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt collect.py nanoalign/world/people.py
	$(PY) collect.py --prompts $< --policy $(OUT)/sft.pt --out $@ $(FLAGS)

$(OUT)/dpo.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_dpo.py
	@rm -f $@
	$(PY) train_dpo.py --data $< --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(DPO_FLAGS_$(SIZE))

$(OUT)/rm.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_rm.py
	@rm -f $@
	$(PY) train_rm.py --data $< --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE))

PPO = $(PY) train_ppo.py --init $(OUT)/sft.pt --prompts $(WORLD)/prompts.jsonl --resume $(FLAGS) $(PPO_FLAGS_$(SIZE))
$(OUT)/ppo.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt $(OUT)/rm.pt train_ppo.py
	@rm -f $@
	$(PPO) --reward $(OUT)/rm.pt --out $@

CHECKPOINTS = $(OUT)/base.pt $(OUT)/sft.pt $(OUT)/dpo.pt $(OUT)/ppo.pt
$(OUT)/scorecard.txt: $(WORLD)/prompts_held_out.jsonl $(CHECKPOINTS) evaluate.py nanoalign/world/judge.py
	$(PY) evaluate.py --checkpoints $(CHECKPOINTS) --baseline $(OUT)/sft.pt --prompts $< \
	  --out $(OUT)/scorecard.json $(FLAGS) > $@

.PHONY: results
results: .venv/installed  ## the demo over several seeds, and its tables for docs/results.md
	@for seed in $(SEEDS); do \
	  $(MAKE) --no-print-directory demo out/seed$$seed/greedy.json SEED=$$seed OUT=out/seed$$seed || exit 1; \
	done
	$(PY) bench/seeds.py $(foreach seed,$(SEEDS),out/seed$(seed)/scorecard.json)
	$(PY) bench/seeds.py $(foreach seed,$(SEEDS),out/seed$(seed)/greedy.json)

$(OUT)/greedy.json: $(WORLD)/prompts_held_out.jsonl $(CHECKPOINTS) evaluate.py nanoalign/world/judge.py
	$(PY) evaluate.py --checkpoints $(CHECKPOINTS) --baseline $(OUT)/sft.pt --prompts $< \
	  --temperature 0 --samples 1 --out $@ $(FLAGS) > /dev/null

# ------------------------------------------------------------------------------------------------ checks

.PHONY: test lint parity clean
test: .venv/installed  ## set up and pass the tests
	$(PY) -m pytest -m "not parity"

lint: .venv/installed  ## ruff: lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

parity: .venv/parity  ## agreement with transformers and trl (installs them)
	$(PY) -m pytest -m parity

clean:  ## delete what this size has built (out/ only)
	$(if $(and $(filter out/%,$(OUT)),$(if $(findstring ..,$(OUT)),,ok)),rm -rf $(OUT),$(error OUT=$(OUT) is not under out/))
