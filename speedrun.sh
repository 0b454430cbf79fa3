#!/usr/bin/env bash
# The whole pipeline, from nothing to a scorecard, as plain commands to copy from: what `make demo` runs, two at a time.
#     ./speedrun.sh                a small world, one command after another, into out/demo
#     SIZE=tiny ./speedrun.sh      a look at it, in two minutes; SIZE=large is for a GPU
set -euo pipefail
cd "$(dirname "$0")"
size=${SIZE:-small}
out=${OUT:-out/${size/small/demo}}
make --silent setup && source .venv/bin/activate

pretrain='' sft='' dpo='' rm='' ppo='' scorecard='' micro=16 kto=264 orpo=310 grpo=33 # the last three in steps
case $size in
  tiny) pretrain='--epochs 2 --batch-size 8 --log-every 10' sft='--epochs 3' kto=16 orpo=34 grpo=2
        rm='--epochs 0.4' ppo='--steps 3 --batch-size 32 --minibatch 16'
        scorecard='--count 40 --samples 2 --max-new-tokens 32' ;;
  small) dpo='--epochs 0.5 --lr 1e-4 --beta 1' rm='--epochs 4 --lr 5e-4' ;;
  large) micro=0 ;;
esac
# a world of facts, people and questions; a base model; one that answers
python -m nanoalign.world --out $out/world --size $size
python train_pretrain.py --data $out/world/pretrain.jsonl --model world-$size --out $out/base.pt $pretrain
python train_sft.py --data $out/world/sft.jsonl --init $out/base.pt --out $out/sft.pt $sft

# people compare its answers; their preferences, learnt from directly
python collect.py --prompts $out/world/prompts.jsonl --policy $out/sft.pt --out $out/pairs.jsonl
pairs="--data $out/pairs.jsonl"
python train_dpo.py $pairs --init $out/sft.pt --out $out/dpo.pt $dpo
python train_kto.py $pairs --init $out/sft.pt --out $out/scoreboard/kto.pt --lr 1e-4 --steps $kto
python train_orpo.py $pairs --init $out/base.pt --out $out/scoreboard/orpo.pt --steps $orpo

# or by way of a reward model
python train_rm.py $pairs --init $out/sft.pt --out $out/rm.pt $rm
python -m lab.reward_report $pairs --model $out/rm.pt
policy="--prompts $out/world/prompts.jsonl --init $out/sft.pt --reward $out/rm.pt --watch judge"
python train_ppo.py $policy --out $out/ppo.pt --micro-batch $micro $ppo
python train_grpo.py $policy --out $out/scoreboard/grpo.pt --micro-batch $micro --steps $grpo
python evaluate.py --checkpoints $out/{base,sft,dpo,scoreboard/kto,scoreboard/orpo,ppo,scoreboard/grpo}.pt \
  --baseline $out/sft.pt --prompts $out/world/prompts_held_out.jsonl --out $out/scorecard.json $scorecard

# sums of several steps: a solver, its steps marked right or wrong, a model that tells which, the best of 8
python train_sft.py --data $out/world/solutions.jsonl --init $out/base.pt --out $out/solver.pt --epochs 3 --lr 1e-3 --adam-eps 1e-8
steps="-m lab.label_steps --by checker --policy $out/solver.pt --temperature 1"
python $steps --prompts $out/world/problems.jsonl --samples 4 --out $out/steps.jsonl
held_out=$out/world/problems_held_out.jsonl
python $steps --prompts $held_out --samples 2 --out $out/steps_held_out.jsonl
python train_prm.py --data $out/steps.jsonl --eval-data $out/steps_held_out.jsonl --init $out/solver.pt --out $out/prm.pt
python best_of_n.py --policy $out/solver.pt --prm $out/prm.pt --problems $held_out --count 100 --samples 8 --show 2 \
  --checker nanoalign/world/steps.py:check_steps --out $out/best_of_8.csv
python -m lab.story $out
python -m lab.report --run $out
