# The pipeline as a graph: each stage's checkpoint is a target that depends on what it is made from, so
# `make out/demo/dpo.pt` builds what is missing, and a second `make demo` rebuilds nothing. `make help` lists all.

SIZE = small#   tiny (seconds), small (minutes on a CPU), large (minutes on a GPU)
OUT = out/$(if $(filter small,$(SIZE)),demo,$(SIZE))$(if $(filter 0,$(SEED)),,-seed$(SEED))
DEVICE = auto
SEED = 0
SEEDS = 1#  how many: `make results` takes 3, `make hacking SEEDS=3` repeats the laboratory
PYTHON ?= python3

PY := .venv/bin/python
FLAGS = --seed $(SEED) --device $(DEVICE)
seeds = $(shell seq 0 $$(($(SEEDS) - 1)))
lab-seeds = $(if $(filter 1,$(SEEDS)),$(SEED),$(seeds))
lab-out = $(if $(filter 1,$(SEEDS)),$(OUT),out/seed$(1))
export PYTHONUNBUFFERED := 1
.DELETE_ON_ERROR:
.SUFFIXES:
.PRECIOUS: $(OUT)/rm.%.pt

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
demo: $(OUT)/best_of_8.txt $(OUT)/scorecard.txt  ## world → pretrain → SFT → preferences → every method → scorecard; a process reward model
	@cat $^
	@echo && echo "Talk to it:  $(PY) chat.py --checkpoint $(OUT)/ppo.pt"

WORLD = $(OUT)/world
PRETRAIN_FLAGS_tiny = --epochs 2 --batch-size 8 --log-every 10
SFT_FLAGS_tiny = --epochs 3
DPO_FLAGS_small = --epochs 0.2 --lr 1e-4#  six pairs a prompt: a whole epoch would go too far
RM_FLAGS_small = --epochs 2#  a trunk this small starts with little to build on
PPO_FLAGS_small = --micro-batch 16#  on a CPU, less padding is worth more than larger matrices
PPO_FLAGS_tiny = --steps 3 --batch-size 32 --minibatch 16

$(WORLD)/pretrain.jsonl: $(addprefix nanoalign/world/,facts.py text.py steps.py feedback.py __main__.py) | .venv/installed
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

PPO = $(PY) train_ppo.py --prompts $(WORLD)/prompts.jsonl --resume $(FLAGS) $(PPO_FLAGS_$(SIZE))
$(OUT)/ppo.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt $(OUT)/rm.pt train_ppo.py
	@rm -f $@
	$(PPO) --init $(OUT)/sft.pt --reward $(OUT)/rm.pt --out $@

BOARD = $(OUT)/scoreboard
CHECKPOINTS = $(OUT)/base.pt $(OUT)/sft.pt $(OUT)/dpo.pt $(BOARD)/kto.pt $(BOARD)/orpo.pt $(OUT)/ppo.pt $(BOARD)/grpo.pt
$(OUT)/scorecard.txt: $(WORLD)/prompts_held_out.jsonl $(CHECKPOINTS) evaluate.py nanoalign/world/judge.py
	$(PY) evaluate.py --checkpoints $(CHECKPOINTS) --baseline $(OUT)/sft.pt --prompts $< \
	  --out $(OUT)/scorecard.json $(FLAGS) > $@

.PHONY: results
results: SEEDS = 3
results: .venv/installed  ## the demo over several seeds, and its tables for docs/results.md
	@for seed in $(seeds); do \
	  $(MAKE) --no-print-directory demo out/seed$$seed/greedy.json SEED=$$seed OUT=out/seed$$seed || exit 1; \
	done
	$(PY) bench/seeds.py $(foreach seed,$(seeds),out/seed$(seed)/scorecard.json)
	$(PY) bench/seeds.py $(foreach seed,$(seeds),out/seed$(seed)/greedy.json)

$(OUT)/greedy.json: $(WORLD)/prompts_held_out.jsonl $(CHECKPOINTS) evaluate.py nanoalign/world/judge.py
	$(PY) evaluate.py --checkpoints $(CHECKPOINTS) --baseline $(OUT)/sft.pt --prompts $< \
	  --temperature 0 --samples 1 --out $@ $(FLAGS) > /dev/null

# ------------------------------------------------------------------------------------------------ scoreboard
# Every method from the same SFT checkpoint (ORPO from the base model), on the same prompts and preferences, and
# with as many responses through the policy's training: RESPONSES, and for ORPO also those that SFT has seen.

METHODS = dpo cdpo robust ipo simpo rpo online kto chosen orpo ppo grpo dr_grpo dapo rloo
RESPONSES = $(if $(filter tiny,$(SIZE)),512,8448)
SFT_RESPONSES = $(if $(filter tiny,$(SIZE)),1710,11400)
from-pairs = --data $(OUT)/pairs.jsonl --init $(OUT)/sft.pt --lr 1e-4 --steps $$(($(RESPONSES) / 64))
from-prompts = --prompts $(WORLD)/prompts.jsonl --init $(OUT)/sft.pt --reward $(OUT)/rm.pt --micro-batch 16 \
  --steps $$(($(RESPONSES) / 256))
method-dpo = train_dpo.py $(from-pairs)
method-cdpo = train_dpo.py --loss cdpo $(from-pairs)
method-robust = train_dpo.py --loss robust $(from-pairs)
method-ipo = train_dpo.py --loss ipo $(from-pairs)
method-simpo = train_dpo.py --loss simpo $(from-pairs)
method-rpo = train_dpo.py --sft-weight 1 $(from-pairs)
method-online = train_dpo.py --online $(OUT)/rm.pt --beta 0.2 $(from-pairs)
method-kto = train_kto.py --data $(OUT)/pairs.jsonl --init $(OUT)/sft.pt --lr 1e-4 --steps $$(($(RESPONSES) / 32))
method-orpo = train_orpo.py --data $(OUT)/pairs.jsonl --init $(OUT)/base.pt \
  --steps $$((($(RESPONSES) + $(SFT_RESPONSES)) / 64))
method-chosen = train_sft.py --data $(OUT)/pairs.jsonl --init $(OUT)/base.pt \
  --steps $$((($(RESPONSES) + $(SFT_RESPONSES)) / 32))#  the control: only imitate the chosen side
method-ppo = train_ppo.py $(from-prompts)
method-grpo = train_grpo.py $(from-prompts)
method-dr_grpo = train_grpo.py --kind dr_grpo $(from-prompts)
method-dapo = train_grpo.py --kind dapo $(from-prompts)
method-rloo = train_grpo.py --kind rloo $(from-prompts)

.PHONY: scoreboard
scoreboard: .venv/installed  ## every method under one budget, measured; SEEDS=3 repeats it (docs/methods.md)
	@for seed in $(lab-seeds); do \
	  $(MAKE) --no-print-directory $(call lab-out,$$seed)/scoreboard/scorecard.json SEED=$$seed OUT=$(call lab-out,$$seed) || exit 1; \
	done
	$(PY) bench/scoreboard.py $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/scoreboard)

$(BOARD)/%.pt: $(OUT)/pairs.jsonl $(OUT)/rm.pt
	@rm -f $@
	$(PY) $(method-$*) --out $@ --resume $(FLAGS)

BOARD_CHECKPOINTS = $(OUT)/sft.pt $(METHODS:%=$(BOARD)/%.pt)
$(BOARD)/scorecard.json: $(BOARD_CHECKPOINTS) evaluate.py
	$(PY) evaluate.py --checkpoints $(BOARD_CHECKPOINTS) --baseline $(OUT)/sft.pt --reference $(OUT)/sft.pt \
	  --reward $(OUT)/rm.pt --show 0 --prompts $(WORLD)/prompts_held_out.jsonl --out $@ $(FLAGS) > $(BOARD)/scorecard.txt

# ------------------------------------------------------------------------------------------------ steps
# Sums of several steps: a solver, rewarded for the right answer, or read step by step.

$(WORLD)/solutions.jsonl $(WORLD)/problems.jsonl $(WORLD)/problems_held_out.jsonl $(WORLD)/feedback.jsonl: $(WORLD)/pretrain.jsonl
	@test -f $@ || { rm -f $<; $(MAKE) --no-print-directory $<; }
	@touch -c $@

$(OUT)/solver.pt: $(WORLD)/solutions.jsonl $(OUT)/base.pt train_sft.py
	@rm -f $@
	$(PY) train_sft.py --data $< --init $(OUT)/base.pt --epochs 3 --adam-eps 1e-8 --out $@ --resume $(FLAGS)

.PHONY: sums
sums: .venv/installed $(OUT)/sums.pt  ## GRPO on sums of several steps, rewarded for the exact answer
$(OUT)/sums.pt: $(WORLD)/problems.jsonl $(OUT)/solver.pt train_grpo.py
	@rm -f $@
	$(PY) train_grpo.py --prompts $< --eval-data $(WORLD)/problems_held_out.jsonl --eval-prompts 500 \
	  --init $(OUT)/solver.pt --reward answer --watch "" --beta 0.01 --lr 2e-4 --epochs 1 --max-new-tokens 64 \
	  --batch-size 512 --minibatch 512 --micro-batch 64 --steps $(if $(filter tiny,$(SIZE)),3,30) --eval-every 10 \
	  --out $@ --resume $(FLAGS)

STEPS = --prompts $(WORLD)/problems.jsonl --policy $(OUT)/solver.pt --temperature 1 $(FLAGS)
$(OUT)/steps.jsonl: $(WORLD)/problems.jsonl $(OUT)/solver.pt collect.py
	$(PY) collect.py --steps checker $(STEPS) --samples 4 --out $@

$(OUT)/steps.rollouts.jsonl: $(WORLD)/problems.jsonl $(OUT)/solver.pt collect.py
	$(PY) collect.py --steps rollouts $(STEPS) --samples 1 --count 1000 --out $@

$(OUT)/steps_held_out.jsonl: $(WORLD)/problems_held_out.jsonl $(OUT)/solver.pt collect.py
	$(PY) collect.py --steps checker --prompts $< --policy $(OUT)/solver.pt --temperature 1 --samples 2 --out $@ $(FLAGS)

PRM = $(PY) train_prm.py --init $(OUT)/solver.pt --eval-data $(OUT)/steps_held_out.jsonl --resume $(FLAGS)
$(OUT)/prm.pt: $(OUT)/steps.jsonl $(OUT)/steps_held_out.jsonl train_prm.py
	@rm -f $@
	$(PRM) --data $< --out $@
$(OUT)/orm.pt: $(OUT)/steps.jsonl $(OUT)/steps_held_out.jsonl train_prm.py
	@rm -f $@
	$(PRM) --data $< --outcome --out $@
$(OUT)/prm-rollouts.pt: $(OUT)/steps.rollouts.jsonl $(OUT)/steps_held_out.jsonl train_prm.py
	@rm -f $@
	$(PRM) --data $< --out $@

.PHONY: prm
prm: .venv/installed $(OUT)/best_of_n.txt $(OUT)/best_of_n.rollouts.txt  ## score every step: process reward models, best of n, search
	@cat $(filter %.txt,$^)

PROBLEMS = 100#  how many of the held-out ones
BEST = $(PY) best_of_n.py --policy $(OUT)/solver.pt --problems $(WORLD)/problems_held_out.jsonl --count $(PROBLEMS) \
  $(FLAGS) $(if $(filter tiny,$(SIZE)),--samples 4 --depth 4)
$(OUT)/best_of_n.txt: $(OUT)/prm.pt $(OUT)/orm.pt best_of_n.py
	$(BEST) --prm $< --orm $(OUT)/orm.pt --search beam dvts --show 2 --out $(@:.txt=.csv) > $@
$(OUT)/best_of_8.txt: $(OUT)/prm.pt best_of_n.py
	$(BEST) --prm $< --samples 8 --show 2 --out $(@:.txt=.csv) > $@
$(OUT)/best_of_n.rollouts.txt: $(OUT)/prm-rollouts.pt best_of_n.py
	$(BEST) --prm $< --out $(@:.txt=.csv) > $@

# Policies trained against the process model: do they learn to write more, or emptier, steps?
.PHONY: prm-hacking
HACKED = $(foreach run,ppo-steps ppo-min grpo-steps grpo-min,$(OUT)/prm-hacking/$(run).pt)
prm-hacking: .venv/installed $(HACKED) $(OUT)/sums.pt  ## PPO and GRPO against the process model, densely and as one score
	$(PY) bench/prm.py policies --checkpoints $(OUT)/solver.pt $(OUT)/sums.pt $(HACKED) --prm $(OUT)/prm.pt \
	  --problems $(WORLD)/problems_held_out.jsonl

$(OUT)/prm-hacking/%.pt: $(OUT)/prm.pt $(OUT)/solver.pt
	@rm -f $@
	$(PY) train_$(word 1,$(subst -, ,$*)).py --reward prm-$(word 2,$(subst -, ,$*)):$< --watch answer --init $(OUT)/solver.pt \
	  --prompts $(WORLD)/problems.jsonl --eval-data $(WORLD)/problems_held_out.jsonl --beta 0.01 --lr 2e-4 --max-new-tokens 96 \
	  --batch-size 128 --minibatch 128 --micro-batch 64 --steps $(if $(filter tiny,$(SIZE)),3,30) --eval-every 10 \
	  --out $@ --resume $(FLAGS)

# ------------------------------------------------------------------------------------------------ AI feedback
# Constitutional AI: an assistant that has learnt to criticise, to revise and to judge learns from its own revisions
# (SL-CAI), then from its own preferences (ai: RLAIF). Beside that, people's preferences: on the same pairs (human),
# on as many of them as cost the same (few), and half the money on either (mixed). A prompt has one pair, so that
# training reads every label. The price leaves out the demonstrations that taught the assistant its three tasks.

PRICE = 10#  AI labels for the price of a person's: about what Lee et al. (2023) estimate
CAI = $(OUT)/cai
CAI_FLAGS_tiny = --max-new-tokens 24

$(OUT)/assistant.pt: $(WORLD)/sft.jsonl $(WORLD)/feedback.jsonl $(OUT)/base.pt train_sft.py
	@rm -f $@
	cat $(filter %.jsonl,$^) > $(OUT)/assistant.jsonl
	$(PY) train_sft.py --data $(OUT)/assistant.jsonl --init $(OUT)/base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE))

$(CAI)/revisions.jsonl: $(WORLD)/prompts.jsonl $(OUT)/assistant.pt constitution.txt critique.py nanoalign/feedback.py
	$(PY) critique.py --prompts $< --policy $(OUT)/assistant.pt --out $@ $(FLAGS) $(CAI_FLAGS_$(SIZE))

# Answers are sampled below temperature 1, so that SFT on them sharpens the model, revised or not: the control.
$(CAI)/unrevised.jsonl: $(WORLD)/prompts.jsonl $(OUT)/assistant.pt constitution.txt critique.py
	$(PY) critique.py --rounds 0 --prompts $< --policy $(OUT)/assistant.pt --out $@ $(FLAGS) $(CAI_FLAGS_$(SIZE))

$(CAI)/sl-cai.pt: $(CAI)/revisions.jsonl
$(CAI)/unrevised.pt: $(CAI)/unrevised.jsonl
$(CAI)/sl-cai.pt $(CAI)/unrevised.pt: train_sft.py
	@rm -f $@
	$(PY) train_sft.py --data $(filter %.jsonl,$^) --init $(OUT)/assistant.pt --out $@ --resume $(FLAGS)

CAI_COLLECT = $(PY) collect.py --policy $(CAI)/sl-cai.pt $(FLAGS) $(CAI_FLAGS_$(SIZE))
BY_AI = --annotator ai:$(OUT)/assistant.pt
$(CAI)/human.jsonl: $(WORLD)/prompts.jsonl $(CAI)/sl-cai.pt collect.py
	$(CAI_COLLECT) --prompts $< --samples 2 --out $@
$(CAI)/ai.jsonl: $(WORLD)/prompts.jsonl $(CAI)/sl-cai.pt constitution.txt collect.py
	$(CAI_COLLECT) --prompts $< --samples 2 --out $@ $(BY_AI)
$(CAI)/price-$(PRICE):
	@mkdir -p $(CAI) && rm -f $(CAI)/price-* && touch $@
$(CAI)/few.jsonl: $(CAI)/human.jsonl $(CAI)/price-$(PRICE)
	awk 'NR % $(PRICE) == 0' $< > $@
$(CAI)/mixed.jsonl: $(CAI)/human.jsonl $(CAI)/ai.jsonl $(CAI)/price-$(PRICE)
	awk 'NR % (2 * $(PRICE)) == 0' $< > $@
	awk 'NR % 2 == 1' $(CAI)/ai.jsonl >> $@

CAI_STEPS = $$(($(RESPONSES) / 64))
$(CAI)/few.pt: CAI_STEPS = $$(($(RESPONSES) / 128))#  seven passes over so few pairs, not fifteen
$(CAI)/%.pt: $(CAI)/%.jsonl $(CAI)/sl-cai.pt train_dpo.py
	@rm -f $@
	$(PY) train_dpo.py --data $< --init $(CAI)/sl-cai.pt --lr 1e-4 --steps $(CAI_STEPS) --out $@ --resume $(FLAGS)

# How good people and the AI are as judges, on the same held-out pairs, by the exact judge.
$(CAI)/judges.txt: $(WORLD)/prompts_held_out.jsonl $(CAI)/sl-cai.pt constitution.txt collect.py
	$(CAI_COLLECT) --prompts $< --out $(CAI)/held_out.jsonl > $@
	$(CAI_COLLECT) --resume --out $(CAI)/held_out.jsonl $(BY_AI) >> $@

CAI_CHECKPOINTS = $(OUT)/sft.pt $(OUT)/assistant.pt $(patsubst %,$(CAI)/%.pt,unrevised sl-cai human ai few mixed)
$(CAI)/scorecard.json: $(WORLD)/prompts_held_out.jsonl $(CAI_CHECKPOINTS) $(CAI)/judges.txt evaluate.py
	$(PY) evaluate.py --checkpoints $(CAI_CHECKPOINTS) --baseline $(OUT)/assistant.pt --reference $(CAI)/sl-cai.pt \
	  --show 0 --prompts $< --out $@ $(FLAGS) > $(CAI)/scorecard.txt

.PHONY: cai
cai: .venv/installed  ## Constitutional AI and RLAIF beside people's preferences, measured; SEEDS=3 repeats it
	@for seed in $(lab-seeds); do \
	  $(MAKE) --no-print-directory $(call lab-out,$$seed)/cai/scorecard.json SEED=$$seed OUT=$(call lab-out,$$seed) || exit 1; \
	done
	@cat $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/cai/judges.txt)
	@echo "few, mixed and ai cost the same: $(PRICE) AI labels for the price of a person's"
	$(PY) bench/seeds.py $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/cai/scorecard.json)

# ------------------------------------------------------------------------------------------------ laboratory
# PPO against the learned reward without and with a penalty, against the judge itself, and with each mitigation.

LAB = $(OUT)/hacking
RUNS = beta-0 beta-0.05 beta-0.1 beta-0.2 judge ensemble length adaptive adversarial continued
from-sft = --init $(OUT)/sft.pt --critic $(OUT)/rm.pt
run-beta-0 = $(from-sft) --reward $(OUT)/rm.pt --beta 0
run-beta-0.05 = $(from-sft) --reward $(OUT)/rm.pt --beta 0.05
run-beta-0.1 = $(from-sft) --reward $(OUT)/rm.pt --beta 0.1
run-beta-0.2 = $(from-sft) --reward $(OUT)/rm.pt --beta 0.2
run-judge = $(from-sft) --reward judge
run-ensemble = $(from-sft) --reward min:$(OUT)/rm.pt,$(OUT)/rm.1.pt,$(OUT)/rm.2.pt --beta 0
run-length = $(from-sft) --reward "$(OUT)/rm.pt - 0.05*length" --beta 0
run-adversarial = $(from-sft) --reward $(OUT)/rm-adversarial.pt --beta 0
run-adaptive = $(from-sft) --reward $(OUT)/rm.pt --kl-target 2 --kl-horizon 500
run-continued = --init $(OUT)/ppo.pt --reference $(OUT)/sft.pt --reward $(OUT)/rm.pt

.PHONY: hacking iterate
hacking: .venv/installed  ## reward hacking and its mitigations, measured; SEEDS=3 repeats it
	@for seed in $(lab-seeds); do \
	  $(MAKE) --no-print-directory $(call lab-out,$$seed)/hacking/scorecard.json SEED=$$seed OUT=$(call lab-out,$$seed) || exit 1; \
	done
	$(PY) bench/hacking.py report $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/hacking)

$(OUT)/rm.%.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_rm.py
	@rm -f $@
	$(PY) train_rm.py --data $< --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE)) --seed $$(($(SEED) + 1000 * $*))

ON_HELD_OUT = --eval-data $(WORLD)/prompts_held_out.jsonl --eval-prompts 1000 --eval-every 4 \
  --watch "judge, $(OUT)/rm.pt"
$(LAB)/%.pt: $(OUT)/ppo.pt $(OUT)/rm.1.pt $(OUT)/rm.2.pt train_ppo.py
	@rm -f $@
	$(PPO) $(run-$*) $(ON_HELD_OUT) --out $@

$(LAB)/adversarial.pt: $(OUT)/rm-adversarial.pt

$(LAB)/best-of-n.jsonl: $(OUT)/rm.pt bench/hacking.py
	$(PY) bench/hacking.py best-of-n --policy $(OUT)/sft.pt --reward $< --prompts $(WORLD)/prompts_held_out.jsonl \
	  --out $@ $(FLAGS)

LAB_CHECKPOINTS = $(OUT)/sft.pt $(OUT)/ppo.pt $(RUNS:%=$(LAB)/%.pt) $(LAB)/iterated.pt
$(LAB)/scorecard.json: $(LAB_CHECKPOINTS) $(LAB)/best-of-n.jsonl
	$(PY) evaluate.py --checkpoints $(LAB_CHECKPOINTS) --baseline $(OUT)/sft.pt --reference $(OUT)/sft.pt --reward $(OUT)/rm.pt --show 0 \
	  --samples 2 --prompts $(WORLD)/prompts_held_out.jsonl --out $@ $(FLAGS) > $(LAB)/scorecard.txt

iterate: $(LAB)/iterated.pt  ## a second round: collect on the PPO policy, retrain the reward model, continue
	$(PY) evaluate.py --checkpoints $(OUT)/sft.pt $(OUT)/ppo.pt $< --prompts $(WORLD)/prompts_held_out.jsonl \
	  --out $(LAB)/iterate.json $(FLAGS)

$(OUT)/pairs2.jsonl: $(WORLD)/prompts.jsonl $(OUT)/ppo.pt collect.py
	$(PY) collect.py --prompts $< --policy $(OUT)/ppo.pt --out $@ $(FLAGS)
$(OUT)/rm2.pt: $(OUT)/pairs.jsonl $(OUT)/pairs2.jsonl train_rm.py
	cat $(OUT)/pairs.jsonl $(OUT)/pairs2.jsonl > $(OUT)/pairs12.jsonl
	@rm -f $@
	$(PY) train_rm.py --data $(OUT)/pairs12.jsonl --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE))
$(LAB)/iterated.pt: $(OUT)/ppo.pt $(OUT)/rm2.pt train_ppo.py
	@rm -f $@
	$(PPO) --init $< --reference $(OUT)/sft.pt --reward $(OUT)/rm2.pt $(ON_HELD_OUT) --out $@

# ------------------------------------------------------------------------------------------------ red team
# Attack the policies; attack the reward model, retrain it on what fooled it, and attack it again.

RED = $(OUT)/red-team
ATTACK = $(PY) evaluate.py --red-team $(WORLD)/prompts.jsonl --prompts $(WORLD)/prompts_held_out.jsonl \
  --max-new-tokens 48 $(FLAGS) $(if $(filter tiny,$(SIZE)),--tries 4)
GRPO = $(PY) train_grpo.py --init $(OUT)/sft.pt --resume $(FLAGS) $(PPO_FLAGS_$(SIZE))

.PHONY: red-team
red-team: .venv/installed  ## attack policies and the reward model; retrain it on what fooled it; SEEDS=3 repeats it
	@for seed in $(lab-seeds); do \
	  $(MAKE) --no-print-directory $(patsubst %,$(call lab-out,$$seed)/red-team/%.txt,policies before after) \
	    SEED=$$seed OUT=$(call lab-out,$$seed) || exit 1; \
	  cat $(patsubst %,$(call lab-out,$$seed)/red-team/%.txt,policies before after); \
	done
	$(PY) bench/red_team.py $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/red-team)

$(RED)/policies.txt: $(addprefix $(OUT)/,sft.pt dpo.pt ppo.pt) $(RED)/attacker.pt nanoalign/redteam.py
	$(ATTACK) --checkpoints $(filter-out $(RED)/%,$(filter %.pt,$^)) --attackers $(RED)/attacker.pt --samples 16 \
	  --out $(@:.txt=.json) > $@

# Its text stands before the request: harm:… pays where the SFT model then helps.
$(RED)/attacker.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt
	@rm -f $@ && mkdir -p $(RED)
	grep '"kind": "harm"' $< > $(RED)/harm.jsonl
	$(GRPO) --prompts $(RED)/harm.jsonl --reward harm:$(OUT)/sft.pt --watch "" --beta 0.01 --lr 3e-4 --out $@

$(RED)/before.txt: $(OUT)/rm.pt $(RED)/gap.pt nanoalign/redteam.py
	$(ATTACK) --checkpoints $(OUT)/sft.pt --reward $< --attackers $(RED)/gap.pt \
	  --adversarial-pairs $(RED)/pairs.jsonl --out $(@:.txt=.json) > $@
$(RED)/after.txt: $(OUT)/rm-adversarial.pt $(RED)/gap-again.pt $(RED)/before.txt
	$(ATTACK) --checkpoints $(OUT)/sft.pt --reward $< --attackers $(RED)/gap.pt $(RED)/gap-again.pt \
	  --replay $(RED)/before.json --out $(@:.txt=.json) > $@

# They write what the reward likes and the judge does not.
GAP = $(GRPO) --prompts $(WORLD)/prompts.jsonl --beta 0.05 --watch "judge, $(OUT)/rm.pt"
$(RED)/gap.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt $(OUT)/rm.pt
	@rm -f $@
	$(GAP) --reward "$(OUT)/rm.pt - judge" --out $@
$(RED)/gap-again.pt: $(OUT)/rm-adversarial.pt
	@rm -f $@
	$(GAP) --reward "$< - judge" --out $@

$(OUT)/rm-adversarial.pt: $(OUT)/pairs.jsonl $(RED)/before.txt train_rm.py
	cat $< $(RED)/pairs.jsonl > $(RED)/all-pairs.jsonl
	@rm -f $@
	$(PY) train_rm.py --data $(RED)/all-pairs.jsonl --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE))

# ------------------------------------------------------------------------------------------------ safety
# Safety against helpfulness: DPO over the share of pairs about harmful requests (share; of people's own pairs it is
# 0.05) and over β (beta), GRPO over the weight of a reward model of such pairs beside one of all the others (weight).

PARETO = $(OUT)/pareto
POINTS = $(addprefix share-,0 0.2 0.5 1) $(addprefix beta-,0.03 0.1 0.5) $(addprefix weight-,0 0.5 0.9)
.PRECIOUS: $(PARETO)/share-%.jsonl

.PHONY: pareto
pareto: .venv/installed  ## safety against helpfulness: the Pareto front; PLOT=pareto.png draws it, SEEDS=3 repeats it
	@for seed in $(lab-seeds); do \
	  $(MAKE) --no-print-directory $(call lab-out,$$seed)/pareto/scorecard.json SEED=$$seed OUT=$(call lab-out,$$seed) || exit 1; \
	done
	$(PY) bench/pareto.py report --folders $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/pareto) $(PLOT:%=--plot %)

$(PARETO)/harmless.jsonl: $(OUT)/pairs.jsonl
	@mkdir -p $(PARETO)
	grep '"kind": "harm"' $< > $@
$(PARETO)/helpful.jsonl: $(OUT)/pairs.jsonl
	@mkdir -p $(PARETO)
	grep -v '"kind": "harm"' $< > $@
$(PARETO)/share-%.jsonl: $(PARETO)/helpful.jsonl $(PARETO)/harmless.jsonl
	$(PY) bench/pareto.py mix --helpful $< --harmless $(PARETO)/harmless.jsonl --share $* \
	  --count $$(($(RESPONSES) / 2)) --seed $(SEED) --out $@

$(PARETO)/share-%.pt: $(PARETO)/share-%.jsonl $(OUT)/sft.pt train_dpo.py
	@rm -f $@
	$(PY) train_dpo.py $(from-pairs) --data $< --out $@ --resume $(FLAGS)
$(PARETO)/beta-%.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_dpo.py
	@rm -f $@
	$(PY) train_dpo.py $(from-pairs) --beta $* --out $@ --resume $(FLAGS)
$(PARETO)/helpful.pt $(PARETO)/harmless.pt: $(PARETO)/%.pt: $(PARETO)/%.jsonl $(OUT)/sft.pt train_rm.py
	@rm -f $@
	$(PY) train_rm.py --data $< --init $(OUT)/sft.pt --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE))
$(PARETO)/weight-%.pt: $(PARETO)/helpful.pt $(PARETO)/harmless.pt train_grpo.py
	@rm -f $@
	$(PY) train_grpo.py $(from-prompts) --out $@ --resume $(FLAGS) \
	  --reward "$$(awk 'BEGIN { print 1 - $* }')*$(PARETO)/helpful.pt + $(*)*$(PARETO)/harmless.pt"

PARETO_CHECKPOINTS = $(OUT)/sft.pt $(POINTS:%=$(PARETO)/%.pt)
$(PARETO)/scorecard.json: $(WORLD)/prompts_held_out.jsonl $(PARETO_CHECKPOINTS) evaluate.py
	$(PY) evaluate.py --checkpoints $(PARETO_CHECKPOINTS) --baseline $(OUT)/sft.pt --reference $(OUT)/sft.pt \
	  --show 0 --prompts $< --out $@ $(FLAGS) > $(PARETO)/scorecard.txt

# ------------------------------------------------------------------------------------------------ weak to strong
# A small model's reward model labels pairs for a larger one (naive; confident: with --confidence), beside the larger
# one on the exact judge's labels of the same pairs (ceiling).

WEAK = $(OUT)/weak-to-strong
weak-to-strong-weak = --data $(WEAK)/weak.jsonl --init $(WEAK)/sft.pt
weak-to-strong-naive = --data $(WEAK)/labels.jsonl --init $(OUT)/sft.pt
weak-to-strong-confident = $(weak-to-strong-naive) --confidence 0.5
weak-to-strong-ceiling = --data $(WEAK)/ceiling.jsonl --init $(OUT)/sft.pt

.PHONY: weak-to-strong
weak-to-strong: .venv/installed  ## a small model's labels supervise a larger one: the gap recovered; SEEDS=3 repeats it
	@for seed in $(lab-seeds); do \
	  $(MAKE) --no-print-directory $(patsubst %,$(call lab-out,$$seed)/weak-to-strong/%.pt,weak naive confident ceiling) \
	    SEED=$$seed OUT=$(call lab-out,$$seed) || exit 1; \
	done
	$(PY) bench/weak_to_strong.py report $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/weak-to-strong)

$(WEAK)/base.pt: $(WORLD)/pretrain.jsonl train_pretrain.py
	@rm -f $@
	$(PY) train_pretrain.py --data $< --model world-nano --out $@ --resume $(FLAGS) $(PRETRAIN_FLAGS_$(SIZE))
$(WEAK)/sft.pt: $(WORLD)/sft.jsonl $(WEAK)/base.pt train_sft.py
	@rm -f $@
	$(PY) train_sft.py --data $< --init $(WEAK)/base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE))

$(WEAK)/test.jsonl: $(OUT)/pairs.jsonl
	$(PY) bench/weak_to_strong.py split --pairs $< --out $(WEAK) --seed $(SEED)
$(WEAK)/labels.jsonl: $(WEAK)/weak.pt $(WEAK)/test.jsonl collect.py
	cp $(WEAK)/unlabelled.jsonl $(WEAK)/labels.votes.jsonl
	$(PY) collect.py --annotator rm:$< --resume --out $@ $(FLAGS)

$(WEAK)/weak.pt: $(WEAK)/test.jsonl $(WEAK)/sft.pt
$(WEAK)/naive.pt $(WEAK)/confident.pt: $(WEAK)/labels.jsonl $(OUT)/sft.pt
$(WEAK)/ceiling.pt: $(WEAK)/test.jsonl $(OUT)/sft.pt
$(patsubst %,$(WEAK)/%.pt,weak naive confident ceiling): $(WEAK)/%.pt: train_rm.py
	@rm -f $@
	$(PY) train_rm.py $(weak-to-strong-$*) --eval-data $(WEAK)/test.jsonl --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE))

# ------------------------------------------------------------------------------------------------ speed
# Beside torch, transformers and trl; `python bench/X.py --help` has the long forms. HH=hh.jsonl: pair rows for
# the training steps, which are left out without.

HH = $(wildcard hh_harmless.jsonl)
SHORT = out/bench/short.jsonl
.PHONY: bench
bench: .venv/parity  ## time and memory beside the peers' (short form; HH=pairs.jsonl adds the training steps)
	@rm -f $(SHORT)
	$(PY) bench/logprobs.py --short --device $(DEVICE) --out $(SHORT)
	$(PY) bench/generate.py --short --device $(DEVICE) --out $(SHORT)
	$(PY) bench/scaling.py --short --device $(DEVICE) --out $(SHORT)
	$(if $(HH),$(PY) bench/train.py --short --data $(HH) --device $(DEVICE) --out $(SHORT),@echo "no HH=pairs.jsonl: training steps are left out")
	@$(PY) bench/timing.py $(SHORT)

# ------------------------------------------------------------------------------------------------ checks

.PHONY: test lint parity clean
test: .venv/installed  ## set up and pass the tests
	$(PY) -m pytest -m "not parity" -n 2

lint: .venv/installed  ## ruff: lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

parity: .venv/parity  ## agreement with transformers and trl (installs them)
	$(PY) -m pytest -m parity

clean:  ## delete what this size has built (out/ only)
	$(if $(and $(filter out/%,$(OUT)),$(if $(findstring ..,$(OUT)),,ok)),rm -rf $(OUT),$(error OUT=$(OUT) is not under out/))
