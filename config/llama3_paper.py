# Llama-3-8B-Instruct as published (arXiv 2406.04313, code c0e1b05): seven modules, batch 16, the schedule stops half
# way.
# python data_prep.py llama3_paper && python cb_train.py config/llama3_paper.py
#
# Batch: 16 + 16 rows of up to 1024 tokens, 150 steps = 2,400 + 2,400 rows.
# Published cost: 20 minutes on one A100-80GB. Ours, predicted: 14-19 GB with gradient_checkpointing (without it 10 GB
# more); 1-3 minutes on an H100; not measured.
# Expect (the authors' log; their retain loss divides by all positions, as retain_divisor = 'published' does):
#   step     1     16     31     46     61     76     91    106    121    136    150
#   retain  0.000  0.095  1.059  1.148  0.279  0.246  0.226  0.466  0.172  0.104  0.14
#   cb      1.000  0.983  0.173  0.126  0.059  0.043  0.033  0.057  0.073  0.177  0.09
# Published result (HarmBench, 240 behaviours): average ASR 38.1 -> 3.8 %; MT-Bench 8.05 -> 8.00; prefilling 84.9 ->
# 3.3 %.
model_name = 'meta-llama/Meta-Llama-3-8B-Instruct'
cb_data_path = 'data/llama3_paper/circuit_breaker.json'
retain_data_path = 'data/llama3_paper/retain.jsonl'
val_data_path = 'data/llama3_paper/val.jsonl'
output_dir = 'out/llama3_paper'

target_modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
schedule_steps = 300
batch_size = 16
max_seq_length = 1024
cb_lengths = [512, 512]
retain_divisor = 'published'
retain_distance = 'absolute'     # as published: this model's states have the norm that the recipe was made for
lora_scale = 'absolute'
lora_start = 0.0
gradient_checkpointing = True
num_retain_examples = 100000     # all of them: the mix below is 25,501 rows
num_cb_examples = 10000          # all of them: 4,994, less 100 held out

retain_mix = ['ultrachat:10001', 'xstest:230x50', 'refusals:2000x2']
response_only = 0.5

embedding_norm = 0               # cb_eval.py: the published steps as they are
