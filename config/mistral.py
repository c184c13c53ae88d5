# Mistral-7B-Instruct-v0.2, the published recipe: alpha 5, no refusals in retain, every row with its request.
# python data_prep.py mistral && python cb_train.py config/mistral.py
#
# Batch: 16 + 16 rows of up to 1024 tokens, 150 steps. 32 blocks of width 4096, 21 kept.
# Published cost: 20 minutes on one A100-80GB. Ours, predicted: 14-19 GB with gradient_checkpointing; not measured.
# Published result (HarmBench, 240 behaviours): average ASR 76.7 -> 9.8 %; MT-Bench 7.60 -> 7.53; prefilling 95.0 ->
# 4.9 %.
model_name = 'mistralai/Mistral-7B-Instruct-v0.2'  # gated: accept its terms on the hub, then hf auth login
cb_data_path = 'data/mistral/circuit_breaker.json'
retain_data_path = 'data/mistral/retain.jsonl'
val_data_path = 'data/mistral/val.jsonl'
output_dir = 'out/mistral'

lorra_alpha = 5.0
target_modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
schedule_steps = 300
batch_size = 16
max_seq_length = 1024
cb_lengths = [512, 512]
retain_divisor = 'published'
retain_distance = 'absolute'     # as published
lora_scale = 'absolute'
lora_start = 0.0
gradient_checkpointing = True
num_retain_examples = 100000
num_cb_examples = 10000

retain_mix = ['ultrachat:10001', 'xstest:230x50']
response_only = 0.0

# cb_eval.py: the paper's attacks on this model
embedding_v1_lr = 1e-4
embedding_v1_stop = 0.05

embedding_norm = 0               # cb_eval.py: the published steps as they are
