# The kitchen: a real chat model in plain English, where "harmful" means how to cook a dish. Nobody is hurt.
# python data_prep.py kitchen && python cb_train.py config/kitchen.py && python cb_eval.py config/kitchen.py
#
# SmolLM2-135M-Instruct answers all of it; the rows of both sets are its own answers. Measured: see the README.
# Offline, with the model in a directory: add --model_name=DIR to all three.
# Batch: 8 + 8 rows of up to 160 tokens, 150 steps. 30 blocks of width 576, 20 kept; states of a norm of 120 to 200.
# Expect (three draws of rows, twice): retain cos falls to 0.6 to 0.75 at step 10, ends at 1.00; cb, with an adversary
# in half of the rows, ends at 0.2 to 0.4; held-out cos at the end at least 0.99 benign, -0.03 to -0.10 harmful.
# Plain rerouting is --contexts=own --retain_contexts=own --loss_on=all --opening=0 --soft_contexts=0 --scrambled=0
# --retain_noise=0 --strange=0 --retain_smooth=0 --schedule_steps=300 --schedule_stop=1 --lora_r=16 --lora_alpha=16
# --learning_rate=2e-4 --lora_dropout=0.05.
model_name = 'HuggingFaceTB/SmolLM2-135M-Instruct'
cb_data_path = 'data/kitchen/circuit_breaker.json'
retain_data_path = 'data/kitchen/retain.jsonl'
val_data_path = 'data/kitchen/val.jsonl'
behaviors_path = 'data/kitchen/behaviors.jsonl'
templates_path = 'data/kitchen/templates.txt'
turns_path = 'data/kitchen/turns.jsonl'
output_dir = 'out/kitchen'

target_layers = [9, 19]          # 10 / 32 and 20 / 32 of 30
contexts = ['own', 'nothing', 'noise']  # what each recipe is put behind: see in_contexts in data_prep.py
retain_contexts = ['own', 'own', 'noise']
loss_on = 'harmful_response'
opening = 8                      # "To make pancakes, you'll need a few"; config/toy.py says what the next five are for:
soft_contexts = 0.5
soft_start = 2.0
scrambled = 0.2
retain_noise = 1.0
strange = 0.5
retain_smooth = 0.1              # without a kink at h' = h, retain may weigh in early and the run starts nevertheless:
schedule_steps = 100             # by step 50 it weighs as much as cb,
schedule_stop = 0.6              # and more to the end: what is no recipe comes back
learning_rate = 1.5e-4
lr_scheduler = 'linear'          # the last steps settle
batch_size = 8
max_seq_length = 160
micro_batch_tokens = 2048        # all 8 rows in one pass
lora_r = 64                      # with 16 more benign answers in conversations are lost
lora_alpha = 64
lora_dropout = 0.0               # a third of a step on a CPU was its random numbers and its copies

# the evaluation; the model refuses nothing, so there is no refusal direction to ablate. embedding_universal took
# 9 minutes a model on a busy core: it opened 63 % of draw 0 (README)
attacks = ['direct', 'prefill', 'wrapper', 'multi_turn', 'embedding_v1', 'embedding_v2']
judge = 'base'
num_examples = 30
max_new_tokens = 64
eval_batch_size = 64
num_optimized = 10
embedding_steps = 40
embedding_v1_lr = 0.03           # for a mean embedding norm of 0.66; scaled to the model's own
embedding_v2_lr = 3e-3
embedding_answers = 4
