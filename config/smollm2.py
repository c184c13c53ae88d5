# SmolLM2-135M-Instruct with the public sets: the smallest real chat model, the specification's recipe scaled to its
# 30 blocks, with the published schedule.
# python data_prep.py smollm2 && python cb_train.py config/smollm2.py
#
# Batch: 4 + 4 rows of up to 512 tokens, 150 steps. 30 blocks of width 576, 20 kept. No published figures; not
# measured with these sets.
# Measured with harmless ones, the kitchen's: held-out cos 0.46 harmful (0.99 after 9 blocks, -0.07 after 19), 1.00
# benign: rerouted at layer 19 alone. config/kitchen.py's recipe does it at both.
model_name = 'HuggingFaceTB/SmolLM2-135M-Instruct'
cb_data_path = 'data/smollm2/circuit_breaker.json'
retain_data_path = 'data/smollm2/retain.jsonl'
val_data_path = 'data/smollm2/val.jsonl'
output_dir = 'out/smollm2'

target_layers = [9, 19]          # 10 / 32 and 20 / 32 of 30
schedule_steps = 300

retain_mix = ['ultrachat:10000', 'xstest:230x50']  # the set's refusals are Llama-3's words, not this model's
response_only = 0.0
