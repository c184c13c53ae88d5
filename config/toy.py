# The toy world on a laptop: python data_prep.py toy && python cb_train.py config/toy.py && python cb_eval.py config/toy.py
# 1.2 M parameters, 8 blocks; half a minute of training on 2 CPU cores (measured). Expected at the end: retain about
# 0.6, cb about 0.3. cb does not reach 0: the chat prefix and the requests, which refusals in the retain set hold in
# place, are part of it.
model_name = 'data/toy/base'
cb_data_path = 'data/toy/circuit_breaker.json'
retain_data_path = 'data/toy/retain.jsonl'
val_data_path = 'data/toy/val.jsonl'
behaviors_path = 'data/toy/behaviors.jsonl'
templates_path = 'data/toy/templates.txt'
turns_path = 'data/toy/turns.jsonl'
output_dir = 'out/toy'

num_hidden_layers = 0            # 6 = max(target_layers) + 1 of the 8 blocks
target_layers = [3, 5]           # as deep as 10 and 20 of 32
target_modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']  # attention alone leaves worlds open
layers_to_transform = range(6)
schedule_steps = 300             # the published ratio: twice the steps
learning_rate = 5e-3             # at 1e-3 nothing happens in 150 steps: a small model needs larger ones
max_steps = 150
batch_size = 16
lora_r = 64                      # at rank 16 more of them
lora_alpha = 64
lora_b_std = 0.02                # from an exact zero it is luck whether, and when, the cosine finds a slope
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
repe_coefficient = 1.2
gcg_steps = 25
gcg_width = 64
gcg_topk = 64
finetune_lr = 1e-3
finetune_steps = 25
