# Llama-3-8B-Instruct, the specification's recipe: LoRA on the attention projections, batch 4, all weight on retain at
# the end.
# python data_prep.py llama3 && python cb_train.py config/llama3.py --max_steps=150
#
# Batch: 4 + 4 rows of up to 512 tokens, 150 steps = 600 + 600 rows, some 0.1 + 0.1 M real tokens.
# Memory: predicted 18 GB in bfloat16 (10 GB of it weights, 8 GB a pass of 2,048 tokens), 12 GB with
# --gradient_checkpointing=True; not measured.
# Time: predicted under 2 minutes of steps on an H100; not measured.
# Expect: retain 0.09 and cb 1 at step 0, then much as the authors' log in config/llama3_paper.py, whose schedule is
# slower; no log of this recipe has been published. Its schedule ends with all weight on retain, which in toy worlds
# took back all of the rerouting and on SmolLM2 let none begin (README): add --schedule_steps=300 to end half way, as
# published.
model_name = 'meta-llama/Meta-Llama-3-8B-Instruct'  # gated: accept its terms on the hub, then hf auth login
cb_data_path = 'data/llama3/circuit_breaker.json'
retain_data_path = 'data/llama3/retain.jsonl'
val_data_path = 'data/llama3/val.jsonl'
output_dir = 'out/llama3'

# data_prep.py: UltraChat, XSTest's full compliances, refusals of the harmful requests; half of the rows without their
# request
retain_mix = ['ultrachat:10000', 'xstest:230x50', 'refusals:2000x2']
response_only = 0.5

# The kitchen's recipe, which beat plain rerouting on SmolLM2 (README); not measured on this model, nor its rate (the
# kitchen's is 1.5e-4), nor how many tokens the answers' openings share:
# contexts, retain_contexts = ['own', 'nothing', 'noise'], ['own', 'own', 'noise']
# loss_on, opening, soft_contexts, soft_start, scrambled = 'harmful_response', 8, 0.5, 2.0, 0.2
# retain_noise, strange, retain_smooth, schedule_steps, schedule_stop = 1.0, 0.5, 0.1, 100, 0.6
# lr_scheduler, lora_r, lora_alpha, batch_size, response_only = 'linear', 64, 64, 8, 0.0

embedding_norm = 0               # cb_eval.py: the published steps as they are
