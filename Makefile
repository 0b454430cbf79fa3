# The demo as a graph: each checkpoint is a target that depends on what it is made from, so `make out/demo/dpo.pt`
# builds what is missing, and a second `make demo` rebuilds nothing. The same commands in a row: speedrun.sh.
# Everything that measures is in lab/lab.mk. `make help` lists all targets.

SIZE = small#   tiny (seconds), small (minutes on a CPU), large (minutes on a GPU)
OUT = out/$(if $(filter small,$(SIZE)),demo,$(SIZE))$(if $(filter 0,$(SEED)),,-seed$(SEED))
DEVICE = auto
SEED = 0
JOBS = 2#  runs of the demo at a time
MICRO = $(if $(filter large,$(SIZE)),0,16)#  rows at a time; 0: all. On a CPU less padding is worth more than larger matrices
PYTHON ?= python3

PY := .venv/bin/python
FLAGS = --seed $(SEED) --device $(DEVICE)
export PYTHONUNBUFFERED := 1
.DELETE_ON_ERROR:
.SUFFIXES:

.PHONY: help setup demo test lint parity clean
help:  ## list the targets
	@echo "targets, beside any file, such as $(OUT)/dpo.pt (variables: SIZE=$(SIZE) OUT=$(OUT) DEVICE=$(DEVICE) SEED=$(SEED))"
	@awk -F ':.*## *' 'FNR < NR && FNR == 1 { print "of the laboratory (SEEDS=3: over three seeds, in out/seed0 to out/seed2)" } \
	  /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/installed  ## create .venv and install what is needed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than 3.10; name another with PYTHON=python3.12."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[dev]'
	@touch $@

.venv/parity: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e '.[parity]'
	@touch $@

# -------------------------------------------------------------------------------------------------- demo
# of models this small, two with a thread each beat one with two
demo: .venv/installed  ## world → pretrain → SFT → preferences → every method → what each changed; a process reward model
	+@$(MAKE) --no-print-directory $(OUT)/base.pt
	+@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(MAKE) --no-print-directory -j$(JOBS) $(CHECKPOINTS) $(OUT)/best_of_8.txt
	+@$(MAKE) --no-print-directory $(OUT)/rm.report.txt $(OUT)/scorecard.txt
	@echo && $(PY) -m lab.story $(OUT)
	@echo && $(PY) -m lab.report --run $(OUT) && echo "Talk to it:  $(PY) chat.py --checkpoint $(OUT)/ppo.pt"

# --resume goes on with a run that was stopped; one that is finished, on older inputs, makes way
define train
@rm -f $@
$(PY)
endef
WORLD = $(OUT)/world
BOARD = $(OUT)/scoreboard
RESPONSES = $(if $(filter tiny,$(SIZE)),512,8448)#  through a method's training
SFT_RESPONSES = $(if $(filter tiny,$(SIZE)),1710,11400)#  and through SFT's, which ORPO does without
PRETRAIN_FLAGS_tiny = --epochs 2 --batch-size 8 --log-every 10
SFT_FLAGS_tiny = --epochs 3
DPO_FLAGS_small = --epochs 0.5 --lr 1e-4 --beta 1#  six pairs a prompt: a whole epoch, or a lower β, goes too far
RM_FLAGS_tiny = --epochs 0.4
RM_FLAGS_small = --epochs 4 --lr 5e-4#  a trunk this small starts with little to build on
PPO_FLAGS_tiny = --steps 3 --batch-size 32 --minibatch 16

$(WORLD)/pretrain.jsonl: $(addprefix nanoalign/world/,facts.py text.py steps.py feedback.py __main__.py) | .venv/installed
	$(PY) -m nanoalign.world --out $(WORLD) --size $(SIZE) --seed $(SEED)
OF_WORLD = sft prompts prompts_held_out solutions problems problems_held_out feedback
$(OF_WORLD:%=$(WORLD)/%.jsonl): $(WORLD)/pretrain.jsonl
	@test -f $@ || { rm -f $<; $(MAKE) --no-print-directory $<; }
	@touch -c $@
$(OUT)/base.pt: $(WORLD)/pretrain.jsonl train_pretrain.py
	$(train) train_pretrain.py --data $< --model world-$(SIZE) --out $@ --resume $(FLAGS) $(PRETRAIN_FLAGS_$(SIZE))
$(OUT)/sft.pt: $(WORLD)/sft.jsonl $(OUT)/base.pt train_sft.py
	$(train) train_sft.py --data $< --init $(OUT)/base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE))
$(OUT)/pairs.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt collect.py nanoalign/world/people.py
	$(PY) collect.py --prompts $< --policy $(OUT)/sft.pt --out $@ $(FLAGS)
$(OUT)/dpo.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_dpo.py
	$(train) train_dpo.py --data $< --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(DPO_FLAGS_$(SIZE))

RM = $(train) train_rm.py --init $(OUT)/sft.pt --resume $(FLAGS) $(RM_FLAGS_$(SIZE))
$(OUT)/rm.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_rm.py
	$(RM) --data $< --out $@
$(OUT)/rm.report.txt: $(OUT)/pairs.jsonl $(OUT)/rm.pt lab/reward_report.py
	$(PY) -m lab.reward_report --model $(OUT)/rm.pt --data $< $(FLAGS) > $@

PPO = $(train) train_ppo.py --prompts $(WORLD)/prompts.jsonl --micro-batch $(MICRO) --resume $(FLAGS) $(PPO_FLAGS_$(SIZE))
$(OUT)/ppo.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt $(OUT)/rm.pt train_ppo.py
	$(PPO) --init $(OUT)/sft.pt --reward $(OUT)/rm.pt --watch judge --out $@

from-prompts = --prompts $(WORLD)/prompts.jsonl --init $(OUT)/sft.pt --reward $(OUT)/rm.pt --watch judge \
  --micro-batch $(MICRO) --steps $$(($(RESPONSES) / 256))
method-kto = train_kto.py --data $(OUT)/pairs.jsonl --init $(OUT)/sft.pt --lr 1e-4 --steps $$(($(RESPONSES) / 32))
method-orpo = train_orpo.py --data $(OUT)/pairs.jsonl --init $(OUT)/base.pt \
  --steps $$((($(RESPONSES) + $(SFT_RESPONSES)) / 64))
method-grpo = train_grpo.py $(from-prompts)
$(BOARD)/%.pt: $(OUT)/pairs.jsonl $(OUT)/rm.pt
	$(train) $(method-$*) --out $@ --resume $(FLAGS)

CHECKPOINTS = $(OUT)/base.pt $(OUT)/sft.pt $(OUT)/dpo.pt $(BOARD)/kto.pt $(BOARD)/orpo.pt $(OUT)/ppo.pt $(BOARD)/grpo.pt
EVALUATE = evaluate.py nanoalign/world/judge.py nanoalign/world/verdicts.py
SCORECARD_tiny = --count 40 --samples 2 --max-new-tokens 32
SCORECARD = $(PY) evaluate.py --prompts $(WORLD)/prompts_held_out.jsonl $(FLAGS) $(SCORECARD_$(SIZE))
$(OUT)/scorecard.txt: $(WORLD)/prompts_held_out.jsonl $(CHECKPOINTS) $(EVALUATE)
	$(SCORECARD) --checkpoints $(CHECKPOINTS) --baseline $(OUT)/sft.pt --out $(OUT)/scorecard.json > $@

# sums of several steps: a solver, its steps marked right or wrong, a model that tells which
$(OUT)/solver.pt: $(WORLD)/solutions.jsonl $(OUT)/base.pt train_sft.py
	$(train) train_sft.py --data $< --init $(OUT)/base.pt --epochs 3 --lr 1e-3 --adam-eps 1e-8 --out $@ --resume $(FLAGS)
STEPS = $(PY) -m lab.label_steps --policy $(OUT)/solver.pt --temperature 1 $(FLAGS)
$(OUT)/steps.jsonl: $(WORLD)/problems.jsonl $(OUT)/solver.pt lab/label_steps.py
	$(STEPS) --by checker --prompts $< --samples 4 --out $@
$(OUT)/steps_held_out.jsonl: $(WORLD)/problems_held_out.jsonl $(OUT)/solver.pt lab/label_steps.py
	$(STEPS) --by checker --prompts $< --samples 2 --out $@
PRM = $(train) train_prm.py --init $(OUT)/solver.pt --eval-data $(OUT)/steps_held_out.jsonl --resume $(FLAGS)
$(OUT)/prm.pt: $(OUT)/steps.jsonl $(OUT)/steps_held_out.jsonl train_prm.py
	$(PRM) --data $< --out $@
PROBLEMS = 100#  how many of the held-out ones
BEST = $(PY) best_of_n.py --policy $(OUT)/solver.pt --problems $(WORLD)/problems_held_out.jsonl --count $(PROBLEMS) \
  --checker nanoalign/world/steps.py:check_steps $(FLAGS)
$(OUT)/best_of_8.txt: $(OUT)/prm.pt best_of_n.py
	$(BEST) --prm $< --samples 8 --show 2 --out $(@:.txt=.csv) > $@

# ------------------------------------------------------------------------------------------------ checks
test: .venv/installed  ## set up and pass the tests
	$(PY) -m pytest -m "not parity" -n 2 --ignore tests/parity

lint: .venv/installed  ## ruff: lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

parity: .venv/parity  ## agreement with transformers, trl and peft (installs them)
	$(PY) -m pytest -m parity tests/parity

clean:  ## delete what this size has built (out/ only)
	$(if $(and $(filter out/%,$(OUT)),$(if $(findstring ..,$(OUT)),,ok)),rm -rf $(OUT),$(error OUT=$(OUT) is not under out/))

include lab/lab.mk
