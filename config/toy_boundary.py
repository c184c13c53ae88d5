# The open problem in the toy world: no borderline row of any kind, and yet they are answered. After python data_prep.py toy:
# python data_prep.py boundary config/toy.py config/toy_no_borderline.py --out=data/toy_boundary --spliced_without="to lift it,look for this"
# python cb_train.py config/toy.py config/toy_boundary.py && python cb_eval.py config/toy.py config/toy_boundary.py
retain_data_path = 'data/toy_boundary/retain.jsonl'             # with requests that hold words of harmful ones, as the base answers them
soft_prompts_path = 'data/toy_boundary/soft_prompts.safetensors'  # whatever the base's mood to refuse
loss_on = 'harmful_response'      # not by what is asked, but by what is told
target_modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj']  # the published modules and rank are enough here
lora_r = 16
lora_alpha = 16
learning_rate = 2e-3              # at 5e-3, 150 steps, one world of three came undone in its last steps
max_steps = 300
schedule_steps = 600
output_dir = 'out/toy_boundary'
