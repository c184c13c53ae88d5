# Qwen3-8B, the specification's recipe scaled to its 36 blocks, with the published schedule. No published figures: alpha
# and the layers are Llama-3's, as deep.
# python data_prep.py qwen3 && python cb_train.py config/qwen3.py
#
# Its template opens every last answer with an empty <think> block, so training covers the model with thinking off.
# Batch: 4 + 4 rows of up to 512 tokens, 150 steps. 36 blocks of width 4096, 24 kept.
# Memory: predicted 13 GB in bfloat16 with --gradient_checkpointing=True; not measured. Time: predicted 2 minutes of
# steps on an H100; not measured.
model_name = 'Qwen/Qwen3-8B'
cb_data_path = 'data/qwen3/circuit_breaker.json'
retain_data_path = 'data/qwen3/retain.jsonl'
val_data_path = 'data/qwen3/val.jsonl'
output_dir = 'out/qwen3'

target_layers = [11, 23]         # 10 / 32 and 20 / 32 of 36
schedule_steps = 300

retain_mix = ['ultrachat:10000', 'xstest:230x50']  # the set's refusals are Llama-3's words, not this model's
response_only = 0.0
