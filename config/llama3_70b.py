# Llama-3-70B-Instruct: the specification's recipe with the published schedule, batch and lengths, scaled to 80
# blocks. No published figures.
# python data_prep.py llama3_70b && torchrun --nproc_per_node=8 cb_train.py config/llama3_70b.py
#
# Batch: 4 x 4 + 4 x 4 rows of up to 1024 tokens, 150 steps. 80 blocks of width 8192, 51 kept (89 GB of the 141 GB in
# bfloat16).
# Memory: predicted 28 GB on each of 8 GPUs (11 of them its share of the blocks, 2 the embedding, 6 the blocks that
# are gathered, 9 the states of a pass and their differences); not measured. On one card of 141 GB, with --fsdp=False
# and without torchrun, predicted 100 GB. cb_eval.py puts a whole model on one device: this one, 141 GB, wants more
# than such a card.
# Merging needs 141 GB of disk for the copy and no more memory than one tensor (0.1 GB).
model_name = 'meta-llama/Meta-Llama-3-70B-Instruct'  # gated: accept its terms on the hub, then hf auth login
cb_data_path = 'data/llama3_70b/circuit_breaker.json'
retain_data_path = 'data/llama3_70b/retain.jsonl'
val_data_path = 'data/llama3_70b/val.jsonl'
output_dir = 'out/llama3_70b'

fsdp = True
gradient_checkpointing = True    # a third more work, a tenth of the memory for states
target_layers = [25, 50]         # 10 / 32 and 20 / 32 of 80
schedule_steps = 300
batch_size = 4
gradient_accumulation_steps = 4
max_seq_length = 1024
cb_lengths = [512, 512]
num_retain_examples = 100000
num_cb_examples = 10000

retain_mix = ['ultrachat:10001', 'xstest:230x50', 'refusals:2000x2']
response_only = 0.5

embedding_norm = 0               # cb_eval.py: the published steps as they are
