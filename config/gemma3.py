# gemma-3-1b-it, the text-only Gemma 3: the specification's recipe scaled to its 26 blocks, with the published schedule.
# No published figures.
# python data_prep.py gemma3 && python cb_train.py config/gemma3.py
#
# Batch: 4 + 4 rows of up to 512 tokens, 150 steps. 26 blocks of width 1152, 17 kept; every sixth attends to all, the
# rest to 512 tokens.
# Its states have norms of thousands (the 270M model: up to 22,000): only a relative retain distance starts there.
# Memory: predicted 4 GB in bfloat16; not measured. Time: predicted under a minute of steps on an H100; not measured.
model_name = 'google/gemma-3-1b-it'  # gated: accept its terms on the hub, then hf auth login
cb_data_path = 'data/gemma3/circuit_breaker.json'
retain_data_path = 'data/gemma3/retain.jsonl'
val_data_path = 'data/gemma3/val.jsonl'
output_dir = 'out/gemma3'

target_layers = [8, 16]          # 10 / 32 and 20 / 32 of 26
schedule_steps = 300

retain_mix = ['ultrachat:10000', 'xstest:230x50']  # the set's refusals are Llama-3's words, not this model's
response_only = 0.0
