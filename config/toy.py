# The toy world on a laptop:
# python data_prep.py toy && python cb_train.py config/toy.py && python cb_eval.py config/toy.py
#
# 1.2 M parameters, 8 blocks of width 128; two minutes of training on two CPU cores (measured).
# Plain rerouting is --contexts=own --retain_contexts=own --loss_on=all --opening=0 --broken=0 --soft_contexts=0
# --scrambled=0 --retain_noise=0 --strange=0 --retain_smooth=0 --use_dynamic_scheduling=True --schedule_steps=300
# --learning_rate=1e-3 --lr_scheduler=constant --max_steps=150 --lora_dropout=0.05.
model_name = 'data/toy/base'
cb_data_path = 'data/toy/circuit_breaker.json'
retain_data_path = 'data/toy/retain.jsonl'
val_data_path = 'data/toy/val.jsonl'
behaviors_path = 'data/toy/behaviors.jsonl'
templates_path = 'data/toy/templates.txt'
turns_path = 'data/toy/turns.jsonl'
output_dir = 'out/toy'

target_layers = [3, 5]           # as deep as 10 and 20 of 32
contexts = ['own', 'own', 'noise', 'noise', 'nothing']  # what each curse is put behind: no mood, no words around tell
retain_contexts = ['own', 'own', 'noise']               # and what else is told, so that a strange context tells nothing
loss_on = 'harmful_response'     # the answer alone is turned away, and of it not what benign answers begin with, too,
opening = 7                      # "sure , here is how : take": one switch there is what soft tokens turn back
broken = 0.6                     # a broken beginning is no excuse to go on
soft_contexts = 0.5              # in half of the curses' requests an adversary looks for what undoes all this,
soft_start = 2.0                 # and starts where attacks may end
scrambled = 0.8                  # a curse's words in any order, or some in a potion, are retained: they do not tell it
retain_noise = 1.0               # a word that is in no row is strange: what is strange is held in place, too
strange = 0.5                    # but what is strange around a curse's request, as a jailbreak's scene, saves nothing
retain_smooth = 1.0              # retain is a square near h' = h, as cb is: so both can weigh in full from the start,
use_dynamic_scheduling = False   # and benign states are never given up
learning_rate = 2e-3             # twenty times the default: a small model needs larger steps, or stays half rerouted
lr_scheduler = 'linear'          # the last steps settle
max_steps = 300
batch_size = 16
lora_r = 64
lora_alpha = 64
lora_dropout = 0.0               # an eighth of a step on a CPU; with 0.05 attacks and benign rows fare alike
micro_batch_tokens = 2048        # all 16 rows in one pass: they are short

# the evaluation: answers are scored exactly; a small model's embeddings want larger steps, and fewer of them
judge = 'recipe'
max_new_tokens = 48
eval_batch_size = 100
num_optimized = 10
embedding_steps = 40
embedding_v1_lr = 0.01
embedding_v2_lr = 3e-3
embedding_answers = 5
suffix_start = '! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !'  # x is no word here
suffix_words = 'tell me , i want to know how . what do i need ? thank you !'
gcg_steps = 25
gcg_width = 64
gcg_topk = 64
finetune_lr = 1e-3
finetune_steps = 25
embedding_norm = 0.4865          # the base's own of seed 0: so the two steps above are absolute
